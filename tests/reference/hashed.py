"""HashedNets entry by entry, in Python's integers: where a weight's value lies, and what its gradient adds to."""

from __future__ import annotations

import numpy as np

WORD = 2**32


def mix(h: int) -> int:
    """MurmurHash3's finaliser for 32 bits."""
    h ^= h >> 16
    h = h * 0x85EBCA6B % WORD
    h ^= h >> 13
    h = h * 0xC2B2AE35 % WORD
    return h ^ h >> 16


def place(r: int, c: int, block: int, buckets: int, seed: int) -> tuple[int, int, int]:
    """Bucket, position in it, and sign of weight (r, c)."""
    h = mix(mix(mix(seed) ^ r) ^ c // block)
    return h * buckets // WORD, c % block, -1 if h % 2 else 1


def decode(buckets: np.ndarray, rows: int, cols: int, seed: int, exact: dict[int, np.ndarray]) -> np.ndarray:
    """The weight; `exact` has the rows that are not hashed."""
    W = np.zeros((rows, cols), buckets.dtype)
    for r in range(rows):
        for c in range(cols):
            k, p, sign = place(r, c, buckets.shape[1], len(buckets), seed)
            W[r, c] = exact[r][c] if r in exact else sign * buckets[k, p]
    return W


def gradient(G: np.ndarray, shape: tuple[int, int], seed: int, exact: set[int]) -> tuple[np.ndarray, np.ndarray]:
    """Sum over members of sign times the weight's gradient G, and the number of members, of each stored value."""
    total, members = np.zeros(shape), np.zeros(shape, int)
    for r, row in enumerate(G):
        for c, value in enumerate(row):
            k, p, sign = place(r, c, shape[1], shape[0], seed)
            if r not in exact:
                total[k, p] += sign * value
                members[k, p] += 1
    return total, members
