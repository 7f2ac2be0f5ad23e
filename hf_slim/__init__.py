"""hf_slim makes language models smaller: quantization, pruning, parameter sharing and distillation for Transformers.

Importing it teaches Transformers to read models that it wrote (`quant_method: hf_slim`) and changes nothing else.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("hf_slim")
except PackageNotFoundError:  # a source tree on sys.path, not installed
    __version__ = "0+unknown"

from hf_slim.compress import compress
from hf_slim.core.errors import SlimError
from hf_slim.distillation.student import make_student
from hf_slim.distillation.trainer import DistillationConfig, DistillationTrainer
from hf_slim.encodings.modules import cache_decoded
from hf_slim.integration.transformers import SlimConfig
from hf_slim.pruning.adapters import merge_and_unload
from hf_slim.pruning.gradual import GradualMagnitudePruning
from hf_slim.pruning.trainer import PruningTrainer
from hf_slim.quantization.qat import FakeQuantize
from hf_slim.sharing.deep_kmeans import DeepKMeans
from hf_slim.sharing.recluster import ReassignCodes

__all__ = [
    "DeepKMeans",
    "DistillationConfig",
    "DistillationTrainer",
    "FakeQuantize",
    "GradualMagnitudePruning",
    "PruningTrainer",
    "ReassignCodes",
    "SlimConfig",
    "SlimError",
    "__version__",
    "cache_decoded",
    "compress",
    "make_student",
    "merge_and_unload",
]
