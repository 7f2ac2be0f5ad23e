"""Exact weighted k-means in one dimension: dynamic programming over all cuts of the sorted values, O(K n^2)."""

from __future__ import annotations

import numpy as np


def interval_cost(x: np.ndarray, h: np.ndarray) -> np.ndarray:
    """cost[a, b]: weighted squared error of the sorted values a..b-1 around their weighted mean; infinite if b < a."""
    n = len(x)
    cost = np.full((n + 1, n + 1), np.inf)
    for a in range(n + 1):
        mass = np.concatenate([[0.0], np.cumsum(h[a:])])
        moment = np.concatenate([[0.0], np.cumsum(h[a:] * (x[a:] - x[min(a, n - 1)]))])
        square = np.concatenate([[0.0], np.cumsum(h[a:] * (x[a:] - x[min(a, n - 1)]) ** 2)])
        cost[a, a:] = np.maximum(square - moment**2 / np.where(mass > 0, mass, 1.0), 0.0)
    return cost


def least_error(x: np.ndarray, clusters: int, h: np.ndarray | None = None) -> float:
    """Smallest sum of h * (x - nearest centroid)^2 that any `clusters` centroids reach; x and h are [n]."""
    order = np.argsort(x, kind="stable")
    x = np.asarray(x, np.float64)[order]
    h = np.ones_like(x) if h is None else np.asarray(h, np.float64)[order]
    cost = interval_cost(x, h)
    error = cost[0]
    for _ in range(clusters - 1):
        error = (error[:, None] + cost).min(axis=0)
    return float(error[-1])


def error_of(x: np.ndarray, centroids: np.ndarray, codes: np.ndarray, h: np.ndarray | None = None) -> float:
    """Weighted squared error of one book."""
    h = np.ones(len(x)) if h is None else np.asarray(h, np.float64)
    return float((h * (np.asarray(x, np.float64) - np.asarray(centroids, np.float64)[codes]) ** 2).sum())
