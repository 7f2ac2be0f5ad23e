"""Ranks: the largest that fits, the smallest that keeps enough, and the cheapest over many layers."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import low_rank as reference

from hf_slim.sharing.ranks import (
    cheapest_choices,
    dropped_energy,
    largest_rank,
    losses_of_ranks,
    lower_hull,
    rank_of_energy,
)

falling = st.lists(st.floats(0, 10), min_size=1, max_size=8).map(lambda x: torch.tensor(sorted(x, reverse=True)))


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 400), st.integers(1, 7))
def test_the_largest_rank_fits_and_the_next_does_not(most, step, room, multiple):
    found = largest_rank(lambda rank: step * rank, most, room, multiple)
    fitting = [rank for rank in range(multiple, most + 1, multiple) if step * rank <= room]
    assert found == max(fitting, default=0)


@given(falling, st.floats(0.01, 1), st.integers(1, 3))
def test_the_rank_of_an_energy_keeps_it_and_no_smaller_one_does(energies, share, multiple):
    rank = rank_of_energy(energies, share, multiple)
    assert rank % multiple == 0
    assert 1 - dropped_energy(energies, rank) >= share - 1e-9
    if rank > multiple and energies.sum() > 0:
        assert 1 - dropped_energy(energies, rank - multiple) < share + 1e-9


def test_losses_are_tails_of_the_energies():
    assert losses_of_ranks(torch.tensor([6.0, 3.0, 1.0]), [1, 2, 3, 9]) == [0.4, 0.1, 0.0, 0.0]
    assert losses_of_ranks(torch.zeros(3), [1, 2]) == [0.0, 0.0]


@st.composite
def curves(draw):
    """Layers of a few ranks each, and the dense weight last."""
    losses, costs = [], []
    for _ in range(draw(st.integers(1, 4))):
        tail = sorted(draw(st.lists(st.floats(0, 1), min_size=1, max_size=4)), reverse=True)
        step = draw(st.integers(1, 5))
        losses.append([*tail, 0.0])
        costs.append([step * (i + 1) for i in range(len(tail))] + [step * (len(tail) + draw(st.integers(1, 6)))])
    least, most = sum(cost[0] for cost in costs), sum(cost[-1] for cost in costs)
    return losses, costs, draw(st.integers(least, most))


@given(curves())
@settings(max_examples=200, deadline=None)
def test_choices_are_within_the_budget_and_nearly_the_best(drawn):
    losses, costs, budget = drawn
    chosen = cheapest_choices(losses, costs, budget)
    assert sum(cost[i] for cost, i in zip(costs, chosen, strict=True)) <= budget
    total = sum(loss[i] for loss, i in zip(losses, chosen, strict=True))
    # One piece of a hull does not fit as a whole: the best choice can be better by its gain at most.
    pieces = [
        loss[a] - loss[b]
        for loss, cost in zip(losses, costs, strict=True)
        for hull in [lower_hull(loss, cost)]
        for a, b in pairwise(hull)
    ]
    assert total <= reference.cheapest(losses, costs, budget) + max(pieces, default=0.0) + 1e-9


def test_what_pays_most_goes_first():
    losses, costs = [[0.9, 0.1, 0.0], [0.5, 0.4, 0.0]], [[1, 2, 3], [1, 2, 9]]
    assert cheapest_choices(losses, costs, 2) == [0, 0]
    assert cheapest_choices(losses, costs, 3) == [1, 0]
    assert cheapest_choices(losses, costs, 12) == [2, 2]
