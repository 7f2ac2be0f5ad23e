"""Weighted one-dimensional k-means, (nearly) to the optimum: clusters are intervals of the sorted values.

A book x [n] with weights h [n] gets K centroids c that minimise

    SSE(c) = sum_i h_i * min_k (x_i - c_k)^2

Let M(p) and S(p) be the sums of h and of h*x over the p smallest values. An interval [a, b) around its mean lowers
sum_i h_i x_i^2 by

    gain(a, b) = (S(b) - S(a))^2 / (M(b) - M(a)),

so the best clustering is the path 0 = p_0 <= p_1 <= ... <= p_K = n of largest total gain. Over all positions that
dynamic programme costs O(K n^2). Here each boundary p_k only chooses among R candidate positions, and *all boundaries
move at once* (Viterbi, O(K R^2)); the candidates start wide and close in:

1. R positions around the k-th K-quantile of density^(1/3), the allocation of centroids that is optimal for many of
   them (Panter and Dite, 1951). They span more than one cluster to either side and lie on one grid shared by all
   boundaries, so one path can move a whole cluster from the bulk of the weights to their tail: the move that Lloyd's
   iteration cannot make.
2. positions around the path found, in steps of 1/8, 1/32, ... of the neighbouring cluster, down to single values.

Steps back (b < a) are ruled out: one over an interval of mean zero would cost nothing, and two steps forth from there
would gain what another interval has gained already.

Books of at most `EXACT_VALUES` values take every position as a candidate: the result is then the exact optimum.

Shapes: values and weights [books, n]; codes uint8 [books, n]; centroids float32 [books, K], ascending.
Time O(n log n + K R^2 log(n / K)) a book, memory O(n + K R^2).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from hf_slim.core.errors import SlimError
from hf_slim.encodings.codebook import as_stored
from hf_slim.sharing.checks import check_books

EXACT_VALUES = 64  # books up to this length are solved exactly
GRID_CELLS = 6  # cells of the first grid for every cluster: 4 cells leave 1.0016 x the optimum, 6 leave 1.0005
GRID_REACH = 8  # cells to either side that a boundary may move in the first pass
REACH = 4  # candidates to either side in every later pass
FEW = 24  # boundaries up to which comparing with each one beats a binary search
DENSITY_SAMPLES = 1 << 15  # sorted values that the density of a long book is estimated from
LONG = 1 << 15  # values of a book from which it pays to sort limits into bins
BINS = 1 << 14
# Candidate pairs or values worked on at a time: what is computed stays in the cache. 1536 rows of 576 values, 16
# clusters, the first pass on one AVX2 thread: 170 ms in one piece, 27 ms in pieces of 1 << 19.
CHUNK = 1 << 19


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
            order = _argsort(x)
            c = _fit(x.gather(1, order), weights[part].detach().gather(1, order), clusters, iterations)
        if with_zero is not None:
            c = _move_to_zero(c, with_zero[part])
        centroids[part] = _round(c, centroid_dtype)
        codes[part] = nearest(x, centroids[part])
    return centroids, codes


def _fit(
    x: Float[Tensor, "books n"], h: Float[Tensor, "books n"] | None, clusters: int, iterations: int
) -> Float[Tensor, "books clusters"]:
    """Centroids (float64, ascending) of sorted values x with weights h."""
    sample = x[:, :: max(1, x.shape[1] // (64 * clusters))]  # mostly enough to see that there are more
    if ((sample[:, 1:] != sample[:, :-1]).sum(1) >= clusters).all():
        return _fit_many(x, h, clusters, iterations)
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
    centre = x[:, x.shape[1] // 2, None]
    x = x - centre
    M, S = _prefix_sums(x, h)
    p = _boundaries(x, M, S, clusters, iterations)
    mass, moment = M.gather(1, p).diff(dim=1), S.gather(1, p).diff(dim=1)
    # A cluster without weight takes the value it starts at, which keeps the centroids ascending.
    empty = x.gather(1, p[:, :-1].clamp(max=x.shape[1] - 1))
    return centre + torch.where(mass > 0, moment / mass, empty.double()).cummax(1).values


def _prefix_sums(
    x: Float[Tensor, "books n"], h: Float[Tensor, "books n"] | None
) -> tuple[Float[Tensor, "books n1"], Float[Tensor, "books n1"]]:
    """M(p) and S(p) for p = 0..n, in float64: their differences must be exact for single values."""
    books, n = x.shape
    S = x.new_zeros(books, n + 1, dtype=torch.float64)
    if h is None:
        torch.cumsum(x, 1, dtype=torch.float64, out=S[:, 1:])
        return torch.arange(n + 1, dtype=torch.float64, device=x.device).expand(books, -1), S
    h = h.double()
    total = h.sum(1, keepdim=True)
    h = torch.where(total > 0, (h * (2.0**52 / total)).round_(), 1.0)  # whole numbers: no sum of them is rounded
    M = torch.zeros_like(S)
    torch.cumsum(h, 1, out=M[:, 1:])
    torch.cumsum(h * x.double(), 1, out=S[:, 1:])  # converted first: torch mixes types ten times as slowly
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
    share, reach = mass / M[:, -1:], gap / (x[:, -1:] - x[:, :1]).clamp(min=torch.finfo(x.dtype).tiny)
    growth = (share * reach**2).float().pow_(1 / 3)
    # No gap may claim more than one cluster: beyond an outlier there is nothing to cut.
    for _ in range(3):
        growth = growth.minimum(growth.sum(1, keepdim=True) * (GRID_CELLS / cells))
    integral = growth.cumsum(1)
    level = torch.arange(1, cells, dtype=integral.dtype, device=x.device) / cells
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
    m, s = (sums.gather(1, flat).view(shape).permute(1, 2, 0).contiguous() for sums in (M, S))
    mass = (m[1:, None] - m[:-1, :, None]).add_(torch.finfo(m.dtype).tiny)  # an empty interval gains 0 / tiny = 0
    gain = (s[1:, None] - s[:-1, :, None]).square_().div_(mass)  # [clusters, from, to, books]: books are in a row
    gain.masked_fill_(mass < 0, -math.inf)

    # best[j, b]: largest gain of the clusters so far, the last of them ending at its candidate j.
    best, came = gain[0, 0], []
    for k in range(1, len(gain)):
        best, last = (best[:, None] + gain[k]).max(0)
        came.append(last)
    chosen = [torch.zeros_like(best[:1], dtype=torch.long)]  # the ends have one candidate
    for last in reversed(came):
        chosen.append(last.gather(0, chosen[-1]))
    chosen.append(chosen[0])
    path = candidates.gather(2, torch.cat(chosen[::-1]).T[:, :, None])[:, :, 0]
    # Steps back over values without weight are free: take them out.
    return path.cummax(1).values


def _sort(x: Float[Tensor, "books n"]) -> Float[Tensor, "books n"]:
    """Each row ascending. On CPUs numpy sorts with vector instructions: 8 ms for 900,000 values, torch needs 100."""
    if x.device.type == "cpu":
        return torch.from_numpy(np.sort(x.numpy(), axis=1))
    return x.sort(1).values


def _argsort(x: Float[Tensor, "books n"]) -> Int[Tensor, "books n"]:
    """Order of each row: 20 ms by numpy for 1536 rows of 576 values, 48 ms by torch."""
    return torch.from_numpy(np.argsort(x.numpy(), axis=1)) if x.device.type == "cpu" else x.argsort(1)


def nearest(x: Float[Tensor, "books n"], c: Float[Tensor, "books clusters"]) -> UInt8[Tensor, "books n"]:
    """Index of the centroid nearest to each value; half way, the lower."""
    halfway = (c[:, 1:].double() + c[:, :-1].double()) / 2
    limit = halfway.float()  # rounded down, so that a float32 value lies above `limit` exactly if above `halfway`
    limit = torch.where(limit.double() > halfway, limit.nextafter(torch.full_like(limit, -torch.inf)), limit)
    if x.shape[1] >= LONG and limit.shape[1] > 1:
        return torch.stack([_nearest_by_bins(*book) for book in zip(x, limit, strict=True)])
    if limit.shape[1] >= FEW:
        return torch.searchsorted(limit, x.contiguous(), out_int32=True).to(torch.uint8)
    codes = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for k in range(limit.shape[1]):
        codes += x > limit[:, k, None]
    return codes


def _nearest_by_bins(x: Float[Tensor, " n"], limit: Float[Tensor, " limits"]) -> UInt8[Tensor, " n"]:
    """How many limits lie below each value: those in lower bins, and that of its own bin if it does.

    The bin of a value never falls as the value grows, whatever is rounded. Values cost the same for any number of
    limits, and a quarter of 15 comparisons. Limits too close for the bins take the binary search.
    """
    width = (limit[-1] - limit[0]) / (BINS - 2)

    def bin_of(values: Tensor) -> Tensor:
        return (values - limit[0]).div_(width).add_(1).clamp_(0, BINS - 1).to(torch.int32)

    own = bin_of(limit) if width > 0 else torch.zeros_like(limit, dtype=torch.int32)
    if (own.diff() < 1).any():
        return torch.searchsorted(limit, x.contiguous(), out_int32=True).to(torch.uint8)
    below = torch.zeros(BINS + 1, dtype=torch.uint8, device=x.device)
    below[own.long() + 1] = 1
    threshold = torch.full((BINS,), math.inf, device=x.device)
    threshold[own.long()] = limit
    bins = bin_of(x)
    return below.cumsum(0, dtype=torch.uint8).index_select(0, bins) + (x > threshold.index_select(0, bins))


def _round(c: Float[Tensor, "books clusters"], dtype: torch.dtype) -> Float[Tensor, "books clusters"]:
    widest = 127 * torch.finfo(torch.float16).max if dtype == torch.int8 else torch.finfo(dtype).max
    largest = c.abs().max().item() if c.numel() else 0.0
    if largest > widest:
        raise SlimError(
            f"a centroid of {largest:.3g} does not fit {dtype}, whose largest number is {widest:.3g}: "
            "store centroids as bfloat16 or float32"
        )
    return as_stored(c.float(), dtype)


def _move_to_zero(
    c: Float[Tensor, "books clusters"], books_with_zero: Bool[Tensor, " books"]
) -> Float[Tensor, "books clusters"]:
    nearest = torch.arange(c.shape[1], device=c.device) == c.abs().argmin(1, keepdim=True)
    return c.masked_fill(nearest & books_with_zero[:, None], 0.0)
