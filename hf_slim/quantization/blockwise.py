"""Block-AP, EfficientQAT's first phase (Chen et al. 2024, arXiv:2407.11062): train all of a block on its own output.

    W_q = (round(u) - z) s,    w = (u - z) s0;    u, log s <- Adam on L of `tuning.py`

Every weight w and every scale s learns; then the codes are what the weights round to. Gradients go straight through the
rounding (`soft.py`).

Shapes: W_q, w, u [rows, cols]; s, s0, z [rows, groups].

Where we differ from the paper:
- It starts from GPTQ's codes on searched grids. w is then the dense weight where that rounds to GPTQ's code, and just
  inside that code's interval where it does not.
- Weights learn in steps of their first grid, so that one learning rate serves all layers and bit widths, and stay
  inside it; a changed scale does not round them anew. Zero points stay: at the paper's rate none would change.
- No gradient is clipped: Adam does not see the loss's scale. The block's norms and biases learn too.
"""

from __future__ import annotations

from pydantic import Field
from torch.optim import Adam
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.method import Rules
from hf_slim.core.report import StageReport
from hf_slim.core.select import Layer
from hf_slim.encodings import Affine
from hf_slim.quantization import rtn, tuning

RULES = Rules(
    needs=("calibration",),
    makes=("codes",),
    preserves=("zeros", "codes", "tied"),
    paper="Chen et al. 2024, arXiv:2407.11062",
)


class Config(tuning.TuningConfig):
    """Options of `quantize.blockwise`."""

    weight_rate: float = Field(0.01, gt=0, le=1, description="learning rate of the weights, in steps of their grid")


def encoding(layer: Layer, config: Config) -> Affine:
    """How a layer will be stored: as rounding stores it."""
    return rtn.encoding(layer, config)


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Train block by block."""
    return tuning.tune_blocks(
        model,
        "quantize.blockwise",
        config,
        context,
        lambda positions: Adam(positions, lr=config.weight_rate, betas=tuning.BETAS, fused=True),
    )
