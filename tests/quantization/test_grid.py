"""Laws of the affine grid: representable zero, nearest value, groups on their own, a search that never loses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import affine

from hf_slim.quantization.grid import fit_grid, from_grid, round_to_grid

CASES = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def problems(draw):
    """Skewed heavy-tailed weights of any usual size, and options for `fit_grid`."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    rows, cols = draw(st.integers(1, 7)), draw(st.integers(1, 50))
    W = torch.randn(rows, cols) * torch.rand(rows, 1) + draw(st.sampled_from([0.0, 0.3, -2.0]))
    W[torch.rand(rows, cols) < 0.05] *= 6
    options = {
        "bits": draw(st.integers(1, 8)),
        "group_size": draw(st.one_of(st.none(), st.integers(1, 60))),
        "symmetric": draw(st.booleans()),
        "clip": draw(st.sampled_from(["minmax", "mse"])),
    }
    return W * 10.0 ** draw(st.integers(-2, 2)), options


def quantized(W, options, **others):
    scales, zeros = fit_grid(W, **options, **others)
    codes = round_to_grid(W, scales, zeros, options["bits"], options["group_size"])
    return codes, scales, zeros, from_grid(codes, scales, zeros, options["group_size"])


def error_by_group(W, W_hat, group_size, importance=1.0):
    squared = (W - W_hat).double().square() * importance
    return torch.stack([squared[:, here].sum(1) for here in affine.groups(W.shape[1], group_size)], dim=1)


@CASES
@given(problems())
def test_everything_is_in_range_and_storable(problem):
    W, options = problem
    codes, scales, zeros, _ = quantized(W, options)
    groups = len(affine.groups(W.shape[1], options["group_size"]))
    assert scales.shape == zeros.shape == (len(W), groups)
    assert scales.dtype == torch.float16
    assert int(codes.max()) < 2 ** options["bits"]
    assert int(zeros.max()) < 2 ** options["bits"]
    assert (scales.abs() >= torch.finfo(torch.float16).smallest_normal).all()
    assert scales.isfinite().all()
    if options["symmetric"]:
        assert (zeros == 2 ** (options["bits"] - 1)).all()


@CASES
@given(problems())
def test_zero_is_exact(problem):
    W, options = problem
    scales, zeros = fit_grid(W, **options)
    nothing = torch.zeros_like(W)
    codes = round_to_grid(nothing, scales, zeros, options["bits"], options["group_size"])
    assert torch.equal(from_grid(codes, scales, zeros, options["group_size"]), nothing)


@CASES
@given(problems())
def test_decoding_matches_the_slow_one(problem):
    W, options = problem
    codes, scales, zeros, W_hat = quantized(W, options)
    expected = affine.decode(codes.numpy(), scales.numpy(), zeros.numpy(), options["group_size"])
    assert np.array_equal(W_hat.numpy(), expected.astype(np.float32))


@CASES
@given(problems())
def test_every_weight_gets_the_nearest_level(problem):
    W, options = problem
    _, scales, zeros, W_hat = quantized(W, options)
    nearest = affine.nearest(W.double().numpy(), scales.numpy(), zeros.numpy(), options["bits"], options["group_size"])
    ours, best = (W - W_hat).abs().double().numpy(), np.abs(W.double().numpy() - nearest)
    np.testing.assert_allclose(ours, best, rtol=1e-4, atol=1e-5 * W.abs().max().item())


@CASES
@given(problems())
def test_inside_the_range_the_error_is_at_most_half_a_step(problem):
    W, options = problem
    _, scales, zeros, W_hat = quantized(W, options)
    for group, here in enumerate(affine.groups(W.shape[1], options["group_size"])):
        step, zero = scales[:, group, None].float(), zeros[:, group, None].float()
        code = W[:, here] / step + zero
        inside = (code >= 0) & (code <= 2 ** options["bits"] - 1)
        assert ((W - W_hat)[:, here].abs() <= step.abs() * 0.5001)[inside].all()


@CASES
@given(problems())
def test_groups_are_independent_of_each_other_and_of_padding(problem):
    W, options = problem
    scales, zeros = fit_grid(W, **options)
    for group, here in enumerate(affine.groups(W.shape[1], options["group_size"])):
        alone = fit_grid(W[:, here], **{**options, "group_size": None})
        assert torch.equal(scales[:, group], alone[0][:, 0])
        assert torch.equal(zeros[:, group], alone[1][:, 0])


