"""Fake quantization: float weights that are rounded to their grid in every forward pass, and scales that learn.

With codes c in {lowest, .., highest}, a zero point z and a scale s per group of columns, straight-through:

    v = W / s,   c = clamp(round(v + z), lowest, highest),   k = c - z,   W_q = k s
    dL/dW = dL/dW_q   where lowest - m <= v + z <= highest + m, else 0
    dL/ds = g Σ dL/dW_q (k - v   inside those limits, k outside),   g = 1 / sqrt(n (highest - z))

which is learned step size quantization (LSQ, Esser et al. 2020, arXiv:1902.08153) for n weights that share a scale.
Three sets of levels, in units of s:

    integer    z whole, m = 0                                 LSQ; with a z of its own for each group if asymmetric
    centered   z = (2**bits - 1) / 2: ±1/2, or ±1/2 and ±3/2   ParetoQ's (Liu et al. 2025, arXiv:2502.02631)
    ternary    z = 2, c in {1, 2, 3}: -1, 0, 1                 ParetoQ's, two bits a code

ParetoQ's clipping leaves half a step beyond the last level (m = 1/2). Two levels are a sign, which does not depend on
the scale: m = 0, and dL/ds has k everywhere.

A weight that is exactly zero is a pruned one: it counts nowhere, gets no gradient and stays zero, on any grid.

Where we differ: n counts the weights of a group (ParetoQ: of the matrix). Scales start where the squared error is
least, not at the largest weight, which one outlier spoils. They are learned as s = s0 exp(rate u), so that their
learning rate is a relative one and signed scales keep their sign; the forward pass uses them as they will be stored.

Shapes: W, codes [rows, cols]; scales, zeros [rows, groups].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Num, UInt8
from torch import Tensor, nn

from hf_slim.encodings import Affine
from hf_slim.quantization.grid import fit_grid, storable

Levels = Literal["integer", "centered", "ternary"]

# Shares of the largest weight at which the search for a first scale begins.
_SHARES = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25)
_REFITS = 4


@dataclass(frozen=True)
class Grid:
    """What a layer is rounded to; `levels` as in the table above."""

    bits: int
    group_size: int | None
    symmetric: bool
    levels: Levels

    @property
    def lowest(self) -> int:
        return 1 if self.levels == "ternary" else 0

    @property
    def highest(self) -> int:
        return 2**self.bits - 1

    @property
    def margin(self) -> float:
        """How far beyond the last level a weight may lie and still learn, in steps."""
        return 0.0 if self.levels == "integer" or self.bits == 1 else 0.5

    def encoding(self, survivors: int | None) -> Affine:
        """How weights on this grid are stored."""
        centered = self.levels == "centered"
        return Affine(
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            survivors=survivors,
            centered=centered,
        )

    def fit(self, W: Float[Tensor, "rows cols"]) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
        """Scales in the stored dtype, and zero points, of small squared error."""
        if self.levels == "integer":
            scales, zeros = fit_grid(W, self.bits, self.group_size, self.symmetric)
            return scales, zeros.float()
        zero = 2.0 if self.levels == "ternary" else self.highest / 2
        scales = fit_scales(W, zero, self.lowest, self.highest, self.group_size)
        return scales, torch.full_like(scales, zero, dtype=torch.float32)


def fit_scales(
    W: Float[Tensor, "rows cols"],
    zero: float,
    lowest: int,
    highest: int,
    group_size: int | None,
    scale_dtype: torch.dtype = torch.float16,
) -> Float[Tensor, "rows groups"]:
    """Scales of a grid that is symmetric around zero: least squares from several starts, zero weights left out."""
    tiles = grouped(W.float(), group_size)
    reach = tiles.abs().amax(-1, keepdim=True) / (highest - zero)
    zeros = torch.full_like(reach, zero)
    best, lowest_error = storable(reach, scale_dtype), torch.full_like(reach, torch.inf)
    for share in _SHARES:
        scale = storable(reach * share, scale_dtype)
        for _ in range(_REFITS):
            k = _codes(tiles, scale, zeros, lowest, highest).sub_(zeros)
            error = (k * scale - tiles).square_().sum(-1, keepdim=True)
            better = error < lowest_error
            best, lowest_error = torch.where(better, scale, best), torch.where(better, error, lowest_error)
            power = k.square().sum(-1, keepdim=True)
            fitted = torch.where(power > 0, (k * tiles).sum(-1, keepdim=True) / power, scale)
            scale = storable(fitted, scale_dtype)
    return best.squeeze(-1).to(scale_dtype)


def grouped(W: Num[Tensor, "rows cols"], group_size: int | None) -> Num[Tensor, "rows groups size"]:
    """Groups of columns apart, a view where possible; a shorter last group is filled up with zeros."""
    rows, cols = W.shape
    size = min(group_size or cols, cols)
    return F.pad(W, (0, -cols % size)).view(rows, -1, size) if cols % size else W.reshape(rows, -1, size)


def to_codes(
    W: Float[Tensor, "rows cols"],
    scales: Float[Tensor, "rows groups"],
    zeros: Float[Tensor, "rows groups"],
    lowest: int,
    highest: int,
    group_size: int | None,
) -> UInt8[Tensor, "rows cols"]:
    """The codes that the forward pass rounds to; on a centered grid those of zero weights mean nothing."""
    codes = _codes(grouped(W.float(), group_size), scales[..., None], zeros[..., None], lowest, highest)
    return codes.floor_().to(torch.uint8).flatten(1)[:, : W.shape[1]].contiguous()


def fake_quantize(
    W: Float[Tensor, "rows cols"],
    scales: Float[Tensor, "rows groups"],
    zeros: Float[Tensor, "rows groups"],
    lowest: int,
    highest: int,
    group_size: int | None,
    margin: float = 0.0,
) -> Float[Tensor, "rows cols"]:
    """W rounded to its grid, with straight-through gradients for W and for the scales.

    Args:
        W: weights; exact zeros are pruned ones.
        scales: nonzero, of either sign.
        zeros: whole, or halves on a centered grid.
        lowest, highest: range of the codes.
        group_size: columns that share a scale; None for a whole row.
        margin: steps beyond the last level within which weights still learn.
    """
    return _FakeQuantize.apply(W, scales, zeros, lowest, highest, group_size, margin)


def _codes(tiles: Tensor, scale: Tensor, zero: Tensor, lowest: int, highest: int) -> Tensor:
    """Codes of [rows, groups, size]; scale and zero [rows, groups, 1]. Pruned weights get z, which decodes to zero."""
    codes = (tiles / scale).add_(zero).round_().clamp_(lowest, highest)
    return torch.where(tiles == 0, zero, codes)


class _FakeQuantize(torch.autograd.Function):
    """Keeps W and the scales, which exist anyway, and rounds once more going backward."""

    @staticmethod
    def forward(ctx, W, scales, zeros, lowest, highest, group_size, margin):
        ctx.save_for_backward(W, scales, zeros)
        ctx.options = lowest, highest, group_size, margin
        scale, zero = scales[..., None], zeros[..., None]
        codes = _codes(grouped(W, group_size), scale, zero, lowest, highest)
        return codes.sub_(zero).mul_(scale).flatten(1)[:, : W.shape[1]]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream):
        W, scales, zeros = ctx.saved_tensors
        lowest, highest, group_size, margin = ctx.options
        scale, zero = scales[..., None], zeros[..., None]
        tiles, slope = grouped(W, group_size), grouped(upstream[0].contiguous(), group_size)
        slope = slope.masked_fill(tiles == 0, 0.0)
        k = _codes(tiles, scale, zero, lowest, highest).sub_(zero)
        v = tiles / scale
        inside = (v >= lowest - margin - zero) & (v <= highest + margin - zero)
        if highest - lowest > 1:
            k.sub_(v.mul_(inside))
        shared = torch.full_like(zeros, tiles.shape[-1])
        if W.shape[1] % tiles.shape[-1]:
            shared[:, -1] = W.shape[1] % tiles.shape[-1]
        g = (shared * (highest - zeros).clamp(min=0.5)).rsqrt()
        d_scales = g * (slope * k).sum(-1)
        d_W = slope.mul_(inside).flatten(1)[:, : W.shape[1]]
        return d_W, d_scales, None, None, None, None, None


class LearnedScales(nn.Module):
    """Scales [rows, groups] that learn in relative steps: s = s0 exp(rate u), u = 0 at first.

    Args:
        initial: s0, in the dtype that scales are stored in.
        rate: what a step of the optimizer is multiplied by: the ratio of the scales' learning rate to the weights'.
    """

    initial: Tensor

    def __init__(self, initial: Float[Tensor, "rows groups"], rate: float):
        super().__init__()
        self.rate, self.stored_dtype = rate, initial.dtype
        self.register_buffer("initial", initial)
        self.stretch = nn.Parameter(torch.zeros_like(initial, dtype=torch.float32))

    def forward(self) -> Float[Tensor, "rows groups"]:
        """Float32 numbers that the stored dtype holds exactly; rounding is straight-through."""
        learned = self.initial.float() * (self.rate * self.stretch.float()).exp()
        return storable(learned.detach(), self.stored_dtype) + (learned - learned.detach())


class FakeWeight(nn.Module):
    """Rounds the weight of one layer to a grid whose scales are learned.

    Args:
        W: the weight [rows, cols] that the grid is fitted to.
        grid: what to round to.
        rate: see `LearnedScales`.
    """

    zeros: Tensor

    def __init__(self, W: Float[Tensor, "rows cols"], grid: Grid, rate: float):
        super().__init__()
        self.grid = grid
        scales, zeros = grid.fit(W)
        self.scales = LearnedScales(scales, rate)
        self.register_buffer("zeros", zeros)

    def forward(self, W: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        """The rounded weight, float32."""
        grid = self.grid
        return fake_quantize(
            W.float(), self.scales(), self.zeros.float(), grid.lowest, grid.highest, grid.group_size, grid.margin
        )

    @torch.no_grad()
    def pack(self, W: Float[Tensor, "rows cols"], keep: Bool[Tensor, "rows cols"] | None) -> dict[str, Tensor]:
        """Stored tensors that decode to what `forward` gives; of weights that `keep` leaves out nothing is stored."""
        grid, scales, zeros = self.grid, self.scales(), self.zeros.float()
        codes = to_codes(W, scales, zeros, grid.lowest, grid.highest, grid.group_size)
        stored = grid.encoding(None if keep is None else int(keep.sum()))
        return stored.pack(codes, scales.to(self.scales.stored_dtype), zeros.to(torch.uint8), keep)
