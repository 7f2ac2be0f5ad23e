"""Rounding with straight-through gradients, in float64, one weight after the other."""

from __future__ import annotations

import numpy as np


def round_straight(
    u: np.ndarray, scales: np.ndarray, zeros: np.ndarray, slope: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rounded weights, and the gradients for u and for the scales when `slope` is dL/dW."""
    W, d_u, d_scales = np.zeros(u.shape), np.zeros(u.shape), np.zeros(scales.shape)
    for r, g, c in np.ndindex(u.shape):
        steps = float(np.round(u[r, g, c])) - float(zeros[r, g])
        W[r, g, c] = steps * scales[r, g]
        d_u[r, g, c] = slope[r, g, c] * scales[r, g]
        d_scales[r, g] += slope[r, g, c] * steps
    return W, d_u, d_scales
