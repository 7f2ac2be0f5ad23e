"""Checkpoints as other quantizers write them, one number at a time, from the definitions of their formats."""

from __future__ import annotations

import numpy as np

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def put_bits(values: list[int], bits: int) -> list[int]:
    """Numbers of `bits` bits one after the other, lowest bit first, cut into signed 32-bit words."""
    stream = sum(value << (bits * i) for i, value in enumerate(values))
    words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(values) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def gptq_layer(codes, scales, zeros, group_of, bits: int, second_version: bool = False) -> dict[str, np.ndarray]:
    """codes [rows, cols], scales and zeros [rows, groups], group_of [cols]: a layer of a GPTQ checkpoint."""
    rows, _ = codes.shape
    groups = scales.shape[1]
    stored = zeros if second_version else zeros - 1
    qweight = np.array([put_bits([int(c) for c in codes[r]], bits) for r in range(rows)], dtype=np.int32).T
    qzeros = np.array([put_bits([int(z) for z in stored[:, g]], bits) for g in range(groups)], dtype=np.int32)
    return {
        "qweight": np.ascontiguousarray(qweight),
        "qzeros": qzeros,
        "scales": np.ascontiguousarray(scales.T.astype(np.float16)),
        "g_idx": group_of.astype(np.int32),
    }


def awq_layer(codes, scales, zeros) -> dict[str, np.ndarray]:
    """The same for AWQ's "gemm" layout: rows of the weight run along the words, eight in an order of their own."""

    def words(line) -> list[int]:
        shuffled = [int(line[8 * w + AWQ_ORDER[i]]) for w in range(len(line) // 8) for i in range(8)]
        return put_bits(shuffled, 4)

    return {
        "qweight": np.array([words(codes[:, c]) for c in range(codes.shape[1])], dtype=np.int32),
        "qzeros": np.array([words(zeros[:, g]) for g in range(zeros.shape[1])], dtype=np.int32),
        "scales": np.ascontiguousarray(scales.T.astype(np.float16)),
    }


def weight(codes, scales, zeros, group_of) -> np.ndarray:
    """The weight that a layer stands for."""
    scales, W = scales.astype(np.float16), np.zeros(codes.shape)
    for r in range(codes.shape[0]):
        for c in range(codes.shape[1]):
            g = group_of[c]
            W[r, c] = (int(codes[r, c]) - int(zeros[r, g])) * float(scales[r, g])
    return W
