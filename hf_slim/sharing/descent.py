"""Codes and tables that lower the error of a layer's output, one at a time: what all calibrated codebooks share.

Row r of W is looked up: run j of d columns (d = 1 for single weights) takes entry codes[r, j] of the table of the row's
book, times the row's scale s_r where rows have one. With Q what that gives and one H for every run of rows
("guided": the Hessian of each group of outputs), the loss is

    L = sum_r (w_r - q_r) H (w_r - q_r)^T

and falls, or stays, with each of the three moves here:

    descend       one run of columns after the other, all rows at once: the best code given all others is the entry
                  nearest to q_j - G_j H_jj^-1 in the metric H_jj, where G = (Q - W) H
    refit_tables  all entries at once given the codes: c = (P^T H P)^-1 P^T H w, summed over the book's rows, where P
                  [cols, K d] says which entry a column takes
    refit_scales  s_r = q H w^T / q H q^T with q the row before scaling

P^T H P has (K d)^2 entries a book and costs rows cols^2 K d to form. Conjugate gradients do without: a step costs one
product with H, lowers L, and a few take it within float32 of the minimum. Entries without members stay as they are.
What is stored in few bits is rounded first, and kept only where L falls all the same.

Shapes: W, Q [rows, cols]; codes uint8 [rows, cols / d]; tables [books, K, d]; scales [rows]; H [groups, cols, cols],
the rows in as many runs. Time of a descent and of a step of `refit_tables`: rows cols^2, by matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from hf_slim.core.feedback import Factor, RoundColumn, damped, diagonal_blocks, error_feedback, factor

BLOCK = 64  # columns of G kept up to date one by one; the others are brought up to date by one matrix product
STEPS = 24  # of conjugate gradients at most
CLOSE = 1e-5  # they end where the gradient has fallen to this share
FAINT = 1e-6  # weight of columns that fill up the last run, as a share of the mean
FEW = 24  # entries up to which comparing with each one beats a binary search

RoundTables = Callable[[Tensor], Tensor]  # tables -> tables as they will be stored and read, in float32


class Tables(NamedTuple):
    """A weight that is looked up.

    Attributes:
        codes: entry of each run of columns.
        tables: as they are stored, in float32; ascending where d = 1.
        book: table of each row.
        scales: as they are stored, in float32; None for none.
    """

    codes: UInt8[Tensor, "rows runs"]
    tables: Float[Tensor, "books clusters d"]
    book: Int[Tensor, " rows"]
    scales: Float[Tensor, " rows"] | None = None

    def entries(self) -> Int[Tensor, "rows runs"]:
        """Places among all books' entries."""
        return self.codes.long() + (self.book * self.tables.shape[1])[:, None]

    def values(self, keep: Bool[Tensor, "rows cols"] | None = None) -> Float[Tensor, "rows cols"]:
        """Q."""
        return self.look_up(self.tables, keep)

    def look_up(
        self, tables: Float[Tensor, "books clusters d"], keep: Bool[Tensor, "rows cols"] | None
    ) -> Float[Tensor, "rows cols"]:
        """Q for other tables of the same shape."""
        Q = tables.flatten(0, 1)[self.entries().flatten()].view(len(self.book), -1)
        Q = Q if self.scales is None else Q * self.scales[:, None]
        return Q if keep is None else Q * keep

    def sum_members(
        self, G: Float[Tensor, "rows cols"], keep: Bool[Tensor, "rows cols"] | None, power: int = 1
    ) -> Float[Tensor, "books clusters d"]:
        """For each entry, the sum of s_r**power * G over the weights that take it: `look_up`, transposed."""
        G = G if keep is None else G * keep
        G = G if self.scales is None else G * self.scales[:, None] ** power
        books, clusters, d = self.tables.shape
        sums = torch.zeros(books * clusters, d, dtype=torch.float64, device=G.device)
        return sums.index_add_(0, self.entries().flatten(), G.reshape(-1, d).double()).view(books, clusters, d).float()


