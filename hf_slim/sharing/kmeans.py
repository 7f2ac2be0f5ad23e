"""Weight sharing by k-means: every weight becomes an index into a small table of centroids (Han et al., "Deep
Compression", arXiv:1510.00149; Fisher-weighted per row: Kim et al., "SqueezeLLM", arXiv:2306.07629).

A book x [n] (the whole matrix, one row, or a run of rows) with weights h [n] (1, or the diagonal of the Fisher
information) gets K = 2**bits centroids c that minimise

    SSE(c) = sum_i h_i * min_k (x_i - c_k)^2

In one dimension clusters are intervals of the sorted values. Let M(p) and S(p) be the sums of h and of h*x over the p
smallest values. An interval [a, b) around its mean lowers sum_i h_i x_i^2 by

    gain(a, b) = (S(b) - S(a))^2 / (M(b) - M(a)),

so the best clustering is the path 0 = p_0 <= p_1 <= ... <= p_K = n of largest total gain. Over all positions that
dynamic programme costs O(K n^2). Here each boundary p_k only chooses among R candidate positions, and *all boundaries
move at once* (Viterbi, O(K R^2)); the candidates start wide and close in:

1. R positions around the k-th K-quantile of density^(1/3), the allocation of centroids that is optimal for many of
   them (Panter and Dite, 1951). They span more than one cluster to either side and lie on one grid shared by all
   boundaries, so one path can move a whole cluster from the bulk of the weights to their tail: the move that Lloyd's
   iteration cannot make.
2. positions around the path found, in steps of 1/8, 1/32, ... of the neighbouring cluster, down to single values.

Where we differ from both papers: they run Lloyd's iteration on all n weights from linear or k-means++ starts, which
costs O(n K) a step and stays in poor local optima on heavy-tailed rows. Books of at most `EXACT_VALUES` values take
every position as a candidate: the result is then the exact optimum.

Shapes: values and weights [books, n]; codes uint8 [books, n]; centroids float32 [books, K], ascending.
Time O(n log n + K R^2 log(n / K)) a book, memory O(n + K R^2).
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from pydantic import Field, PositiveInt
from torch import Tensor
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.errors import SlimError
from hf_slim.core.layers import Encoded, encode_layers, only_survivors, plan_targets
from hf_slim.core.method import MethodConfig, Rules
from hf_slim.core.report import StageReport
from hf_slim.core.select import Layer, Select
from hf_slim.encodings import Codebook
from hf_slim.methods import find_method
from hf_slim.sharing.checks import check_books, check_matrix

Scope = Literal["tensor", "row"] | PositiveInt

EXACT_VALUES = 64  # books up to this length are solved exactly
GRID_CELLS = 6  # cells of the first grid for every cluster: 4 cells leave 1.0016 x the optimum, 6 leave 1.0005
GRID_REACH = 8  # cells to either side that a boundary may move in the first pass
REACH = 4  # candidates to either side in every later pass
FEW = 24  # boundaries up to which comparing with each one beats a binary search
DENSITY_SAMPLES = 1 << 16  # sorted values that the density of a long book is estimated from
CHUNK = 1 << 21  # candidate pairs or values worked on at a time: bounds memory, stays near the cache


RULES = Rules(makes=("centroids",), preserves=("zeros", "codes"), paper="Han et al. 2016, arXiv:1510.00149")


class Embeddings(MethodConfig):
    """How the input embedding is clustered, and with it a head that shares it: one table for all of it."""

    bits: int = Field(8, ge=1, le=8)


class Config(MethodConfig):
    """Options of `share.kmeans`.

    Attributes:
        bits: bits of an index; 2**bits centroids a book.
        scope: weights that share one table: the whole matrix, every row its own, or runs of so many rows.
        iterations: sweeps of refinement at most; a sweep that moves no boundary is the last.

    The default scope weighs fit against the size of the tables: 16 float16 centroids for each row of 576 weights are
    0.44 bits a weight. Relative squared error of nine SmolLM2-135M matrices at 4 bits, and the same brought to exactly
    4 bits at 6.02 dB a bit:

        rows a book    1        2        4        8        16       64       all
        bits           4.327    4.164    4.082    4.041    4.020    4.005    4.000
        error          0.00784  0.00904  0.00992  0.01064  0.01128  0.01247  0.01431
        at 4 bits      0.01235  0.01134  0.01111  0.01126  0.01160  0.01256  0.01432
    """

    per_layer: ClassVar[tuple[str, ...]] = ("bits", "scope")

    bits: int = Field(4, ge=1, le=8)
    scope: Scope = 4
    iterations: PositiveInt = 2
    layers: Select = Select()
    embeddings: Embeddings | None = None


def cluster(
    values: Float[Tensor, "books n"],
    clusters: int,
    weights: Float[Tensor, "books n"] | None = None,
    iterations: int = 2,
    centroid_dtype: torch.dtype = torch.float32,
    with_zero: Bool[Tensor, " books"] | None = None,
) -> tuple[Float[Tensor, "books clusters"], UInt8[Tensor, "books n"]]:
    """Cluster each row of `values` on its own so that the weighted squared error is (nearly) least.

    A book with at most `clusters` distinct values is reproduced exactly; its spare centroids repeat the largest value.
    A book whose weights are all zero counts as unweighted. A value halfway between two centroids takes the lower.

    Args:
        values: finite; the books to cluster.
        clusters: centroids a book, 1 to 256.
        weights: importance of each value, finite and >= 0; None weighs all the same.
        iterations: sweeps of refinement at most.
        centroid_dtype: the type the centroids will be stored in: they are rounded through it, and the codes are
            nearest for the rounded centroids.
        with_zero: books in which the centroid nearest to zero is moved to exactly 0.

    Returns:
        Centroids, float32 [books, clusters], ascending; codes, uint8 [books, n].

    Raises:
        SlimError: values or weights that are not finite, negative weights, shapes or a number of clusters that cannot
            be, centroids too large for `centroid_dtype`.
    """
    check_books(values, clusters, weights, iterations)
    books, n = values.shape
    reach = max(2 * GRID_REACH, EXACT_VALUES if n <= EXACT_VALUES else 0) + 1
    step = max(1, CHUNK // max(n, min(clusters, n) * reach**2))
    centroids = torch.empty(books, clusters, dtype=torch.float32, device=values.device)
    codes = torch.empty(books, n, dtype=torch.uint8, device=values.device)
    for start in range(0, books, step):
        part = slice(start, start + step)
        x = values[part].detach().float()
        if weights is None:
            c = _fit(_sort(x), None, clusters, iterations)
        else:
            order = x.argsort(1)
            c = _fit(x.gather(1, order), weights[part].detach().gather(1, order), clusters, iterations)
        if with_zero is not None:
            c = _move_to_zero(c, with_zero[part])
        centroids[part] = _round(c, centroid_dtype)
        codes[part] = _nearest(x, centroids[part])
    return centroids, codes


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
    per_book = {"tensor": rows, "row": 1}.get(scope, scope)
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


def _fit(
    x: Float[Tensor, "books n"], h: Float[Tensor, "books n"] | None, clusters: int, iterations: int
) -> Float[Tensor, "books clusters"]:
    """Centroids (float64, ascending) of sorted values x with weights h."""
    fresh = x[:, 1:] != x[:, :-1]
    many = fresh.sum(1) >= clusters
    if many.all():
        return _fit_many(x, h, clusters, iterations)
    c = x[:, -1:].double().repeat(1, clusters)
    rank = torch.cat([torch.zeros_like(fresh[:, :1]), fresh], 1)[~many].cumsum(1)
    c[~many] = c[~many].scatter(1, rank, x[~many].double())
    if many.any():
        c[many] = _fit_many(x[many], None if h is None else h[many], clusters, iterations)
    return c


def _fit_many(
    x: Float[Tensor, "books n"], h: Float[Tensor, "books n"] | None, clusters: int, iterations: int
) -> Float[Tensor, "books clusters"]:
    """As `_fit`, for books with more distinct values than clusters."""
    # Centred: gains of values far from zero would be differences of large, nearly equal numbers.
    centre = x[:, x.shape[1] // 2, None].double()
    x = x - centre
    M, S = _prefix_sums(x, h)
    p = _boundaries(x, M, S, clusters, iterations)
    mass, moment = M.gather(1, p).diff(dim=1), S.gather(1, p).diff(dim=1)
    # A cluster without weight takes the value it starts at, which keeps the centroids ascending.
    empty = x.gather(1, p[:, :-1].clamp(max=x.shape[1] - 1))
    return centre + torch.where(mass > 0, moment / mass, empty).cummax(1).values


def _prefix_sums(
    x: Float[Tensor, "books n"], h: Float[Tensor, "books n"] | None
) -> tuple[Float[Tensor, "books n1"], Float[Tensor, "books n1"]]:
    """M(p) and S(p) for p = 0..n, in float64: their differences must be exact for single values."""
    books, n = x.shape
    S = x.new_zeros(books, n + 1)
    if h is None:
        torch.cumsum(x, 1, out=S[:, 1:])
        return torch.arange(n + 1, dtype=x.dtype, device=x.device).expand(books, -1), S
    h = torch.where((h > 0).any(1, keepdim=True), h.double(), 1.0)
    M = torch.zeros_like(S)
    torch.cumsum(h, 1, out=M[:, 1:])
    torch.cumsum(h * x, 1, out=S[:, 1:])
    return M, S


def _boundaries(
    x: Float[Tensor, "books n"], M: Float[Tensor, "books n1"], S: Float[Tensor, "books n1"], clusters: int, sweeps: int
) -> Int[Tensor, "books clusters1"]:
    """Positions p_0 = 0 <= ... <= p_K = n at which the clusters begin and end."""
    books, n = x.shape
    if n <= EXACT_VALUES:
        everywhere = torch.arange(n + 1, device=x.device).expand(books, clusters + 1, -1)
        return _best_path(M, S, _pin_ends(everywhere.clone(), n))
    grid = _density_grid(x, M, GRID_CELLS * clusters)
    offset = torch.arange(-GRID_REACH, GRID_REACH + 1, device=x.device)
    cell = GRID_CELLS * torch.arange(clusters + 1, device=x.device)[:, None] + offset
    near = grid[:, cell.clamp_(0, GRID_CELLS * clusters).flatten()].view(books, clusters + 1, -1)
    p = _best_path(M, S, _pin_ends(near, n))
    levels = max(0, math.ceil(math.log(n / clusters / 8, 8)))
    for _ in range(sweeps):
        before = p
        for fraction in [8.0**-level / 8 for level in range(levels)] + [0.0]:
            p = _best_path(M, S, _pin_ends(_around(p, fraction), n))
        if torch.equal(p, before):
            break
    return p


def _density_grid(x: Float[Tensor, "books n"], M: Float[Tensor, "books n1"], cells: int) -> Int[Tensor, "books cells1"]:
    """Positions 0..n that cut the integral of density^(1/3) into `cells` equal parts.

    Between neighbouring values the density is weight / gap, so the integral grows by weight^(1/3) * gap^(2/3). A
    repeated value (gap 0) hands its weight on to the next gap.
    """
    n = x.shape[1]
    if n > DENSITY_SAMPLES:
        # Smoothstep spacing: single values in the tails, where few weights span most of the range.
        t = torch.linspace(0, 1, DENSITY_SAMPLES, dtype=torch.float64, device=x.device)
        sample = ((3 * t**2 - 2 * t**3) * (n - 1)).round().long().unique()
    else:
        sample = torch.arange(n, device=x.device)
    gap = x[:, sample].diff(dim=1)
    upto = M[:, sample[1:] + 1].where(gap > 0, 0).cummax(1).values
    mass = upto.diff(dim=1, prepend=torch.zeros_like(upto[:, :1]))
    growth = (mass * gap**2).pow_(1 / 3)
    # No gap may claim more than one cluster: beyond an outlier there is nothing to cut.
    for _ in range(3):
        growth = growth.minimum(growth.sum(1, keepdim=True) * (GRID_CELLS / cells))
    integral = growth.cumsum(1)
    level = torch.arange(1, cells, dtype=x.dtype, device=x.device) / cells
    at = torch.searchsorted(integral, (level * integral[:, -1:]).contiguous())
    inner = sample[at.clamp_(max=len(sample) - 1)] + 1
    return torch.cat([torch.zeros_like(inner[:, :1]), inner, torch.full_like(inner[:, :1], n)], 1)


def _around(p: Int[Tensor, "books clusters1"], fraction: float) -> Int[Tensor, "books clusters1 candidates"]:
    """Candidates around each boundary in steps of a fraction of the cluster on that side, at least one value."""
    size = p.diff(dim=1)
    none = torch.zeros_like(p[:, :1])
    right = (torch.cat([size, none], 1) * fraction).long().clamp_(min=1)[:, :, None]
    left = (torch.cat([none, size], 1) * fraction).long().clamp_(min=1)[:, :, None]
    steps = torch.arange(REACH + 1, device=p.device)
    return p[:, :, None] + torch.cat([-left * steps[1:].flip(0), right * steps], 2)


def _pin_ends(
    candidates: Int[Tensor, "books clusters1 candidates"], n: int
) -> Int[Tensor, "books clusters1 candidates"]:
    """The same candidates, in place, within 0..n, the first boundary at 0 and the last at n."""
    candidates.clamp_(0, n)
    candidates[:, 0], candidates[:, -1] = 0, n
    return candidates


def _best_path(
    M: Float[Tensor, "books n1"], S: Float[Tensor, "books n1"], candidates: Int[Tensor, "books clusters1 candidates"]
) -> Int[Tensor, "books clusters1"]:
    """One candidate for each boundary, ascending, with the largest total gain."""
    flat, shape = candidates.flatten(1), candidates.shape
    m, s = (sums.gather(1, flat).view(shape).transpose(0, 1).contiguous() for sums in (M, S))
    moment2 = (s[1:, :, None, :] - s[:-1, :, :, None]).square_()  # [clusters, books, from, to]
    mass = m[1:, :, None, :] - m[:-1, :, :, None]
    moment2.masked_fill_(mass < 0, math.inf)  # backwards: a gain of minus infinity
    mass.add_(torch.finfo(m.dtype).tiny)  # empty: a gain of 0 / tiny = 0

    best = [moment2[0, :, 0] / mass[0, :, 0]]  # best[k][b, j]: largest gain of clusters 0..k that end at candidate j
    for k in range(1, len(mass) - 1):
        best.append(torch.addcdiv(best[-1][:, :, None], moment2[k], mass[k]).amax(1))
    path = [candidates[:, -1, :1]]
    j = torch.zeros_like(path[0])
    # Only states on the path need the argument of their maximum: cheaper than keeping it for all.
    for k in range(len(mass) - 1, 0, -1):
        column = j[:, :, None].expand(-1, shape[2], 1)
        gain = moment2[k].gather(2, column) / mass[k].gather(2, column)
        j = (best[k - 1] + gain[:, :, 0]).argmax(1, keepdim=True)
        path.append(candidates[:, k].gather(1, j))
    path.append(candidates[:, 0, :1])
    # Steps back over values without weight are free: take them out.
    return torch.cat(path[::-1], 1).cummax(1).values


def _sort(x: Float[Tensor, "books n"]) -> Float[Tensor, "books n"]:
    """Each row ascending. On CPUs numpy sorts with vector instructions: 8 ms for 900,000 values, torch needs 100."""
    if x.device.type == "cpu":
        return torch.from_numpy(np.sort(x.numpy(), axis=1))
    return x.sort(1).values


def _nearest(x: Float[Tensor, "books n"], c: Float[Tensor, "books clusters"]) -> UInt8[Tensor, "books n"]:
    """Index of the centroid nearest to each value; half way, the lower."""
    halfway = (c[:, 1:].double() + c[:, :-1].double()) / 2
    limit = halfway.float()  # rounded down, so that a float32 value lies above `limit` exactly if above `halfway`
    limit = torch.where(limit.double() > halfway, limit.nextafter(torch.full_like(limit, -torch.inf)), limit)
    if limit.shape[1] >= FEW:
        return torch.searchsorted(limit, x.contiguous(), out_int32=True).to(torch.uint8)
    codes = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for k in range(limit.shape[1]):
        codes += x > limit[:, k, None]
    return codes


def _round(c: Float[Tensor, "books clusters"], dtype: torch.dtype) -> Float[Tensor, "books clusters"]:
    largest = c.abs().max().item() if c.numel() else 0.0
    if largest > torch.finfo(dtype).max:
        raise SlimError(
            f"a centroid of {largest:.3g} does not fit {dtype}, whose largest number is {torch.finfo(dtype).max:.3g}: "
            "store centroids as bfloat16 or float32"
        )
    return c.to(dtype).float()


def _move_to_zero(
    c: Float[Tensor, "books clusters"], books_with_zero: Bool[Tensor, " books"]
) -> Float[Tensor, "books clusters"]:
    nearest = torch.arange(c.shape[1], device=c.device) == c.abs().argmin(1, keepdim=True)
    return c.masked_fill(nearest & books_with_zero[:, None], 0.0)


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


def encoding(layer: Layer, config: Config) -> Codebook:
    """How a layer will be stored."""
    here = config.at(layer)
    bits, scope = here.bits, here.scope
    if layer.kind == "embedding" and config.embeddings is not None:
        bits, scope = config.embeddings.bits, "tensor"
    rows_per_book = {"tensor": None, "row": 1}.get(scope, scope) if isinstance(scope, str) else scope
    return Codebook(bits=bits, clusters=2**bits, rows_per_book=rows_per_book, **only_survivors(layer, bits))


def encode(W: Float[Tensor, "rows cols"], layer: Layer, config: Config, keep: Tensor | None) -> Encoded:
    """Cluster one weight. When the mask is stored, no centroid is spent on the pruned weights."""
    stored = encoding(layer, config)
    scope = stored.rows_per_book or "tensor"
    if keep is None or stored.survivors is None:
        codes, centroids = quantize(W, stored.bits, scope, None, keep, config.iterations)
        return stored, stored.pack(codes, centroids)
    codes, centroids = quantize(W, stored.bits, scope, keep.float(), None, config.iterations)
    return stored, stored.pack(codes, centroids, keep)


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Cluster the chosen layers of a model."""
    chosen = plan_targets(model, "share.kmeans", config)
    return StageReport(layers=encode_layers(model, chosen, find_method("share.kmeans"), config, context.progress))
