"""Places of survivors: nothing is lost, the bytes are those that the docstring states, patterns are told apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import places as oracle

from hf_slim.core.errors import ArtifactError
from hf_slim.encodings import Affine, Codebook, Sparse, read_encoding
from hf_slim.encodings.packing import unpack
from hf_slim.encodings.places import follows, load_places, place_layout, spread, storable, store_places

BITS = {None: 1, "1:2": 1 / 2, "1:4": 2 / 4, "2:4": 3 / 4, "3:4": 2 / 4, "4:8": 7 / 8, "2:8": 5 / 8, "1:256": 8 / 256,
        "block:4": 1 / 4, "block:8": 1 / 8}  # fmt: skip


def draw(pattern: str | None, rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    """A mask that follows a pattern."""
    generator = torch.Generator().manual_seed(seed)
    if pattern is None:
        return torch.rand(rows, cols, generator=generator) < 0.4
    n, _, m = pattern.partition(":")
    if n == "block":
        return (torch.rand(rows, cols // int(m), generator=generator) < 0.4).repeat_interleave(int(m), dim=1)
    order = torch.rand(rows, cols // int(m), int(m), generator=generator).argsort(-1)
    return (order < int(n)).view(rows, cols)


@pytest.mark.parametrize("pattern", BITS)
def test_places_come_back_and_take_the_bits_that_are_stated(pattern):
    rows, cols = 5, 2048
    keep = draw(pattern, rows, cols)
    stored = store_places(keep, pattern)
    layout = place_layout(rows, cols, pattern)
    assert {n: (t.shape, t.dtype) for n, t in stored.items()} == {n: (s.shape, s.dtype) for n, s in layout.items()}
    assert torch.equal(load_places(stored, rows, cols, pattern), keep)
    assert sum(t.nbytes for t in stored.values()) * 8 == BITS[pattern] * rows * cols


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["1:2", "1:3", "2:4", "3:4", "2:5", "4:8"]), st.integers(0, 4), st.integers(0, 7), st.integers(0, 9)
)
def test_sets_are_numbered_as_the_oracle_does(pattern, rows, groups, seed):
    n, m = map(int, pattern.split(":"))
    keep = draw(pattern, rows, groups * m, seed)
    stored = store_places(keep, pattern)
    bits = (len(oracle.sets_in_order(n, m)) - 1).bit_length()
    assert unpack(stored["places"], bits, groups).tolist() == oracle.numbers(keep.tolist(), n, m)
    assert torch.equal(load_places(stored, rows, groups * m, pattern), keep)


@pytest.mark.parametrize("pattern", ["unstructured", "8:16", "1:300"])
def test_patterns_that_save_nothing_are_masks(pattern):
    assert storable(pattern) is None
    with pytest.raises(ValueError, match="mask"):
        Sparse(survivors=3, pattern=pattern)


@pytest.mark.parametrize("kind", [Sparse(survivors=8), Affine(bits=4, survivors=8), Codebook(bits=2, clusters=4)])
def test_a_damaged_pattern_is_named(kind):
    with pytest.raises(ArtifactError, match="4:2"):
        read_encoding(kind.model_dump(mode="json") | {"pattern": "4:2"})


def test_following_is_exact():
    keep = draw("2:4", 3, 16)
    assert follows(keep, "2:4")
    assert not follows(keep, "1:4")
    assert not follows(keep[:, :14], "2:4")
    keep[1, keep[1].nonzero()[0]] = False
    assert not follows(keep, "2:4")
    assert follows(draw("block:4", 3, 16), "block:4")
    assert follows(draw("block:4", 3, 16), "block:2")
    assert not follows(draw(None, 3, 16), "block:4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_both_ways_of_spreading_agree(dtype, share):
    keep = torch.rand(7, 9, generator=torch.Generator().manual_seed(0)) < share
    values = torch.arange(1, int(keep.sum()) + 1).to(dtype)
    expected = torch.zeros(7, 9, dtype=dtype)
    expected[keep] = values
    assert torch.equal(spread(values, keep), expected)
    if dtype.is_floating_point:
        assert torch.equal(spread(values.requires_grad_(), keep), expected)


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "block:4"])
def test_survivors_of_every_encoding_follow_a_pattern(pattern):
    keep = draw(pattern, 6, 32)
    left = int(keep.sum())
    codes = torch.randint(0, 16, (6, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    scales, zeros = torch.ones(6, 1), torch.full((6, 1), 3, dtype=torch.uint8)
    table = torch.arange(1.0, 17)[None]
    affine = Affine(bits=4, survivors=left, pattern=pattern)
    book = Codebook(bits=4, clusters=16, survivors=left, pattern=pattern)
    found = affine.decode(affine.pack(codes, scales, zeros, keep), 6, 32)
    assert torch.equal(found, (codes.float() - 3) * keep)
    assert torch.equal(book.decode(book.pack(codes, table, keep), 6, 32), (codes.float() + 1) * keep)
    for encoding in (affine, book):
        assert pattern in encoding.describe()
        plain = encoding.model_copy(update={"pattern": None})
        assert encoding.nbytes(6, 32, torch.float32) < plain.nbytes(6, 32, torch.float32)
