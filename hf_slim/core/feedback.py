"""Error feedback: choose the columns of a matrix one by one, and let later columns repair the error so far.

The loss of replacing W by Q is tr((W - Q) H (W - Q)^T). With H = R R^T, R upper triangular, it is
sum_j ||sum_{i <= j} (W_i - Q_i) R_ij||**2: term j holds no column after j, and is least, whatever came before, when Q_j
is the value nearest to W_j + sum_{i < j} (W_i - Q_i) R_ij / R_jj. What values there are to choose from is left to the
caller: an integer grid (GPTQ), a codebook, or zero.

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
# may be of any type that holds them.
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


def factor(H: Float[Tensor, "cols cols"], damping: float = 0.01, act_order: bool = True) -> Factor:
    """Order the columns, damp H and factorise it, with ten times the damping (up to 1) after every failure.

    Columns whose diagonal is zero get the mean of the others there.

    Raises:
        SingularHessian: even damping 1 failed.
    """
    diagonal = H.diagonal().float()
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if not dead.all() else torch.ones_like(diagonal[0])
    diagonal = torch.where(dead, mean, diagonal)
    order = torch.arange(len(H), device=H.device)
    if act_order:
        order = diagonal.argsort(descending=True, stable=True)
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
) -> tuple[UInt8[Tensor, "rows cols"], Float[Tensor, "rows cols"]]:
    """Round with error feedback on any grid whose entries are chosen one at a time.

    Args:
        W: weights; those pruned need not be zero: their removal is an error that the other columns repair.
        shared: from `factor`.
        round_column: called once for every column, in `shared.order`; gets weights that carry the feedback.
        block: longest run of columns in which every column is repaired by itself.
        keep: False where a weight is pruned: its value becomes exactly 0, its code that of 0.
        choose: decides that on the way, in place of `keep`.
        window: columns that `choose` decides about at a time.

    Returns:
        Codes, and the float32 values they stand for.
    """
    order = shared.order
    feedback = shared.root / shared.root.diagonal()
    # One row of memory for each column of W, in rounding order. `moving` holds the weights with feedback and then their
    # rounded values, `error` the original weights and then W - Q.
    error = W.float().t()[order]
    moving = error.clone()
    kept = None if keep is None else keep.t()[order].to(moving.dtype)
    if choose is not None:
        kept = torch.empty_like(moving)  # filled in run by run
    codes = torch.empty(moving.shape, dtype=torch.uint8, device=W.device)
    columns = list(zip(order.tolist(), moving, error, codes, strict=True))

    def sweep(start: int, stop: int, window: int) -> None:
        if stop - start > (window or block):
            unit = window or 1
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
        for j in range(start, stop):
            column, w, lost, code = columns[j]
            found, value = round_column(w if kept is None else w * kept[j], column)
            code.copy_(found)
            w.copy_(value if kept is None else value * kept[j])
            lost.sub_(w)
            if j + 1 < stop:
                moving[j + 1 : stop].addr_(feedback[j, j + 1 : stop], lost)

    sweep(0, len(order), 0 if choose is None else window)
    inverse = order.argsort()
    return codes[inverse].t().contiguous(), moving[inverse].t().contiguous()
