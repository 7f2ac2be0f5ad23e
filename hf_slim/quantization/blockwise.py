"""Block-AP, EfficientQAT's first phase (Chen et al. 2024, arXiv:2407.11062): train all of a block on its own output.

    W_q = (clamp(round(w / s + z), 0, 2**bits - 1) - z) s,    s = s0 exp(r)

Every weight w and every group's scale s learns by Adam, on the squared error of the block's output (`tuning.py`); then
the codes are what the weights round to. Gradients are those of `fake.fake_quantize`: straight through the rounding,

    dL/dw = dL/dW_q  where w lies on the grid, else 0;    dL/ds = Σ dL/dW_q (code - z - w / s, or code - z off the grid)

Shapes: W_q, w [rows, cols]; s, z, r [rows, groups].

Where we differ from the paper:
- It starts from GPTQ's codes on searched grids. w is then the dense weight where that rounds to GPTQ's code, and just
  inside that code's interval where it does not.
- Weights learn in units of their group's first scale, so that one learning rate serves all layers and bit widths, and
  scales by their logarithms. Zero points stay: at the paper's rate none would come near its next whole number.
- No gradient is clipped: Adam does not see the loss's scale. The block's norms and biases learn too.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.method import Rules
from hf_slim.core.report import StageReport
from hf_slim.core.select import Layer
from hf_slim.encodings import Affine
from hf_slim.quantization import rtn, tuning
from hf_slim.quantization.fake import LearnedScales, fake_quantize, grouped, to_codes
from hf_slim.quantization.tuning import Dense, Start, place, tune_blocks

RULES = Rules(
    needs=("calibration",),
    makes=("codes",),
    preserves=("zeros", "codes"),
    paper="Chen et al. 2024, arXiv:2407.11062",
)


class Config(tuning.TuningConfig):
    """Options of `quantize.blockwise`."""

    weight_rate: float = Field(0.01, gt=0, le=1, description="learning rate of the weights, in steps of their grid")
    scale_rate: float = Field(0.005, ge=0, le=1, description="relative learning rate of the scales")


class Trained(nn.Module):
    """A weight that learns while it is rounded; see `tuning.Part`."""

    unit: Tensor
    zeros: Tensor

    def __init__(self, start: Start):
        super().__init__()
        self.top, self.group_size, self.cols = 2**start.bits - 1, start.group_size, start.W.shape[1]
        self.register_buffer("unit", start.scales.float()[..., None])
        self.register_buffer("zeros", start.zeros.float())
        self.scales = LearnedScales(start.scales, 1.0)
        steps = grouped(place(start), start.group_size) - self.zeros[..., None]
        pruned = None if start.keep is None else grouped((~start.keep).float(), start.group_size).bool()
        self.steps = nn.Parameter(steps if pruned is None else steps.masked_fill(pruned, 0.0))

    def latent(self) -> Float[Tensor, "rows cols"]:
        """w."""
        return (self.steps * self.unit).flatten(1)[:, : self.cols]

    def forward(self) -> Float[Tensor, "rows cols"]:
        return fake_quantize(self.latent(), self.scales(), self.zeros, 0, self.top, self.group_size, 0.5)

    def confine(self) -> None:
        """Nothing binds it."""

    @torch.no_grad()
    def chosen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and zero points that decode to what the forward pass gives."""
        scales = self.scales()
        codes = to_codes(self.latent(), scales, self.zeros, 0, self.top, self.group_size)
        return codes, scales.to(self.scales.stored_dtype), self.zeros.to(torch.uint8)


def encoding(layer: Layer, config: Config) -> Affine:
    """How a layer will be stored: as rounding stores it."""
    return rtn.encoding(layer, config)


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Train block by block."""

    def optimizers(layers: list[Trained], dense: list[Dense]) -> list[Optimizer]:
        groups = [
            {"params": [part.steps for part in layers], "lr": config.weight_rate},
            {"params": [part.scales.stretch for part in layers], "lr": config.scale_rate},
            {"params": [part.shift for part in dense], "lr": config.dense_rate},
        ]
        return [Adam([group for group in groups if group["params"]])]

    return tune_blocks(model, "quantize.blockwise", config, context, Trained, optimizers)
