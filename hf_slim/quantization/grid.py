"""The affine grid that every integer method of this family rounds to: fitting, rounding, decoding.

A group is a run of `group_size` consecutive columns of one row; the last group of a row may be shorter. It has a scale
`s` and an integer zero point `z`, and represents the values

    (code - z) * s,    code in {0, .., 2**bits - 1},

so zero is always representable and a pruned weight stays zero. Shapes: W [rows, cols]; scales and zeros
[rows, groups], groups = ceil(cols / group_size).

The asymmetric grid covers [min(W, 0), max(W, 0)]. The symmetric one has z = 2**(bits - 1) everywhere, hence one level
more below zero than above; its scale is *signed*, so that the extra level serves whichever tail of the group is longer.
On three matrices of SmolLM2-135M (groups of 64, searched clipping) the sign takes the squared rounding error of the
symmetric grid from 1.16, 1.21 and 1.31 times that of the asymmetric one, at 2, 3 and 4 bits, to 1.00, 1.04 and 1.16.

The clipping search minimises sum_c importance_c (W_c - grid_c)**2 in every group at once. The GPTQ authors' code
(IST-DASLab/gptq, quant.py) tries 80 shrunken ranges under |error|**2.4. We try a dozen, then move to the least-squares
scale of the codes found and to neighbouring zero points: on average a squared error no larger than the best of
those 80, for a fifth of the work. Scales are rounded to their stored type before they are judged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

Clip = Literal["minmax", "mse"]

# Weights handled at a time by the clipping search: the tile and its scratch buffer stay in the processor's cache.
_TILE = 1 << 17
# Shares of the full range that the search tries. Few bits and heavy tails want harsh clipping.
_SHRINK = (0.96, 0.92, 0.88, 0.84, 0.79, 0.74, 0.68, 0.62, 0.55, 0.47, 0.39, 0.3)


def fit_grid(
    W: Float[Tensor, "rows cols"],
    bits: int,
    group_size: int | None = 64,
    symmetric: bool = False,
    clip: Clip = "mse",
    scale_dtype: torch.dtype = torch.float16,
    importance: Float[Tensor, " cols"] | None = None,
    keep: Bool[Tensor, "rows cols"] | None = None,
) -> tuple[Float[Tensor, "rows groups"], UInt8[Tensor, "rows groups"]]:
    """Choose scale and zero point of every group.

    Args:
        W: finite weights.
        bits: 1 to 8.
        group_size: columns that share a grid; None for one grid a row.
        symmetric: fix the zero point at 2**(bits - 1) and let the scale take either sign.
        clip: "minmax" covers every weight; "mse" may cut the ends off to lower the squared error, never raising it.
        scale_dtype: type the scales are stored in.
        importance: weight of a column's squared error under "mse", >= 0; None for equal weights.
        keep: False where a weight is pruned, and so needs no place on the grid.

    Returns:
        Scales in `scale_dtype`, and integer zero points. No scale is zero, subnormal or infinite: groups too small
        (all zero, say) or too large for `scale_dtype` get its smallest normal or largest number.
    """
    grouped = by_group(W.float() if keep is None else W.float() * keep, group_size)
    groups, _, rows = grouped.shape
    weight = None if importance is None else by_group(importance.float()[None], group_size)
    scales = torch.empty(groups, rows, dtype=scale_dtype, device=W.device)
    zeros = torch.empty(groups, rows, dtype=torch.uint8, device=W.device)
    for here, tile in tiles(grouped):
        best = _Search(tile, bits, scale_dtype, None if weight is None else weight[here[0]])
        (_fit_symmetric if symmetric else _fit_asymmetric)(best, clip)
        scales[here], zeros[here] = best.scale[:, 0].to(scale_dtype), best.zero[:, 0].to(torch.uint8)
    return scales.t().contiguous(), zeros.t().contiguous()


def round_to_grid(
    W: Float[Tensor, "rows cols"],
    scales: Float[Tensor, "rows groups"],
    zeros: UInt8[Tensor, "rows groups"],
    bits: int,
    group_size: int | None = 64,
) -> UInt8[Tensor, "rows cols"]:
    """Code of the grid value nearest to each weight (half to even)."""
    cols = W.shape[1]
    codes = (W.float() / spread(scales.float(), cols, group_size)).round_()
    return codes.add_(spread(zeros.float(), cols, group_size)).clamp_(0, 2**bits - 1).to(torch.uint8)


def from_grid(
    codes: UInt8[Tensor, "rows cols"],
    scales: Float[Tensor, "rows groups"],
    zeros: UInt8[Tensor, "rows groups"],
    group_size: int | None = 64,
) -> Float[Tensor, "rows cols"]:
    """The float32 weights that the codes stand for."""
    cols = codes.shape[1]
    steps = codes.float().sub_(spread(zeros.float(), cols, group_size))
    return steps.mul_(spread(scales.float(), cols, group_size))


def spread(per_group: Float[Tensor, "rows groups"], cols: int, group_size: int | None) -> Float[Tensor, "rows _"]:
    """Repeat one number a group over the columns of the group; a single group is left to broadcast."""
    if per_group.shape[1] == 1:
        return per_group
    return per_group.repeat_interleave(group_size or cols, dim=1)[:, :cols]


def by_group(W: Float[Tensor, "rows cols"], group_size: int | None) -> Float[Tensor, "groups size rows"]:
    """Group-major, rows innermost, so that work on all rows is contiguous.

    The last group is filled up with zeros, which belong to every range and cost no error: they change nothing.
    """
    rows, cols = W.shape
    size = min(group_size or cols, cols)
    return F.pad(W, (0, -cols % size)).t().contiguous().view(-1, size, rows)


def tiles(grouped: Float[Tensor, "groups size rows"]) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Whole groups, a cacheful at a time: where they lie among groups and rows, and a contiguous copy of them."""
    groups, size, rows = grouped.shape
    high, wide = max(1, _TILE // (size * rows)), max(1, _TILE // size)
    for g in range(0, groups, high):
        for r in range(0, rows, wide):
            here = slice(g, g + high), slice(r, r + wide)
            yield here, grouped[here[0], :, here[1]].contiguous()


def storable(scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """A signed scale as `scale_dtype` holds it, in float32; never zero, subnormal or infinite."""
    info = torch.finfo(scale_dtype)
    return scale.abs().clamp_(info.smallest_normal, info.max).to(scale_dtype).float().copysign_(scale)


class _Search:
    """The best grid offered so far to each group of a tile [groups, size, rows]; all else is [groups, 1, rows]."""

    def __init__(self, tile: Tensor, bits: int, scale_dtype: torch.dtype, weight: Tensor | None):
        self.tile, self.weight, self.scale_dtype = tile, weight, scale_dtype
        self.top, self.half = 2**bits - 1, 2 ** (bits - 1)
        self.low = tile.amin(1, keepdim=True).clamp_(max=0)
        self.high = tile.amax(1, keepdim=True).clamp_(min=0)
        self.scratch = torch.empty_like(tile)

    def storable(self, scale: Tensor) -> Tensor:
        return storable(scale, self.scale_dtype)

    def start(self, scale: Tensor, zero: Tensor) -> None:
        self.scale, self.zero = self.storable(scale), zero

    def steps(self, scale: Tensor, zero: Tensor) -> Tensor:
        """code - zero of every weight, in the scratch buffer."""
        return torch.div(self.tile, scale, out=self.scratch).round_().clamp_(-zero, self.top - zero)

    def error(self, scale: Tensor, zero: Tensor) -> Tensor:
        squared = self.steps(scale, zero).mul_(scale).sub_(self.tile).square_()
        return (squared if self.weight is None else squared.mul_(self.weight)).sum(1, keepdim=True)

    def measure(self) -> None:
        self.lowest = self.error(self.scale, self.zero)

    def offer(self, scale: Tensor, zero: Tensor) -> None:
        """Take the grid in those groups where it is better."""
        scale = self.storable(scale)
        error = self.error(scale, zero)
        better = error < self.lowest
        self.lowest = torch.where(better, error, self.lowest)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)

    def refit(self) -> None:
        """Offer the least-squares scale of the present codes k: sum(h k w) / sum(h k k)."""
        steps = self.steps(self.scale, self.zero)
        weighted = steps if self.weight is None else steps * self.weight
        power = (weighted * steps).sum(1, keepdim=True)
        fitted = (weighted * self.tile).sum(1, keepdim=True) / power
        self.offer(torch.where(power > 0, fitted, self.scale), self.zero)


def _fit_asymmetric(best: _Search, clip: Clip) -> None:
    def grid(share: float) -> tuple[Tensor, Tensor]:
        scale = best.storable((best.high * share - best.low * share) / best.top)
        return scale, (best.low * -share / scale).round_().clamp_(0, best.top)

    best.start(*grid(1.0))
    if clip == "minmax":
        return
    best.measure()
    for share in _SHRINK:
        best.offer(*grid(share))
    best.refit()
    scale, zero = best.scale, best.zero
    for shift in (-1, 1):
        best.offer(scale, (zero + shift).clamp_(0, best.top))
    best.refit()


def _fit_symmetric(best: _Search, clip: Clip) -> None:
    below, above = -best.low, best.high
    longer, shorter = torch.maximum(below, above), torch.minimum(below, above)
    end = torch.where(below >= above, longer, -longer) / best.half
    zero = torch.full_like(end, best.half)
    best.start(torch.maximum(longer / best.half, shorter / max(1, best.half - 1)).copysign_(end), zero)
    if clip == "minmax":
        return
    best.measure()
    for share in (1.0, *_SHRINK):
        best.offer(end * share, zero)
        best.offer(end * -share, zero)
    best.refit()
    best.refit()
