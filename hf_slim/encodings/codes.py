"""Integer codes as stored: packed row by row; or, of a pruned weight, the survivors' only, with their places."""

from __future__ import annotations

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from hf_slim.encodings.base import TensorSpec
from hf_slim.encodings.packing import pack, packed_bytes, unpack
from hf_slim.encodings.places import load_places, place_layout, spread, store_places


def code_layout(
    rows: int, cols: int, bits: int, survivors: int | None, pattern: str | None = None
) -> dict[str, TensorSpec]:
    """Stored tensors of codes [rows, cols]; `survivors` counts the weights that pruning left (None: not pruned)."""
    if survivors is None:
        return {"codes": TensorSpec((rows, packed_bytes(cols, bits)), torch.uint8)}
    codes = TensorSpec((packed_bytes(survivors, bits),), torch.uint8)
    return place_layout(rows, cols, pattern) | {"codes": codes}


def store_codes(
    codes: UInt8[Tensor, "rows cols"], bits: int, keep: Bool[Tensor, "rows cols"] | None, pattern: str | None = None
) -> dict[str, Tensor]:
    """The tensors that `code_layout` announces."""
    if keep is None:
        return {"codes": pack(codes, bits)}
    return store_places(keep, pattern) | {"codes": pack(codes[keep], bits)}


def load_codes(
    tensors: dict[str, Tensor], bits: int, rows: int, cols: int, survivors: int | None, pattern: str | None = None
) -> tuple[UInt8[Tensor, "rows cols"], Bool[Tensor, "rows cols"] | None]:
    """Codes and the mask of survivors (None: not pruned). Codes of pruned weights are 0 and mean nothing."""
    if survivors is None:
        return unpack(tensors["codes"], bits, cols), None
    keep = load_places(tensors, rows, cols, pattern)
    return spread(unpack(tensors["codes"], bits, survivors), keep), keep
