"""Integer codes as stored: packed row by row; or, of a pruned weight, the survivors' only, with a bit mask."""

from __future__ import annotations

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from hf_slim.encodings.base import TensorSpec
from hf_slim.encodings.packing import pack, pack_mask, packed_bytes, unpack, unpack_mask


def code_layout(rows: int, cols: int, bits: int, survivors: int | None) -> dict[str, TensorSpec]:
    """Stored tensors of codes [rows, cols]; `survivors` counts the weights that pruning left (None: not pruned)."""
    if survivors is None:
        return {"codes": TensorSpec((rows, packed_bytes(cols, bits)), torch.uint8)}
    return {
        "mask": TensorSpec((rows, packed_bytes(cols, 1)), torch.uint8),
        "codes": TensorSpec((packed_bytes(survivors, bits),), torch.uint8),
    }


def store_codes(
    codes: UInt8[Tensor, "rows cols"], bits: int, keep: Bool[Tensor, "rows cols"] | None
) -> dict[str, Tensor]:
    """The tensors that `code_layout` announces."""
    if keep is None:
        return {"codes": pack(codes, bits)}
    return {"mask": pack_mask(keep), "codes": pack(codes[keep], bits)}


def load_codes(
    tensors: dict[str, Tensor], bits: int, rows: int, cols: int, survivors: int | None
) -> tuple[UInt8[Tensor, "rows cols"], Bool[Tensor, "rows cols"] | None]:
    """Codes and the mask of survivors (None: not pruned). Codes of pruned weights are 0 and mean nothing."""
    if survivors is None:
        return unpack(tensors["codes"], bits, cols), None
    keep = unpack_mask(tensors["mask"], cols)
    codes = torch.zeros(rows, cols, dtype=torch.uint8, device=keep.device)
    codes.masked_scatter_(keep, unpack(tensors["codes"], bits, survivors))
    return codes, keep
