"""Budgets: counts add up exactly, bounds hold, what is called cheapest is, and measuring changes nothing."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_slim import compress
from hf_slim.core.context import Context
from hf_slim.core.select import Select, find_layers, select_layers
from hf_slim.core.swap import get_keep, get_weight
from hf_slim.pruning import budget, wanda

IDS = tiny.ids(16, 16, seed=1)
SIZES = st.lists(st.integers(1, 5000), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.floats(0, budget.MOST), st.randoms(use_true_random=False))
def test_counts_add_up_exactly_within_bounds(sizes, sparsity, random):
    shares = [random.uniform(-0.2, 1.2) for _ in sizes]
    counts = budget.exact_counts(shares, sizes, sparsity)
    assert sum(counts) == round(sparsity * sum(sizes))
    assert all(0 <= count <= budget.MOST * n + 1 for count, n in zip(counts, sizes, strict=True))


def test_counts_are_the_shares_where_those_add_up():
    assert budget.exact_counts([0.25, 0.75], [400, 400], 0.5) == [100, 300]
    assert budget.exact_counts([0.5, 0.5], [3, 4], 0.5) in ([1, 3], [2, 2])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 0.3), min_size=1, max_size=8), st.floats(0.2, 0.8))
def test_owl_keeps_the_mean_and_gives_outliers_room(outliers, sparsity):
    shares = budget.owl_shares(outliers, sparsity)
    assert sum(shares) / len(shares) == pytest.approx(sparsity)
    assert max(shares) - min(shares) <= 2 * budget.SPREAD + 1e-9
    ranked = sorted(range(len(outliers)), key=lambda i: outliers[i])
    assert all(shares[a] >= shares[b] - 1e-9 for a, b in pairwise(ranked))


def test_owl_by_hand():
    assert budget.owl_shares([0.0, 0.02, 0.04], 0.7) == pytest.approx([0.78, 0.70, 0.62])
    assert budget.owl_shares([0.1, 0.1], 0.7) == pytest.approx([0.7, 0.7])


def test_outliers_are_scores_far_above_the_mean():
    scores = torch.ones(100)
    scores[:3] = 50.0
    assert budget.outlier_share(scores) == pytest.approx(0.03)


def test_cheapest_is_the_best_of_all_allocations():
    levels = torch.linspace(0.2, 0.8, 4)
    curves = torch.tensor([[0.0, 1, 3, 9], [0.0, 2, 5, 20], [0.0, 0.1, 0.3, 0.6]])
    sizes = [100, 100, 100]
    shares = budget.cheapest(curves, levels, sizes, 0.4 + 0.2 / 3)
    grid = levels.tolist()
    choices = [c for c in product(range(4), repeat=3) if sum(grid[k] for k in c) == pytest.approx(1.4)]
    best = min(choices, key=lambda c: sum(curves[layer, k].item() for layer, k in enumerate(c)))
    assert shares == pytest.approx([grid[k] for k in best], abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(0, 99), st.floats(0.2, 0.8))
def test_cheapest_meets_the_total_and_stays_in_range(sizes, seed, sparsity):
    curves = torch.rand(len(sizes), 5, generator=torch.Generator().manual_seed(seed)).cumsum(1)
    levels = torch.linspace(0.2, 0.8, 5)
    shares = budget.cheapest(curves, levels, sizes, sparsity)
    whole = sum(share * n for share, n in zip(shares, sizes, strict=True))
    assert whole == pytest.approx(sparsity * sum(sizes), rel=1e-4)
    assert all(0.2 - 1e-6 <= share <= 0.8 + 1e-6 for share in shares)


def test_equal_layers_are_treated_about_alike():
    curve = torch.linspace(0, 1, 7).square()
    shares = budget.cheapest(torch.stack([curve] * 4), torch.linspace(0.4, 0.6, 7), [50] * 4, 0.5)
    assert max(shares) - min(shares) <= 0.2 / 6 + 1e-6


@pytest.mark.parametrize("how", ["owl", "sensitivity"])
def test_measured_budgets_are_exact_in_the_model(how):
    model = tiny.llama()
    layers = select_layers(find_layers(model), Select())
    report = compress(model, "prune.wanda", data=IDS, sparsity=0.6, budget=how)
    total = sum(layer.rows * layer.cols for layer in layers)
    zeros = [(row.metrics["zeros"], row.rows * row.cols) for row in report.layers]
    assert sum(count for count, _ in zeros) == round(0.6 * total)
    assert len({count / n for count, n in zeros}) > 1
    for row in report.layers:
        assert (~get_keep(model.get_submodule(row.name))).sum() == row.metrics["zeros"]


@pytest.mark.parametrize("how", ["owl", "sensitivity"])
def test_measuring_changes_no_weight_and_keeps_no_block(how, tmp_path):
    model, before = tiny.gpt2(), tiny.gpt2()
    layers = select_layers(find_layers(model), Select())
    context = Context(blocks=tmp_path)
    shares = budget.layer_sparsities(model, layers, how, 0.5, IDS, context, wanda.keep_mask)
    assert shares.keys() == {layer.name for layer in layers}
    for layer in layers:
        assert torch.equal(get_weight(model.get_submodule(layer.name)), get_weight(before.get_submodule(layer.name)))
    assert not list(tmp_path.iterdir())
