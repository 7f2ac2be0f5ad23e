"""Learned step size quantization the slow way: one weight at a time, in float64, from the papers' equations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from reference.affine import groups


@dataclass
class Case:
    """A weight matrix, its grid, and the gradient of some loss with respect to the rounded weights."""

    W: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    slope: np.ndarray
    lowest: int
    highest: int
    group_size: int | None
    margin: float

    def cells(self):
        """Every weight: row, column, group, and how many weights the group has."""
        for row in range(self.W.shape[0]):
            for group, here in enumerate(groups(self.W.shape[1], self.group_size)):
                for col in range(here.start, here.stop):
                    yield row, col, group, here.stop - here.start

    def steps(self, row: int, col: int, group: int) -> float:
        """code - zero of the level nearest to a weight; a pruned weight is at zero."""
        if self.W[row, col] == 0:
            return 0.0
        levels = np.arange(self.lowest, self.highest + 1) - self.zeros[row, group]
        return levels[np.argmin(np.abs(levels - self.W[row, col] / self.scales[row, group]))]


def rounded(case: Case) -> np.ndarray:
    """Every weight at its nearest level."""
    W = np.zeros_like(case.W)
    for row, col, group, _ in case.cells():
        W[row, col] = case.steps(row, col, group) * case.scales[row, group]
    return W


def gradients(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Gradients for the weights and for the scales."""
    d_W, d_scales = np.zeros_like(case.W), np.zeros_like(case.scales)
    for row, col, group, count in case.cells():
        if case.W[row, col] == 0:
            continue
        v = case.W[row, col] / case.scales[row, group]
        zero = case.zeros[row, group]
        clipped = v < case.lowest - zero - case.margin or v > case.highest - zero + case.margin
        term = case.steps(row, col, group)
        if not clipped:
            d_W[row, col] = case.slope[row, col]
            term -= 0.0 if case.highest - case.lowest == 1 else v
        top = max(case.highest - zero, 0.5)
        d_scales[row, group] += case.slope[row, col] * term / np.sqrt(count * top)
    return d_W, d_scales
