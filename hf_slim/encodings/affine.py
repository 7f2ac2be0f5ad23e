"""Affine encoding: integers on an even grid, one scale (and zero point) a group of columns.

W[r, c] = (codes[r, c] - zeros[r, g]) * scales[r, g],  g = c // group_size;  the last group of a row may be shorter.

Zero is on every grid, so weights that pruning set to zero stay zero. Centered grids of 1 or 2 bits are an exception,

    W[r, c] = (codes[r, c] - (2**bits - 1) / 2) * scales[r, g],

where a level for zero would cost most; a pruned weight is then one whose code is not stored. Stored bits a weight:
`bits`, plus 16 / group_size for the scale, plus bits / group_size for the zero point when asymmetric; a row's codes and
its zero points each fill whole bytes. Of a pruned weight only the survivors' codes are stored, beside their
places (`places.py`): 50 % sparsity and 4 bits take 3 bits a weight and the grid, 2:4 takes 2.75.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, UInt8
from pydantic import Field, model_validator
from torch import Tensor

from hf_slim.encodings.base import DTYPES, Encoding, TensorSpec
from hf_slim.encodings.codes import code_layout, load_codes, store_codes
from hf_slim.encodings.packing import pack, packed_bytes, unpack
from hf_slim.encodings.places import StoredPattern

# Weights decoded at a time: 4 MB of float32 stay in the cache, and the allocator hands the same pages out again.
# 8 bits to float32, 5632 x 2048, one thread: 2 ms in such runs, 40 ms in one piece (fresh pages).
RUN = 1 << 20


class Affine(Encoding):
    """Description of an affine encoding.

    Args:
        bits: 1 to 8 bits a code.
        group_size: columns that share a scale; None for one scale a row.
        symmetric: the zero point is fixed at 2**(bits - 1) and not stored.
        scale_dtype: stored dtype of the scales.
        survivors: weights that pruning left, when only their codes are stored.
        pattern: "n:m" or "block:b" that their places follow exactly.
        centered: levels lie evenly around zero, which is none of them; symmetric grids of 1 or 2 bits only.
        activations: "int8" quantizes what is multiplied with this weight, token by token, to 8-bit integers too (see
            `activations.py`); only for symmetric 8-bit weights with one scale a row, whose product is an integer one.
    """

    kind: Literal["affine"] = "affine"
    bits: int = Field(ge=1, le=8)
    group_size: int | None = Field(default=None, ge=1)
    symmetric: bool = False
    scale_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    survivors: int | None = Field(default=None, ge=0)
    pattern: StoredPattern = None
    centered: bool = False
    activations: Literal["int8"] | None = None

    @model_validator(mode="after")
    def _integer_product(self) -> Affine:
        asked = {"bits": 8, "group_size": None, "symmetric": True}
        found = {name: getattr(self, name) for name in asked if getattr(self, name) != asked[name]}
        if self.activations is not None and found:
            raise ValueError(
                f"activations: {self.activations!r} needs weights of 8 bits, symmetric, with one scale a row; "
                f"got {found}: set bits=8, symmetric=True, group_size=None, or leave activations out"
            )
        return self

    @model_validator(mode="after")
    def _centered_is_small(self) -> Affine:
        if self.centered and not (self.symmetric and self.bits <= 2):
            raise ValueError("centered grids are symmetric and have 1 or 2 bits: set symmetric=True, bits=2")
        return self

    def groups(self, cols: int) -> int:
        """Groups a row."""
        return 1 if self.group_size is None else -(-cols // self.group_size)

    def layout(self, rows: int, cols: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        groups = self.groups(cols)
        specs = code_layout(rows, cols, self.bits, self.survivors, self.pattern)
        specs["scales"] = TensorSpec((rows, groups), DTYPES[self.scale_dtype])
        if not self.symmetric:
            specs["zeros"] = TensorSpec((rows, packed_bytes(groups, self.bits)), torch.uint8)
        return specs

    def pack(
        self,
        codes: UInt8[Tensor, "rows cols"],
        scales: Float[Tensor, "rows groups"],
        zeros: UInt8[Tensor, "rows groups"],
        keep: Bool[Tensor, "rows cols"] | None = None,
    ) -> dict[str, Tensor]:
        """Stored tensors from what a solver chose."""
        tensors = store_codes(codes, self.bits, keep, self.pattern)
        tensors["scales"] = scales.to(DTYPES[self.scale_dtype])
        if not self.symmetric:
            tensors["zeros"] = pack(zeros, self.bits)
        return tensors

    def decode(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Float[Tensor, "rows cols"]:
        codes, keep = load_codes(tensors, self.bits, rows, cols, self.survivors, self.pattern)
        W = self.dequantize(codes, tensors)
        return W if keep is None else W.masked_fill_(~keep, 0.0)

    def runs(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Iterator[tuple[slice, Tensor]]:
        if self.survivors is not None:
            yield from super().runs(tensors, rows, cols)
            return
        for run in row_runs(rows, cols):
            yield run, self.decode({name: t[run] for name, t in tensors.items()}, run.stop - run.start, cols)

    def take(self, tensors: dict[str, Tensor], ids: Int[Tensor, "n"], rows: int, cols: int) -> Float[Tensor, "n cols"]:
        if self.survivors is not None:
            return super().take(tensors, ids, rows, cols)
        chosen = {name: tensor[ids] for name, tensor in tensors.items()}
        return self.decode(chosen, len(ids), cols)

    def describe(self) -> str:
        group = "row" if self.group_size is None else f"g{self.group_size}"
        grid = " centered" if self.centered else " sym" if self.symmetric else ""
        sparse = "" if self.survivors is None else f" sparse {self.pattern or ''}".rstrip()
        activations = "" if self.activations is None else f", {self.activations} activations"
        return f"{self.bits}-bit {group}{grid}{sparse}{activations}"

    def dequantize(self, codes: UInt8[Tensor, "rows cols"], tensors: dict[str, Tensor]) -> Float[Tensor, "rows cols"]:
        """(code - zero) * scale, with the scales and zero points among the stored tensors."""
        rows, cols = codes.shape
        groups = self.groups(cols)
        scales, zeros = tensors["scales"].float(), self.zero_points(tensors, groups)
        size = self.group_size or cols
        W = codes.float()
        whole = cols // size
        body = W[:, : whole * size].view(rows, whole, size)  # a view: the arithmetic below is in place
        body.sub_(zeros[:, :whole, None]).mul_(scales[:, :whole, None])
        if whole < groups:
            W[:, whole * size :].sub_(zeros[:, whole:]).mul_(scales[:, whole:])
        return W

    def zero_points(self, tensors: dict[str, Tensor], groups: int) -> Float[Tensor, "rows groups"]:
        """The stored zero points, or the middle of the range."""
        if self.symmetric:
            middle = (2**self.bits - 1) / 2 if self.centered else 2 ** (self.bits - 1)
            return torch.full_like(tensors["scales"], middle, dtype=torch.float32)
        return unpack(tensors["zeros"], self.bits, groups).float()


def row_runs(rows: int, cols: int, multiple: int = 64) -> Iterator[slice]:
    """Consecutive runs of rows, about `RUN` weights each."""
    step = max(1, RUN // (cols * multiple)) * multiple
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))
