"""Affine grids the slow way: loops over rows, groups and levels, in float64."""

from __future__ import annotations

import numpy as np


def groups(cols: int, group_size: int | None) -> list[slice]:
    size = group_size or cols
    return [slice(start, min(start + size, cols)) for start in range(0, cols, size)]


def levels(scale: float, zero: int, bits: int) -> np.ndarray:
    return np.array([(code - int(zero)) * float(scale) for code in range(2**bits)])


def decode(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, group_size: int | None) -> np.ndarray:
    W = np.zeros(codes.shape)
    for row in range(codes.shape[0]):
        for group, here in enumerate(groups(codes.shape[1], group_size)):
            for col in range(here.start, here.stop):
                W[row, col] = (int(codes[row, col]) - int(zeros[row, group])) * float(scales[row, group])
    return W


def nearest(W: np.ndarray, scales: np.ndarray, zeros: np.ndarray, bits: int, group_size: int | None) -> np.ndarray:
    """The representable value nearest to each weight, found by looking at all of them."""
    found = np.zeros(W.shape)
    for row in range(W.shape[0]):
        for group, here in enumerate(groups(W.shape[1], group_size)):
            for col in range(here.start, here.stop):
                values = levels(scales[row, group], zeros[row, group], bits)
                found[row, col] = values[np.argmin(np.abs(values - W[row, col]))]
    return found


def min_max(w: np.ndarray, bits: int, shrink: float = 1.0) -> tuple[float, int]:
    """Scale and zero point of the asymmetric grid over [min(w, 0), max(w, 0)], both ends shrunk."""
    low, high = shrink * min(w.min(), 0.0), shrink * max(w.max(), 0.0)
    scale = (high - low) / (2**bits - 1)
    return scale, round(-low / scale)


def searched_error(w: np.ndarray, bits: int) -> float:
    """Least squared error of one group over the 80 shrunken ranges that GPTQ's code tries."""
    errors = []
    for step in range(80):
        scale, zero = min_max(w, bits, 1 - step / 100)
        values = levels(scale, zero, bits)
        errors.append(np.square(np.abs(values[None, :] - w[:, None]).min(axis=1)).sum())
    return min(errors)
