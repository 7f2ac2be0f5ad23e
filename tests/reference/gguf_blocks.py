"""GGUF blocks decoded one number at a time, from the format's definition."""

from __future__ import annotations

import struct

import numpy as np

BYTES = {"q8_0": 34, "q4_0": 18, "q4_1": 20}


def decode(data: np.ndarray, kind: str) -> np.ndarray:
    """Rows of block bytes to float32 [rows, 32 * blocks]."""
    rows = []
    for row in data:
        raw = row.tobytes()
        values: list[float] = []
        for start in range(0, len(raw), BYTES[kind]):
            values += decode_block(raw[start : start + BYTES[kind]], kind)
        rows.append(values)
    return np.array(rows, dtype=np.float32)


def decode_block(raw: bytes, kind: str) -> list[float]:
    """The 32 numbers of one block."""
    if kind == "q8_0":
        (d,), steps = struct.unpack("<e", raw[:2]), struct.unpack("<32b", raw[2:])
        return [d * q for q in steps]
    if kind == "q4_0":
        (d,), nibbles = struct.unpack("<e", raw[:2]), raw[2:]
        return [d * (n - 8) for n in columns(nibbles)]
    (d, m), nibbles = struct.unpack("<ee", raw[:4]), raw[4:]
    return [float(np.float32(np.float32(d * n) + np.float32(m))) for n in columns(nibbles)]


def columns(nibbles: bytes) -> list[int]:
    """Sixteen bytes to 32 numbers: the low halves first."""
    return [byte % 16 for byte in nibbles] + [byte // 16 for byte in nibbles]
