"""AWQ's scale search, one number at a time, and SmoothQuant's scales."""

from __future__ import annotations

import numpy as np


def scale_grid(x, w, points, duo):
    """All scales to try, in order."""
    found = []
    for i in range(points):
        a = i / points
        for with_weights in [False, True] if duo else [False]:
            s = np.array([x[j] ** a / (w[j] ** (1 - a) if with_weights else 1.0) for j in range(len(x))])
            found.append(s / np.sqrt(s.max() * s.min()))
    return found


def weight_sizes(weights, group_size):
    """Mean over all rows of |W| / largest |W| of the group."""
    sizes = []
    for W in weights:
        for row in np.abs(W):
            sizes.append([row[j] / row[j // group_size * group_size :][:group_size].max() for j in range(len(row))])
    return np.mean(sizes, axis=0)


def loss(weights, X, s, rounded):
    """Mean squared change of the outputs, by running the inputs through: twice it is tr(E H E^T)."""
    total = 0.0
    for W in weights:
        Q = rounded(W * s) / s
        total += np.square(X @ W.T - X @ Q.T).sum() / len(X)
    return 2 * total


def search(weights, X, group_size, points, duo, rounded):
    """Scales of least loss, and all losses."""
    x = np.sqrt(2 * np.square(X).mean(0))
    grid = scale_grid(x, weight_sizes(weights, group_size), points, duo)
    losses = [loss(weights, X, s, rounded) for s in grid]
    return grid[int(np.argmin(losses))], losses