def row_runs(rows: int, hessians: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Each group's rows and its Hessian."""
    start = 0
    for part, H in zip(torch.empty(rows, 0).tensor_split(len(hessians)), hessians, strict=True):
        yield slice(start, start + len(part)), H
        start += len(part)


def times_hessians(
    E: Float[Tensor, "rows cols"], hessians: Float[Tensor, "groups cols cols"]
) -> Float[Tensor, "rows cols"]:
    """E H, each row with its group's H."""
    return torch.cat([E[rows] @ H for rows, H in row_runs(len(E), hessians)])


def losses(
    W: Float[Tensor, "rows cols"], Q: Float[Tensor, "rows cols"], hessians: Float[Tensor, "groups cols cols"]
) -> Float[Tensor, " rows"]:
    """(w_r - q_r) H (w_r - q_r)^T, in float64."""
    E = W - Q
    return (times_hessians(E, hessians).double() * E).sum(1)


def rounder(found: Tables, metrics: Float[Tensor, "runs d d"] | None, rows: slice) -> RoundColumn:
    """What rounds single columns, or runs of them, to the nearest entry of some rows' tables.

    Args:
        found: tables and scales; the codes are not looked at.
        metrics: of each run of columns; unused for single columns.
        rows: the rows that will be rounded.
    """
    scales = None if found.scales is None else found.scales[rows]
    if found.tables.shape[2] == 1 or metrics is None:
        return _scalar_rounder(found.tables[found.book[rows], :, 0], scales)
    return _vector_rounder(found.tables, found.book[rows], metrics, scales)


def _scalar_rounder(tables: Float[Tensor, "rows clusters"], scales: Tensor | None) -> RoundColumn:
    by_row = tables if scales is None else tables * scales[:, None]
    halfway, by_entry = (by_row[:, 1:] + by_row[:, :-1]) / 2, by_row.t().contiguous()
    limits = halfway.contiguous() if halfway.shape[1] >= FEW else halfway.t().contiguous()

    def round_column(w: Tensor, column: int) -> tuple[Tensor, Tensor]:
        few = limits.shape[0] == by_entry.shape[0] - 1
        codes = (w > limits).sum(0) if few else torch.searchsorted(limits, w[:, None])[:, 0]
        return codes, by_entry.gather(0, codes[None])[0]

    return round_column


def _vector_rounder(
    tables: Float[Tensor, "books clusters d"],
    book: Int[Tensor, " rows"],
    metrics: Float[Tensor, "runs d d"],
    scales: Tensor | None,
) -> RoundColumn:
    d = tables.shape[2]

    def round_columns(w: Tensor, column: int) -> tuple[Tensor, Tensor]:
        wanted = w if scales is None else w / scales
        turned = tables @ metrics[column // d]
        norms = (turned * tables).sum(2)
        if len(tables) == 1:
            codes = torch.addmm(norms, wanted.t(), turned[0].t(), alpha=-2).argmin(1)
        else:
            products = torch.bmm(turned[book], wanted.t()[:, :, None])[:, :, 0]
            codes = torch.sub(norms[book], products, alpha=2).argmin(1)
        values = tables[book, codes].t()
        return codes, values if scales is None else values * scales

    return round_columns


class Curvature(NamedTuple):
    """What the layers with one input share.

    Attributes:
        hessians: damped.
        factors: of each of them.
    """

    hessians: Float[Tensor, "groups cols cols"]
    factors: tuple[Factor, ...]

    @property
    def damping(self) -> float:
        """The largest damping that was needed."""
        return max(shared.damping for shared in self.factors)

    def importance(self, rows: int) -> Float[Tensor, "rows cols"]:
        """What the loss charges for the squared rounding error of each weight."""
        parts = zip(row_runs(rows, self.hessians), self.factors, strict=True)
        return torch.cat([shared.importance().expand(run.stop - run.start, -1) for (run, _), shared in parts])


def pad(hessians: Float[Tensor, "groups cols cols"], dim: int) -> Float[Tensor, "groups padded padded"]:
    """H with columns that hardly count, up to a multiple of `dim`."""
    missing = -hessians.shape[1] % dim
    if not missing:
        return hessians
    padded = F.pad(hessians.float(), (0, missing, 0, missing))
    faint = FAINT * hessians.diagonal(dim1=1, dim2=2).float().mean(1, keepdim=True)
    padded.diagonal(dim1=1, dim2=2)[:, -missing:] = faint
    return padded


def curvature_of(hessians: Float[Tensor, "groups width width"], damping: float, run: int = 1) -> Curvature:
    """Damp and factorise each Hessian, see `core.feedback.factor`; padded to whole runs.

    Raises:
        SingularHessian: as `factor`.
    """
    hessians = pad(hessians, run)
    factors = tuple(factor(H, damping, run=run) for H in hessians)
    return Curvature(torch.stack([damped(H, f.damping) for H, f in zip(hessians, factors, strict=True)]), factors)


def feed_back(
    W: Float[Tensor, "rows cols"],
    found: Tables,
    known: Curvature,
    keep: Bool[Tensor, "rows cols"] | None = None,
) -> Tables:
    """Codes chosen anew, with error feedback."""
    d = found.tables.shape[2]
    parts = []
    for (rows, _), shared in zip(row_runs(len(W), known.hessians), known.factors, strict=True):
        nearest = rounder(found, shared.metrics(d) if d > 1 else None, rows)
        parts.append(error_feedback(W[rows], shared, nearest, keep=None if keep is None else keep[rows], run=d)[0])
    return found._replace(codes=torch.cat(parts))


def descend(
    W: Float[Tensor, "rows cols"],
    found: Tables,
    hessians: Float[Tensor, "groups cols cols"],
    keep: Bool[Tensor, "rows cols"] | None = None,
) -> Tables:
    """One cycle of coordinate descent on the codes."""
    Q = found.values(keep)
    d = found.tables.shape[2]
    parts = []
    for rows, H in row_runs(len(W), hessians):
        nearest = rounder(found, diagonal_blocks(H, d) if d > 1 else None, rows)
        kept = None if keep is None else keep[rows]
        parts.append(_descend(W[rows], Q[rows], H, nearest, d, kept))
    return found._replace(codes=torch.cat(parts))


def _descend(
    W: Float[Tensor, "rows cols"],
    Q: Float[Tensor, "rows cols"],
    H: Float[Tensor, "cols cols"],
    nearest: RoundColumn,
    d: int,
    keep: Bool[Tensor, "rows cols"] | None,
) -> UInt8[Tensor, "rows runs"]:
    """The codes of a cycle, for rows with one H."""
    q = Q.t().contiguous()
    error = q - W.t()
    kept = None if keep is None else keep.t().to(q.dtype)
    codes = torch.empty(len(q) // d, q.shape[1], dtype=torch.uint8, device=q.device)
    inverses = torch.linalg.inv(diagonal_blocks(H, d)) if d > 1 else H.diagonal().reciprocal()[:, None, None]
    for first in range(0, len(q), BLOCK):
        last = min(first + BLOCK, len(q))
        G = H[first:last] @ error
        for j in range(first, last, d):
            here, local = slice(j, j + d), slice(j - first, j - first + d)
            target = q[here] - inverses[j // d] @ G[local]
            if kept is not None:
                target *= kept[here]
            code, value = nearest(target[0] if d == 1 else target, j)
            value = value.view(d, -1) if kept is None else value.view(d, -1) * kept[here]
            step = value - q[here]
            error[here] += step
            G.addmm_(H[first:last, here], step)
            codes[j // d] = code
    return codes.t().contiguous()


def refit_tables(
    W: Float[Tensor, "rows cols"],
    found: Tables,
    hessians: Float[Tensor, "groups cols cols"],
    store: RoundTables,
    keep: Bool[Tensor, "rows cols"] | None = None,
    fixed: Bool[Tensor, "books clusters d"] | None = None,
) -> Tables:
    """The tables of least loss for the codes; a book keeps the table it has where rounding would cost more.

    Args:
        store: rounds tables as storing them will.
        keep: False where a weight is zero whatever its code.
        fixed: entries that must stay as they are.
    """

    def project(x: Tensor) -> Tensor:
        return x if fixed is None else x.masked_fill(fixed, 0.0)

    def curvature(x: Tensor) -> Tensor:
        return project(found.sum_members(times_hessians(found.look_up(x, keep), hessians), keep))

    diagonal = torch.cat([H.diagonal().expand(rows.stop - rows.start, -1) for rows, H in row_runs(len(W), hessians)])
    gradient = project(found.sum_members(times_hessians(W - found.values(keep), hessians), keep))
    step = conjugate_gradients(curvature, gradient, found.sum_members(diagonal, keep, power=2))
    changed = project(store(found.tables + step) - found.tables)
    # L(c + x) - L(c) = x^T P^T H P x - 2 x^T gradient
    rise = (changed.double() * (curvature(changed).double() - 2 * gradient.double())).sum((1, 2))
    tables = torch.where((rise < 0)[:, None, None], found.tables + changed, found.tables)
    return ascending(found._replace(tables=tables))


def conjugate_gradients(
    curvature: Callable[[Tensor], Tensor],
    gradient: Float[Tensor, "books clusters d"],
    diagonal: Float[Tensor, "books clusters d"],
) -> Float[Tensor, "books clusters d"]:
    """x with A x = gradient in every book, A positive semidefinite; no part of x leaves the gradient's Krylov space.

    Args:
        curvature: A x of all books at once.
        gradient: zero where x must be.
        diagonal: of A, the preconditioner.
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((1, 2), keepdim=True, dtype=torch.float64).float()

    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)
    x, residual = torch.zeros_like(gradient), gradient.clone()
    scaled = residual * inverse
    direction, power = scaled, dot(residual, scaled)
    goal = CLOSE**2 * power
    for _ in range(min(STEPS, 2 * gradient[0].numel())):
        active = power > goal
        if not active.any():
            break
        image = curvature(direction)
        bend = dot(direction, image)
        length = torch.where(active & (bend > 0), power / bend, 0.0)
        x, residual = x + length * direction, residual - length * image
        scaled = residual * inverse
        last, power = power, dot(residual, scaled)
        direction = scaled + torch.where(last > 0, power / last, 0.0) * direction
    return x


def refit_scales(
    W: Float[Tensor, "rows cols"],
    found: Tables,
    hessians: Float[Tensor, "groups cols cols"],
    keep: Bool[Tensor, "rows cols"] | None = None,
) -> Tables:
    """The row scales of least loss, rounded to float16, where there are any and the loss falls."""
    if found.scales is None:
        return found
    q = found._replace(scales=None).values(keep)
    turned = times_hessians(q, hessians)
    bend, slope = ((turned.double() * other).sum(1) for other in (q, W))
    scales = torch.where(bend > 0, slope / bend, 0.0).half()
    smallest, largest = torch.finfo(torch.float16).tiny, torch.finfo(torch.float16).max
    s, before = scales.double(), found.scales.double()
    better = (s >= smallest) & (s <= largest) & (s * (s * bend - 2 * slope) < before * (before * bend - 2 * slope))
    return found._replace(scales=torch.where(better, scales.float(), found.scales))


def ascending(found: Tables) -> Tables:
    """The same weight with the tables of single weights in order, as `rounder` needs them."""
    if found.tables.shape[2] > 1:
        return found
    tables, order = found.tables[:, :, 0].sort(1)
    rank = order.argsort(1).to(torch.uint8)
    codes = rank[found.book].gather(1, found.codes.long())
    return found._replace(codes=codes, tables=tables[:, :, None])
