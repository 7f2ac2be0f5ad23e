"""GGUF blocks hold our grids exactly; the oracle decodes them byte by byte."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import gguf_blocks as reference

from hf_slim.encodings import Affine
from hf_slim.export.gguf_blocks import block_grid, groups_fit, pack_grid, steps_fit

KINDS = ("q8_0", "q4_0", "q4_1")


def affine(bits: int, group: int | None, symmetric: bool, seed: int = 0, rows: int = 6, cols: int = 96, **options):
    """A random weight on an affine grid that uses every level: (encoding, stored tensors, keep)."""
    encoding = Affine(bits=bits, group_size=group, symmetric=symmetric, **options)
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, cols), generator=draw, dtype=torch.uint8)
    codes[0, :2] = torch.tensor([0, 2**bits - 1])
    scales = torch.randn(rows, encoding.groups(cols), generator=draw).half()
    zeros = torch.randint(0, 2**bits, scales.shape, generator=draw, dtype=torch.uint8)
    zeros[0, 0], zeros[1, 0] = 0, 2**bits - 1
    keep = None
    if options.get("survivors") is not None:
        keep = torch.zeros(rows * cols, dtype=torch.bool)
        keep[torch.randperm(rows * cols, generator=draw)[: options["survivors"]]] = True
        keep = keep.view(rows, cols)
    return encoding, encoding.pack(codes, scales, zeros, keep), keep


def packed(encoding: Affine, tensors: dict[str, torch.Tensor], kind: str, rows: int = 6, cols: int = 96) -> np.ndarray:
    return pack_grid(block_grid(encoding, tensors, rows, cols), kind).numpy()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    bits=st.integers(1, 8),
    group=st.sampled_from([None, 32, 64, 96, 128]),
    symmetric=st.booleans(),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1000),
)
def test_what_fits_is_kept_bit_for_bit(bits: int, group: int | None, symmetric: bool, kind: str, seed: int):
    encoding, tensors, _ = affine(bits, group, symmetric, seed)
    assert groups_fit(encoding, 96)
    if not steps_fit(encoding, kind):
        return
    ours = encoding.decode(tensors, 6, 96).numpy()
    data = packed(encoding, tensors, kind)
    theirs = gguf.dequantize(data, gguf.GGMLQuantizationType[kind.upper()])
    np.testing.assert_array_equal(theirs, reference.decode(data, kind))
    if kind != "q4_1":
        np.testing.assert_array_equal(theirs, ours)
    else:  # only the minimum, -zero * scale, is rounded to float16
        grid = block_grid(encoding, tensors, 6, 96)
        minimum = (grid.zeros * grid.scales).abs().repeat_interleave(32, dim=1).numpy()
        assert (np.abs(theirs - ours) <= 2**-11 * minimum + 2**-24 + 1e-6 * np.abs(ours)).all()


def test_each_type_takes_the_grids_whose_levels_it_has():
    def fitting(kind: str, symmetric: bool) -> list[int]:
        return [bits for bits in range(1, 9) if steps_fit(Affine(bits=bits, symmetric=symmetric), kind)]

    assert fitting("q4_0", True) == [1, 2, 3, 4]
    assert fitting("q4_0", False) == [1, 2, 3]
    assert fitting("q4_1", True) == fitting("q4_1", False) == [1, 2, 3, 4]
    assert fitting("q8_0", True) == list(range(1, 9))
    assert fitting("q8_0", False) == list(range(1, 8))


@pytest.mark.parametrize(
    ("group", "cols", "fit"),
    [
        (32, 96, True),
        (64, 96, True),
        (None, 96, True),
        (200, 96, True),
        (16, 96, False),
        (48, 96, False),
        (32, 80, False),
    ],
)
def test_no_block_may_span_two_groups(group: int | None, cols: int, fit: bool):
    assert groups_fit(Affine(bits=4, group_size=group), cols) is fit


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
def test_levels_beside_zero_become_odd_steps(bits: int, kind: str):
    encoding, tensors, _ = affine(bits, 32, symmetric=True, centered=True)
    np.testing.assert_array_equal(
        reference.decode(packed(encoding, tensors, kind), kind), encoding.decode(tensors, 6, 96).numpy()
    )


@pytest.mark.parametrize(("bits", "symmetric", "centered"), [(4, True, False), (3, False, False), (2, True, True)])
def test_pruned_weights_stay_zero(bits: int, symmetric: bool, centered: bool):
    encoding, tensors, keep = affine(bits, 32, symmetric, survivors=200, centered=centered)
    decoded = reference.decode(packed(encoding, tensors, "q4_0"), "q4_0")
    np.testing.assert_array_equal(decoded, encoding.decode(tensors, 6, 96).numpy())
    assert keep is not None
    assert not decoded[~keep.numpy()].any()


def test_rows_change_places_with_their_scales():
    encoding, tensors, _ = affine(4, 32, symmetric=False)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    grid = block_grid(encoding, tensors, 6, 96).take(order)
    np.testing.assert_array_equal(pack_grid(grid, "q4_1").numpy(), packed(encoding, tensors, "q4_1")[order.numpy()])
