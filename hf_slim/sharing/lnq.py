"""LNQ, codebooks by the loss of the layer's output (Kim et al., "GuidedQuant", arXiv:2505.07004, sec. 4).

k-means lowers the error of the weights; what counts is that of the output, sum_r (w_r - q_r) H (w_r - q_r)^T with
H = 2/n sum x x^T. Both halves of a codebook are solved for it in turn, `rounds` times:

    tables   given the codes, c = (P^T H P)^-1 P^T H w: least squares, exact
    codes    given the tables, `cycles` times every column: the entry nearest to what repairs all others' errors best

Neither ever raises the loss (`descent.py` has the equations). `guided` weighs tokens by squared gradients of the
model's loss, in as many groups of rows, each with an H of its own.

Shapes: W [rows, cols]; H [groups, cols, cols]; codes uint8 [rows, cols]; tables [books, 2**bits].

Where we differ from the paper:
- It starts from k-means weighted by the Fisher information. We start from k-means weighted by what the loss charges for
  a column (R_jj**2, `core/feedback.py`), with the codes chosen anew by error feedback: GPTQ on a codebook grid, which
  is a solver of its own (`share.kmeans` with `feedback`, the same as `rounds` 0 here).
- A table may serve several rows, or all, with a scale for each: at 576 columns, tables of one row are dear.
- The tables that are kept are those as stored; the last word is theirs, not the codes'.
- H is damped as in GPTQ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.layers import Encoded, only_survivors
from hf_slim.core.method import MethodConfig, Rules
from hf_slim.core.report import StageReport
from hf_slim.core.select import Layer, Select
from hf_slim.encodings import Codebook
from hf_slim.encodings.codebook import CentroidDtype, store_tables
from hf_slim.sharing import calibrated, kmeans
from hf_slim.sharing.descent import (
    Curvature,
    RoundTables,
    Tables,
    curvature_of,
    descend,
    feed_back,
    losses,
    refit_scales,
    refit_tables,
)

RULES = Rules(
    needs=("calibration",),
    makes=("centroids",),
    preserves=("zeros", "codes", "tied"),
    paper="Kim et al. 2025, arXiv:2505.07004",
)

ENOUGH = 1e-4  # a round that lowers the loss by less than this share is the last


class Config(MethodConfig):
    """Options of `share.lnq`."""

    per_layer: ClassVar[tuple[str, ...]] = ("bits", "scope", "scales", "centroids")

    bits: int = Field(3, ge=1, le=8, description="bits of an index; 2**bits centroids a table")
    scope: kmeans.Scope = Field("row", description="weights that share a table: 'tensor', 'row' or so many rows")
    scales: Literal["row"] | None = Field(None, description="'row' gives every row a scale beside a shared table")
    centroids: CentroidDtype = Field("float16", description="how tables are stored")
    rounds: int = Field(2, ge=0, description="times that tables and codes are solved in turn")
    cycles: int = Field(4, ge=1, description="times that every column is chosen anew in a round")
    damping: float = Field(0.01, gt=0, le=1, description="share of mean(diag H) added to the diagonal")
    guided: int | None = Field(
        None, ge=1, description="weigh tokens by squared gradients, for this many groups of rows"
    )
    true_sequential: bool = Field(False, description="o_proj sees what the shared q, k and v put out, and so on")
    min_tokens: int = Field(32, ge=1, description="an expert that fewer tokens were routed to is clustered plainly")
    layers: Select = Select()
    embeddings: kmeans.Embeddings | None = None


@dataclass(frozen=True)
class Report:
    """Measured on one matrix.

    Attributes:
        losses: with the damped H, after the start and after every move; never rising.
        relative_error: of the output, with the undamped H; 0 where the output is all zero.
    """

    losses: tuple[float, ...]
    relative_error: float


def quantize(
    W: Float[Tensor, "rows cols"],
    hessians: Float[Tensor, "groups cols cols"],
    bits: int,
    scope: kmeans.Scope = "row",
    scales: Literal["row"] | None = None,
    centroids: CentroidDtype = "float16",
    rounds: int = 2,
    cycles: int = 4,
    damping: float = 0.01,
    keep: Bool[Tensor, "rows cols"] | None = None,
    with_zero: bool = True,
    weights: Float[Tensor, "rows cols"] | None = None,
    known: Curvature | None = None,
) -> tuple[Tables, Report]:
    """Tables and codes of (nearly) least loss at the layer's output.

    Args:
        W: finite.
        hessians: H of each run of rows, all rows' where there is one.
        bits, scope, centroids: see `kmeans.quantize`; tables are rounded to how they will be stored.
        scales: "row" for a float16 scale a row.
        rounds, cycles: see above; 0 rounds refit the tables of the start, and no more.
        damping: see `core.feedback.factor`; unused with `known`.
        keep: False where a weight is pruned.
        with_zero: a pruned weight needs a code of its own, that of an exact zero; False where the mask is stored.
        weights: importance of each weight for the first tables, on top of that of its column.
        known: `curvature_of` the Hessians, where several layers share them.

    Raises:
        SingularHessian: no damping makes an H positive definite.
    """
    known = known or curvature_of(hessians, damping)
    W = W.float() if keep is None else W.float() * keep
    store = rounding(centroids)
    found = start(W, bits, scope, scales, store, keep, with_zero, _importance(known, len(W), weights))
    found = feed_back(W, found, known, keep)
    fixed = (found.tables == 0) if keep is not None and with_zero else None
    return alternate(W, found, known, hessians, store, rounds, cycles, keep, fixed)


def start(
    W: Float[Tensor, "rows cols"],
    bits: int,
    scope: kmeans.Scope,
    scales: Literal["row"] | None,
    store: RoundTables,
    keep: Bool[Tensor, "rows cols"] | None,
    with_zero: bool,
    weights: Float[Tensor, "rows cols"],
) -> Tables:
    """k-means of the rows over their scales, weighted."""
    sizes = row_sizes(W, weights if keep is None else weights * keep) if scales else None
    x = W if sizes is None else W / sizes[:, None]
    h = weights if sizes is None else weights * sizes[:, None] ** 2
    if keep is not None and not with_zero:
        h, keep = h * keep, None
    codes, tables = kmeans.quantize(x, bits, scope, h, keep, centroid_dtype=torch.float32)
    book = torch.arange(len(W), device=W.device) // rows_per_book(scope, len(W))
    return Tables(codes, store(tables[:, :, None]), book, sizes)


def rows_per_book(scope: kmeans.Scope, rows: int) -> int:
    """Rows that share a table."""
    return scope if isinstance(scope, int) else {"tensor": rows, "row": 1}[scope]


def row_sizes(W: Float[Tensor, "rows cols"], weights: Float[Tensor, "rows cols"]) -> Float[Tensor, " rows"]:
    """Weighted root mean square of each row as float16 holds it; 1 for a row of zeros."""
    total = weights.sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    sizes = ((weights * W.square()).sum(1) / total).sqrt().clamp(max=torch.finfo(torch.float16).max).half().float()
    return torch.where(sizes > torch.finfo(torch.float16).tiny, sizes, 1.0)


def alternate(
    W: Float[Tensor, "rows cols"],
    found: Tables,
    known: Curvature,
    hessians: Float[Tensor, "groups cols cols"],
    store: RoundTables,
    rounds: int,
    cycles: int,
    keep: Bool[Tensor, "rows cols"] | None = None,
    fixed: Bool[Tensor, "books clusters d"] | None = None,
) -> tuple[Tables, Report]:
    """Tables, scales and codes in turn; the tables last."""

    def loss(found: Tables, hessians: Tensor = known.hessians) -> float:
        return losses(W, found.values(keep), hessians).sum().item()

    def refit(found: Tables) -> Tables:
        found = refit_tables(W, found, known.hessians, store, keep, fixed)
        return refit_scales(W, found, known.hessians, keep)

    history = [loss(found)]
    found = refit(found)
    history.append(loss(found))
    for _ in range(rounds):
        before = history[-1]
        for _ in range(cycles):
            found = descend(W, found, known.hessians, keep)
            history.append(loss(found))
        found = refit(found)
        history.append(loss(found))
        if history[-1] >= (1 - ENOUGH) * before:
            break
    nothing = losses(W, torch.zeros_like(W), hessians).sum().item()
    return found, Report(tuple(history), loss(found, hessians) / nothing if nothing > 0 else 0.0)


def rounding(centroids: CentroidDtype) -> RoundTables:
    """What rounds tables as the encoding stores and reads them."""
    stored = Codebook(bits=8, clusters=256, centroid_dtype=centroids)

    def store(tables: Tensor) -> Tensor:
        if centroids in ("float16", "int8"):  # what does not fit becomes the largest number that does
            tables = tables.clamp(-torch.finfo(torch.float16).max, torch.finfo(torch.float16).max)
        return stored.tables(store_tables(tables, centroids))

    return store


def _importance(known: Curvature, rows: int, weights: Tensor | None) -> Float[Tensor, "rows cols"]:
    return known.importance(rows) if weights is None else known.importance(rows) * weights


def makes(config: Config) -> tuple[str, ...]:
    """What weights have after it: tables that learn, or int8 ones that cannot."""
    return ("codes",) if config.centroids == "int8" else RULES.makes


def encoding(layer: Layer, config: Config) -> Codebook:
    """How a layer will be stored; embeddings as `share.kmeans` stores them."""
    if layer.kind == "embedding" and config.embeddings is not None:
        return table_encoding(layer, config.embeddings)
    here = config.at(layer)
    return Codebook(
        bits=here.bits,
        clusters=2**here.bits,
        rows_per_book=None if here.scope == "tensor" else rows_per_book(here.scope, layer.rows),
        scales=here.scales,
        centroid_dtype=here.centroids,
        **only_survivors(layer, here.bits),
    )


def table_encoding(layer: Layer, config: kmeans.Embeddings) -> Codebook:
    """How an embedding will be stored: one table for all of it."""
    return Codebook(bits=config.bits, clusters=2**config.bits, **only_survivors(layer, config.bits))


def solve_table(
    W: Tensor, layer: Layer, config: kmeans.Embeddings, known: calibrated.Known, damping: float
) -> tuple[Encoded, float]:
    """An embedding, by k-means with error feedback: its rows are too many to be chosen anew time and again."""
    stored = table_encoding(layer, config)
    found, report = quantize(
        W, known.hessians, stored.bits, "tensor", rounds=0, keep=known.keep, with_zero=stored.survivors is None,
        weights=known.weights, known=known.curvature(damping),
    )  # fmt: skip
    return pack(stored, found, known.keep), report.relative_error


def pack(stored: Codebook, found: Tables, keep: Tensor | None) -> Encoded:
    """What is stored."""
    keep = None if stored.survivors is None else keep
    return stored, stored.pack(found.codes, found.tables[:, :, 0], keep, scales=found.scales)


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Share block by block."""

    def solve(W: Tensor, layer: Layer, known: calibrated.Known) -> tuple[Encoded, float]:
        if layer.kind == "embedding" and config.embeddings is not None:
            return solve_table(W, layer, config.embeddings, known, config.damping)
        here, stored = config.at(layer), encoding(layer, config)
        found, report = quantize(
            W, known.hessians, here.bits, here.scope, here.scales, here.centroids, here.rounds, here.cycles,
            keep=known.keep, with_zero=stored.survivors is None, weights=known.weights,
            known=known.curvature(here.damping),
        )  # fmt: skip
        return pack(stored, found, known.keep), report.relative_error

    return calibrated.compress(model, "share.lnq", config, context, solve)
