"""Half-quadratic steps of one group, the slow way, in float64, with the auxiliary error written out as in the paper."""

from __future__ import annotations

import numpy as np


def shrink(r: float, p: float, beta: float) -> float:
    """argmin over e of |e|**p + beta/2 (r - e)**2, by the paper's generalised soft threshold."""
    return 0.0 if r == 0 else float(np.sign(r) * max(0.0, abs(r) - abs(r) ** (p - 1) / beta))


def loss(w: np.ndarray, scale: float, zero: int, bits: int, p: float) -> float:
    """sum |w - nearest grid value|**p"""
    values = np.array([(code - zero) * scale for code in range(2**bits)])
    return float(sum(np.abs(values - x).min() ** p for x in w))


def scale_of(
    w: np.ndarray, scale: float, zero: int, bits: int, p: float, beta: float, kappa: float, iterations: int
) -> float:
    """The best of all iterates that start at `scale`; every one is rounded to float16."""
    unit, best, least = scale, scale, loss(w / scale, 1.0, zero, bits, p)
    for _ in range(iterations):
        k = np.clip(np.round(w / scale), -zero, 2**bits - 1 - zero)
        r = (w - k * scale) / unit
        target = w / unit - np.array([shrink(x, p, beta) for x in r])
        scale = float(np.float16(unit * (k @ target) / (k @ k)))
        now = loss(w / unit, scale / unit, zero, bits, p)
        if now < least:
            best, least = scale, now
        beta *= kappa
    return best
