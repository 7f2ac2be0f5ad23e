"""Head pruning: remove attention heads, each key/value head together with the query heads that share it.

    block by block, so that a block sees what the pruned blocks before it put out:
        measure    h [tokens, cols], what the output projection W is handed, on calibration text; C = E h h^T
        order      the heads by what their removal costs
        remove     rows of q, k and v (with biases), columns of W, and the counts that the module keeps
        refit      W by least squares, so that the heads that stay take over (`refit.py`), as far as that holds on
                   tokens that it was not fitted to

"output" removes greedily the head u, with columns J, whose loss costs the projection's output least: with refit that is
the optimal brain surgeon's cost of a block of columns (as in ZipLM, Kurtic et al. 2023, arXiv:2302.04089),

    tr(W_J (A_JJ)^-1 W_J^T),  A = C^-1;      then  W -= W_J (A_JJ)^-1 A_J,   A -= A_J^T (A_JJ)^-1 A_J

and without refit tr(W_S C_SS W_S^T), S the columns of all heads that are gone. "activation" is Minitron's (Muralidharan
et al. 2024, arXiv:2407.14679), the norm of h over a head's columns, averaged over tokens, L2 over windows; it does not
look at W. Under a global ranking costs count relative to the power of their layer's output, and every layer keeps one.

Heads are found by trying (`core/units.py`); those with a position bias that all blocks share (T5) are not. A sparse
projection is not refitted: its zeros stay. A bias stays as it is. On stories260K (5 blocks of 4 groups,
16 windows of 256 tokens to calibrate, 16 others to test) half of the heads removed take perplexity from 4.25 to 7.13,
without refit to 8.23. With one window of another text to calibrate it goes from 7.45 to 14.71, without refit to 14.83;
a refit at a fixed small ridge did harm (16.78).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from accelerate.utils import reduce
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.errors import PlanError
from hf_slim.core.layers import check_weights
from hf_slim.core.method import MethodConfig, Rules
from hf_slim.core.parallel import processes
from hf_slim.core.report import LayerReport, StageReport
from hf_slim.core.select import Layer, Select, find_layers, select_layers
from hf_slim.core.statistics import watching
from hf_slim.core.swap import get_weight
from hf_slim.core.units import Units, expected_units, find_units
from hf_slim.core.walk import Block, Removal, Statistics, walk
from hf_slim.encodings import Sparse
from hf_slim.encodings.modules import EncodedModule
from hf_slim.pruning.measured import Measured, measure
from hf_slim.pruning.refit import RIDGE, choose_ridge, refit_columns, refit_loss

RULES = Rules(needs=("calibration",), preserves=("zeros",), paper="Muralidharan et al. 2024, arXiv:2407.14679")


class Config(MethodConfig):
    """Options of `prune.heads`."""

    per_layer: ClassVar[tuple[str, ...]] = ("share",)

    share: float = Field(0.25, gt=0, lt=1, description="share of the heads to remove, by whole key/value groups")
    score: Literal["output", "activation"] = Field("output", description="what makes a head matter")
    scope: Literal["layer", "global"] = Field("layer", description="share of each layer, or of all layers together")
    refit: bool = Field(True, description="fit the output projection to its old outputs by least squares")
    layers: Select = Field(Select(), description="the attentions' output projections (o_proj)")

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if self.scope == "global" and (self.layers.first or self.layers.last or self.layers.overrides):
            raise ValueError("scope 'global' ranks all layers together, so no layer can have a share of its own")
        return self


class Order(NamedTuple):
    """In which order heads go.

    Attributes:
        units: their numbers, the least important first.
        losses: relative squared error of the output once they are gone up to there, by the score's own measure.
    """

    units: Int[Tensor, " units"]
    losses: Float[Tensor, " units"]


def activation(h: Float[Tensor, "windows length cols"], columns: Int[Tensor, "units size"]) -> Float[Tensor, " units"]:
    """Sum over windows of (mean over tokens of a head's norm)², whose root is Minitron's importance."""
    return h.float()[..., columns].norm(dim=-1).mean(1).square().sum(0)


def order_by_importance(importance: Float[Tensor, " units"]) -> Order:
    """The least important first; what they make up of the whole stands for the error."""
    units = importance.argsort(stable=True)
    return Order(units, importance[units].double().cumsum(0) / importance.sum().clamp(min=1e-30))


def order_by_output(
    W: Float[Tensor, "rows cols"], C: Float[Tensor, "cols cols"], columns: Int[Tensor, "units size"], refit: bool
) -> Order:
    """Greedy: each time the head whose removal adds least to the squared error of the output.

    Args:
        W: the output projection's weight.
        C: second moment of its inputs, up to a factor.
        columns: of every head.
        refit: the other columns are refitted after every removal.
    """
    W, C = W.double(), C.double()
    power = float(((W @ C) * W).sum())
    costs = _with_refit(W, C, columns) if refit else _without_refit(W, C, columns)
    units, losses = zip(*costs, strict=True)
    total = torch.tensor(losses, dtype=torch.float64).cumsum(0)
    return Order(torch.tensor(units), total / power if power > 0 else total)


def _with_refit(W: Tensor, C: Tensor, columns: Tensor) -> list[tuple[int, float]]:
    """Heads in order, and what each removal adds to the error."""
    mean = C.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    A = torch.linalg.inv(C + RIDGE * mean * torch.eye(len(C), dtype=C.dtype, device=C.device))
    removed: list[tuple[int, float]] = []
    left = list(range(len(columns)))
    while left:
        taken = {u: torch.linalg.solve(A[columns[u]][:, columns[u]], W[:, columns[u]].T).T for u in left}
        costs = {u: float((taken[u] * W[:, columns[u]]).sum()) for u in left}
        best = min(left, key=costs.__getitem__)
        J = columns[best]
        W = W - taken[best] @ A[J]
        A = A - A[:, J] @ torch.linalg.solve(A[J][:, J], A[J])
        left.remove(best)
        removed.append((best, max(0.0, costs[best])))
    return removed


def _without_refit(W: Tensor, C: Tensor, columns: Tensor) -> list[tuple[int, float]]:
    """Heads in order, and what each removal adds to the error."""
    parts = torch.stack([W[:, J] @ C[J] for J in columns])  # [units, rows, cols]
    gram = torch.stack([(parts[:, :, J] * W[:, J]).sum((1, 2)) for J in columns])  # tr(W_u C_uv W_v^T)
    removed: list[tuple[int, float]] = []
    cost = gram.diagonal().clone()
    for _ in columns:
        best = int(cost.argmin())
        removed.append((best, float(cost[best])))
        cost += 2 * gram[best]
        cost[best] = torch.inf
    return removed


def global_counts(orders: Mapping[str, Order], remove: int) -> dict[str, int]:
    """How many heads each layer loses: those go first that add least to the relative error, the last of a layer never.

    Raises:
        PlanError: every layer has to keep one.
    """
    steps = [
        (float(step), name)
        for name, order in orders.items()
        for step in order.losses.diff(prepend=order.losses.new_zeros(1)).cummax(0).values[:-1]
    ]
    if remove > len(steps):
        raise PlanError(f"share: {remove} heads cannot go, {len(steps)} can: every layer keeps one; ask for less")
    chosen = [name for _, name in sorted(steps, key=lambda step: step[0])[:remove]]
    return {name: chosen.count(name) for name in orders}


def plan(layers: dict[str, Layer], config: Config, model: PreTrainedModel) -> dict[str, Layer]:
    """The layers as they will be: known beforehand where every layer loses a given share.

    Raises:
        PlanError: everything that cannot be done.
    """
    planned: dict[str, Layer] = {}
    for units in _chosen(expected_units(model, ("head",)), layers, config):
        if config.scope == "layer":
            gone = _count(units, layers, config)
            planned[units.reader] = _smaller(layers[units.reader], 0, gone * units.columns.shape[1])
            for name, rows in units.writers.items():
                planned[name] = _smaller(planned.get(name, layers[name]), gone * rows.shape[1], 0)
    return planned


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Remove heads from a model, block by block."""
    layers = find_layers(model)
    chosen = {units.reader: units for units in _chosen(find_units(model, ("head",)), layers, config)}
    check_weights(model, [layers[name] for units in chosen.values() for name in (units.reader, *units.writers)])
    counts = {name: _count(units, layers, config) for name, units in chosen.items()}
    total = sum(map(len, chosen.values()))
    if config.scope == "global":
        counts = global_counts(_orders(model, chosen, layers, config, context), round(config.share * total))

    def solve(statistics: Mapping[str, Statistics], block: Block | None) -> dict[str, Removal]:
        orders = _order_block(model, chosen, statistics, block, config)
        fitted = {n: known for n, known in statistics.items() if counts[n] and _refits(model.get_submodule(n), config)}
        measured = measure(model, fitted, block, 0.0) if fitted and block is not None else {}
        return {
            name: _removal(model, chosen[name], order, counts[name], statistics[name], measured.get(name))
            for name, order in orders.items()
            if counts[name]
        }

    rows = _walk(model, chosen, layers, solve, context)
    return StageReport(layers=rows, metrics={"heads_before": total, "heads": total - sum(counts.values())})


def _walk(
    model: nn.Module, chosen: Mapping[str, Units], layers: Mapping[str, Layer], solve: Any, context: Context
) -> list[LayerReport]:
    readers, windows = [layers[name] for name in chosen], context.tokens("calibration")
    return walk(model, readers, windows, solve, context, units=list(chosen.values()))


def _orders(
    model: nn.Module, chosen: Mapping[str, Units], layers: Mapping[str, Layer], config: Config, context: Context
) -> dict[str, Order]:
    """The order of every layer's heads, from a walk that changes nothing."""
    orders: dict[str, Order] = {}

    def look(statistics: Mapping[str, Statistics], block: Block | None) -> dict[str, Removal]:
        orders.update(_order_block(model, chosen, statistics, block, config))
        return {}

    _walk(model, chosen, layers, look, replace(context, blocks=None))
    return orders


def _order_block(
    model: nn.Module,
    chosen: Mapping[str, Units],
    statistics: Mapping[str, Statistics],
    block: Block | None,
    config: Config,
) -> dict[str, Order]:
    if config.score == "activation" and block is not None:
        return {name: order_by_importance(sums.sqrt()) for name, sums in _activations(model, chosen, statistics, block)}
    return {
        name: order_by_output(get_weight(model.get_submodule(name)), known.hessian, chosen[name].columns, refits)
        for name, known in statistics.items()
        for refits in [_refits(model.get_submodule(name), config)]
    }


def _activations(
    model: nn.Module, chosen: Mapping[str, Units], names: Mapping[str, Any], block: Block
) -> list[tuple[str, Tensor]]:
    """Run the block for the activations of its heads."""
    device = processes().device
    sums = {name: torch.zeros(len(chosen[name]), device=device) for name in names}

    def note(name: str, h: Tensor) -> None:
        h = h if h.dim() == 3 else h[None]
        sums[name] += activation(h, chosen[name].columns).to(device)

    with watching(model, names, note):
        for i in range(len(block)):
            block.run(i)
    return [(name, reduce(found, reduction="sum").cpu()) for name, found in sums.items()]  # pyright: ignore


def _refits(module: nn.Module, config: Config) -> bool:
    return config.refit and not isinstance(module, EncodedModule)


def _removal(
    model: nn.Module, units: Units, order: Order, count: int, known: Statistics, measured: Measured | None
) -> Removal:
    """Which heads of a layer go, and the projection that makes up for them, if it was measured and that serves."""
    W, keep = get_weight(model.get_submodule(units.reader)), torch.ones(len(units), dtype=torch.bool)
    keep[order.units[:count].cpu()] = False
    stays = torch.ones(W.shape[1], dtype=torch.bool, device=W.device)
    stays[units.columns[~keep].flatten()] = False
    weight, ridge = None, None
    if measured is not None and measured.halves is not None:
        ridge = choose_ridge(W, (measured.halves[0].C, measured.halves[1].C), stays)
    if ridge is not None:
        weight = refit_columns(W, known.hessian, stays, ridge)
    loss = refit_loss(W, known.hessian, stays, W[:, stays] if weight is None else weight)
    return Removal(units, keep, weight, metrics={"output_error": loss, "heads": int(keep.sum())})


def _chosen(found: Sequence[Units], layers: Mapping[str, Layer], config: Config) -> list[Units]:
    """The heads to work on, checked."""
    if not found:
        raise PlanError(
            "no attention heads that could be removed: none were found whose removal is the same as setting them to "
            "zero (a position bias that all blocks share is in the way, or norms across heads)"
        )
    readers = {layer.name for layer in select_layers({u.reader: layers[u.reader] for u in found}, config.layers)}
    chosen = [units for units in found if units.reader in readers]
    problems = [] if chosen else ["no attention to prune: layers.exclude leaves none"]
    for name in dict.fromkeys(name for units in chosen for name in (*units.writers, units.reader)):
        encoding = layers[name].encoding
        if encoding is not None and not encoding.lossless:
            problems.append(
                f"{name} is stored as {encoding.describe()}: no heads can be cut out; prune the dense model"
            )
    if config.scope == "layer":
        problems += [
            f"{units.reader}: share {share:g} of {len(units)} heads (or groups) leaves none; at least one stays"
            for units in chosen
            for share in [config.at(layers[units.reader]).share]
            if _count(units, layers, config) >= len(units)
        ]
    if chosen and not problems and not any(_count(units, layers, config) for units in chosen):
        most = max(map(len, chosen))
        problems.append(
            f"share {config.share:g} of {most} heads (or groups) removes none; ask for {1 / most:.2g} or more"
        )
    if problems:
        raise PlanError(problems)
    return chosen


def _count(units: Units, layers: Mapping[str, Layer], config: Config) -> int:
    """How many heads go where every layer loses its share."""
    return round(config.at(layers[units.reader]).share * len(units))


def _smaller(layer: Layer, rows: int, cols: int) -> Layer:
    """A layer with fewer rows and columns; what pruning left of it is taken to be spread evenly."""
    smaller = replace(layer, rows=layer.rows - rows, cols=layer.cols - cols)
    if layer.survivors is None:
        return smaller
    left = layer.survivors * smaller.rows * smaller.cols // (layer.rows * layer.cols)
    return replace(smaller, encoding=Sparse(survivors=left), survivors=left)
