"""Scores of neurons: agreement with loops, sums that add up, padding that does not count."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import neurons as reference

from hf_slim.pruning.neurons import (
    apoz,
    apoz_below,
    contribution,
    flap,
    minitron,
    neuron_sums,
    no_sums,
    over_one_std,
    over_processes,
    threshold,
)


@pytest.fixture
def case():
    """ReLU outputs [3, 5, 7] with a dead neuron, a mask with an empty window's worth of padding, and W [4, 7]."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(3, 5, 7, generator=generator).relu() * torch.arange(7)
    keep = torch.ones(3, 5, dtype=torch.bool)
    keep[1, 3:], keep[2] = False, False
    return h, keep, torch.randn(4, 7, generator=generator)


def test_scores_match_loops(case):
    h, keep, W = case
    sums = neuron_sums(h, 0.5, keep)
    arrays = [x.numpy().astype(np.float64) for x in (h, W)]
    keep_ = keep.numpy()
    expected = [
        (apoz(sums), reference.apoz(arrays[0], keep_)),
        (apoz_below(sums), reference.apoz(arrays[0], keep_, below=0.5)),
        (contribution(sums, W), reference.contribution(arrays[0], keep_, arrays[1])),
        (flap(sums, W), reference.flap(arrays[0], keep_, arrays[1])),
        (minitron(sums), reference.minitron(arrays[0], keep_)),
    ]
    for ours, theirs in expected:
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-6)
    assert apoz(sums)[0] == 1


def test_sums_of_batches_are_sums_of_all(case):
    h, keep, W = case
    whole = neuron_sums(h, 0.5, keep)
    parts = no_sums(7)
    for window, kept in zip(h, keep, strict=True):
        parts = parts + neuron_sums(window[None], 0.5, kept[None])
    parts = over_processes(parts)
    for score in (apoz, apoz_below, minitron, threshold):
        torch.testing.assert_close(score(parts), score(whole))
    torch.testing.assert_close(flap(parts, W), flap(whole, W))


def test_padding_may_hold_anything(case):
    h, keep, W = case
    changed = h.masked_fill(~keep[..., None], 9.0)
    torch.testing.assert_close(contribution(neuron_sums(changed, 0, keep), W), contribution(neuron_sums(h, 0, keep), W))
    assert torch.equal(apoz(neuron_sums(changed, 0, keep)), apoz(neuron_sums(h, 0, keep)))


def test_tokens_without_windows_are_one_window(case):
    h, keep, _ = case
    flat = neuron_sums(h[keep])
    assert flat.windows == 1
    torch.testing.assert_close(minitron(flat), h[keep].abs().mean(0).double())


def test_threshold_is_a_share_of_the_rms(case):
    h, _, _ = case
    assert threshold(neuron_sums(h), 0.25) == pytest.approx(0.25 * h.square().mean().sqrt().item())


def test_no_tokens_give_no_scores():
    sums = no_sums(3)
    W = torch.ones(2, 3)
    for score in (apoz(sums), apoz_below(sums), contribution(sums, W), flap(sums, W), minitron(sums)):
        assert torch.equal(score, torch.zeros(3, dtype=torch.float64))
    assert threshold(sums) == 0


def test_variance_survives_a_large_mean():
    h = torch.tensor([[1000.0], [1001.0], [1002.0], [1001.0]])
    torch.testing.assert_close(neuron_sums(h).variance, torch.tensor([0.5], dtype=torch.float64))


def test_the_papers_rule_takes_outliers_only():
    share = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.9], dtype=torch.float64)
    assert over_one_std(share).tolist() == [False] * 4 + [True]
    assert not over_one_std(torch.full((5,), 0.7, dtype=torch.float64)).any()
