"""Codebooks by the loss of the layer's output, entry by entry and column by column, in float64.

    loss = sum_r (w_r - q_r) H_r (w_r - q_r)^T

P of a row is the 0/1 matrix [cols, entries * d] with a one where column c takes coordinate c mod d of an entry.
"""

from __future__ import annotations

import numpy as np


def loss(W: np.ndarray, Q: np.ndarray, hessian_of_row) -> float:
    return sum(float((w - q) @ hessian_of_row(r) @ (w - q)) for r, (w, q) in enumerate(zip(W, Q, strict=True)))


def membership(codes: np.ndarray, entries: int, d: int, scale: float = 1.0) -> np.ndarray:
    P = np.zeros((len(codes) * d, entries * d))
    for run, code in enumerate(codes):
        for i in range(d):
            P[run * d + i, code * d + i] = scale
    return P


def best_table(W: np.ndarray, codes: np.ndarray, entries: int, d: int, hessian_of_row, scales=None) -> np.ndarray:
    """c = (sum P'HP)^-1 sum P'Hw for rows that share one table; [entries, d], zero where an entry has no members."""
    A, b = np.zeros((entries * d, entries * d)), np.zeros(entries * d)
    for r, w in enumerate(W):
        P = membership(codes[r], entries, d, 1.0 if scales is None else scales[r])
        A += P.T @ hessian_of_row(r) @ P
        b += P.T @ hessian_of_row(r) @ w
    return (np.linalg.pinv(A) @ b).reshape(entries, d)


def descend(W: np.ndarray, Q: np.ndarray, table_of_row, hessian_of_row, d: int) -> np.ndarray:
    """One cycle: each run of columns in turn takes the entry with which the whole row's loss is least."""
    Q = Q.copy()
    codes = np.zeros((len(W), W.shape[1] // d), dtype=int)
    for r, w in enumerate(W):
        H = hessian_of_row(r)
        for run in range(codes.shape[1]):
            here = slice(run * d, (run + 1) * d)
            found = []
            for entry in table_of_row(r):
                tried = Q[r].copy()
                tried[here] = entry
                found.append((w - tried) @ H @ (w - tried))
            codes[r, run] = int(np.argmin(found))
            Q[r, here] = table_of_row(r)[codes[r, run]]
    return codes
