"""Codebook encoding: every weight is an index into a small table of shared values.

W[r, c] = centroids[b, codes[r, c]],  b = r // rows_per_book.  Stored bits a weight: `bits`, plus 16 * clusters /
(rows_per_book * cols) for the table. Of a pruned weight only the survivors' indices are stored, beside their
places (`places.py`).
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, UInt8
from pydantic import Field, model_validator
from torch import Tensor

from hf_slim.encodings.base import DTYPES, Encoding, TensorSpec
from hf_slim.encodings.codes import code_layout, load_codes, store_codes
from hf_slim.encodings.places import StoredPattern


class Codebook(Encoding):
    """Description of a codebook encoding.

    Args:
        bits: 1 to 8 bits an index.
        clusters: entries of a table, at most 2**bits.
        rows_per_book: rows that share a table; None for one table for the whole weight.
        centroid_dtype: stored dtype of the tables.
        survivors: weights that pruning left, when only their indices are stored.
        pattern: "n:m" or "block:b" that their places follow exactly.
    """

    kind: Literal["codebook"] = "codebook"
    bits: int = Field(ge=1, le=8)
    clusters: int = Field(ge=1, le=256)
    rows_per_book: int | None = Field(default=None, ge=1)
    centroid_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    survivors: int | None = Field(default=None, ge=0)
    pattern: StoredPattern = None

    @model_validator(mode="after")
    def _fits(self) -> Codebook:
        if self.clusters > 2**self.bits:
            raise ValueError(f"clusters: {self.clusters} do not fit in {self.bits} bits, at most {2**self.bits}")
        return self

    def books(self, rows: int) -> int:
        """Tables of a weight with that many rows."""
        return 1 if self.rows_per_book is None else -(-rows // self.rows_per_book)

    def layout(self, rows: int, cols: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        specs = code_layout(rows, cols, self.bits, self.survivors, self.pattern)
        specs["centroids"] = TensorSpec((self.books(rows), self.clusters), DTYPES[self.centroid_dtype])
        return specs

    def pack(
        self,
        codes: UInt8[Tensor, "rows cols"],
        centroids: Float[Tensor, "books clusters"],
        keep: Bool[Tensor, "rows cols"] | None = None,
    ) -> dict[str, Tensor]:
        """Stored tensors from what a solver chose."""
        tensors = store_codes(codes, self.bits, keep, self.pattern)
        tensors["centroids"] = centroids.to(DTYPES[self.centroid_dtype])
        return tensors

    def decode(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Float[Tensor, "rows cols"]:
        codes, keep = load_codes(tensors, self.bits, rows, cols, self.survivors, self.pattern)
        W = _look_up(codes, tensors["centroids"], self._book_of(torch.arange(rows, device=codes.device)))
        return W if keep is None else W.masked_fill(~keep, 0.0)

    def take(self, tensors: dict[str, Tensor], ids: Int[Tensor, "n"], rows: int, cols: int) -> Float[Tensor, "n cols"]:
        if self.survivors is not None:
            return super().take(tensors, ids, rows, cols)
        codes, _ = load_codes({"codes": tensors["codes"][ids]}, self.bits, len(ids), cols, None)
        return _look_up(codes, tensors["centroids"], self._book_of(ids))

    def describe(self) -> str:
        sparse = "" if self.survivors is None else f" sparse {self.pattern or ''}".rstrip()
        scope = "tensor" if self.rows_per_book is None else f"{self.rows_per_book} rows"
        return f"{self.clusters} clusters / {scope}{sparse}"

    def _book_of(self, rows: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
        return torch.zeros_like(rows) if self.rows_per_book is None else rows // self.rows_per_book


def _look_up(
    codes: UInt8[Tensor, "n cols"], centroids: Float[Tensor, "books clusters"], book: Int[Tensor, "n"]
) -> Float[Tensor, "n cols"]:
    flat = codes.to(torch.int32) + (book.to(torch.int32) * centroids.shape[1])[:, None]
    return centroids.float().flatten().index_select(0, flat.flatten()).view(codes.shape)
