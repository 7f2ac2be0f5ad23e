"""Looking at a model before anything is removed from it: its weights, its neurons, and what each layer can spare.

    found = hf_slim.insight.weights(model)
    found = hf_slim.insight.activations(model, texts, tokenizer=tokenizer)
    found = hf_slim.insight.sensitivity(model, texts, tokenizer=tokenizer)

Each leaves the model as it is and returns a frozen dataclass with `.to_dict()`, `.table()` (for rich) and `.plot(path)`
(a PNG; needs matplotlib).
"""

from hf_slim.insight.activations import ActivationInsight, NeuronRow, activations
from hf_slim.insight.sensitivity import SensitivityInsight, SensitivityRow, sensitivity
from hf_slim.insight.weights import WeightInsight, WeightRow, weights

__all__ = [
    "ActivationInsight",
    "NeuronRow",
    "SensitivityInsight",
    "SensitivityRow",
    "WeightInsight",
    "WeightRow",
    "activations",
    "sensitivity",
    "weights",
]
