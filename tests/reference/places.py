"""Where survivors lie, bit by bit: slow and obvious."""

from __future__ import annotations

from itertools import product


def sets_in_order(n: int, m: int) -> list[tuple[bool, ...]]:
    """Every choice of n of m places, ordered by the last place in which two choices differ."""
    chosen = [bits for bits in product([False, True], repeat=m) if sum(bits) == n]
    return sorted(chosen, key=lambda bits: bits[::-1])


def numbers(keep: list[list[bool]], n: int, m: int) -> list[list[int]]:
    """The number of the choice that every run of m columns is."""
    order = sets_in_order(n, m)
    return [[order.index(tuple(row[i : i + m])) for i in range(0, len(row), m)] for row in keep]
