"""AutoRound (Cheng et al. 2023, arXiv:2309.05516): tune which way weights are rounded, on the block's output.

    W_q = (clamp(round(u0 + V), 0, 2**bits - 1) - z) s;    V <- V - lr sign(dL/dV),    L: `tuning.py`

u0 is where a weight lies on its grid, and V moves it: half a step is enough to round it the other way. Every weight
moves by the same amount, lr = reach / iterations at first and falling linearly to zero, and so by reach / 2 in all if
its sign never changes; the paper's reach is 1.

Shapes: W_q, u0, V [rows, cols]; scales s and zero points z [rows, groups].

Where we differ from the paper:
- It starts from GPTQ's codes on searched grids instead of rounding on min-max ranges. u0 is then the weight's own
  place where that rounds to GPTQ's code, and just inside that code's interval where it does not (`soft.py`).
- u0 does not depend on s. Scales learn by Adam on their logarithms; the paper learns the ends of the range, by signs.
- The block's norms and biases learn too.
- Few steps and a short reach: minutes on a CPU, where the paper takes 200 steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer
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
    paper="Cheng et al. 2023, arXiv:2309.05516",
)


class Config(tuning.TuningConfig):
    """Options of `quantize.autoround`."""

    reach: float = Field(0.3, gt=0, le=2, description="first step times iterations, in steps of the grid")


class SignSGD(Optimizer):
    """p <- p - lr sign(dL/dp)."""

    def __init__(self, params: Iterable[Tensor], lr: float):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.sign_(), alpha=group["lr"])


def encoding(layer: Layer, config: Config) -> Affine:
    """How a layer will be stored: as rounding stores it."""
    return rtn.encoding(layer, config)


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Tune block by block."""
    return tuning.tune_blocks(
        model,
        "quantize.autoround",
        config,
        context,
        lambda positions: SignSGD(positions, lr=config.reach / max(1, config.iterations)),
    )
