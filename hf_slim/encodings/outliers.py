"""A few weights kept apart: where they lie, in about two bits more than the logarithm of their distance.

The m places p_0 < p_1 < ... among n weights are written as Elias and Fano did (Elias 1974, doi:10.1145/321812.321820):
the low l = log2(n / m) bits of each as they are, what is above them as the distances between neighbours in unary. One
bit string holds those: bit (p_i >> l) + i is set. That is m l + m + n / 2**l bits, at most half a bit a place more than
any code needs: 0.5 % of the weights take 9.6 bits a place, where a column number takes 16.

Shapes: low [bytes of m l bits], high [bytes of m + ceil(n / 2**l) bits], both uint8.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from hf_slim.encodings.base import TensorSpec
from hf_slim.encodings.packing import pack, pack_mask, packed_bytes, unpack, unpack_mask


def low_bits(count: int, weights: int) -> int:
    """Bits of a place that are stored as they are; codes are packed in at most 8."""
    return min(8, int(math.log2(weights / count))) if 0 < count < weights else 0


def outlier_layout(count: int, weights: int) -> dict[str, TensorSpec]:
    """The tensors that hold `count` places among `weights`."""
    low = low_bits(count, weights)
    specs = {"outliers_high": TensorSpec((packed_bytes(count + -(-weights >> low), 1),), torch.uint8)}
    return specs | ({"outliers_low": TensorSpec((packed_bytes(count, low),), torch.uint8)} if low else {})


def store_outliers(places: Int[Tensor, " count"], weights: int) -> dict[str, UInt8[Tensor, " b"]]:
    """The tensors that `outlier_layout` announces, of ascending places below `weights`."""
    count = len(places)
    low = low_bits(count, weights)
    high = torch.zeros(count + -(-weights >> low), dtype=torch.bool, device=places.device)
    high[(places >> low) + torch.arange(count, device=places.device)] = True
    tensors = {"outliers_high": pack_mask(high)}
    if low:
        tensors["outliers_low"] = pack((places & ((1 << low) - 1)).to(torch.uint8), low)
    return tensors


def load_outliers(tensors: dict[str, Tensor], count: int, weights: int) -> Int[Tensor, " count"]:
    """The places, ascending."""
    low = low_bits(count, weights)
    high = unpack_mask(tensors["outliers_high"], count + -(-weights >> low))
    places = torch.nonzero_static(high, size=count).flatten() - torch.arange(count, device=high.device)
    return places << low | unpack(tensors["outliers_low"], low, count).long() if low else places
