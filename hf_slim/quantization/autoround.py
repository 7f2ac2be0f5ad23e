"""AutoRound (Cheng et al. 2023, arXiv:2309.05516): tune which way weights are rounded, on the block's output.

    W_q = (clamp(round(u), 0, 2**bits - 1) - z) s,    u = u0 + V,    s = s0 exp(r)

u0 is where a weight lies on its grid, V moves it (half a step is enough to round it the other way), s and z are a
group's scale and whole zero point. V descends by the sign of its gradient, every weight by the same step; the loss is
the squared error of the block's output (`tuning.py`). Straight through the rounding,

    dL/du = dL/dW_q s,    dL/ds = Σ dL/dW_q (code - z)

Shapes: W_q, u, V, codes [rows, cols]; s, z, r [rows, groups].

Where we differ from the paper:
- It starts from GPTQ's codes on searched grids instead of rounding on min-max ranges. u0 is then the weight's own
  place where that rounds to GPTQ's code, and just inside that code's interval where it does not.
- u does not depend on s, so that dL/ds is exact. Scales learn by Adam on their logarithms; the paper learns the ends
  of the range, by signs. Zero points stay: a whole step of one moves a whole group.
- The block's norms and biases learn too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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
from hf_slim.quantization.fake import LearnedScales, grouped
from hf_slim.quantization.tuning import Dense, Start, place, tune_blocks

RULES = Rules(
    needs=("calibration",),
    makes=("codes",),
    preserves=("zeros", "codes"),
    paper="Cheng et al. 2023, arXiv:2309.05516",
)


class Config(tuning.TuningConfig):
    """Options of `quantize.autoround`."""

    reach: float = Field(
        0.2, gt=0, le=1, description="how far a weight can move in all, in steps; half of that if its sign alternates"
    )
    scale_rate: float = Field(0.005, ge=0, le=1, description="relative learning rate of the scales")


def round_straight(
    u: Float[Tensor, "rows groups size"],
    scales: Float[Tensor, "rows groups"],
    zeros: Float[Tensor, "rows groups"],
) -> Float[Tensor, "rows groups size"]:
    """(round(u) - zeros) * scales, with straight-through gradients for u and exact ones for the scales.

    Args:
        u: within the range of the codes.
    """
    return _RoundStraight.apply(u, scales[..., None], zeros[..., None])


class _RoundStraight(torch.autograd.Function):
    """Keeps nothing but its result, from which the scales' gradient follows."""

    @staticmethod
    def forward(ctx, u, scales, zeros):
        W = u.round().sub_(zeros).mul_(scales)
        ctx.save_for_backward(W, scales)
        return W

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream):
        W, scales = ctx.saved_tensors
        slope = upstream[0]
        return slope * scales, (slope * W).sum(-1, keepdim=True) / scales, None


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


class Rounding(nn.Module):
    """A weight whose rounding and scales learn; see `tuning.Part`."""

    zeros: Tensor

    def __init__(self, start: Start):
        super().__init__()
        self.cols, self.top = start.W.shape[1], 2**start.bits - 1
        self.u = nn.Parameter(grouped(place(start), start.group_size).clone())
        self.scales = LearnedScales(start.scales, 1.0)
        self.register_buffer("zeros", start.zeros.float())
        self.register_buffer("pruned", None if start.keep is None else ~start.keep)

    def forward(self) -> Float[Tensor, "rows cols"]:
        W = round_straight(self.u, self.scales(), self.zeros).flatten(1)[:, : self.cols]
        return W if self.pruned is None else W.masked_fill(self.pruned, 0.0)

    def confine(self) -> None:
        self.u.clamp_(-tuning.MARGIN, self.top + tuning.MARGIN)

    def chosen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and zero points that decode to what the forward pass gives."""
        codes = self.u.detach().round().to(torch.uint8).flatten(1)[:, : self.cols].contiguous()
        return codes, self.scales().detach().to(self.scales.stored_dtype), self.zeros.to(torch.uint8)


def encoding(layer: Layer, config: Config) -> Affine:
    """How a layer will be stored: as rounding stores it."""
    return rtn.encoding(layer, config)


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Tune block by block."""

    def optimizers(layers: list[Rounding], dense: list[Dense]) -> list[Optimizer]:
        adam = [
            {"params": [part.scales.stretch for part in layers], "lr": config.scale_rate},
            {"params": [part.shift for part in dense], "lr": config.dense_rate},
        ]
        signs = SignSGD([part.u for part in layers], lr=config.reach / max(1, config.iterations))
        return [signs, Adam([group for group in adam if group["params"]])]

    return tune_blocks(model, "quantize.autoround", config, context, Rounding, optimizers)
