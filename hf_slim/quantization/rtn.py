"""Round to nearest: every weight takes the closest value of its group's integer grid.

Needs no data. The baseline that a calibrated method has to beat, and already a good one when the clipping search
("mse") chooses the grid: it is what separates a usable 3-bit model from noise.

    scale, zero = fit_grid(W);   code = clamp(round(W / scale) + zero, 0, 2**bits - 1);   W_hat = (code - zero) * scale

W [rows, cols]; codes [rows, cols]; scales and zeros [rows, ceil(cols / group_size)]. The grid is `grid.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, UInt8
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.layers import Encoded, encode_layers, only_survivors, plan_targets
from hf_slim.core.method import MethodConfig, Rules
from hf_slim.core.report import StageReport
from hf_slim.core.select import Layer, Select
from hf_slim.encodings import Affine
from hf_slim.methods import find_method
from hf_slim.quantization.grid import Clip, fit_grid, round_to_grid

RULES = Rules(makes=("codes",), preserves=("zeros", "codes", "tied"), paper="Jacob et al. 2018, arXiv:1712.05877")

_CHUNK = 1 << 20  # weights encoded at once: of a weight that arrives, only a part is ever held in float32


class Embeddings(MethodConfig):
    """How the input embedding is quantized, and with it a head that shares it."""

    bits: int = Field(8, ge=2, le=8, description="bits a code takes")
    group_size: int | None = Field(None, ge=1, description="columns that share a scale; null for one scale a token")
    symmetric: bool = False
    weighted: bool = Field(True, description="round for the shared head's inputs too, where there is calibration data")


class GridConfig(MethodConfig):
    """What all methods that round to the affine grid take."""

    per_layer: ClassVar[tuple[str, ...]] = ("bits", "group_size", "symmetric")

    bits: int = Field(4, ge=2, le=8, description="bits a code takes")
    group_size: int | None = Field(64, ge=1, description="columns that share a scale; null for one scale a row")
    symmetric: bool = Field(False, description="no stored zero points; the scale is signed")
    layers: Select = Select()
    embeddings: Embeddings | None = Field(None, description="quantize the input embedding (and a tied head) too")


class Config(GridConfig):
    """Options of `quantize.rtn`."""

    per_layer: ClassVar[tuple[str, ...]] = (*GridConfig.per_layer, "clip")

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


def encoding(layer: Layer, config: GridConfig) -> Affine:
    """How a layer will be stored."""
    chosen = config.at(layer)
    if layer.kind == "embedding" and config.embeddings is not None:
        chosen = config.embeddings
    return Affine(
        bits=chosen.bits,
        group_size=chosen.group_size,
        symmetric=chosen.symmetric,
        **only_survivors(layer, chosen.bits),
    )


def encode(W: Float[Tensor, "rows cols"], layer: Layer, config: Config, keep: Tensor | None) -> Encoded:
    """Quantize one weight."""
    return encode_rows(W, encoding(layer, config), keep, partial(quantize, clip=config.at(layer).clip))


def encode_rows(W: Float[Tensor, "rows cols"], stored: Affine, keep: Tensor | None, fit: Callable[..., Any]) -> Encoded:
    """Quantize one weight by a function like `quantize`, some rows at a time."""
    chunk = max(1, _CHUNK // W.shape[1])
    masks = [None] * len(W.split(chunk)) if keep is None else keep.split(chunk)
    parts = (
        fit(part, stored.bits, stored.group_size, stored.symmetric, keep=mask)
        for part, mask in zip(W.split(chunk), masks, strict=True)
    )
    if stored.survivors is None:  # rows are stored apart: pack each part at once, and hold no codes of the whole
        packed = [stored.pack(*part) for part in parts]
        return stored, {name: torch.cat([tensors[name] for tensors in packed]) for name in packed[0]}
    codes, scales, zeros = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return stored, stored.pack(codes, scales, zeros, keep)


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Quantize the chosen layers of a model."""
    chosen = plan_targets(model, "quantize.rtn", config)
    return StageReport(layers=encode_layers(model, chosen, find_method("quantize.rtn"), config, context.progress))
