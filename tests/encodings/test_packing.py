"""Packed integers: nothing is lost, nothing is wasted, and the bytes are the ones that the docstring states."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import encodings as oracle

from hf_slim.encodings.packing import pack, pack_mask, packed_bytes, unpack, unpack_mask

BITS = range(1, 9)


@st.composite
def rows_of_codes(draw) -> tuple[int, torch.Tensor]:
    bits = draw(st.integers(1, 8))
    rows, count = draw(st.integers(0, 4)), draw(st.integers(0, 40))
    codes = draw(st.lists(st.integers(0, 2**bits - 1), min_size=rows * count, max_size=rows * count))
    return bits, torch.tensor(codes, dtype=torch.uint8).view(rows, count)


@given(rows_of_codes())
@settings(max_examples=200, deadline=None)
def test_unpack_undoes_pack(drawn):
    bits, codes = drawn
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (codes.shape[0], -(-codes.shape[1] * bits // 8))
    assert torch.equal(unpack(packed, bits, codes.shape[1]), codes)


@given(rows_of_codes())
@settings(max_examples=100, deadline=None)
def test_bytes_are_those_of_a_bit_stream(drawn):
    bits, codes = drawn
    packed = pack(codes, bits)
    assert packed.tolist() == [oracle.pack(row, bits) for row in codes.tolist()]
    assert [oracle.unpack(row, bits, codes.shape[1]) for row in packed.tolist()] == codes.tolist()


@pytest.mark.parametrize("bits", BITS)
def test_codes_take_exactly_their_bits(bits):
    codes = torch.zeros(3, 576, dtype=torch.uint8)
    assert pack(codes, bits).numel() * 8 == codes.numel() * bits
    assert [packed_bytes(n, bits) for n in range(9)] == [-(-n * bits // 8) for n in range(9)]


@pytest.mark.parametrize("bits", BITS)
def test_rows_do_not_touch_each_other(bits):
    codes = torch.randint(0, 2**bits, (5, 13), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    packed = pack(codes, bits)
    alone = torch.stack([pack(row, bits) for row in codes])
    assert torch.equal(packed, alone)
    assert torch.equal(unpack(packed[[3, 1]], bits, 13), codes[[3, 1]])


@pytest.mark.parametrize("bits", BITS)
def test_what_fills_the_last_byte_is_zero(bits):
    full = torch.full((1, 5), 2**bits - 1, dtype=torch.uint8)
    used = 5 * bits
    assert sum(byte << (8 * j) for j, byte in enumerate(pack(full, bits)[0].tolist())) == (1 << used) - 1


@pytest.mark.parametrize("bits", BITS)
def test_any_leading_dimensions_and_strides(bits):
    codes = torch.randint(0, 2**bits, (11, 3, 2), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    turned = codes.permute(2, 1, 0)
    assert torch.equal(unpack(pack(turned, bits), bits, 11), turned)


@given(st.lists(st.booleans(), max_size=40))
@settings(deadline=None)
def test_masks_take_one_bit(bits):
    keep = torch.tensor(bits, dtype=torch.bool)
    packed = pack_mask(keep)
    assert packed.numel() == -(-len(bits) // 8)
    assert torch.equal(unpack_mask(packed, len(bits)), keep)
