"""Weight sharing by k-means: every weight becomes an index into a small table of centroids (Han et al., "Deep
Compression", arXiv:1510.00149; Fisher-weighted per row: Kim et al., "SqueezeLLM", arXiv:2306.07629).

A book x [n] (the whole matrix, one row, or a run of rows) with weights h [n] (1, or the diagonal of the Fisher
information) gets K = 2**bits centroids c of (nearly) least sum_i h_i * min_k (x_i - c_k)^2; `intervals.py` says how.

    W[r, c] = s_r * centroids[b, codes[r, c]]

Row scales s (1, or the weighted root mean square of the row) let rows of different size share a table: rows are
clustered as W / s with weights h s^2, then s is fitted to the codes, s_r = sum h w c / sum h c^2, and codes are chosen
again. `outliers` takes out the weights of largest h w^2 first, which are stored as they are and weigh nothing in the
table; a row's heaviest weights otherwise claim centroids of their own.

Where we differ from both papers: they run Lloyd's iteration on all n weights from linear or k-means++ starts, which
costs O(n K) a step and stays in poor local optima on heavy-tailed rows. SqueezeLLM picks outliers by range and by
sensitivity apart; here both are one number.

Shapes: W, h [rows, cols]; codes uint8 [rows, cols]; centroids float32 [books, K], ascending; s [rows].
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, UInt8
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.layers import Encoded, only_survivors, plan_targets, put_layer
from hf_slim.core.method import MethodConfig, Rules
from hf_slim.core.report import StageReport
from hf_slim.core.saliency import fisher
from hf_slim.core.select import Layer, Select
from hf_slim.core.swap import get_keep, get_weight
from hf_slim.encodings import Codebook
from hf_slim.encodings.codebook import CentroidDtype
from hf_slim.methods import find_method
from hf_slim.sharing.checks import check_matrix
from hf_slim.sharing.intervals import cluster, nearest

Scope = Literal["tensor", "row"] | PositiveInt

RULES = Rules(makes=("centroids",), preserves=("zeros", "codes", "tied"), paper="Han et al. 2016, arXiv:1510.00149")


class Embeddings(MethodConfig):
    """How the input embedding is clustered, and with it a head that shares it: one table for all of it."""

    bits: int = Field(8, ge=1, le=8, description="bits of an index")
    scales: Literal["row"] | None = Field(None, description="'row' gives every token a scale beside the table")


class TableConfig(MethodConfig):
    """What all methods that cluster single weights take.

    Attributes:
        bits: bits of an index; 2**bits centroids a book.
        scope: weights that share one table: the whole matrix, every row its own, or runs of so many rows.
        scales: "row" gives every row a float16 scale beside a shared table.
        centroids: how tables are stored; an int8 table has one float16 scale, and cannot be trained.
        outliers: share of the weights that is kept apart, about 25 bits each; 0.005 adds 0.13 bits a weight.
        iterations: sweeps of refinement at most; a sweep that moves no boundary is the last.

    The default scope weighs fit against the size of the tables: 16 float16 centroids for each row of 576 weights are
    0.44 bits a weight. Relative squared error of nine SmolLM2-135M matrices at 4 bits, and the same brought to exactly
    4 bits at 6.02 dB a bit:

        rows a book    1        2        4        8        16       64       all
        bits           4.327    4.164    4.082    4.041    4.020    4.005    4.000
        error          0.00784  0.00904  0.00992  0.01064  0.01128  0.01247  0.01431
        at 4 bits      0.01235  0.01134  0.01111  0.01126  0.01160  0.01256  0.01432
    """

    per_layer: ClassVar[tuple[str, ...]] = ("bits", "scope", "scales", "centroids", "outliers")

    bits: int = Field(4, ge=1, le=8, description="bits of an index; 2**bits centroids a table")
    scope: Scope = Field(4, description="weights that share a table: 'tensor', 'row' or so many rows")
    scales: Literal["row"] | None = Field(None, description="'row' gives every row a scale beside a shared table")
    centroids: CentroidDtype = Field("float16", description="how tables are stored")
    outliers: float = Field(0.0, ge=0, le=0.1, description="share of the weights that is kept apart, as it is")
    iterations: PositiveInt = Field(2, description="sweeps of refinement at most")
    layers: Select = Select()
    embeddings: Embeddings | None = Field(None, description="cluster the input embedding (and a tied head) too")

    @model_validator(mode="after")
    def _one_scale(self) -> TableConfig:
        if self.scales is not None and self.scope in ("row", 1):
            raise ValueError(
                "scales: a table of the row's own has its scale already: set scope to 'tensor' or more rows"
            )
        return self


class Config(TableConfig):
    """Options of `share.kmeans`. A weight with fewer distinct values than 2**bits takes as few bits as they need.

    Attributes:
        importance: "fisher" weighs a weight's error by its mean squared gradient on calibration data (SqueezeLLM).
        feedback: choose column by column, so that later columns repair the error so far, and refit the tables to the
            layer's output: GPTQ on a codebook (`lnq.py`). Needs calibration data.
    """

    importance: Literal["none", "fisher"] = Field("none", description="'fisher' weighs errors by squared gradients")
    feedback: bool = Field(False, description="later columns repair the error of earlier ones, as in GPTQ")


def quantize(
    W: Float[Tensor, "rows cols"],
    bits: int,
    scope: Scope = 4,
    weights: Float[Tensor, "rows cols"] | None = None,
    keep: Bool[Tensor, "rows cols"] | None = None,
    iterations: int = 2,
    centroid_dtype: torch.dtype = torch.float16,
) -> tuple[UInt8[Tensor, "rows cols"], Float[Tensor, "books clusters"]]:
    """Replace a matrix by indices into tables of centroids.

    Row r belongs to book r // rows_per_book; the last book may hold fewer rows. In a book with pruned entries one
    centroid is exactly 0 and every pruned entry carries its code; the others are placed for the survivors alone, given
    that one. A book without pruned entries has no forced zero.

    Args:
        W: the matrix, finite.
        bits: 1 to 8.
        scope: "tensor", "row", or the rows a book.
        weights: importance of each entry, as in `cluster`.
        keep: True where an entry survives pruning; None when nothing is pruned.
        iterations: sweeps of refinement at most.
        centroid_dtype: the type that centroids are stored in; codes are nearest for the stored centroids.

    Returns:
        Codes, uint8 [rows, cols]; centroids, float32 [books, 2**bits], ascending, exact in `centroid_dtype`.

    Raises:
        SlimError: as `cluster`; bits, scope or a mask that cannot be.
    """
    check_matrix(W, bits, scope, weights, keep)
    rows, cols = W.shape
    per_book = rows_per_book(scope, rows)
    full = rows - rows % per_book if per_book < rows else rows
    parts = []
    for part, books in ((slice(0, full), max(1, full // per_book)), (slice(full, rows), 1)):
        if part.start == part.stop:
            continue
        x, h = W[part].reshape(books, -1), None if weights is None else weights[part].reshape(books, -1)
        pruned = None if keep is None else ~keep[part].reshape(books, -1)
        if pruned is not None:
            x, h = x.masked_fill(pruned, 0), _anchor_zero(h, pruned)
        with_zero = None if pruned is None else pruned.any(1)
        parts.append(cluster(x, 2**bits, h, iterations, centroid_dtype, with_zero))
    return torch.cat([codes.reshape(-1, cols) for _, codes in parts]), torch.cat([c for c, _ in parts])


def quantize_scaled(
    W: Float[Tensor, "rows cols"],
    bits: int,
    scope: Scope = "tensor",
    weights: Float[Tensor, "rows cols"] | None = None,
    keep: Bool[Tensor, "rows cols"] | None = None,
    iterations: int = 2,
    centroid_dtype: torch.dtype = torch.float16,
) -> tuple[UInt8[Tensor, "rows cols"], Float[Tensor, "books clusters"], Float[Tensor, " rows"]]:
    """As `quantize`, with a scale for every row: codes, centroids and scales that float16 holds."""
    check_matrix(W, bits, scope, weights, keep)
    W = W.detach().float()
    h = torch.ones_like(W) if weights is None else weights.float()
    sizes = row_sizes(W, h if keep is None else h * keep)
    codes, c = quantize(W / sizes[:, None], bits, scope, h * sizes[:, None] ** 2, keep, iterations, centroid_dtype)
    per_book = rows_per_book(scope, len(W))
    tables = c.repeat_interleave(per_book, 0)[: len(W)]
    values = tables.gather(1, codes.long())
    fitted = (h * W * values).sum(1) / (h * values.square()).sum(1)
    fitted = fitted.half().float()
    sizes = torch.where(fitted.isfinite() & (fitted > 0), fitted, sizes)
    again = nearest((W / sizes[:, None]).contiguous(), tables)
    return again if keep is None else torch.where(keep, again, codes), c, sizes


def rows_per_book(scope: Scope, rows: int) -> int:
    """Rows that share a table."""
    return scope if isinstance(scope, int) else {"tensor": rows, "row": 1}[scope]


def row_sizes(W: Float[Tensor, "rows cols"], weights: Float[Tensor, "rows cols"]) -> Float[Tensor, " rows"]:
    """Weighted root mean square of each row as float16 holds it; 1 for a row of zeros."""
    total = weights.sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    sizes = ((weights * W.square()).sum(1) / total).sqrt().clamp(max=torch.finfo(torch.float16).max).half().float()
    return torch.where(sizes > torch.finfo(torch.float16).tiny, sizes, 1.0)


def heaviest(W: Float[Tensor, "rows cols"], count: int, weights: Tensor | None = None) -> Bool[Tensor, "rows cols"]:
    """The `count` entries of largest h w^2, of equal ones the first."""
    power = W.float().square() if weights is None else W.float().square() * weights
    least = power.flatten().topk(count).values[-1]
    equal = power.flatten() == least
    above = power.flatten() > least
    return (above | equal & (equal.cumsum(0) <= count - above.sum())).view(W.shape)


def _anchor_zero(h: Float[Tensor, "books n"] | None, pruned: Bool[Tensor, "books n"]) -> Float[Tensor, "books n"]:
    """Weights in which pruned entries (value 0) outweigh all survivors a million times.

    The cluster that holds them then has its mean at zero whatever else it holds, which makes the search place the
    other centroids for the survivors *given* a centroid at zero.
    """
    h = torch.ones_like(pruned, dtype=torch.float64) if h is None else h.double()
    h = h.masked_fill(pruned, 0)
    h = torch.where((h > 0).any(1, keepdim=True), h, (~pruned).double())
    total = h.sum(1, keepdim=True).where(~pruned.all(1, keepdim=True), 1)
    return torch.where(pruned, 1e6 * total / pruned.sum(1, keepdim=True).clamp(min=1), h)


def makes(config: Config) -> tuple[str, ...]:
    """What it makes of weights: integer tables cannot learn."""
    return ("codes",) if config.centroids == "int8" else RULES.makes


def needs(config: Config) -> tuple[str, ...]:
    """The data that it needs with these options."""
    return ("calibration",) if config.feedback or config.importance == "fisher" else RULES.needs


def encoding(layer: Layer, config: TableConfig) -> Codebook:
    """How a layer will be stored, unless it has too few distinct values for that."""
    here = config.at(layer)
    if layer.kind == "embedding" and config.embeddings is not None:
        changed = {"bits": config.embeddings.bits, "scope": "tensor", "scales": config.embeddings.scales}
        here = here.model_copy(update=changed | {"outliers": 0.0})
    left = layer.rows * layer.cols if layer.survivors is None else layer.survivors
    return Codebook(
        bits=here.bits,
        clusters=2**here.bits,
        rows_per_book=None if here.scope == "tensor" else rows_per_book(here.scope, layer.rows),
        scales=here.scales,
        centroid_dtype=here.centroids,
        outliers=int(here.outliers * left),
        **only_survivors(layer, here.bits),
    )


def solve(
    W: Float[Tensor, "rows cols"],
    stored: Codebook,
    keep: Bool[Tensor, "rows cols"] | None = None,
    weights: Float[Tensor, "rows cols"] | None = None,
    iterations: int = 2,
) -> Encoded:
    """Cluster one weight for an encoding. When the mask is stored, no centroid is spent on the pruned weights.

    Args:
        W: finite.
        stored: how it will be stored; with fewer bits where it has too few distinct values.
        keep: False where a weight is pruned.
        weights: importance of each weight.
        iterations: sweeps of refinement at most.
    """
    apart, h = None, weights
    if stored.outliers:
        apart = heaviest(W if keep is None else W * keep, stored.outliers, weights)
        h = (torch.ones_like(W, dtype=torch.float32) if h is None else h).masked_fill(apart, 0)
    masked = keep is not None and stored.survivors is not None
    if keep is not None and masked:
        h = keep.float() if h is None else h * keep
    dtype = getattr(torch, stored.centroid_dtype)
    options = (stored.bits, stored.rows_per_book or "tensor", h, None if masked else keep, iterations, dtype)
    codes, c, scales = quantize_scaled(W, *options) if stored.scales else (*quantize(W, *options), None)
    used = max(1, int((c < c[:, -1:]).sum(1).max()) + 1)  # spare centroids repeat the largest
    stored = stored.model_copy(update={"clusters": used, "bits": max(1, (used - 1).bit_length())})
    codes = codes.clamp(max=used - 1)  # a value above a rounded centroid takes the last that repeats it
    outliers = None if apart is None else (apart, W)
    return stored, stored.pack(codes, c[:, :used], keep if masked else None, scales=scales, outliers=outliers)


def encode(W: Float[Tensor, "rows cols"], layer: Layer, config: Config, keep: Tensor | None) -> Encoded:
    """Cluster one weight."""
    return solve(W, encoding(layer, config), keep, iterations=config.iterations)


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Cluster the chosen layers of a model."""
    if config.feedback:
        return find_method("share.lnq").with_feedback(model, config, context)
    chosen = plan_targets(model, "share.kmeans", config)
    weights = {}
    if config.importance == "fisher":
        weights = fisher(model, [layer.name for layer in chosen], context.tokens("calibration"), context.progress)
    rows, notes = [], []
    for layer in context.progress.track(chosen, "encoding layers"):
        module, stored = model.get_submodule(layer.name), encoding(layer, config)
        encoded = solve(get_weight(module), stored, get_keep(module), weights.pop(layer.name, None), config.iterations)
        rows.append(put_layer(model, layer, encoded))
        if rows[-1].encoding != stored.describe():
            planned = stored.describe()
            notes.append(
                f"{layer.name}: {rows[-1].encoding} instead of {planned}, because it has no more distinct values"
            )
    return StageReport(layers=rows, notes=notes)
