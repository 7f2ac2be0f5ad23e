"""Codes packed into 32-bit words, as most checkpoint formats of other programs store them.

A row of n codes is a little-endian bit stream, code i at bit i * bits, cut into ceil(n * bits / 32) words: our own
packing (`packing.py`), filled up to whole words.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Int32, UInt8
from torch import Tensor

from hf_slim.encodings.packing import pack, unpack


def pack_words(codes: UInt8[Tensor, "rows cols"], bits: int) -> Int32[Tensor, "rows words"]:
    """Pack codes below 2**bits row by row; the last word is filled up with zero bits."""
    packed = pack(codes, bits)
    filled = F.pad(packed, (0, -packed.shape[1] % 4))
    return filled.flatten().view(torch.int32).view(len(codes), -1)


def unpack_words(words: Int32[Tensor, "rows words"], bits: int, cols: int) -> UInt8[Tensor, "rows cols"]:
    """The first `cols` codes of each row of words."""
    return unpack(words.flatten().view(torch.uint8).view(len(words), -1), bits, cols)


def words_of(cols: int, bits: int) -> int:
    """Words that a row of codes takes."""
    return -(-cols * bits // 32)
