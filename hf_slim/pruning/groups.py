"""Masks that drop whole neurons or heads: everything that a unit writes and everything that reads it.

A unit's score is the sum over all of its weights, in every layer that it has a part in; among layers ("global") the
mean over its weights, so that units of unlike size compare. Ranked so, every group of units (the neurons of one MLP,
the key/value heads of one attention with the query heads that share them) keeps its best unit at least.

A unit that is gone puts out act(0), so its rows' biases go with it once masks are fixed; until then they train, which
changes nothing, as nothing reads the unit. `prune.structurize` makes the layers smaller afterwards.

scores, W, keep: [rows, cols] by layer. Weights of these layers that belong to no unit stay.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hf_slim.core.errors import PlanError
from hf_slim.core.units import Kind, Units
from hf_slim.pruning.masks import highest


def unit_scores(units: Units, scores: Mapping[str, Tensor]) -> Float[Tensor, " units"]:
    """Sum over each unit's weights, without those of -inf; -inf for a unit of which nothing else is left."""
    reader = scores[units.reader][:, units.columns.to(scores[units.reader].device)]  # [rows, units, size]
    parts = [reader.permute(1, 0, 2).flatten(1)]
    for name, rows in units.writers.items():
        parts.append(scores[name][rows.to(scores[name].device)].flatten(1))  # [units, rows of a unit * cols]
    weights = torch.cat(parts, dim=1).float()
    dead = weights == -torch.inf
    return weights.masked_fill(dead, 0.0).sum(1).masked_fill_(dead.all(1), -torch.inf)


def unit_size(units: Units, weights: Mapping[str, Tensor]) -> int:
    """How many weights a unit has."""
    size = units.columns.shape[1] * weights[units.reader].shape[0]
    return size + sum(rows.shape[1] * weights[name].shape[1] for name, rows in units.writers.items())


def choose_units(
    groups: Sequence[Units], scores: Mapping[str, Tensor], sparsity: float, *, together: bool
) -> list[Bool[Tensor, " units"]]:
    """Which units of each group stay: all but the round(sparsity * units) that score lowest.

    Args:
        groups: units of one kind, a group for each layer that reads them.
        scores: [rows, cols] by layer.
        together: rank over all groups instead of within each.
    """
    found = {str(i): unit_scores(units, scores) for i, units in enumerate(groups)}
    if not together:
        return [highest({"": scores}, sparsity)[""] for scores in found.values()]
    for i, units in enumerate(groups):
        mean = found[str(i)] / unit_size(units, scores)
        mean[mean.argmax()] = torch.inf
        found[str(i)] = mean
    return list(highest(found, sparsity).values())


def unit_masks(
    groups: Sequence[Units], stay: Sequence[Bool[Tensor, " units"]], shapes: Mapping[str, Tensor]
) -> dict[str, Bool[Tensor, "rows cols"]]:
    """Masks of all layers in which the groups have a part.

    Args:
        shapes: a tensor of each layer's shape, on the device that its mask is wanted on.
    """
    names = {name for units in groups for name in (units.reader, *units.writers)}
    keep = {name: torch.ones_like(shapes[name], dtype=torch.bool) for name in shapes if name in names}
    for units, alive in zip(groups, stay, strict=True):
        gone = ~alive.cpu()
        keep[units.reader][:, units.columns.cpu()[gone].flatten().to(keep[units.reader].device)] = False
        for name, rows in units.writers.items():
            keep[name][rows.cpu()[gone].flatten().to(keep[name].device)] = False
    return keep


def zero_biases(
    groups: Sequence[Units], weights: Mapping[str, Tensor], biases: Mapping[str, Float[Tensor, " rows"]]
) -> None:
    """Set the biases of units to zero, in place, whose weights are.

    Args:
        weights: [rows, cols] by layer.
        biases: by layer; layers without one are left out.
    """
    for units in groups:
        gone = unit_scores(units, {n: weights[n].abs().float() for n in (units.reader, *units.writers)}) == 0
        for name, rows in units.writers.items():
            if name in biases:
                biases[name][rows.to(gone.device)[gone].flatten()] = 0


def survivors(groups: Sequence[Units], shapes: Mapping[str, tuple[int, int]], sparsity: float) -> dict[str, int]:
    """Weights that stay in each layer once every group has lost round(sparsity * units) of its units.

    Args:
        shapes: rows and columns by layer.
    """
    kept = {name: list(shapes[name]) for units in groups for name in (units.reader, *units.writers)}
    for units in groups:
        gone = round(sparsity * len(units))
        kept[units.reader][1] -= gone * units.columns.shape[1]
        for name, rows in units.writers.items():
            kept[name][0] -= gone * rows.shape[1]
    return {name: rows * cols for name, (rows, cols) in kept.items()}


def prunable(
    found: Sequence[Units], names: Collection[str], kind: Kind, sparsity: float, *, together: bool
) -> list[Units]:
    """The groups of which every layer may be pruned.

    Args:
        found: all groups of a model.
        names: the layers that may be pruned.
        sparsity: share of the units that will go.
        together: as in `choose_units`.

    Raises:
        PlanError: there are none, or all units of a group would go.
    """
    groups = [units for units in found if all(name in names for name in (units.reader, *units.writers))]
    if not groups:
        raise PlanError(
            f"prune.gradual: there are no {kind}s whose layers are all among those that layers selects; select both "
            "the layers that write and the one that reads them, or set units: weight"
        )
    if problems := [
        f"{units.reader}: sparsity {sparsity} would remove all of its {len(units)} {units.kind}s; "
        f"set sparsity below {1 - 0.5 / len(units):.4g}"
        for units in groups
        if not together and round(sparsity * len(units)) == len(units)
    ]:
        raise PlanError(problems)
    return groups
