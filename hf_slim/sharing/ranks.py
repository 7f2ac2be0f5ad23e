"""Ranks: how many directions of each layer's output are kept.

A rank r costs about r (rows + cols) numbers and saves room below r = rows cols / (rows + cols). Dropping direction i
costs its share of the output's energy, s_i². Over many layers the ranks of least total loss within a number of bytes
lie on the lower convex hulls of the layers' (bytes, loss) curves: go down the steepest piece that is left, until
nothing fits. Ranks up to the useful one and the dense weight, which loses nothing, are points of a curve: with sinking
s_i² all ranks lie on its hull until the jump to the dense weight pays better.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor


def largest_rank(nbytes: Callable[[int], int], most: int, room: float, multiple: int = 1) -> int:
    """The largest rank up to `most` that takes at most `room` bytes, a multiple of `multiple`; 0 if none does.

    Args:
        nbytes: of a rank; rising.
    """
    return multiple * bisect_right(range(1, most // multiple + 1), room, key=lambda n: nbytes(multiple * n))


def rank_of_energy(energies: Float[Tensor, " directions"], share: float, multiple: int = 1) -> int:
    """The smallest rank, a multiple of `multiple`, that keeps this share of the energy; at least `multiple`.

    Args:
        energies: not negative, falling.
    """
    kept = energies.double().cumsum(0)
    enough = kept >= share * kept[-1] * (1 - 1e-12)  # a sum of all of it, in another order, is all of it
    return multiple * -(-(int(enough.int().argmax()) + 1) // multiple)


def losses_of_ranks(energies: Float[Tensor, " directions"], ranks: Sequence[int]) -> list[float]:
    """What is lost at each of these ranks, the energy of the dropped directions, as a share of all; 0 for no energy."""
    total = float(energies.double().sum())
    if total <= 0:
        return [0.0] * len(ranks)
    dropped = energies.double().flip(0).cumsum(0).flip(0)  # small ones first: their sum is the loss of high ranks
    tail = [*dropped.tolist(), 0.0]
    return [tail[min(rank, len(energies))] / total for rank in ranks]


def cheapest_choices(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: float) -> list[int]:
    """One option for every layer, of least total loss within the budget, up to what one option cannot fill.

    Args:
        losses: of every layer's options.
        costs: of them, rising.
        budget: for the sum of the costs; at least that of all the first options.

    Returns:
        The number of the option that each layer takes.
    """
    pieces = []
    for layer, (loss, cost) in enumerate(zip(losses, costs, strict=True)):
        hull = lower_hull(loss, cost)
        for start, stop in pairwise(hull):
            slope = (loss[stop] - loss[start]) / (cost[stop] - cost[start])
            pieces.append((slope, layer, start, stop))
    chosen = [0] * len(losses)
    left = budget - sum(cost[0] for cost in costs)
    for _, layer, start, stop in sorted(pieces):
        if chosen[layer] != start:  # an earlier piece of this layer did not fit as a whole
            continue
        cost = costs[layer]
        # The dense weight may be such a piece's end; if it does not fit, the largest rank that does is taken.
        chosen[layer] = bisect_right(cost, left + cost[start], start, stop + 1) - 1
        left -= cost[chosen[layer]] - cost[start]
    return chosen


def lower_hull(loss: Sequence[float], cost: Sequence[int]) -> list[int]:
    """Numbers of the points (cost, loss) on the lower convex hull, from the first to the least loss."""
    hull: list[int] = []
    for i in range(len(loss)):
        if hull and loss[i] >= loss[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2:]
            if (loss[b] - loss[a]) * (cost[i] - cost[a]) < (loss[i] - loss[a]) * (cost[b] - cost[a]):
                break
            hull.pop()
        hull.append(i)
    return hull


def dropped_energy(energies: Float[Tensor, " directions"], rank: int) -> float:
    """The loss of a rank, as a share of the energy of all directions; 0 for no energy."""
    return losses_of_ranks(torch.as_tensor(energies), [rank])[0]
