"""Integers of 1 to 8 bits, really packed: 3-bit codes take 3 bits.

A row of n codes becomes ceil(n * bits / 8) bytes, a little-endian bit stream: code i starts at bit i * bits. Rows are
packed on their own, so that single rows (tokens of an embedding) can be read without touching the others.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def pack(codes: UInt8[Tensor, "*rows n"], bits: int) -> UInt8[Tensor, "*rows b"]:
    """Pack codes below 2**bits along the last dimension; the last byte is filled up with zero bits."""
    if bits == 8:
        return codes.contiguous()
    n = codes.shape[-1]
    per_byte = _codes_a_byte(bits)
    if per_byte:
        padded = _in_runs(codes, per_byte)
        packed = padded[..., 0].clone()
        for i in range(1, per_byte):
            packed |= padded[..., i] << (bits * i)
        return packed
    # eight codes fill exactly `bits` bytes: gather them in one 64-bit word
    padded = _in_runs(codes, 8)
    word = torch.zeros(padded.shape[:-1], dtype=torch.int64, device=codes.device)
    for i in range(8):
        word |= padded[..., i].to(torch.int64) << (bits * i)
    packed = torch.stack([(word >> (8 * j) & 255).to(torch.uint8) for j in range(bits)], dim=-1)
    return packed.flatten(-2)[..., : packed_bytes(n, bits)].contiguous()


def unpack(packed: UInt8[Tensor, "*rows b"], bits: int, count: int) -> UInt8[Tensor, "*rows n"]:
    """The first `count` codes of each packed row."""
    if bits == 8:
        return packed[..., :count]
    *rows, n_bytes = packed.shape
    mask = (1 << bits) - 1
    if bits == 4:  # spread each byte over two in one 16-bit word: contiguous writes, twice as fast as the loop below
        words = packed.to(torch.int16, memory_format=torch.contiguous_format)
        return words.bitwise_or_(words << 4).bitwise_and_(0x0F0F).view(torch.uint8)[..., :count]
    per_byte = _codes_a_byte(bits)
    if per_byte:
        codes = torch.empty(*rows, n_bytes, per_byte, dtype=torch.uint8, device=packed.device)
        for i in range(per_byte):
            torch.bitwise_and(packed >> (bits * i), mask, out=codes[..., i])
        return codes.flatten(-2)[..., :count]
    padded = _in_runs(packed, bits)
    word = torch.zeros(padded.shape[:-1], dtype=torch.int64, device=packed.device)
    for j in range(bits):
        word |= padded[..., j].to(torch.int64) << (8 * j)
    codes = torch.empty(*padded.shape[:-1], 8, dtype=torch.uint8, device=packed.device)
    for i in range(8):
        codes[..., i] = word >> (bits * i) & mask
    return codes.flatten(-2)[..., :count]


def pack_mask(keep: Tensor) -> UInt8[Tensor, "*rows b"]:
    """One bit an entry of a boolean tensor [*rows, n]."""
    return pack(keep.to(torch.uint8), bits=1)


def unpack_mask(packed: UInt8[Tensor, "*rows b"], count: int) -> Tensor:
    """Boolean [*rows, count]."""
    bytes_ = packed.flatten().int()
    spread = _bits_of_bytes(packed.device).index_select(0, bytes_).view(torch.bool)  # a third of the time of `unpack`
    return spread.view(*packed.shape[:-1], 8 * packed.shape[-1])[..., :count]


def _in_runs(values: UInt8[Tensor, "*rows n"], size: int) -> UInt8[Tensor, "*rows runs {size}"]:
    """Runs of `size` values, the last filled up with zeros; an empty tensor has none."""
    *rows, n = values.shape
    return torch.nn.functional.pad(values, (0, -n % size)).view(*rows, -(-n // size), size)


@lru_cache(maxsize=8)
def _bits_of_bytes(device: torch.device) -> Int64[Tensor, "256"]:
    """The eight bits of every byte, as eight booleans in one word: looking up words is fast."""
    with torch.inference_mode(False):
        bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
        return bits.bool().view(torch.int64).flatten()


def _codes_a_byte(bits: int) -> int:
    """How many codes fill a byte exactly, or 0."""
    return 8 // bits if 8 % bits == 0 else 0
