"""Slow, obvious low rank: whitened SVD as SVD-LLM's paper writes it, and every way to share ranks out."""

from __future__ import annotations

from itertools import product

import numpy as np


def whitened_svd(W: np.ndarray, H: np.ndarray, rank: int) -> np.ndarray:
    """[W S]_r S^-1 with S Sᵀ = H by Cholesky."""
    S = np.linalg.cholesky(H)
    U, s, V = np.linalg.svd(W @ S, full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ V[:rank] @ np.linalg.inv(S)


def loss(W: np.ndarray, M: np.ndarray, H: np.ndarray) -> float:
    """tr((W - M) H (W - M)ᵀ)."""
    return float(np.trace((W - M) @ H @ (W - M).T))


def cheapest(losses: list[list[float]], costs: list[list[int]], budget: float) -> float:
    """Least total loss of any choice within the budget."""
    choices = product(*(range(len(loss)) for loss in losses))
    found = [
        sum(loss[i] for loss, i in zip(losses, choice, strict=True))
        for choice in choices
        if sum(cost[i] for cost, i in zip(costs, choice, strict=True)) <= budget
    ]
    return min(found)
