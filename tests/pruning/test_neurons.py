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
    global_counts,
    kept_count,
    minitron,
    most_important,
    neuron_sums,
    no_sums,
    over_one_std,
    over_processes,
    surgeon,
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


def correlated(neurons=8, tokens=400, rows=5):
    """h [tokens, neurons] that are linear in each other to some degree, and W [rows, neurons]."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(neurons, neurons, generator=generator, dtype=torch.float64)
    h = torch.randn(tokens, neurons, generator=generator, dtype=torch.float64) @ mix
    return h, torch.randn(rows, neurons, generator=generator, dtype=torch.float64)


def test_surgeon_is_the_error_of_the_best_refit_without_the_neuron():
    h, W = correlated()
    expected = [reference.error_without(h.numpy(), W.numpy(), [j]) for j in range(8)]
    np.testing.assert_allclose(surgeon(W, h.T @ h / len(h), ridge=1e-12).numpy(), expected, rtol=1e-5)


def test_surgeon_removes_greedily():
    h, W = correlated()
    rank = surgeon(W, h.T @ h / len(h), count=4, ridge=1e-12)
    assert rank.argsort()[:4].tolist() == reference.greedy(h.numpy(), W.numpy(), 4)
    assert rank.isinf().sum() == 4


def test_surgeon_in_steps_removes_as_many_and_hardly_worse():
    h, W = correlated(neurons=24, rows=12)
    C = h.T @ h / len(h)
    gone = [surgeon(W, C, count=12, step=step).argsort()[:12].tolist() for step in (1, 3)]
    fine, coarse = (reference.error_without(h.numpy(), W.numpy(), chosen) for chosen in gone)
    assert len(set(gone[1])) == 12
    assert coarse < 1.5 * fine


def test_surgeon_takes_the_dead_and_the_doubled_first():
    h, W = correlated()
    h[:, 2] = 0
    h[:, 5] = -3 * h[:, 4]
    gone = surgeon(W, h.T @ h / len(h), count=2).argsort()[:2].tolist()
    assert 2 in gone
    assert {4, 5} & set(gone)


@pytest.mark.parametrize(
    ("neurons", "share", "multiple_of", "kept"),
    [
        (48, 0.25, 1, 36),
        (7, 0.5, 1, 3),
        (7, 0.01, 1, 7),
        (7, 0.99, 1, 0),
        (48, 0.3, 8, 32),
        (48, 0.99, 8, 8),
        (50, 0.01, 8, 48),
        (50, 0.001, 64, 50),
    ],
)
def test_kept_counts(neurons, share, multiple_of, kept):
    assert kept_count(neurons, share, multiple_of) == kept


def test_the_most_important_stay_and_ties_go_by_position():
    assert most_important(torch.tensor([3.0, 1.0, 2.0, 1.0]), 2).tolist() == [True, False, True, False]
    assert most_important(torch.ones(4), 1).tolist() == [False, False, False, True]
    assert most_important(torch.ones(3), 3).all()


def test_a_global_ranking_removes_so_many_and_spares_every_layers_floor():
    scores = {"a": torch.tensor([0.0, 0.0, 0.0, 10.0]), "b": 100 * torch.tensor([0.9, 1.0, 1.1, 1.0])}
    counts = global_counts(scores, 4, {"a": 1, "b": 1})
    assert counts == {"a": 1, "b": 3}  # in standard deviations b's smallest lies below a's, then come a's three
    assert global_counts(scores, 4, {"a": 3, "b": 1}) == {"a": 3, "b": 1}
    assert global_counts(scores, 0, {"a": 1, "b": 1}) == {"a": 4, "b": 4}
