"""Sparse encoding: a bit mask and the surviving values, nothing else; lossless.

W[mask] = values (row by row), zero elsewhere. A 50 % sparse bf16 weight takes 1 + 8 = 9 bits a weight; n:m patterns
cost the same mask (two of four positions take four bits either way). The values are trainable: gradients reach the
survivors only, so whatever trainer fine-tunes such a layer keeps its zeros.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from hf_slim.encodings.base import Encoding, TensorSpec
from hf_slim.encodings.packing import pack_mask, packed_bytes, unpack_mask


class Sparse(Encoding):
    """Description of a sparse encoding.

    Args:
        survivors: weights that pruning left; their values are stored in the model's dtype.
    """

    kind: Literal["sparse"] = "sparse"
    survivors: int = Field(ge=0)
    lossless: ClassVar[bool] = True
    trainable: ClassVar[tuple[str, ...]] = ("values",)

    def layout(self, rows: int, cols: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        return {
            "mask": TensorSpec((rows, packed_bytes(cols, 1)), torch.uint8),
            "values": TensorSpec((self.survivors,), dtype),
        }

    def pack(self, W: Float[Tensor, "rows cols"], keep: Bool[Tensor, "rows cols"]) -> dict[str, Tensor]:
        """Stored tensors of the weights that `keep` marks."""
        return {"mask": pack_mask(keep), "values": W[keep]}

    def decode(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Float[Tensor, "rows cols"]:
        values = tensors["values"]
        keep = unpack_mask(tensors["mask"], cols)
        return torch.zeros(rows, cols, dtype=values.dtype, device=values.device).masked_scatter(keep, values)

    def describe(self) -> str:
        return "sparse"