@CASES
@given(problems())
def test_tiles_do_not_change_the_result(problem):
    W, options = problem
    whole = fit_grid(W, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_slim.quantization.grid._TILE", 64)
        pieces = fit_grid(W, **options)
    assert torch.equal(whole[0], pieces[0])
    assert torch.equal(whole[1], pieces[1])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_weights_on_a_grid_are_reproduced(bits, clip, symmetric):
    torch.manual_seed(bits)
    codes = torch.randint(0, 2**bits, (6, 300), dtype=torch.uint8)
    codes[:, ::37], codes[:, 1::37] = 0, 2**bits - 1
    scales = (torch.rand(6, 5) + 0.1).half()
    zeros = torch.full((6, 5), 2 ** (bits - 1), dtype=torch.uint8)
    W = from_grid(codes, scales, zeros, 64)
    assert torch.equal(round_to_grid(W, scales, zeros, bits, 64), codes)
    _, _, _, again = quantized(W, {"bits": bits, "group_size": 64, "symmetric": symmetric, "clip": clip})
    torch.testing.assert_close(again, W, rtol=1e-6, atol=0)


@CASES
@given(problems(), st.integers(0, 99))
def test_search_is_never_worse_than_min_max(problem, seed):
    W, options = problem
    importance = torch.rand(W.shape[1], generator=torch.Generator().manual_seed(seed)) ** 4
    errors = {}
    for clip in ("minmax", "mse"):
        W_hat = quantized(W, {**options, "clip": clip}, importance=importance)[-1]
        errors[clip] = error_by_group(W, W_hat, options["group_size"], importance.double())
    assert (errors["mse"] <= errors["minmax"] * (1 + 1e-5) + 1e-9 * W.square().sum()).all()


@pytest.mark.parametrize("tails", [6.0, 1e6])
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_search_is_as_good_as_eighty_shrunken_ranges(bits, tails):
    torch.manual_seed(0)
    W = torch.distributions.StudentT(tails).sample((100, 64))
    W_hat = quantized(W, {"bits": bits, "group_size": None, "symmetric": False, "clip": "mse"})[-1]
    rival = sum(affine.searched_error(row, bits) for row in W.double().numpy())
    assert (W - W_hat).square().sum() < 1.001 * rival


@pytest.mark.parametrize(("bits", "most"), [(2, 1.01), (3, 1.05), (4, 1.2)])
def test_signed_scale_makes_symmetric_nearly_as_good(bits, most):
    torch.manual_seed(0)
    W = torch.randn(100, 64)
    errors = [
        (W - quantized(W, {"bits": bits, "group_size": None, "symmetric": symmetric, "clip": "mse"})[-1]).square().sum()
        for symmetric in (True, False)
    ]
    assert errors[0] < most * errors[1]


def test_important_columns_get_the_better_grid():
    torch.manual_seed(0)
    W = torch.randn(32, 64)
    W[:, 5] *= 8
    importance = torch.ones(64)
    importance[5] = 1000.0
    options = {"bits": 3, "group_size": 64, "symmetric": False, "clip": "mse"}
    plain, weighted = quantized(W, options)[-1], quantized(W, options, importance=importance)[-1]
    assert (W - weighted)[:, 5].square().sum() < 0.2 * (W - plain)[:, 5].square().sum()


def test_symmetric_scale_takes_the_sign_of_the_longer_tail():
    W = torch.tensor([[-7.0, 8.0, 1.0, 0.0], [7.0, -8.0, 1.0, 0.0]])
    for clip in ("minmax", "mse"):
        codes, scales, _, W_hat = quantized(W, {"bits": 4, "group_size": None, "symmetric": True, "clip": clip})
        assert scales.flatten().tolist() == [-1.0, 1.0]
        assert codes[0].tolist() == [15, 0, 7, 8]
        assert torch.equal(W_hat, W)


@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_pruned_weights_stay_zero_and_have_no_say(clip, symmetric):
    torch.manual_seed(0)
    W, keep = torch.randn(5, 70), torch.rand(5, 70) < 0.6
    options = {"bits": 3, "group_size": 32, "symmetric": symmetric, "clip": clip}
    expected = fit_grid(W * keep, **options)
    wild = torch.where(keep, W, torch.full_like(W, 1e6))
    scales, zeros = fit_grid(wild, **options, keep=keep)
    assert torch.equal(scales, expected[0])
    assert torch.equal(zeros, expected[1])


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, 1e-38, -1e-30, 1e-6, 3.0, -3.0, 1e5, -1e30, 3e38])
def test_degenerate_groups_have_a_defined_grid(value, symmetric, clip, scale_dtype):
    W = torch.full((2, 8), value)
    W[1, ::2] *= -1
    options = {"bits": 4, "group_size": 8, "symmetric": symmetric, "clip": clip}
    _, scales, _, W_hat = quantized(W, options, scale_dtype=scale_dtype)
    limits = torch.finfo(scale_dtype)
    assert scales.dtype == scale_dtype
    assert ((scales.abs() >= limits.smallest_normal) & (scales.abs() <= limits.max)).all()
    assert W_hat.isfinite().all()
    if value == 0.0:
        assert torch.equal(W_hat, W)
    if abs(value) == 3.0:
        torch.testing.assert_close(W_hat, W, rtol=0.08, atol=0)


def test_one_constant_group_is_exact_to_the_scale_precision():
    W = torch.tensor([[0.7] * 8, [-0.7] * 8])
    W_hat = quantized(W, {"bits": 2, "group_size": None, "symmetric": False, "clip": "minmax"})[-1]
    torch.testing.assert_close(W_hat, W, rtol=2**-11, atol=0)
