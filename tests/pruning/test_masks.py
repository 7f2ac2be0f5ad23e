"""Masks: exact counts, the largest stay, ties by position; agreement with sorting lists."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import pruning as reference

from hf_slim.core.errors import PlanError
from hf_slim.pruning.masks import block_scores, global_masks, highest, magnitude_mask, n_m_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(rows, cols, seed=0, dtype=torch.float32):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)


@st.composite
def coarse_weights(draw):
    """Few distinct magnitudes, so that most thresholds fall on ties; zeros and signs among them."""
    rows, cols = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    values = draw(st.lists(st.integers(-3, 3), min_size=rows * cols, max_size=rows * cols))
    return torch.tensor(values, dtype=torch.float32).view(rows, cols) * draw(st.sampled_from([1.0, 1e-30, 3.3e7]))


@settings(max_examples=60, deadline=None)
@given(coarse_weights(), st.floats(0, 1, exclude_max=True))
def test_magnitude_mask_matches_sorting(W, sparsity):
    keep = magnitude_mask(W, sparsity)
    assert keep.flatten().tolist() == reference.drop_smallest(W.flatten().tolist(), round(sparsity * W.numel()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.0, 1e-6, 0.3, 0.5, 0.999, 1 - 1e-9])
def test_count_is_exact_and_the_largest_stay(dtype, sparsity):
    W = weights(37, 53, dtype=dtype)
    keep = magnitude_mask(W, sparsity)
    assert (~keep).sum().item() == round(sparsity * W.numel())
    if keep.any() and not keep.all():
        assert W[keep].abs().min() >= W[~keep].abs().max()


def test_equal_weights_are_dropped_in_order():
    keep = magnitude_mask(torch.full((4, 5), -2.0), 0.35)
    assert keep.flatten().tolist() == [False] * 7 + [True] * 13


def test_pruning_further_keeps_what_is_pruned():
    W = weights(20, 30, dtype=torch.bfloat16)
    first = magnitude_mask(W, 0.4)
    second = magnitude_mask(W * first, 0.6)
    assert (second <= first).all()


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 2.0, float("nan")])
def test_sparsity_out_of_range_is_refused(sparsity):
    with pytest.raises(PlanError, match="at least 0 and below 1"):
        magnitude_mask(weights(2, 2), sparsity)


@settings(max_examples=30, deadline=None)
@given(st.lists(coarse_weights(), min_size=1, max_size=4), st.floats(0, 1, exclude_max=True))
def test_global_masks_match_sorting_all_together(matrices, sparsity):
    named = {f"layer{i}": W for i, W in enumerate(matrices)}
    together = [value for W in matrices for value in W.flatten().tolist()]
    keep = torch.cat([mask.flatten() for mask in global_masks(named, sparsity).values()])
    assert keep.tolist() == reference.drop_smallest(together, round(sparsity * len(together)))


def test_global_ranking_prunes_small_layers_more():
    masks = global_masks({"small": weights(8, 8) * 0.1, "large": weights(8, 8, seed=1)}, 0.5)
    assert masks["small"].float().mean() < 0.3
    assert masks["large"].float().mean() > 0.7


@settings(max_examples=60, deadline=None)
@given(coarse_weights(), st.integers(1, 5), st.data())
def test_n_m_mask_matches_groups(W, m, data):
    n = data.draw(st.integers(0, m))
    W = W.repeat(1, m)
    expected = [reference.n_m(row, n, m) for row in W.tolist()]
    assert n_m_mask(W, n, m).tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_n_m_mask_keeps_n_of_every_m(dtype):
    keep = n_m_mask(weights(6, 24, dtype=dtype), 2, 4)
    assert (keep.view(6, 6, 4).sum(-1) == 2).all()


def test_n_m_mask_reads_transposed_views():
    W = weights(8, 12)
    np.testing.assert_array_equal(n_m_mask(W.T.contiguous().T, 1, 4), n_m_mask(W, 1, 4))


@pytest.mark.parametrize(("n", "m", "message"), [(2, 5, "multiple of 5"), (5, 4, "0 <= n <= m"), (0, 0, "0 <= n <= m")])
def test_impossible_n_m_is_refused(n, m, message):
    with pytest.raises(PlanError, match=message):
        n_m_mask(weights(2, 8), n, m)


@settings(max_examples=60, deadline=None)
@given(coarse_weights(), st.floats(0, 1, exclude_max=True))
def test_scores_of_either_sign_rank_as_sorting_does(S, sparsity):
    S[S == 3] = -torch.inf
    S[0, 0] = -0.0
    order = sorted(range(S.numel()), key=lambda i: (S.flatten()[i].item(), i))
    dropped = set(order[: round(sparsity * S.numel())])
    assert highest({"S": S}, sparsity)["S"].flatten().tolist() == [i not in dropped for i in range(S.numel())]


@settings(max_examples=60, deadline=None)
@given(coarse_weights(), st.integers(1, 4), st.floats(0, 1, exclude_max=True))
def test_blocks_stay_or_go_as_their_sums_rank(W, block, sparsity):
    W = W.repeat(1, block)
    sums = [sum(abs(x) for x in run) for run in W.reshape(-1, block).tolist()]
    kept = reference.drop_smallest(sums, round(sparsity * len(sums)))
    assert magnitude_mask(W, sparsity, block).reshape(-1, block).tolist() == [[keep] * block for keep in kept]


def test_a_block_is_pruned_only_when_all_of_it_is():
    scores = torch.tensor([[1.0, -torch.inf, -torch.inf, -torch.inf, -2.0, -3.0]])
    assert block_scores(scores, 2).tolist() == [[1.0, -torch.inf, -5.0]]


def test_columns_that_blocks_do_not_fill_are_refused():
    with pytest.raises(PlanError, match="multiple of 4 columns, got 6"):
        magnitude_mask(weights(2, 6), 0.5, block=4)
