"""Codebook encoding: every weight, or every short run of weights, is an index into a small table of shared values.

    W[r, c] = s_r * centroids[b, codes[r, c // d], c mod d],    b = r // rows_per_book,

with runs of d columns (the last run of a row may be cut short) and s_r = 1 unless rows have scales. Stored
bits a weight: bits / d; plus 16 * clusters * d / (rows_per_book * cols) for the tables, half of that and one scale a
table where they are int8; 16 / cols for row scales. 3-bit indices of runs of 4 take 0.75 bits. Of a pruned weight only
the survivors' indices are stored, beside their places (`places.py`). `outliers` weights are kept apart, as they are,
with their places (`outliers.py`): 0.5 % of them add 0.13 bits.

Centroids learn, int8 ones excepted: the gradient of a centroid is the sum over its members. For that the packed codes
are kept until the backward pass and unpacked again, run by run: no index tensor of the weight's size is held.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int8, UInt8
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from hf_slim.encodings.affine import row_runs
from hf_slim.encodings.base import DTYPES, Encoding, TensorSpec
from hf_slim.encodings.codes import code_layout, load_codes, store_codes
from hf_slim.encodings.outliers import load_outliers, outlier_layout, store_outliers
from hf_slim.encodings.places import StoredPattern

CentroidDtype = Literal["float16", "bfloat16", "float32", "int8"]


class Apart(NamedTuple):
    """Outliers: places in the flattened weight, ascending, and values."""

    places: Int[Tensor, "count"]
    values: Float[Tensor, "count"]


class Codebook(Encoding):
    """Description of a codebook encoding.

    Args:
        bits: 1 to 8 bits an index.
        clusters: entries of a table, at most 2**bits.
        rows_per_book: rows that share a table; None for one table for the whole weight.
        dim: consecutive columns that one index stands for.
        scales: "row" multiplies every row by a float16 of its own.
        centroid_dtype: stored dtype of the tables; int8 tables have one float16 scale each.
        outliers: weights kept apart, in the dtype of the tables (float16 beside int8 ones).
        survivors: weights that pruning left, when only their indices are stored.
        pattern: "n:m" or "block:b" that their places follow exactly.
    """

    kind: Literal["codebook"] = "codebook"
    bits: int = Field(ge=1, le=8)
    clusters: int = Field(ge=1, le=256)
    rows_per_book: int | None = Field(default=None, ge=1)
    dim: int = Field(default=1, ge=1, le=256)
    scales: Literal["row"] | None = None
    centroid_dtype: CentroidDtype = "float16"
    outliers: int = Field(default=0, ge=0)
    survivors: int | None = Field(default=None, ge=0)
    pattern: StoredPattern = None

    @model_validator(mode="after")
    def _fits(self) -> Codebook:
        if self.clusters > 2**self.bits:
            raise ValueError(f"clusters: {self.clusters} do not fit in {self.bits} bits, at most {2**self.bits}")
        if self.survivors is not None and self.dim > 1:
            raise ValueError(f"survivors: runs of {self.dim} weights share an index, pruned ones among them: set dim=1")
        return self

    @property
    def trainable(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Integers cannot be trained; all other tables can."""
        return () if self.centroid_dtype == "int8" else ("centroids",)

    def books(self, rows: int) -> int:
        """Tables of a weight with that many rows."""
        return 1 if self.rows_per_book is None else -(-rows // self.rows_per_book)

    def layout(self, rows: int, cols: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        books, run = self.books(rows), () if self.dim == 1 else (self.dim,)
        specs = code_layout(rows, -(-cols // self.dim), self.bits, self.survivors, self.pattern)
        if self.scales is not None:
            specs["scales"] = TensorSpec((rows,), torch.float16)
        if self.outliers:
            specs |= outlier_layout(self.outliers, rows * cols)
            specs["outliers"] = TensorSpec((self.outliers,), self._outlier_dtype)
        if self.centroid_dtype == "int8":
            specs["centroids"] = TensorSpec((books, self.clusters, *run), torch.int8)
            specs["centroid_scales"] = TensorSpec((books,), torch.float16)
        else:
            specs["centroids"] = TensorSpec((books, self.clusters, *run), DTYPES[self.centroid_dtype])
        return specs

    def pack(
        self,
        codes: UInt8[Tensor, "rows runs"],
        centroids: Float[Tensor, "books clusters *dim"],
        keep: Bool[Tensor, "rows cols"] | None = None,
        *,
        scales: Float[Tensor, " rows"] | None = None,
        outliers: tuple[Bool[Tensor, "rows cols"], Float[Tensor, "rows cols"]] | None = None,
    ) -> dict[str, Tensor]:
        """Stored tensors from what a solver chose.

        Args:
            codes: an index for each run of `dim` columns.
            centroids: [books, clusters], and runs [books, clusters, dim] where `dim` is more than 1.
            keep: which weights pruning left; stored where the encoding counts `survivors`.
            scales: where the encoding has them.
            outliers: which weights are kept apart, as many as the encoding says, and the weight.
        """
        tensors = store_codes(codes, self.bits, keep, self.pattern) | store_tables(centroids, self.centroid_dtype)
        if scales is not None:
            tensors["scales"] = scales.half()
        if outliers is not None:
            chosen, W = outliers
            tensors |= store_outliers(chosen.flatten().nonzero().flatten(), W.numel())
            tensors["outliers"] = W[chosen].to(self._outlier_dtype)
        return tensors

    def decode(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Float[Tensor, "rows cols"]:
        book = self._book_of(torch.arange(rows, device=tensors["codes"].device))
        return self._look_up(tensors, book, self._apart(tensors, rows * cols), cols)

    def take(self, tensors: dict[str, Tensor], ids: Int[Tensor, "n"], rows: int, cols: int) -> Float[Tensor, "n cols"]:
        if self.survivors is not None:
            return super().take(tensors, ids, rows, cols)
        return self._take(tensors, ids, self._apart(tensors, rows * cols), cols)

    def runs(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Iterator[tuple[slice, Tensor]]:
        if self.survivors is not None:
            yield from super().runs(tensors, rows, cols)
            return
        apart = self._apart(tensors, rows * cols)
        for run in row_runs(rows, cols):
            yield (
                run,
                self._take(tensors, torch.arange(run.start, run.stop, device=tensors["codes"].device), apart, cols),
            )

    def describe(self) -> str:
        runs = "" if self.dim == 1 else f" of {self.dim}"
        scope = "tensor" if self.rows_per_book is None else f"{self.rows_per_book} rows"
        extras = [
            "" if self.survivors is None else f" sparse {self.pattern or ''}".rstrip(),
            "" if self.scales is None else ", row scales",
            ", int8 tables" if self.centroid_dtype == "int8" else "",
            f", {self.outliers} outliers" if self.outliers else "",
        ]
        return f"{self.clusters} clusters{runs} / {scope}{''.join(extras)}"

    def tables(self, tensors: dict[str, Tensor]) -> Float[Tensor, "books clusters *dim"]:
        """The tables in float32; gradients reach the stored centroids."""
        c = tensors["centroids"].float()
        if self.centroid_dtype != "int8":
            return c
        return c * tensors["centroid_scales"].float().view(-1, *[1] * (c.ndim - 1))

    def int8_entries(self, tensors: dict[str, Tensor], rows: slice, cols: int) -> Int8[Tensor, "n cols"]:
        """Entries of int8 tables, before any scale, for a run of rows of a weight that is not pruned."""
        book = self._book_of(torch.arange(rows.start, rows.stop, device=tensors["codes"].device))
        index, _ = self._codes({"codes": tensors["codes"][rows]}, book, cols)
        tables = tensors["centroids"].flatten(0, 1)
        return tables.index_select(0, index.flatten()).view(len(book), -1)[:, :cols]

    def row_scales(self, tensors: dict[str, Tensor], rows: int) -> Float[Tensor, " rows"]:
        """What a row of `int8_entries` is multiplied by."""
        scale = tensors["centroid_scales"].float()[self._book_of(torch.arange(rows, device=tensors["codes"].device))]
        return scale if self.scales is None else scale * tensors["scales"].float()

    @property
    def _outlier_dtype(self) -> torch.dtype:
        return DTYPES.get(self.centroid_dtype, torch.float16)

    def _book_of(self, rows: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
        return torch.zeros_like(rows) if self.rows_per_book is None else rows // self.rows_per_book

    def _apart(self, tensors: dict[str, Tensor], weights: int) -> Apart | None:
        if not self.outliers:
            return None
        return Apart(load_outliers(tensors, self.outliers, weights), tensors["outliers"].float())

    def _take(
        self, tensors: dict[str, Tensor], ids: Int[Tensor, "n"], apart: Apart | None, cols: int
    ) -> Float[Tensor, "n cols"]:
        chosen = tensors | {"codes": tensors["codes"][ids]}
        if self.scales is not None:
            chosen["scales"] = tensors["scales"][ids]
        return self._look_up(chosen, self._book_of(ids), None if apart is None else _of_rows(apart, ids, cols), cols)

    def _look_up(
        self, tensors: dict[str, Tensor], book: Int[Tensor, "n"], apart: Apart | None, cols: int
    ) -> Float[Tensor, "n cols"]:
        """Rows of the weight, whose books are given."""
        W = _LookUp.apply(self.tables(tensors), self, tensors, book, cols)
        if self.scales is not None:
            W = W * tensors["scales"].float()[:, None]
        return W if apart is None else W.index_put((apart.places // cols, apart.places % cols), apart.values)

    def _codes(
        self, tensors: dict[str, Tensor], book: Int[Tensor, "n"], cols: int
    ) -> tuple[Int[Tensor, "n runs"], Bool[Tensor, "n runs"] | None]:
        """Places of the centroids among all tables' [books * clusters], and the mask of survivors."""
        n, runs = len(book), -(-cols // self.dim)
        codes, keep = load_codes(tensors, self.bits, n, runs, self.survivors, self.pattern)
        return codes.to(torch.int32) + (book.to(torch.int32) * self.clusters)[:, None], keep


class _LookUp(torch.autograd.Function):
    """Rows of centroids by their codes. What is kept for the gradient are the codes as they are stored."""

    @staticmethod
    def forward(
        ctx: Any, tables: Tensor, encoding: Codebook, tensors: dict[str, Tensor], book: Tensor, cols: int
    ) -> Tensor:
        ctx.encoding, ctx.shape = encoding, tables.shape
        ctx.names = [name for name in ("codes", "mask", "places") if name in tensors]
        ctx.save_for_backward(book, *(tensors[name] for name in ctx.names))
        index, keep = encoding._codes(tensors, book, cols)
        W = tables.reshape(-1, *tables.shape[2:]).index_select(0, index.flatten())
        W = W.view(len(book), index.shape[1] * encoding.dim)
        return W[:, :cols] if keep is None else W.masked_fill_(~keep, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        book, *stored = ctx.saved_tensors
        packed = dict(zip(ctx.names, stored, strict=True))
        sums = _sum_members(ctx.encoding, packed, book, gradients[0], ctx.shape[0] * ctx.shape[1])
        return sums.view(ctx.shape), None, None, None, None


def _sum_members(
    encoding: Codebook, tensors: dict[str, Tensor], book: Int[Tensor, "n"], G: Float[Tensor, "n cols"], entries: int
) -> Float[Tensor, "entries dim"]:
    """For each of the centroids of all tables, the sum of G over the weights that are its members.

    A pruned weight is no member. Sums run in float64; over runs of rows, unless only survivors are stored.
    """
    (n, cols), d, pruned = G.shape, encoding.dim, encoding.survivors is not None
    sums = torch.zeros(d, entries, dtype=torch.float64, device=G.device)
    for run in [slice(0, n)] if pruned else row_runs(n, cols):
        part = tensors if pruned else {"codes": tensors["codes"][run]}
        index, keep = encoding._codes(part, book[run], cols)
        g = F.pad(G[run].double(), (0, -cols % d)).reshape(-1, d)
        if keep is not None:
            index, g = index[keep], g[keep.flatten()]
        for i in range(d):
            sums[i] += torch.bincount(index.flatten(), g[:, i], minlength=entries)
    return sums.T.float()


def _of_rows(apart: Apart, ids: Int[Tensor, "n"], cols: int) -> Apart:
    """Outliers of the chosen rows, at their places among those [n, cols]."""
    places, values = apart
    first, last = (torch.searchsorted(places, (ids + end) * cols) for end in (0, 1))
    counts = last - first
    row = torch.repeat_interleave(torch.arange(len(ids), device=ids.device), counts)
    nth = torch.arange(len(row), device=ids.device) - (counts.cumsum(0) - counts)[row]
    chosen = first[row] + nth
    return Apart(places[chosen] + (row - ids[row]) * cols, values[chosen])


def store_tables(centroids: Float[Tensor, "books clusters *dim"], dtype: CentroidDtype) -> dict[str, Tensor]:
    """Tables as they are stored: rounded to `dtype`, int8 ones with a scale each so that the largest entry is 127."""
    if dtype != "int8":
        return {"centroids": centroids.to(DTYPES[dtype])}
    largest = centroids.abs().flatten(1).amax(1).clamp(max=127 * torch.finfo(torch.float16).max)
    scale = (largest / 127).half()
    scale = torch.where(scale > 0, scale, torch.finfo(torch.float16).tiny)
    steps = centroids / scale.to(centroids.dtype).view(-1, *[1] * (centroids.ndim - 1))
    return {"centroids": steps.round().clamp(-127, 127).to(torch.int8), "centroid_scales": scale}


def as_stored(centroids: Float[Tensor, "books clusters *dim"], dtype: torch.dtype) -> Float[Tensor, "..."]:
    """Tables as they come back in float32 from being stored in a dtype, int8 among them."""
    if dtype != torch.int8:
        return centroids.to(dtype).float()
    tensors = store_tables(centroids, "int8")
    return Codebook(bits=8, clusters=256, centroid_dtype="int8").tables(tensors)
