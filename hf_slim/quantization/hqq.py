"""HQQ (Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models"): a sparse rounding error.

Needs no data. Minimises sum |W - W_hat|**p, p < 1, in every group: such a norm forgives a few large errors, those of
outliers, for many small ones. An auxiliary error E splits the problem in two that have closed solutions,

    min over E, grid   sum |E|**p + beta/2 (W - W_hat - E)**2,      W_hat = k * scale,  k = code - zero
    E      <- sign(r) * relu(|r| - |r|**(p - 1) / beta),            r = W - W_hat    (generalised soft threshold)
    scale  <- <k, W - E> / <k, k>
    k      <- clamp(round(W / scale), -zero, 2**bits - 1 - zero);   beta <- kappa * beta

from min-max ranges on. Of all iterates a group keeps the one of least sum |r|**p, so it never ends worse than min-max
rounding. W - E is W_hat + clamp(r, -t, t) with t = |r|**(p - 1) / beta, and so computed.

W [rows, cols]; codes [rows, cols]; scales and zeros [rows, ceil(cols / group_size)].

Where we differ from the paper and the authors' code (mobiusml/hqq, optimize.py):
- The paper moves the zero point, a real number, and leaves the scale. Ours is an integer (pruned weights stay exactly
  zero, and no 16-bit zero is stored), and its half-quadratic step, mean(W - E - W_hat) scales, is too short to move it:
  |W - E - W_hat| <= beta**(-1 / (2 - p)), 0.17 with the defaults, and rounding asks for half a scale. So we take the
  step of the scale, the other half of the same quadratic, and keep the zero point of the min-max range.
- r is measured in units of the min-max scale. The paper's threshold depends on the unit of W: E is 0 where |r| < 0.17,
  and the weights of language models are smaller than that altogether.
- The authors stop when the mean error of the whole matrix rises; groups are independent, so each keeps its own best.

On SmolLM2-135M, groups of 64, the sum of |r|**0.7 is 0.89 and 0.91 times that of min-max ranges at 4 and 3 bits, the
same as of `quantize.rtn`'s clipping search, whose squared error is lower (0.83 and 0.80 against 0.88 and 0.87).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float, UInt8
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.layers import Encoded, encode_layers, plan_targets
from hf_slim.core.method import Rules
from hf_slim.core.report import StageReport
from hf_slim.core.select import Layer
from hf_slim.encodings import Affine
from hf_slim.methods import find_method
from hf_slim.quantization import rtn
from hf_slim.quantization.grid import by_group, fit_grid, round_to_grid, storable, tiles

RULES = Rules(
    makes=("codes",), preserves=("zeros", "codes", "tied"), paper="Badri and Shaji 2023, mobiusml.github.io/hqq_blog"
)

_SMALLEST = 1e-6  # of the min-max scale: |r| is no smaller, so that |r|**(p - 1) is finite


class Config(rtn.GridConfig):
    """Options of `quantize.hqq`."""

    norm: float = Field(0.7, gt=0, lt=1, description="p: the smaller, the more is forgiven to outliers")
    penalty: float = Field(10.0, gt=0, description="beta: the larger, the fewer weights count as outliers")
    growth: float = Field(1.01, ge=1, description="kappa: the penalty grows by it in every iteration")
    iterations: int = Field(20, ge=1, description="half-quadratic steps")


def quantize(
    W: Float[Tensor, "rows cols"],
    bits: int = 4,
    group_size: int | None = 64,
    symmetric: bool = False,
    keep: Bool[Tensor, "rows cols"] | None = None,
    norm: float = 0.7,
    penalty: float = 10.0,
    growth: float = 1.01,
    iterations: int = 20,
    scale_dtype: torch.dtype = torch.float16,
) -> tuple[UInt8[Tensor, "rows cols"], Float[Tensor, "rows groups"], UInt8[Tensor, "rows groups"]]:
    """Codes, scales and zero points of small sum |W - W_hat|**norm in every group.

    Args:
        W: finite weights.
        bits, group_size, symmetric, scale_dtype: see `grid.fit_grid`; a symmetric grid keeps its zero point.
        keep: False where a weight is pruned; it gets the zero point, exactly zero.
        norm, penalty, growth, iterations: p, beta, kappa and the number of iterations.
    """
    kept = W.float() if keep is None else W.float() * keep
    scales, zeros = fit_grid(kept, bits, group_size, symmetric, "minmax", scale_dtype)
    by_scale, by_zero = scales.t().contiguous(), zeros.t()
    penalties = [penalty * growth**iteration for iteration in range(iterations)]
    for here, tile in tiles(by_group(kept, group_size)):
        scale, zero = by_scale[here][:, None].float(), by_zero[here][:, None].float()
        by_scale[here] = _alternate(tile, scale, -zero, 2**bits - 1 - zero, norm, penalties, scale_dtype)[:, 0].to(
            scale_dtype
        )
    scales = by_scale.t().contiguous()
    return round_to_grid(kept, scales, zeros, bits, group_size), scales, zeros


def _alternate(
    tile: Float[Tensor, "groups size rows"],
    scale: Float[Tensor, "groups 1 rows"],
    low: Float[Tensor, "groups 1 rows"],
    high: Float[Tensor, "groups 1 rows"],
    norm: float,
    penalties: Sequence[float],
    scale_dtype: torch.dtype,
) -> Float[Tensor, "groups 1 rows"]:
    """The best scale of every group, whose k run from `low` to `high`. Uses `tile` up."""
    unit = scale.abs()
    W, scale = tile.div_(unit), scale / unit
    k, r, size, power = (torch.empty_like(W) for _ in range(4))
    best, least = scale, torch.full_like(scale, math.inf)
    for beta in (*penalties, None):
        torch.div(W, scale, out=k).round_().clamp_(low, high)
        torch.addcmul(W, k, scale, value=-1, out=r)
        torch.abs(r, out=size).clamp_(min=_SMALLEST)
        torch.log2(size, out=power).mul_(norm - 1).exp2_()
        loss = (size * power).sum(1, keepdim=True)
        better = loss < least
        best, least = torch.where(better, scale, best), torch.where(better, loss, least)
        if beta is None:
            break
        clipped = torch.minimum(size, power.div_(beta), out=size).copysign_(r)  # W - E - W_hat
        fitted = scale + clipped.mul_(k).sum(1, keepdim=True) / k.square_().sum(1, keepdim=True).clamp_(min=1)
        scale = storable(fitted * unit, scale_dtype) / unit
    return best * unit


def encoding(layer: Layer, config: Config) -> Affine:
    """How a layer will be stored: as rounding stores it."""
    return rtn.encoding(layer, config)


def encode(W: Float[Tensor, "rows cols"], layer: Layer, config: Config, keep: Tensor | None) -> Encoded:
    """Quantize one weight."""
    options = {"norm": config.norm, "penalty": config.penalty, "growth": config.growth, "iterations": config.iterations}
    return rtn.encode_rows(W, encoding(layer, config), keep, partial(quantize, **options))


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Quantize the chosen layers of a model."""
    chosen = plan_targets(model, "quantize.hqq", config)
    return StageReport(layers=encode_layers(model, chosen, find_method("quantize.hqq"), config, context.progress))
