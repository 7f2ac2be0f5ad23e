"""HQQ: the slow reference, never worse than its start, better than min-max by a margin, pruned weights, streaming."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import hqq as reference
from transformers import AutoModelForCausalLM

import hf_slim
from hf_slim.quantization import hqq, rtn
from hf_slim.quantization.grid import fit_grid, from_grid


def weights(rows: int = 8, cols: int = 64, seed: int = 0, scale: float = 0.03) -> torch.Tensor:
    """Normal weights with a few outliers, as language models have them."""
    W = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    return scale * torch.where(W.abs() > 2.3, 2 * W, W)


def losses(W: torch.Tensor, found, start, group: int = 16, p: float = 0.7) -> torch.Tensor:
    """sum |r|**p of every group, r in units of the grid it started from."""
    r = (W - from_grid(*found, group)) / start[0].float().abs().repeat_interleave(group, 1)[:, : W.shape[1]]
    return r.abs().pow(p).view(len(W), -1, group).sum(-1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scales_are_those_of_the_slow_reference(bits):
    W = weights(seed=bits)
    starts, zeros = fit_grid(W, bits, 16, clip="minmax")
    found, found_zeros = hqq.quantize(W, bits, 16)[1:]
    assert torch.equal(found_zeros, zeros)
    expected = np.zeros(starts.shape)
    for row in range(len(W)):
        for group in range(starts.shape[1]):
            w = W[row, 16 * group : 16 * group + 16].double().numpy()
            start = (float(starts[row, group]), int(zeros[row, group]))
            expected[row, group] = reference.scale_of(w, *start, bits, 0.7, 10.0, 1.01, iterations=20)
    assert np.quantile(np.abs(found.double().numpy() / expected - 1), 0.9) < 2e-3  # near ties may go another way
    assert np.abs(found.double().numpy() / starts.double().numpy() - 1).mean() > 0.01  # it moved at all


def test_the_shrunk_error_minimises_the_half_quadratic():
    """The threshold is the paper's one-step approximation, so a fine search may be better, but only by a little."""
    errors = np.linspace(-3, 3, 60001)
    for r in (0.05, 0.4, 1.0, -2.0):
        cost = np.abs(errors) ** 0.7 + 5 * (r - errors) ** 2
        found = reference.shrink(r, 0.7, 10.0)
        assert abs(found) ** 0.7 + 5 * (r - found) ** 2 <= cost.min() + 0.35 * abs(r) ** 0.7


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4, 8]), st.booleans(), st.floats(1e-3, 1e2))
def test_no_group_is_worse_than_min_max(seed, bits, symmetric, scale):
    W = weights(4, 48, seed, scale)
    minmax = rtn.quantize(W, bits, 16, symmetric, "minmax")
    found = hqq.quantize(W, bits, 16, symmetric)
    assert (losses(W, found, minmax[1:]) <= losses(W, minmax, minmax[1:]) * (1 + 1e-3) + 1e-2).all()


@pytest.mark.parametrize(("bits", "share"), [(3, 0.95), (4, 0.96)])
def test_the_sparse_error_is_lower_than_that_of_min_max_by_a_margin(bits, share):
    W = weights(64, 256)
    minmax = rtn.quantize(W, bits, 64, clip="minmax")
    found = hqq.quantize(W, bits, 64)
    before, after = (losses(W, x, minmax[1:], 64).sum() for x in (minmax, found))
    assert after < share * before


def test_the_unit_of_the_weights_does_not_matter():
    W = weights(seed=3, scale=1.0)
    small, large = (hqq.quantize(W * unit, 3, 16) for unit in (2.0**-6, 2.0**4))
    assert torch.equal(small[0], large[0])
    assert torch.equal(small[1] * 2.0**10, large[1])


def test_pruned_weights_stay_zero_and_groups_of_zeros_are_harmless():
    W, keep = weights(6, 50, seed=4), torch.rand(6, 50, generator=torch.Generator().manual_seed(4)) < 0.5
    keep[0] = False
    codes, scales, zeros = hqq.quantize(W, 3, 16, keep=keep)
    W_hat = from_grid(codes, scales, zeros, 16)
    assert (W_hat[~keep] == 0).all()
    assert torch.isfinite(scales).all()
    assert W_hat[keep].any()


def test_layers_take_options_of_their_own():
    model = tiny.llama()
    report = hf_slim.compress(model, "quantize.hqq", bits=3, group_size=8, layers={"*.down_proj": {"bits": 8}})
    assert {row.encoding for row in report.layers if "down_proj" in row.name} == {"8-bit g8"}
    assert {row.encoding for row in report.layers if "down_proj" not in row.name} == {"3-bit g8"}


def test_loading_with_it_gives_what_compressing_gives(tmp_path):
    options = {"bits": 4, "group_size": 16, "embeddings": {"bits": 8}}
    folder = tiny.save(tiny.llama(), tmp_path / "dense")
    streamed = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=hf_slim.SlimConfig("quantize.hqq", **options)
    )
    model = tiny.llama()
    hf_slim.compress(model, "quantize.hqq", **options)
    here, there = model.state_dict(), streamed.state_dict()
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
