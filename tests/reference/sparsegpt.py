"""SparseGPT as elimination, one column after the other, in float64 (Frantar & Alistarh 2023, algorithm 1).

    before a run of columns   drop the weights of lowest w**2 / [H_F^-1]_jj, F the columns from j on
    after column j            w_rest <- w_rest - (w_j - x_j) / [H_F^-1]_jj * [H_F^-1]_j,rest

Every H_F is inverted anew. Nothing is triangular, and nothing is delayed.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from reference.gptq import damped
from reference.pruning import drop_smallest, n_m


def sparsegpt(
    W: np.ndarray, H: np.ndarray, sparsity: float, pattern: str, window: int, damping: float, earlier: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weights and keep; what is not in `earlier` is dropped first, and stays dropped."""
    W, H = W.astype(np.float64).copy(), damped(H, damping)
    rows, cols = W.shape
    keep = earlier.copy()
    inverses = [np.linalg.inv(H[j:, j:]) for j in range(cols)]
    for j in range(cols):
        if j % window == 0:
            stop = min(cols, j + window)
            score = np.stack([W[:, c] ** 2 / inverses[c][0, 0] * earlier[:, c] for c in range(j, stop)], axis=1)
            keep[:, j:stop] = _choose(score, sparsity, pattern, rows * j) & earlier[:, j:stop]
        lost = W[:, j] * ~keep[:, j]
        W[:, j] -= lost
        W[:, j + 1 :] -= np.outer(lost / inverses[j][0, 0], inverses[j][0, 1:])
    return W, keep


def _choose(score: np.ndarray, sparsity: float, pattern: str, before: int) -> np.ndarray:
    if pattern != "unstructured":
        n, m = map(int, pattern.split(":"))
        return np.array([n_m(row, n, m) for row in score.tolist()])
    count = round(sparsity * (before + score.size)) - round(sparsity * before)
    return np.array(drop_smallest(score.flatten().tolist(), count)).reshape(score.shape)


def least_squares(W: np.ndarray, H: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Row by row, the survivors that minimise (w - x) H (w - x)^T, by solving for them."""
    X = np.zeros(W.shape)
    for r, kept in enumerate(keep):
        if kept.any():
            X[r, kept] = np.linalg.solve(H[np.ix_(kept, kept)], H[kept] @ W[r])
    return X


def best_support(w: np.ndarray, H: np.ndarray, survivors: int) -> float:
    """The least error of one row over all supports of so many weights, each tried."""
    errors = []
    for chosen in combinations(range(len(w)), survivors):
        keep = np.zeros((1, len(w)), dtype=bool)
        keep[0, list(chosen)] = True
        d = w - least_squares(w[None], H, keep)[0]
        errors.append(d @ H @ d)
    return min(errors)
