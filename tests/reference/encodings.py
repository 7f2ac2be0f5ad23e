"""Stored forms the slow way: one bit, one weight at a time, from the layout that the encodings' docstrings state."""

from __future__ import annotations

import numpy as np


def pack(codes: list[int], bits: int) -> list[int]:
    """One row of codes as the bytes of a little-endian bit stream: bit j of code i is bit i * bits + j."""
    stream = [(code >> j) & 1 for code in codes for j in range(bits)]
    stream += [0] * (-len(stream) % 8)
    return [sum(bit << j for j, bit in enumerate(stream[start : start + 8])) for start in range(0, len(stream), 8)]


def unpack(packed: list[int], bits: int, count: int) -> list[int]:
    """The first `count` codes of one row of bytes."""
    stream = [(byte >> j) & 1 for byte in packed for j in range(8)]
    return [sum(stream[i * bits + j] << j for j in range(bits)) for i in range(count)]


def affine(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, group_size: int | None, keep=None) -> np.ndarray:
    """(code - zero) * scale, weight by weight; 0 where `keep` is False."""
    W = np.zeros(codes.shape, dtype=np.float32)
    for row, col in np.ndindex(*codes.shape):
        if keep is None or keep[row, col]:
            group = 0 if group_size is None else col // group_size
            W[row, col] = np.float32(int(codes[row, col]) - int(zeros[row, group])) * np.float32(scales[row, group])
    return W


def codebook(codes: np.ndarray, centroids: np.ndarray, rows_per_book: int | None, keep=None) -> np.ndarray:
    """The centroid that each code names in its row's book; 0 where `keep` is False."""
    W = np.zeros(codes.shape, dtype=np.float32)
    for row, col in np.ndindex(*codes.shape):
        if keep is None or keep[row, col]:
            W[row, col] = centroids[0 if rows_per_book is None else row // rows_per_book, codes[row, col]]
    return W


def stored_tables(centroids: np.ndarray, dtype: str) -> np.ndarray:
    """Tables [books, clusters, ...] as they come back: rounded to a float type, or to 255 steps of a scale each."""
    if dtype == "bfloat16":
        bits = centroids.astype(np.float32).view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    if dtype != "int8":
        return centroids.astype(dtype).astype(np.float32)
    back = np.zeros(centroids.shape, dtype=np.float32)
    for book, table in enumerate(centroids):
        scale = np.float32(np.float16(np.float32(np.abs(table).max()) / np.float32(127)))
        back[book] = np.clip(np.rint(table.astype(np.float32) / scale), -127, 127).astype(np.float32) * scale
    return back


def vectors(codes: np.ndarray, tables: np.ndarray, cols: int, rows_per_book: int | None, keep=None) -> np.ndarray:
    """As `codebook`, where a code stands for as many columns as the tables are deep."""
    W = np.zeros((len(codes), cols), dtype=np.float32)
    deep = tables.reshape(*tables.shape[:2], -1)
    for row, col in np.ndindex(*W.shape):
        if keep is None or keep[row, col]:
            book = 0 if rows_per_book is None else row // rows_per_book
            W[row, col] = deep[book, codes[row, col // deep.shape[2]], col % deep.shape[2]]
    return W


def sparse(mask: list[list[int]], values: list[float], cols: int) -> np.ndarray:
    """Values laid down row by row where the bit mask (packed rows) has a one."""
    W = np.zeros((len(mask), cols), dtype=np.float32)
    left = iter(values)
    for row, packed in enumerate(mask):
        for col, bit in enumerate(unpack(packed, 1, cols)):
            if bit:
                W[row, col] = next(left)
    return W


def int8_product(x: np.ndarray, codes: np.ndarray, scales: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """Token by token: x to integers in -128 .. 127, an integer product with codes - 128, both scales, the bias."""
    W = codes.astype(np.int64) - 128
    y = np.zeros((len(x), len(codes)))
    for token, values in enumerate(x):
        scale = np.float64(np.float32(np.abs(values).max()) / np.float32(127.5)) or 1.0
        steps = np.rint((values.astype(np.float32) / np.float32(scale)).astype(np.float64)).astype(np.int64)
        steps = np.minimum(steps, 127)
        y[token] = (W @ steps) * scale * scales[:, 0]
    return y if bias is None else y + bias
