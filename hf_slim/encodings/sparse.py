"""Sparse encoding: the values that pruning left and their places, nothing else; lossless.

W[keep] = values (row by row), zero elsewhere. Bits a weight are 16 * density for bf16 values, plus the places
(`places.py`): 1 for a mask, 3/4 for 2:4, 1/4 for blocks of 4. That is 9 bits at 50 % sparsity, 5.8 at 70 %, 8.75 at
2:4, and 4.5 at 1:4.

The values are trainable: gradients reach the survivors only, so whatever trainer fine-tunes such a layer keeps its
zeros. Who wants every weight to learn makes the model dense first (`model.dequantize()`).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from hf_slim.encodings.base import Encoding, TensorSpec
from hf_slim.encodings.places import StoredPattern, load_places, place_layout, spread, store_places


class Sparse(Encoding):
    """Description of a sparse encoding.

    Args:
        survivors: weights that pruning left; their values are stored in the model's dtype.
        pattern: "n:m" or "block:b" that their places follow exactly; None for places anywhere.
    """

    kind: Literal["sparse"] = "sparse"
    survivors: int = Field(ge=0)
    pattern: StoredPattern = None
    lossless: ClassVar[bool] = True
    trainable: ClassVar[tuple[str, ...]] = ("values",)

    def layout(self, rows: int, cols: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        return place_layout(rows, cols, self.pattern) | {"values": TensorSpec((self.survivors,), dtype)}

    def pack(self, W: Float[Tensor, "rows cols"], keep: Bool[Tensor, "rows cols"]) -> dict[str, Tensor]:
        """Stored tensors of the weights that `keep` marks."""
        return store_places(keep, self.pattern) | {"values": W[keep]}

    def decode(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Float[Tensor, "rows cols"]:
        return spread(tensors["values"], load_places(tensors, rows, cols, self.pattern))

    def describe(self) -> str:
        return "sparse" if self.pattern is None else f"sparse {self.pattern}"
