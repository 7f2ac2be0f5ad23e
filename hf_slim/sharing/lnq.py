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
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.layers import Encoded
from hf_slim.core.method import Rules
from hf_slim.core.report import StageReport
from hf_slim.core.select import Layer
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


class Config(kmeans.TableConfig, calibrated.Options):
    """Options of `share.lnq`.

    Relative squared error of the output of two matrices of SmolLM2-135M (q_proj 576 x 576, gate_proj 1536 x 576) on
    held-out tokens, H from 8192 others, brought to equal stored bits at 6.02 dB a bit (4 bits: weights moved off their
    checkpoint's own 4-bit grid):

                                           2.3 bits          3.3 bits           4.3 bits
        GPTQ, groups of 64                 0.0292  0.0643    0.00735  0.0157    0.00181  0.00384
        4 rows a table, feedback alone                                          0.00146  0.00320
        4 rows a table                     0.0189  0.0362    0.00523  0.0109    0.00140  0.00307
        a table for each row, int8         0.0181  0.0371    0.00505  0.0112    0.00141  0.00316
        16 rows a table, row scales        0.0191  0.0353    0.00540  0.0104    0.00138  0.00290
        share.vq, vectors of 2             0.0164  0.0326    0.00483  0.0092    0.00161  0.00284
        share.vq, vectors of 4             0.0134  0.0298
    """

    bits: int = Field(3, ge=1, le=8, description="bits of an index; 2**bits centroids a table")
    rounds: int = Field(2, ge=0, description="times that tables and codes are solved in turn")
    cycles: int = Field(4, ge=1, description="times that every column is chosen anew in a round")


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
    apart: Bool[Tensor, "rows cols"] | None = None,
    weights: Float[Tensor, "rows cols"] | None = None,
    iterations: int = 2,
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
        apart: weights that are kept as they are, beside the tables, which then stand for the others.
        weights: importance of each weight for the first tables, on top of that of its column.
        iterations: of `kmeans.quantize`.
        known: `curvature_of` the Hessians, where several layers share them.

    Raises:
        SingularHessian: no damping makes an H positive definite.
    """
    known = known or curvature_of(hessians, damping)
    importance = known.importance(len(W)) if weights is None else known.importance(len(W)) * weights
    W, free = W.float(), keep
    if apart is not None:  # their error is zero: so is that of a weight of zero that is pruned
        importance = importance.masked_fill(apart, 0.0)
        W, free = W.masked_fill(apart, 0.0), ~apart if keep is None else keep & ~apart
    if keep is not None:
        W = W * keep
        importance = importance if with_zero else importance * keep
    store, zeros = rounding(centroids), keep if with_zero else None
    found = start(W, bits, scope, scales, zeros, importance, iterations)
    found = feed_back(W, found._replace(tables=store(found.tables)), known, free)
    fixed = None if zeros is None else found.tables == 0
    return alternate(W, found, known, hessians, store, rounds, cycles, free, fixed)


def start(
    W: Float[Tensor, "rows cols"],
    bits: int,
    scope: kmeans.Scope,
    scales: Literal["row"] | None,
    keep: Bool[Tensor, "rows cols"] | None,
    weights: Float[Tensor, "rows cols"],
    iterations: int,
) -> Tables:
    """k-means, weighted."""
    options = (bits, scope, weights, keep, iterations, torch.float32)
    codes, tables, *sizes = (kmeans.quantize_scaled if scales else kmeans.quantize)(W, *options)
    book = torch.arange(len(W), device=W.device) // kmeans.rows_per_book(scope, len(W))
    return Tables(codes, tables[:, :, None], book, *sizes)


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


def makes(config: Config) -> tuple[str, ...]:
    """What weights have after it: tables that learn, or int8 ones that cannot."""
    return ("codes",) if config.centroids == "int8" else RULES.makes


def encoding(layer: Layer, config: Config) -> Codebook:
    """How a layer will be stored: as k-means stores it."""
    return kmeans.encoding(layer, config)


def solve(
    W: Float[Tensor, "rows cols"],
    stored: Codebook,
    known: calibrated.Known,
    damping: float,
    rounds: int,
    cycles: int,
    iterations: int,
) -> tuple[Encoded, float]:
    """Solve one weight for an encoding; what is stored, and the relative error of the layer's output."""
    apart, keep = None, known.keep
    if stored.outliers:
        apart = kmeans.heaviest(W if keep is None else W * keep, stored.outliers, known.weights)
    found, report = quantize(
        W, known.hessians, stored.bits, stored.rows_per_book or "tensor", stored.scales, stored.centroid_dtype, rounds,
        cycles, damping, keep, stored.survivors is None, apart, known.weights, iterations, known.curvature(damping),
    )  # fmt: skip
    masked = None if stored.survivors is None else keep
    outliers = None if apart is None else (apart, W)
    tensors = stored.pack(found.codes, found.tables[:, :, 0], masked, scales=found.scales, outliers=outliers)
    return (stored, tensors), report.relative_error


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Share block by block."""

    def solve_layer(W: Tensor, layer: Layer, known: calibrated.Known) -> tuple[Encoded, float]:
        # An embedding has too many rows to be chosen anew time and again.
        rounds = 0 if layer.kind == "embedding" else config.rounds
        stored = encoding(layer, config)
        return solve(W, stored, known, config.damping, rounds, config.cycles, config.iterations)

    return calibrated.compress(model, "share.lnq", config, config, context, solve_layer)


def with_feedback(model: PreTrainedModel, config: kmeans.Config, context: Context) -> StageReport:
    """`share.kmeans` with `feedback`: the start of LNQ, and its tables refitted."""
    options = calibrated.Options()

    def solve_layer(W: Tensor, layer: Layer, known: calibrated.Known) -> tuple[Encoded, float]:
        return solve(W, kmeans.encoding(layer, config), known, options.damping, 0, 1, config.iterations)

    by_fisher = config.importance == "fisher"
    return calibrated.compress(model, "share.kmeans", config, options, context, solve_layer, by_fisher)
