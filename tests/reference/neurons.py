"""Slow, obvious oracles for the scores of neurons: loops over tokens and neurons in NumPy."""

from __future__ import annotations

import numpy as np


def apoz(h: np.ndarray, keep: np.ndarray, below: float | None = None) -> list[float]:
    """Share of kept tokens for which each neuron is zero, or below a threshold; h [windows, length, neurons]."""
    shares = []
    for j in range(h.shape[2]):
        hits = tokens = 0
        for w in range(h.shape[0]):
            for t in range(h.shape[1]):
                if keep[w, t]:
                    tokens += 1
                    hits += int(h[w, t, j] == 0 if below is None else abs(h[w, t, j]) < below)
        shares.append(hits / tokens)
    return shares


def contribution(h: np.ndarray, keep: np.ndarray, W: np.ndarray) -> list[float]:
    """Mean over kept tokens of the length of what each neuron adds to the output."""
    rows = h[keep]
    return [float(np.mean([np.linalg.norm(x[j] * W[:, j]) for x in rows])) for j in range(h.shape[2])]


def flap(h: np.ndarray, keep: np.ndarray, W: np.ndarray) -> list[float]:
    """Mean squared change of the output when each neuron is replaced by its mean."""
    rows = h[keep]
    mean = rows.mean(0)
    return [float(np.mean([np.sum(((x[j] - mean[j]) * W[:, j]) ** 2) for x in rows])) for j in range(h.shape[2])]


def minitron(h: np.ndarray, keep: np.ndarray) -> list[float]:
    """L2 norm over windows of the mean magnitude of a window's kept tokens."""
    means = [np.abs(window[kept]).mean(0) for window, kept in zip(h, keep, strict=True) if kept.any()]
    return [float(np.sqrt(sum(mean[j] ** 2 for mean in means))) for j in range(h.shape[2])]


def error_without(h: np.ndarray, W: np.ndarray, gone: list[int]) -> float:
    """Mean squared error of h Wᵀ by the neurons that stay, weighted as well as can be: least squares on the samples."""
    stay = [j for j in range(h.shape[1]) if j not in gone]
    wanted = h @ W.T
    solution = np.linalg.lstsq(h[:, stay], wanted, rcond=None)[0]
    return float(np.sum((wanted - h[:, stay] @ solution) ** 2) / len(h))


def greedy(h: np.ndarray, W: np.ndarray, count: int) -> list[int]:
    """Neurons in the order in which they go when each time the one goes whose loss leaves the smallest error."""
    gone: list[int] = []
    for _ in range(count):
        left = [j for j in range(h.shape[1]) if j not in gone]
        gone.append(min(left, key=lambda j: error_without(h, W, [*gone, j])))
    return gone
