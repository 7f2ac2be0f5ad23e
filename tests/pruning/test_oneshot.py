"""Wanda, SparseGPT and ALPS on matrices: counts are exact, oracles agree, and each beats the one before it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from reference.pruning import drop_smallest, n_m
from reference.sparsegpt import best_support, least_squares
from reference.sparsegpt import sparsegpt as slow_sparsegpt

from hf_slim.core.feedback import error_feedback, factor
from hf_slim.pruning import alps, sparsegpt, wanda
from hf_slim.pruning.masks import magnitude_mask, n_m_mask
from hf_slim.pruning.survivors import damped, refit
from hf_slim.quantization.gptq import grid_rounder, relative_error
from hf_slim.quantization.grid import fit_grid, from_grid

PATTERNS = ["unstructured", "2:4", "1:3"]


def problem(rows: int, cols: int, seed: int, tokens: int = 2048):
    """Weights, and H of inputs that are correlated and of unequal size, as a transformer's are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=generator) / cols**0.5 + torch.eye(cols)
    sizes = torch.exp(torch.randn(cols, generator=generator))
    x = torch.randn(tokens, cols, generator=generator) @ mix * sizes
    return torch.randn(rows, cols, generator=generator), 2 / tokens * x.T @ x


def related(rows: int, cols: int, seed: int, tokens: int = 2048):
    """Weights, and H of inputs most of whose variance lies in a quarter of the directions."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols // 4, cols, generator=generator)
    sizes = torch.exp(0.5 * torch.randn(cols, generator=generator))
    x = torch.randn(tokens, cols // 4, generator=generator) @ mix + torch.randn(tokens, cols, generator=generator)
    x *= sizes
    return torch.randn(rows, cols, generator=generator), 2 / tokens * x.T @ x


def earlier_mask(rows: int, cols: int, seed: int = 0):
    return torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) < 0.8


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 17), st.floats(0, 0.99), st.integers(0, 99))
def test_wanda_drops_the_smallest_of_every_row_and_exactly_as_many_as_asked(rows, cols, sparsity, seed):
    W, H = problem(rows, cols, seed, tokens=32)
    keep = wanda.keep_mask(W, H.diagonal(), sparsity)
    dropped = (~keep).sum(1)
    assert dropped.sum() == round(sparsity * rows * cols)
    assert dropped.max() - dropped.min() <= 1
    score = (W.abs() * H.diagonal().sqrt()).tolist()
    assert keep.tolist() == [drop_smallest(row, int(count)) for row, count in zip(score, dropped, strict=True)]


@pytest.mark.parametrize("pattern", PATTERNS[1:])
def test_wanda_keeps_n_of_every_m(pattern):
    W, H = problem(5, 24, seed=1)
    n, m = map(int, pattern.split(":"))
    score = (W.abs() * H.diagonal().sqrt()).tolist()
    assert wanda.keep_mask(W, H.diagonal(), pattern=pattern).tolist() == [n_m(row, n, m) for row in score]


def test_wanda_without_input_ranks_by_magnitude():
    W, _ = problem(4, 12, seed=2)
    assert torch.equal(wanda.keep_mask(W, torch.zeros(12)), wanda.keep_mask(W, torch.ones(12)))


def test_wanda_counts_what_is_pruned_already():
    W, H = problem(6, 20, seed=3)
    earlier = wanda.keep_mask(W, H.diagonal(), 0.3)
    assert torch.equal(wanda.keep_mask(W, H.diagonal(), 0.6, earlier=earlier), wanda.keep_mask(W, H.diagonal(), 0.6))
    assert torch.equal(wanda.keep_mask(W, H.diagonal(), 0.1, earlier=earlier), earlier)


@pytest.mark.parametrize("again", [False, True], ids=["dense", "pruned before"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("seed", range(2))
def test_sparsegpt_is_elimination_from_the_paper(pattern, again, seed):
    W, H = problem(6, 36, seed)
    earlier = earlier_mask(6, 36) if again else torch.ones(6, 36, dtype=torch.bool)
    window = 12 if pattern == "unstructured" else int(pattern[-1])
    _, X, keep = sparsegpt.prune(W, factor(H, act_order=False), 0.6, pattern, window, earlier if again else None)
    expected, expected_keep = slow_sparsegpt(W.numpy(), H.numpy(), 0.6, pattern, window, 0.01, earlier.numpy())
    assert np.array_equal(keep.numpy(), expected_keep)
    np.testing.assert_allclose(X.numpy(), expected, atol=2e-4)
    assert (X[~keep] == 0).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.integers(1, 40), st.floats(0, 0.99), st.integers(1, 50), st.integers(0, 99))
def test_sparsegpt_drops_exactly_as_many_as_asked(rows, cols, sparsity, window, seed):
    W, H = problem(rows, cols, seed, tokens=64)
    _, _, keep = sparsegpt.prune(W, factor(H, act_order=False), sparsity, window=window)
    assert (~keep).sum() == round(sparsity * rows * cols)


@pytest.mark.parametrize("block", [1, 5, 32, 128])
def test_blocks_of_the_feedback_do_not_change_what_is_chosen(block):
    W, H = problem(5, 90, seed=4)
    _, X, _ = sparsegpt.prune(W, factor(H, act_order=False), 0.5, window=20)
    keep = torch.ones_like(W, dtype=torch.bool)
    choose = sparsegpt._chooser(keep, factor(H, act_order=False).importance().sqrt(), 0.5, None)
    _, other = error_feedback(W, factor(H, act_order=False), sparsegpt._as_it_is, block, choose=choose, window=20)
    torch.testing.assert_close(other, X, rtol=0, atol=1e-5)


def test_unrelated_inputs_mean_wanda_in_one_window():
    W, _ = problem(8, 40, seed=5)
    H = torch.diag(torch.linspace(0.5, 3, 40))
    _, X, keep = sparsegpt.prune(W, factor(H, 1e-6, act_order=False), 0.5, window=40)
    assert torch.equal(keep, magnitude_mask(W * H.diagonal().sqrt(), 0.5))
    assert torch.equal(X, W * keep)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_refit_falls_step_by_step_to_the_exact_solution(pattern):
    W, H = problem(6, 36, seed=6)
    H = damped(H, 0.01)
    _, start, keep = sparsegpt.prune(W, factor(H, act_order=False), 0.6, pattern)
    errors = [relative_error(W, refit(W, H, start, keep, steps), H) for steps in (0, 1, 2, 4, 8, 36)]
    assert all(after < before * (1 + 1e-5) for before, after in pairwise(errors))
    assert errors[-1] < 0.97 * errors[0]
    exact = least_squares(W.double().numpy(), H.double().numpy(), keep.numpy())
    np.testing.assert_allclose(refit(W, H, start, keep, 60).numpy(), exact, atol=1e-4)
    assert (refit(W, H, start, keep, 3)[~keep] == 0).all()


def test_refit_leaves_what_cannot_be_better_alone():
    W, H = problem(4, 20, seed=7)
    H = damped(H, 0.01)
    everything, nothing = torch.ones_like(W, dtype=torch.bool), torch.zeros_like(W, dtype=torch.bool)
    assert torch.equal(refit(W, H, W, everything), W)
    assert torch.equal(refit(W, H, W * 0, nothing), W * 0)


def rivals(W, H, sparsity, pattern="unstructured"):
    """Relative output errors, worst method first."""
    ranked = {"magnitude": W, "wanda": None}
    if pattern == "unstructured":
        ranked["magnitude"] = W * magnitude_mask(W, sparsity)
    else:
        ranked["magnitude"] = W * n_m_mask(W, *map(int, pattern.split(":")))
    ranked["wanda"] = W * wanda.keep_mask(W, H.diagonal(), sparsity, pattern)
    _, ranked["sparsegpt"], keep = sparsegpt.prune(W, factor(H, act_order=False), sparsity, pattern)
    ranked["refitted"] = refit(W, damped(H, 0.01), ranked["sparsegpt"], keep)
    ranked["alps"], _ = alps.prune(W, damped(H, 0.01), sparsity, pattern)
    return {name: relative_error(W, X, H) for name, X in ranked.items()}


@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.5), ("unstructured", 0.7), ("2:4", 0.5)])
def test_each_method_beats_the_one_before_it(pattern, sparsity):
    for seed in range(2):
        errors = rivals(*related(48, 192, seed), sparsity, pattern)
        assert errors["wanda"] < 0.9 * errors["magnitude"], errors
        assert errors["sparsegpt"] < 0.6 * errors["wanda"], errors
        assert errors["refitted"] < errors["sparsegpt"], errors
        assert errors["alps"] < 0.95 * errors["refitted"], errors


@pytest.mark.parametrize("survivors", [3, 5, 7])
def test_alps_is_near_the_best_of_all_supports(survivors):
    found, best = [], []
    for seed in range(6):
        W, H = problem(1, 10, seed)
        H = damped(H, 0.01)
        X, keep = alps.prune(W, H, 1 - survivors / 10, refits=20)
        assert keep.sum() == survivors
        found.append((((W - X) @ H) * (W - X)).sum().item())
        best.append(best_support(W[0].double().numpy(), H.double().numpy(), survivors))
    assert all(f >= b * (1 - 1e-4) for f, b in zip(found, best, strict=True))
    assert sum(found) < 1.5 * sum(best)
    assert sum(f < b * (1 + 1e-3) for f, b in zip(found, best, strict=True)) >= 3  # of six, the very best


@pytest.mark.parametrize("pattern", PATTERNS)
def test_alps_is_exact_and_leaves_the_pruned_pruned(pattern):
    W, H = problem(7, 24, seed=8)
    earlier = earlier_mask(7, 24)
    X, keep = alps.prune(W, damped(H, 0.01), 0.7, pattern, steps=30)
    assert (~keep).sum() == {"unstructured": round(0.7 * 7 * 24), "2:4": 84, "1:3": 112}[pattern]
    assert torch.equal(X != 0, keep)
    again, kept = alps.prune(W * earlier, damped(H, 0.01), 0.7, pattern, earlier, steps=30)
    assert not (kept & ~earlier).any()
    assert (again[~kept] == 0).all()


def test_scale_of_the_inputs_does_not_matter():
    W, H = problem(8, 40, seed=9)
    _, X, keep = sparsegpt.prune(W, factor(H, act_order=False), 0.6)
    _, same, same_keep = sparsegpt.prune(W, factor(H * 2**-20, act_order=False), 0.6)
    assert torch.equal(keep, same_keep)
    assert torch.equal(X, same)
    assert torch.equal(alps.prune(W, damped(H, 0.01))[1], alps.prune(W, damped(H * 2**-20, 0.01))[1])


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_rounding_in_the_same_pass_beats_rounding_afterwards(pattern):
    W, H = related(32, 128, seed=10)
    root = factor(H, act_order=False)
    scales, zeros = fit_grid(W, 3, 32, importance=root.importance())
    codes, X, keep = sparsegpt.prune(W, root, 0.5, pattern, round_column=grid_rounder(scales, zeros, 3, 32))
    assert torch.equal(from_grid(codes, scales, zeros, 32) * keep, X)
    _, dense, mask = sparsegpt.prune(W, root, 0.5, pattern)
    rounder = grid_rounder(scales, zeros, 3, 32)
    after = torch.stack([rounder(dense[:, c], c)[1] for c in range(128)], 1) * mask
    assert relative_error(W, X, H) < 0.85 * relative_error(W, after, H)


def test_arguments_are_left_alone():
    W, H = problem(6, 24, seed=11)
    earlier = earlier_mask(6, 24)
    before = W.clone(), H.clone(), earlier.clone()
    wanda.keep_mask(W, H.diagonal(), 0.5, earlier=earlier)
    sparsegpt.prune(W, factor(H, act_order=False), 0.5, earlier=earlier)
    alps.prune(W, damped(H, 0.01), 0.5, earlier=earlier)
    assert all(torch.equal(a, b) for a, b in zip(before, (W, H, earlier), strict=True))


@pytest.mark.parametrize("method", [wanda, sparsegpt, alps])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": -0.1}, "greater than or equal to 0"),
        ({"pattern": "4:2"}, "0 < n < m"),
        ({"pattern": "block:4"}, "take 'unstructured' or 'n:m'"),
        ({"pattern": "2:4", "budget": "owl"}, "prunes every layer alike"),
        ({"budget": "owl", "layers": {"first": {"sparsity": 0.1}}}, "no options to single layers"),
        ({"budget": "random"}, "'uniform', 'owl' or 'sensitivity'"),
    ],
)
def test_impossible_options_are_refused(method, options, message):
    with pytest.raises(ValidationError, match=message):
        method.Config(**options)


def test_rounded_survivors_do_not_learn():
    with pytest.raises(ValidationError, match="rounded survivors do not learn"):
        sparsegpt.Config(bits=4, iterations=8)
