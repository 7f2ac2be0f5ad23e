"""Rounding to nearest: options that are refused, textbook errors on Gaussian weights, pruned weights."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from hf_slim.quantization import rtn
from hf_slim.quantization.grid import fit_grid, from_grid, round_to_grid


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "greater than or equal to 2"),
        ({"bits": 1}, "greater than or equal to 2"),
        ({"bits": 9}, "less than or equal to 8"),
        ({"bits": 3.5}, "valid integer"),
        ({"group_size": 0}, "greater than or equal to 1"),
        ({"clip": "max"}, "'minmax' or 'mse'"),
        ({"group": 64}, "Extra inputs are not permitted"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        rtn.Config(**options)


def test_options_have_the_documented_defaults():
    config = rtn.Config()
    assert (config.bits, config.group_size, config.symmetric, config.clip) == (4, 64, False, "mse")
    assert rtn.Config(group_size=None).group_size is None


def relative_error(W, bits, clip):
    W_hat = from_grid(*rtn.quantize(W, bits, 128, clip=clip), 128)
    return ((W - W_hat).square().sum() / W.square().sum()).item()


@pytest.mark.parametrize(("bits", "expected"), [(2, 0.250), (3, 0.0457), (4, 0.0099)])
def test_min_max_error_on_gaussian_weights_is_the_known_one(bits, expected):
    """Relative squared error of uniform grids on i.i.d. normal weights, groups of 128."""
    torch.manual_seed(0)
    assert relative_error(torch.randn(256, 512), bits, "minmax") == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("bits", "unrestricted", "price"), [(2, 0.115, 1.16), (3, 0.0336, 1.05), (4, 0.0089, 1.03)])
def test_searched_error_on_gaussian_weights_is_the_known_one(bits, unrestricted, price):
    """The best uniform grids may have any zero point; that zero itself is on ours has its price at few bits."""
    torch.manual_seed(0)
    assert unrestricted < relative_error(torch.randn(256, 512), bits, "mse") < price * unrestricted


@pytest.mark.parametrize("symmetric", [False, True])
def test_pruned_weights_get_the_zero_point(symmetric):
    torch.manual_seed(1)
    W, keep = torch.randn(6, 50), torch.rand(6, 50) < 0.5
    codes, scales, zeros = rtn.quantize(W, 3, 16, symmetric, keep=keep)
    W_hat = from_grid(codes, scales, zeros, 16)
    assert (W_hat[~keep] == 0).all()
    assert (codes == zeros.repeat_interleave(16, 1)[:, :50])[~keep].all()
    already = rtn.quantize(W * keep, 3, 16, symmetric)
    assert torch.equal(W_hat, from_grid(*already, 16))


def test_bfloat16_weights_round_as_their_float32_values():
    torch.manual_seed(2)
    W = torch.randn(4, 30).bfloat16()
    scales, zeros = fit_grid(W.float(), 4, 8)
    codes, found_scales, found_zeros = rtn.quantize(W, 4, 8)
    assert torch.equal(found_scales, scales)
    assert torch.equal(found_zeros, zeros)
    assert torch.equal(codes, round_to_grid(W.float(), scales, zeros, 4, 8))
