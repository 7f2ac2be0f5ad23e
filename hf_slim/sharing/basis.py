"""Shared basis: several layers write their weights in one basis (Wang et al. 2025, arXiv:2410.03765).

    W_i ~ A_i B        for the same layer of neighbouring blocks i = 1..n, one B for all of them;
                       or for the layers of one block that read the same input (q, k and v; gate and up)

Minimises Σ tr((W_i - A_i B) H (W_i - A_i B)ᵀ), the squared error of their outputs for all their inputs together, whose
second moments are H = Σ H_i. That is `share.low_rank` of the stacked weight [W_1; ...; W_n], and the same kernels solve
it: with U the principal directions of the stack's outputs, [A_1; ...; A_n] = U_r and B = U_rᵀ [W_1; ...; W_n].

Shapes: W_i [rows_i, cols]; H [cols, cols]; A_i [rows_i, rank]; B [rank, cols]. B is stored once: rank (sum of rows +
cols) numbers in place of (sum of rows) cols. Two square weights get a third more rank than they would get each for
itself. B is one parameter in n modules (`core/ties.py`), so it is trained once, too.

Where we differ: the authors whiten with a Cholesky factor of H, which has to be definite; here nothing is inverted
(`directions.py`). They give output and down projections bases of their own; `layers.exclude` leaves those out.
A basis across inputs is not theirs; a layer that reads alone becomes plain low rank there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_slim.core.capture import own_share
from hf_slim.core.context import Context
from hf_slim.core.errors import PlanError
from hf_slim.core.forward import evaluating, run_on
from hf_slim.core.layers import check_weights, put_layer, targets
from hf_slim.core.method import MethodConfig, Rules
from hf_slim.core.report import LayerReport, StageReport
from hf_slim.core.select import Layer, Select, find_layers, find_stacks
from hf_slim.core.siblings import siblings
from hf_slim.core.statistics import StopForward, gather
from hf_slim.core.swap import get_weight
from hf_slim.core.ties import tie
from hf_slim.encodings import LowRank
from hf_slim.methods import find_method
from hf_slim.sharing.directions import damp, output_directions, project
from hf_slim.sharing.ranks import dropped_energy

RULES = Rules(needs=("calibration",), makes=("tied",), paper="Wang et al. 2025, arXiv:2410.03765")


class Config(MethodConfig):
    """Options of `share.basis`; `ratio` is 0.8 if neither that nor `rank` is given."""

    across: Literal["blocks", "inputs"] = Field(
        "blocks", description="who shares: the same layer of neighbouring blocks, or layers that read the same input"
    )
    blocks: int = Field(2, ge=2, description="neighbouring blocks that share a basis; the last ones may be fewer")
    ratio: float | None = Field(None, gt=0, lt=1, description="share of the bytes that is kept")
    rank: int | None = Field(None, ge=1, description="vectors in a basis")
    layers: Select = Field(Select())
    damping: float = Field(0.01, gt=0, description="added to H's diagonal, in units of its mean")

    @model_validator(mode="after")
    def _one_size(self) -> Config:
        if self.rank is not None and self.ratio is not None:
            raise ValueError("give one of rank and ratio, not both")
        if self.across == "inputs" and "blocks" in self.changed():
            raise ValueError("blocks: with across: inputs the layers of one block share; leave blocks out")
        return self


def room(rows: int, cols: int, rank: int) -> float:
    """What weights in a shared basis take, as a share of what they take dense.

    Args:
        rows: of all of them together.
        cols: of each.
    """
    return rank * (rows + cols) / (rows * cols)


def rank_of(group: Sequence[Layer], config: Config) -> int:
    """Vectors in the basis of a group of layers."""
    if config.rank is not None:
        return config.rank
    return int((config.ratio or 0.8) / room(_rows(group), group[0].cols, 1))


def _rows(group: Sequence[Layer]) -> int:
    return sum(layer.rows for layer in group)


def groups_of(layers: Sequence[Layer], config: Config, model: PreTrainedModel) -> list[list[Layer]]:
    """The layers that share a basis, in the model's order; layers outside of blocks are in none."""
    found: dict[object, list[Layer]] = {}
    stacks = {block: stack.name for stack in find_stacks(model) for block in stack.blocks}
    together = siblings(model) if config.across == "inputs" else {}
    for layer in layers:
        if layer.block is None or layer.place is None:
            continue
        inside = layer.name.removeprefix(layer.block)
        across_blocks = (stacks[layer.block], layer.place[0] // config.blocks, inside)
        found.setdefault(together.get(layer.name, across_blocks), []).append(layer)
    return list(found.values())


def plan(layers: dict[str, Layer], config: Config, model: PreTrainedModel) -> dict[str, Layer]:
    """The layers as they will be stored; the first of each group owns the basis.

    Raises:
        PlanError: every group that cannot share a basis.
    """
    chosen = targets(layers, find_method("share.basis"), config)
    groups = groups_of(chosen, config, model)
    problems = [f"{layer.name} lies in no block, and has no neighbours" for layer in chosen if layer.block is None]
    problems += [problem for group in groups for problem in _problems(group, config)]
    if problems:
        raise PlanError(problems)
    planned: dict[str, Layer] = {}
    for group in groups:
        rank = rank_of(group, config)
        for number, layer in enumerate(group):
            basis = rank * layer.cols * layer.dtype.itemsize
            stored = layer.encoded(LowRank(rank=rank))
            planned[layer.name] = dataclasses.replace(stored, elsewhere=basis if number else 0)
    return planned


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Write the weights of each group in one basis, block after block, each fed by those before it."""
    layers = find_layers(model)
    planned = plan(layers, config, model)
    groups = groups_of([layers[name] for name in planned], config, model)
    check_weights(model, [layers[name] for name in planned])
    batches = own_share(context.tokens("calibration"))
    together: dict[str, list[list[Layer]]] = {}
    for group in groups:
        together.setdefault(str(group[0].block), []).append(group)
    rows: list[LayerReport] = []
    for alike in context.progress.track(list(together.values()), "sharing bases"):
        rows += _share(model, alike, planned, config, batches)
    return StageReport(layers=rows)


def _problems(group: Sequence[Layer], config: Config) -> list[str]:
    first, what = group[0], f"{group[0].name} [{group[0].rows}, {group[0].cols}]"
    problems = [
        f"{layer.name} is stored as {layer.encoding.describe()}; start from the dense model, or exclude it"
        for layer in group
        if layer.encoding is not None
    ]
    alike = config.across == "inputs"  # the same columns, and as many rows as each has
    odd = [layer for layer in group if (layer.rows, layer.cols) != (first.rows, first.cols) and not alike]
    problems += [
        f"{layer.name} has shape {layer.rows} x {layer.cols}, {first.name} {first.rows} x {first.cols}: they cannot "
        "share a basis; name the layer in layers.exclude"
        for layer in odd
    ]
    rank, highest = rank_of(group, config), min(_rows(group), first.cols)
    useful = min(highest, int((1 - 1e-9) / room(_rows(group), first.cols, 1)))
    if rank < 1:
        problems.append(f"{what}: a basis of one vector takes more than ratio {config.ratio}; allow more")
    elif rank > useful:
        problems.append(f"{what}: a basis of {rank} vectors saves nothing; the largest useful one has {useful}")
    return problems


def _share(
    model: nn.Module,
    groups: Sequence[Sequence[Layer]],
    planned: dict[str, Layer],
    config: Config,
    batches: list[Tensor],
) -> list[LayerReport]:
    """Factorise groups that lie in the same blocks."""
    chosen = [layer for group in groups for layer in group]
    with evaluating(model), gather(model, [layer.name for layer in chosen]) as sums:
        for batch in batches:
            sums.begin()
            with suppress(StopForward):
                run_on(model, batch)
    known = sums.finish({layer.name: layer.cols for layer in chosen})
    rows: list[LayerReport] = []
    for group in groups:
        H = damp(torch.stack([known[layer.name].hessian for layer in group]).sum(0), config.damping)
        stack = torch.cat([get_weight(model.get_submodule(layer.name)) for layer in group])
        U, energies = output_directions(stack, H)
        stored = LowRank(rank=rank_of(group, config))
        left, right = project(stack, U[:, : stored.rank])
        metrics = {"rank": float(stored.rank), "dropped_energy": dropped_energy(energies, stored.rank)}
        for layer, A in zip(group, left.split([layer.rows for layer in group]), strict=True):
            factors = (A.to(layer.dtype), right.to(layer.dtype))
            row = put_layer(model, layer, (stored, stored.pack(*factors)), metrics=metrics)
            rows.append(row.model_copy(update={"bytes": planned[layer.name].nbytes}))
        tie(model, {f"{layer.name}.right": f"{group[0].name}.right" for layer in group[1:]})
    return rows
