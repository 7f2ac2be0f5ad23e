"""Layer budgets: how many of the weights that are to go each layer gives, in a model pruned as a whole.

    uniform       every layer the same share
    owl           Yin et al. 2024, arXiv:2310.05175: blocks with more outliers give fewer. D = share of a block's scores
                  |W| * ||x|| above M = 5 times their mean; its sparsity is S - (D', scaled to a spread of 2 lambda,
                  lambda = 0.08, around its mean over the blocks)
    sensitivity   minimise sum over layers of E_l(s_l), E_l the measured curve of the layer's relative output error over
                  its sparsity, by giving weights where the next one costs least (steepest curves last), within
                  +- 0.15 of the whole's sparsity

The counts add up to round(sparsity * all weights) exactly. What is measured is measured on the dense model, in a walk
that replaces nothing. The curves are those of Wanda's masks under the whole Hessian.

Shapes: curves [layers, levels]; sizes, shares: one number a layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hf_slim.core.context import Context
from hf_slim.core.select import Layer
from hf_slim.core.swap import get_weight
from hf_slim.core.walk import Block, Solution, Statistics, walk

Budget = Literal["uniform", "owl", "sensitivity"]
OUTLIER = 5.0  # M, times the mean
SPREAD = 0.08  # lambda
REACH = 0.15  # of "sensitivity"
LEVELS = 7
MOST = 0.99  # of a layer's weights that a budget may take


def exact_counts(shares: Sequence[float], sizes: Sequence[int], sparsity: float) -> list[int]:
    """Whole numbers of weights near shares * sizes that add up to round(sparsity * sum(sizes)).

    Args:
        shares: wished-for sparsity of every layer; all are shifted by the same amount to meet the total.
        sizes: weights of every layer.
        sparsity: of all together, at least 0 and at most `MOST`.

    Returns:
        Counts between 0 and each layer's size, apart from rounding at most `MOST` of it.
    """
    total = round(sparsity * sum(sizes))

    def wished(shift: float) -> list[float]:
        return [n * min(MOST, max(0.0, share + shift)) for share, n in zip(shares, sizes, strict=True)]

    low, high = -1.0 - max(shares), 1.0 - min(shares)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(wished(middle)) < total else (low, middle)
    wish = wished(high)
    counts = [int(w) for w in wish]
    by_rest = sorted(range(len(wish)), key=lambda i: counts[i] - wish[i])
    for i in by_rest[: total - sum(counts)]:
        counts[i] += 1
    return counts


def owl_shares(outliers: Sequence[float], sparsity: float, spread: float = SPREAD) -> list[float]:
    """OWL's sparsity of every block.

    Args:
        outliers: share of outlying scores of every block.
        sparsity: mean of the result.
        spread: lambda: half the distance between the largest and the smallest of them.
    """
    low, high = min(outliers), max(outliers)
    scaled = [2 * spread * (x - low) / (high - low) if high > low else 0.0 for x in outliers]
    mean = sum(scaled) / len(scaled)
    return [sparsity - (x - mean) for x in scaled]


def outlier_share(scores: Float[Tensor, " weights"], times: float = OUTLIER) -> float:
    """Share of the scores above `times` their mean."""
    return (scores > times * scores.mean()).float().mean().item()


def cheapest(
    curves: Float[Tensor, "layers levels"], levels: Float[Tensor, " levels"], sizes: Sequence[int], sparsity: float
) -> list[float]:
    """Sparsity of every layer for the least sum of errors, along the lower convex hull of each curve.

    Args:
        curves: error of every layer at every level.
        levels: rising sparsities; no layer leaves their range.
        sizes: weights of every layer.
        sparsity: of all together, within the range of the levels.
    """
    grid = levels.double().tolist()
    pieces: list[tuple[float, int, float]] = []
    for layer, curve in enumerate(curves.double().tolist()):
        hull = [0]
        while hull[-1] < len(grid) - 1:
            here = hull[-1]
            slopes = {k: (curve[k] - curve[here]) / (grid[k] - grid[here]) for k in range(here + 1, len(grid))}
            steepest = min(slopes, key=lambda k: (slopes[k], -k))
            pieces.append((slopes[steepest] / sizes[layer], layer, grid[steepest] - grid[here]))
            hull.append(steepest)
    shares = [grid[0]] * len(sizes)
    left = sparsity * sum(sizes) - grid[0] * sum(sizes)
    for _, layer, width in sorted(pieces):
        part = min(width, max(0.0, left / sizes[layer]))
        shares[layer] += part
        left -= part * sizes[layer]
    return shares


# Kept mask of a weight: (W [rows, cols], squares [cols], sparsity) -> Bool[rows, cols].
KeepMask = Callable[[Tensor, Tensor, float], Tensor]


def layer_sparsities(
    model: nn.Module,
    layers: Sequence[Layer],
    budget: Budget,
    sparsity: float,
    windows: Tensor,
    context: Context,
    keep_mask: KeepMask,
) -> dict[str, float]:
    """Sparsity of every layer by a measured budget, counts exact; each times the layer's size is a whole number.

    Args:
        keep_mask: the masks whose error is measured.
    """
    reach = min(REACH, sparsity, MOST - sparsity)
    if reach <= 0:  # no layer can give more than another
        return {layer.name: sparsity for layer in layers}
    levels = torch.linspace(sparsity - reach, sparsity + reach, LEVELS)
    found: dict[str, Tensor] = {}

    def measure(statistics: Mapping[str, Statistics], block: Block | None) -> dict[str, Solution]:
        for group in _one_group(statistics, block, budget):
            weights = {name: get_weight(model.get_submodule(name)).float() for name in group}
            if budget == "owl":
                scores = [(W.abs() * statistics[name].squares.sqrt()).flatten() for name, W in weights.items()]
                found.update(dict.fromkeys(group, torch.tensor(outlier_share(torch.cat(scores)))))
            else:
                found.update({n: error_curve(W, statistics[n], levels, keep_mask) for n, W in weights.items()})
        return {}

    apart = dataclasses.replace(context, blocks=None)  # blocks kept by this walk would be taken for pruned ones
    walk(model, layers, windows, measure, apart, squares=budget == "owl")
    sizes = [layer.rows * layer.cols for layer in layers]
    values = torch.stack([found[layer.name] for layer in layers])
    if budget == "owl":
        shares = _owl_of_layers(layers, values.tolist(), sparsity)
    else:
        shares = cheapest(values, levels, sizes, sparsity)
    counts = exact_counts(shares, sizes, sparsity)
    return {layer.name: count / n for layer, count, n in zip(layers, counts, sizes, strict=True)}


def error_curve(
    W: Float[Tensor, "rows cols"], known: Statistics, levels: Float[Tensor, " levels"], keep_mask: KeepMask
) -> Float[Tensor, " levels"]:
    """Relative squared error of a layer's output when pruned to each level; zero for a layer without input."""
    H = known.hessian
    power = ((W @ H) * W).sum()
    lost = [W * ~keep_mask(W, known.squares, level) for level in levels.tolist()]
    errors = torch.stack([((D @ H) * D).sum() for D in lost])
    return errors / power if power > 0 else torch.zeros_like(errors)


def _one_group(statistics: Mapping[str, Statistics], block: Block | None, budget: Budget) -> list[list[str]]:
    """Names measured together: a whole block under OWL, else every layer alone."""
    names = list(statistics)
    return [names] if budget == "owl" and block is not None else [[name] for name in names]


def _owl_of_layers(layers: Sequence[Layer], outliers: Sequence[float], sparsity: float) -> list[float]:
    """OWL's shares by layer; those of one block are alike, and a layer outside of blocks is one of its own."""
    places = [layer.block or layer.name for layer in layers]
    by_place = dict(zip(places, outliers, strict=True))
    shares = dict(zip(by_place, owl_shares(list(by_place.values()), sparsity), strict=True))
    return [shares[place] for place in places]
