"""Round to nearest: every weight takes the closest value of its group's integer grid.

Needs no data. The baseline that a calibrated method has to beat, and already a good one when the clipping search
("mse") chooses the grid: it is what separates a usable 3-bit model from noise.

    scale, zero = fit_grid(W);   code = clamp(round(W / scale) + zero, 0, 2**bits - 1);   W_hat = (code - zero) * scale

W [rows, cols]; codes [rows, cols]; scales and zeros [rows, ceil(cols / group_size)]. The grid is `grid.py`'s.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, UInt8
from pydantic import Field
from torch import Tensor

from hf_slim.core.method import MethodConfig
from hf_slim.quantization.grid import Clip, fit_grid, round_to_grid


class Config(MethodConfig):
    """Options of `quantize.rtn`."""

    bits: int = Field(4, ge=2, le=8, description="bits a code takes")
    group_size: int | None = Field(64, ge=1, description="columns that share a scale; null for one scale a row")
    symmetric: bool = Field(False, description="no stored zero points; the scale is signed")
    clip: Clip = Field("mse", description="'mse' searches the range of least squared error, 'minmax' keeps all of it")


def quantize(
    W: Float[Tensor, "rows cols"],
    bits: int = 4,
    group_size: int | None = 64,
    symmetric: bool = False,
    clip: Clip = "mse",
    keep: Bool[Tensor, "rows cols"] | None = None,
    importance: Float[Tensor, " cols"] | None = None,
    scale_dtype: torch.dtype = torch.float16,
) -> tuple[UInt8[Tensor, "rows cols"], Float[Tensor, "rows groups"], UInt8[Tensor, "rows groups"]]:
    """Codes, scales and zero points of the nearest grid values; a pruned weight gets the zero point, exactly zero.

    Args:
        W: finite weights.
        bits, group_size, symmetric, clip, importance, scale_dtype: see `grid.fit_grid`.
        keep: False where a weight is pruned.
    """
    kept = W.float() if keep is None else W.float() * keep
    scales, zeros = fit_grid(kept, bits, group_size, symmetric, clip, scale_dtype, importance)
    return round_to_grid(kept, scales, zeros, bits, group_size), scales, zeros
