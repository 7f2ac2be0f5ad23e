"""GPTQ as elimination, one column after the other, in float64 (Frantar et al. 2023, eq. 2 and 3).

    w_rest <- w_rest - (w_q - quant(w_q)) / [H^-1]_qq * [H^-1]_q,rest
    H^-1   <- H^-1 - [H^-1]_:,q [H^-1]_q,: / [H^-1]_qq

No Cholesky factor, no blocks, no permuted copies: `order` only says which column comes next.
"""

from __future__ import annotations

import numpy as np
from reference.affine import groups, levels


def damped(H: np.ndarray, damping: float) -> np.ndarray:
    H = H.astype(np.float64).copy()
    live = np.diag(H) > 0
    mean = np.diag(H)[live].mean()
    for column in range(len(H)):
        if not live[column]:
            H[column, column] = mean
        H[column, column] += damping * mean
    return H


def gptq(
    W: np.ndarray,
    H: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray,
    bits: int,
    group_size: int | None,
    damping: float,
    order: list[int],
    keep: np.ndarray | None = None,
) -> np.ndarray:
    """The quantized weights, for grids that are given."""
    W = W.astype(np.float64).copy()
    Q = np.zeros_like(W)
    inverse = np.linalg.inv(damped(H, damping))
    group_of = [
        group for group, here in enumerate(groups(W.shape[1], group_size)) for _ in range(here.start, here.stop)
    ]
    waiting = list(order)
    while waiting:
        q = waiting.pop(0)
        for row in range(W.shape[0]):
            values = levels(scales[row, group_of[q]], zeros[row, group_of[q]], bits)
            if keep is None or keep[row, q]:
                Q[row, q] = values[np.argmin(np.abs(values - W[row, q]))]
            share = (W[row, q] - Q[row, q]) / inverse[q, q]
            for column in waiting:
                W[row, column] -= share * inverse[q, column]
        inverse = inverse - np.outer(inverse[:, q], inverse[q, :]) / inverse[q, q]
    return Q
