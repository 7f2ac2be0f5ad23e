"""Error feedback: choose the columns of a matrix one by one, and let later columns repair the error so far.

The loss of replacing W by Q is tr((W - Q) H (W - Q)^T). With H = R R^T, R upper triangular, it is
sum_j ||sum_{i <= j} (W_i - Q_i) R_ij||**2: term j holds no column after j, and is least, whatever came before, when Q_j
is the value nearest to W_j + sum_{i < j} (W_i - Q_i) R_ij / R_jj. What values there are to choose from is left to the
caller: an integer grid (GPTQ), a codebook, or zero.

Vectors: j may stand for a run of columns that are chosen together, and R_jj for a triangular block. Term j is then
least for the vector nearest to W_j + (sum_{i < j} (W_i - Q_i) R_ij) R_jj^-1 in the metric R_jj R_jj^T
(`Factor.metrics`).

Shapes: W, Q [rows, cols]; H, R [cols, cols]. Rows are independent: layers with the same input can be stacked. Why R and
how this differs from the paper's algorithm, stands in `quantization/gptq.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

# What rounds one column: (weights [rows], column of W) -> (codes [rows], the values they stand for [rows]). The codes
# may be of any type that holds them. For runs of columns: weights and values [run, rows], and the run's first column.
RoundColumn = Callable[[Tensor, int], tuple[Tensor, Tensor]]

# What decides which weights of a run of columns survive: (weights [columns, rows] as they would be if all of them did,
# every error before the run repaired; columns of W [columns]) -> keep [columns, rows].
ChooseKeep = Callable[[Tensor, Tensor], Tensor]


class SingularHessian(ArithmeticError):
    """No damping made the Hessian positive definite, as with NaN or infinite inputs."""


class Factor(NamedTuple):
    """What layers with the same input share.

    Attributes:
        root: R [cols, cols], upper triangular, R R^T = damped H with rows and columns in `order`.
        order: column of W that is rounded first, second, ...
        damping: the damping that worked.
    """

    root: Float[Tensor, "cols cols"]
    order: Int[Tensor, " cols"]
    damping: float

    def importance(self) -> Float[Tensor, " cols"]:
        """R_jj**2, what the loss charges for the squared rounding error of a column; in W's order, never zero."""
        return torch.empty_like(self.root[0]).index_copy_(0, self.order, self.root.diagonal().square())

    def metrics(self, run: int) -> Float[Tensor, "runs run run"]:
        """R_jj R_jj^T of every run of columns, in W's order: what the loss charges for a run's rounding error."""
        blocks = diagonal_blocks(self.root, run)
        return torch.empty_like(blocks).index_copy_(0, self.order[::run] // run, blocks @ blocks.mT)


def diagonal_blocks(H: Float[Tensor, "cols cols"], run: int) -> Float[Tensor, "runs run run"]:
    """The square blocks along the diagonal; `run` divides the columns."""
    return H.unflatten(0, (-1, run)).unflatten(2, (-1, run)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def damped(H: Float[Tensor, "cols cols"], damping: float) -> Float[Tensor, "cols cols"]:
    """H + damping * mean(diag H) * I; columns whose diagonal is zero get the mean of the others there."""
    diagonal, mean = _filled_diagonal(H)
    return H.float().clone().diagonal_scatter(diagonal + damping * mean)


def _filled_diagonal(H: Float[Tensor, "cols cols"]) -> tuple[Float[Tensor, " cols"], Float[Tensor, ""]]:
    diagonal = H.diagonal().float()
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if not dead.all() else torch.ones_like(diagonal[0])
    return torch.where(dead, mean, diagonal), mean


def factor(H: Float[Tensor, "cols cols"], damping: float = 0.01, act_order: bool = True, run: int = 1) -> Factor:
    """Order the columns, damp H and factorise it, with ten times the damping (up to 1) after every failure.

    Columns whose diagonal is zero get the mean of the others there.

    Args:
        H: symmetric.
        damping: share of the mean diagonal that is added to it.
        act_order: columns with the largest diagonal first.
        run: columns that stay together, ordered by the sum of their diagonals; divides their number.

    Raises:
        SingularHessian: even damping 1 failed.
    """
    diagonal, mean = _filled_diagonal(H)
    order = torch.arange(len(H), device=H.device).view(-1, run)
    if act_order:
        order = order[diagonal.view(-1, run).sum(1).argsort(descending=True, stable=True)]
    order = order.flatten()
    backwards = order.flip(0)
    flipped, diagonal = H.float()[backwards][:, backwards], diagonal[backwards]
    while True:
        flipped.diagonal().copy_(diagonal + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(flipped)
        if not failed:
            return Factor(lower.flip(0, 1), order, damping)
        if damping >= 1:
            raise SingularHessian(f"not positive definite with damping {damping:g}")
        damping = min(1.0, 10 * damping)


def error_feedback(
    W: Float[Tensor, "rows cols"],
    shared: Factor,
    round_column: RoundColumn,
    block: int = 32,
    keep: Bool[Tensor, "rows cols"] | None = None,
    choose: ChooseKeep | None = None,
    window: int = 128,
    run: int = 1,
) -> tuple[UInt8[Tensor, "rows runs"], Float[Tensor, "rows cols"]]:
    """Round with error feedback on any grid whose entries are chosen one at a time, or run by run.

    Args:
        W: weights; those pruned need not be zero: their removal is an error that the other columns repair.
        shared: from `factor`.
        round_column: called once for every column, in `shared.order`; gets weights that carry the feedback.
        block: longest run of columns in which every column is repaired by itself.
        keep: False where a weight is pruned: its value becomes exactly 0, its code that of 0.
        choose: decides that on the way, in place of `keep`.
        window: columns that `choose` decides about at a time.
        run: columns that a code stands for; `factor` was told of it too. Not together with `choose`.

    Returns:
        Codes, one for each run of columns, and the float32 values they stand for.
    """
    order = shared.order
    feedback = _feedback(shared.root, run)
    # One row of memory for each column of W, in rounding order. `moving` holds the weights with feedback and then their
    # rounded values, `error` the original weights and then W - Q.
    error = W.float().t()[order]
    moving = error.clone()
    kept = None if keep is None else keep.t()[order].to(moving.dtype)
    if choose is not None:
        kept = torch.empty_like(moving)  # filled in run by run
    codes = torch.empty(len(moving) // run, len(W), dtype=torch.uint8, device=W.device)
    pieces = (order[::run].tolist(), *(_runs(part, run) for part in (moving, error)), codes)
    columns = list(zip(*pieces, strict=True))

    def sweep(start: int, stop: int, window: int) -> None:
        if stop - start > max(window or block, run):
            unit = window or run
            middle = start + unit * max(1, (stop - start) // (2 * unit))
            sweep(start, middle, window)
            moving[middle:stop].addmm_(feedback[start:middle, middle:stop].t(), error[start:middle])
            return sweep(middle, stop, window)
        if choose is not None and kept is not None and window:
            here = slice(start, stop)
            # `moving` repairs as if the run's other columns were still as in W; they will have moved themselves.
            left = torch.linalg.solve_triangular(
                feedback[here, here].t(), error[here] - moving[here], upper=False, unitriangular=True
            )
            kept[here] = choose(error[here] - left, order[here])
            return sweep(start, stop, 0)
        for j in range(start, stop, run):
            column, w, lost, code = columns[j // run]
            here = None if kept is None else kept[j] if run == 1 else kept[j : j + run]
            found, value = round_column(w if here is None else w * here, column)
            code.copy_(found)
            w.copy_(value if here is None else value * here)
            lost.sub_(w)
            if j + run < stop:
                _repair(moving[j + run : stop], feedback[j : j + run, j + run : stop], lost)

    sweep(0, len(order), 0 if choose is None else window)
    inverse = order.argsort()
    return codes[inverse[::run] // run].t().contiguous(), moving[inverse].t().contiguous()


def _feedback(root: Float[Tensor, "cols cols"], run: int) -> Float[Tensor, "cols cols"]:
    """R_ij R_jj^-1: what the errors of columns i before run j add to its weights."""
    if run == 1:
        return root / root.diagonal()
    by_run = root.unflatten(1, (-1, run)).transpose(0, 1)
    solved = torch.linalg.solve_triangular(diagonal_blocks(root, run), by_run, upper=True, left=False)
    return solved.transpose(0, 1).flatten(1)


def _runs(columns: Float[Tensor, "cols rows"], run: int) -> Tensor:
    """Single columns [cols, rows], or runs of them [runs, run, rows]; a view."""
    return columns if run == 1 else columns.unflatten(0, (-1, run))


def _repair(rest: Tensor, feedback: Tensor, lost: Tensor) -> None:
    if lost.dim() == 1:
        rest.addr_(feedback[0], lost)
    else:
        rest.addmm_(feedback.t(), lost)
