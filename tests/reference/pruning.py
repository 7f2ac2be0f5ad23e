"""Slow, obvious oracles for masks and the schedule: plain Python lists."""

from __future__ import annotations


def drop_smallest(values: list[float], count: int) -> list[bool]:
    """keep: False for the `count` smallest magnitudes; among equals the earlier one goes."""
    order = sorted(range(len(values)), key=lambda i: (abs(values[i]), i))
    dropped = set(order[:count])
    return [i not in dropped for i in range(len(values))]


def n_m(row: list[float], n: int, m: int) -> list[bool]:
    """keep: the n largest of every m consecutive values."""
    keep: list[bool] = []
    for start in range(0, len(row), m):
        keep += drop_smallest(row[start : start + m], m - n)
    return keep


def sparsity_by_hand(step: int, initial: float, final: float, begin: int, end: int, every: int) -> float:
    """Walk through training and note the sparsity that each mask update sets."""
    current = 0.0
    for t in range(step + 1):
        if begin <= t < end and (t - begin) % every == 0:
            remaining = (end - t) / (end - begin)
            current = final - (final - initial) * remaining * remaining * remaining
        if t >= end:
            current = final
    return current
