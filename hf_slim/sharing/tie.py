"""Tied blocks: several blocks of a model compute with one set of weights (ALBERT, Lan et al. 2020, arXiv:1909.11942).

    W_i = W_g        for every block i of group g and every matrix W [rows, cols] of a block

ALBERT ties all parameters from the start; here a trained model is tied: it matters which blocks, and what they share.
Norms and biases stay each block's own unless asked for: they are next to nothing to store.

Which. `groups` ties neighbours, `pairs` what it says. With `blocks` or `share` it is measured which blocks can stand in
for others. First, what block j's weights make of block i's inputs, for all pairs:

    d(i, j) = Σ |f_j(x_i) - f_i(x_i)|² / Σ |f_i(x_i) - x_i|²        x_i [tokens, width]: what enters block i

0 for a duplicate, 1 for a stand-in as bad as no block at all. "outputs" takes the least d. "kl" measures the best 16
pairs again, in the whole model with what is tied already, one tie after the other:

    KL(p || p with block i's weights replaced by block j's)

What. "source": one block's weights as they are. "mean": of all. "least_squares": the W that comes closest to what each
block put out for its own inputs X_i, H_i = X_iᵀX_i slightly damped, so that it is the mean where there is no data:

    W = (Σ W_i H_i) (Σ H_i)⁻¹

Blocks of a trained model differ: tying costs much, and training afterwards (`distill.logits`) wins most of it back. On
stories260K (5 blocks; 16 windows of 256 tokens to choose, 24 of held-out text; then 60 steps of 4 windows), perplexity
4.03, one block tied goes to 10.0 and is trained to 5.8 from its source; from the mean to 29.3 and 8.3, from least
squares to 27.3 and 8.2. Two go to 36.7 and 10.1 chosen by "kl", to 107.9 and 10.5 by "outputs", to 52.2 and 10.7 as
neighbours. Removing blocks (`prune.depth`), which saves time as well, was better at the same size: 8.4 and 5.6 with one
less, 23.2 and 9.5 with two. So try that first, and tie where a model needs its depth.

What is shared is encoded once by stages after this, those that calibrate see what the first block of a group is fed.
An adapter merged into a tied layer changes all blocks that share it: keep adapters beside tied weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_slim.core.capture import own_share
from hf_slim.core.context import Context
from hf_slim.core.errors import PlanError
from hf_slim.core.forward import evaluating, run_on
from hf_slim.core.layers import relative_error
from hf_slim.core.method import MethodConfig, Rules
from hf_slim.core.report import LayerReport, StageReport
from hf_slim.core.select import Layer, Select, Stack, choose_stack, find_layers, matches, select_layers
from hf_slim.core.statistics import StopForward, gather
from hf_slim.core.swap import get_weight
from hf_slim.core.ties import Ties, put_parameter, tie
from hf_slim.sharing.standins import closest, output_distances, tie_losses

RULES = Rules(
    needs=("calibration",),
    makes=("tied",),
    preserves=("tied",),
    wants_training=True,
    paper="Lan et al. 2020, arXiv:1909.11942",
)
CANDIDATES = 16  # pairs whose KL is measured for every tie
DAMPING = 0.01  # of the mean of H's diagonal

Groups = dict[int, list[int]]
"""{block whose weights are used: the blocks that use them, itself too}."""

Shared = dict[str, Tensor]
"""{name below the block: what the blocks of a group have in common}."""


class Config(MethodConfig):
    """Options of `share.tie`: one of `groups`, `pairs`, `blocks` (1 by default) and `share` says which blocks."""

    groups: int | None = Field(None, ge=1, description="how many different blocks are left; neighbours share")
    pairs: dict[int, int] | None = Field(None, min_length=1, description="{3: 2}: block 3 uses the weights of block 2")
    blocks: int | None = Field(None, ge=1, description="how many blocks give up their weights; measured which")
    share: float | None = Field(None, gt=0, lt=1, description="share of the blocks that give them up, at least one")
    by: Literal["kl", "outputs"] = Field("kl", description="how blocks are compared; 'outputs' is cheaper, and worse")
    initial: Literal["source", "mean", "least_squares"] = Field(
        "source", description="what the blocks of a group share"
    )
    layers: Select = Field(Select(), description="only these layers of the blocks")
    norms: bool = Field(False, description="share norms and biases too, as ALBERT does")
    stack: str | None = Field(None, description="name of the stack of blocks, where the model has several")
    windows: int = Field(8, ge=1, description="calibration windows that decide")

    @model_validator(mode="after")
    def _one_way(self) -> Config:
        given = [name for name in ("groups", "pairs", "blocks", "share") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of groups, pairs, blocks and share, not {' and '.join(given)}")
        return self

    @property
    def measures(self) -> bool:
        """Whether it is measured which blocks are tied."""
        return self.groups is None and self.pairs is None


def needs(config: Config) -> tuple[str, ...]:
    """The data that it needs with these options."""
    return ("calibration",) if config.measures or config.initial == "least_squares" else ()


def neighbours(count: int, groups: int) -> Groups:
    """`count` blocks in `groups` runs of about the same length; the first of each run is the source."""
    found: Groups = {}
    runs: dict[int, int] = {}
    for number in range(count):
        found.setdefault(runs.setdefault(number * groups // count, number), []).append(number)
    return found


def least_squares(
    weights: Sequence[Float[Tensor, "rows cols"]], hessians: Sequence[Float[Tensor, "cols cols"]]
) -> Float[Tensor, "rows cols"]:
    """The W with the least Σ |(W - W_i) X_i|², float64; the mean of the W_i in directions without data."""
    mean = sum(float(H.diagonal().mean()) for H in hessians) / len(hessians)
    damping = (DAMPING * mean or 1.0) * torch.eye(hessians[0].shape[0], dtype=torch.float64, device=hessians[0].device)
    damped = [H.double() + damping for H in hessians]
    total = torch.stack(damped).sum(0)
    products = torch.stack([W.double() @ H for W, H in zip(weights, damped, strict=True)]).sum(0)
    return torch.linalg.solve(total, products, left=False)


def plan(layers: dict[str, Layer], config: Config, model: PreTrainedModel) -> dict[str, Layer]:
    """The layers that will use others' weights, where that is known before anything is measured.

    Raises:
        PlanError: no such stack, blocks or layers; blocks that cannot share weights, all of them named.
    """
    stack = choose_stack(model, config.stack)
    count = len(stack.blocks)
    if problems := _number_problems(stack, config):
        raise PlanError(problems)
    groups = _groups(count, config) or {0: list(range(count))}
    chosen = select_layers(layers, config.layers)
    if problems := _shape_problems(chosen, stack, groups):
        raise PlanError(problems)
    if config.measures:
        return {}
    found: dict[str, Layer] = {}
    for members in groups.values():
        first = f"{stack.blocks[members[0]]}."
        for number in members[1:]:
            prefix = f"{stack.blocks[number]}."
            for layer in chosen:
                if layer.name.startswith(prefix):
                    owner = layers[first + layer.name.removeprefix(prefix)]
                    found[layer.name] = dataclasses.replace(layer, tied_to=owner.tied_to or owner.name)
    return found


def notes(layers: dict[str, Layer], config: Config, model: PreTrainedModel) -> list[str]:
    """What the plan cannot foresee."""
    unknown = "which blocks are tied is known once they have been compared; sizes are predicted without it"
    return [unknown] if config.measures else []


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Tie blocks of a model."""
    layers = find_layers(model)
    plan(layers, config, model)
    stack = choose_stack(model, config.stack)
    batches = own_share(context.tokens("calibration")[: config.windows]) if needs(config) else []
    groups, metrics = _groups(len(stack.blocks), config), {}
    with evaluating(model):
        if groups is None:
            groups, metrics = _measured(model, stack, config, batches, context)
        groups = {source: members for source, members in sorted(groups.items()) if len(members) > 1}
        values = {g: _shared(model, layers, stack, g, members, config, batches) for g, members in groups.items()}
    rows = [row for g, shared in values.items() for row in _tie_group(model, layers, stack, g, groups[g], shared)]
    return StageReport(layers=rows, metrics={"stack": stack.name, "groups": list(groups.values())} | metrics)


def _groups(count: int, config: Config) -> Groups | None:
    """The groups that the options name; None where they are to be measured."""
    if config.groups is not None:
        return neighbours(count, config.groups)
    if config.pairs is None:
        return None
    return _grouped(list(config.pairs.items()))


def _grouped(ties: Sequence[tuple[int, int]]) -> Groups:
    """Groups of blocks from ties (block, source), of which a source may have been given up later."""
    source = dict(ties)
    found: Groups = {}
    for block in source:
        last = source[block]
        while last in source:
            last = source[last]
        found.setdefault(last, [last]).append(block)
    return {last: sorted(members) for last, members in found.items()}


def _number(count: int, config: Config) -> int:
    """How many blocks give up their weights, where it is measured which."""
    return max(1, round(config.share * count)) if config.share is not None else config.blocks or 1


def _number_problems(stack: Stack, config: Config) -> list[str]:
    count = len(stack.blocks)
    if config.groups is not None:
        fits = config.groups < count
        return (
            [] if fits else [f"groups: {config.groups} groups of {count} blocks share nothing; give 1 to {count - 1}"]
        )
    if config.pairs is None:
        wanted = _number(count, config)
        few = f"{stack.name} has {count} blocks: {wanted} cannot give up their weights, {count - 1} can; ask for fewer"
        return [few] if wanted >= count else []
    problems = []
    for block, source in config.pairs.items():
        if unknown := [n for n in (block, source) if n not in range(count)]:
            problems.append(f"pairs: {stack.name} has no block {unknown[0]}; give numbers from 0 to {count - 1}")
        elif block == source:
            problems.append(f"pairs: block {block} cannot be tied to itself; leave it out")
        elif source in config.pairs:
            problems.append(
                f"pairs: block {block} is to use block {source}, which gives up its own weights; "
                "name the block that both shall use"
            )
    return problems


def _shape_problems(chosen: Sequence[Layer], stack: Stack, groups: Groups) -> list[str]:
    """Blocks of one group whose layers are not the same, or are encoded."""
    blocks: dict[str, dict[str, Layer]] = {block: {} for block in stack.blocks}
    for layer in chosen:
        if layer.block in blocks:
            blocks[layer.block][layer.name.removeprefix(f"{layer.block}.")] = layer
    problems = []
    if not any(blocks.values()):
        problems.append(f"layers: none of them lies in a block of {stack.name}")
    for members in groups.values():
        first, *others = [stack.blocks[number] for number in members]
        for block in others:
            odd = sorted(blocks[first].keys() ^ blocks[block].keys())
            problems += [f"{first} and {block} cannot be tied: only one of them has a layer {name!r}" for name in odd]
            problems += [
                f"{block}.{name} has shape {layer.rows} x {layer.cols}, {first}.{name} {like.rows} x {like.cols}: they "
                "cannot share a weight; name the layer in layers.exclude"
                for name, layer in blocks[block].items()
                if (like := blocks[first].get(name)) is not None and (like.rows, like.cols) != (layer.rows, layer.cols)
            ]
    problems += [
        f"{layer.name} is stored as {layer.encoding.describe()}, which cannot be tied; tie the dense model's blocks, "
        "what comes after then encodes each weight once"
        for number in sorted({n for members in groups.values() for n in members})
        for layer in blocks[stack.blocks[number]].values()
        if layer.encoding is not None
    ]
    return problems


def _tensors(model: nn.Module, blocks: Sequence[str], config: Config) -> list[str]:
    """The tensors that blocks share, below the block: those that all have, in one shape.

    Weights of routers and the like are no linear layers, and belong to the experts that they choose from: they are
    shared with them.
    """
    found: list[str] = []
    own = [dict(model.get_submodule(block).named_parameters(remove_duplicate=False)) for block in blocks]
    for name, parameter in own[0].items():
        module = f"{blocks[0]}.{name.rpartition('.')[0]}"
        wanted = config.layers.include is None or any(matches(module, p) for p in config.layers.include)
        excluded = any(matches(module, p) for p in config.layers.exclude)
        alike = all(name in other and other[name].shape == parameter.shape for other in own)
        if wanted and not excluded and alike and (parameter.dim() > 1 or config.norms):
            found.append(name)
    return found


def _measured(
    model: nn.Module, stack: Stack, config: Config, batches: Sequence[Tensor], context: Context
) -> tuple[Groups, dict[str, Any]]:
    """The groups that calibration data speak for, and the KL after every tie."""
    names, count = _tensors(model, stack.blocks, config), _number(len(stack.blocks), config)
    distances = output_distances(model, stack, names, batches)
    chosen: list[tuple[int, int]] = []
    losses: list[float] = []
    for _ in context.progress.track(range(count), "tying blocks"):
        candidates = closest(distances, chosen)[: CANDIDATES if config.by == "kl" else 1]
        ties = [_ties(stack, _grouped([*chosen, pair]), names) for pair in candidates]
        found = tie_losses(model, ties, batches)
        best = int(found.argmin())
        chosen.append(candidates[best])
        losses.append(float(found[best]))
    return _grouped(chosen), {"kl": losses, "distances": [float(distances[pair]) for pair in chosen]}


def _ties(stack: Stack, groups: Groups, names: Sequence[str]) -> Ties:
    return {
        f"{stack.blocks[number]}.{name}": f"{stack.blocks[source]}.{name}"
        for source, members in groups.items()
        for number in members
        if number != source
        for name in names
    }


def _shared(
    model: nn.Module,
    layers: Mapping[str, Layer],
    stack: Stack,
    source: int,
    members: Sequence[int],
    config: Config,
    batches: Sequence[Tensor],
) -> Shared:
    """The values that a group's tensors share."""
    blocks = [stack.blocks[number] for number in members]
    names = _tensors(model, blocks, config)
    if config.initial == "source":
        return {name: model.get_parameter(f"{stack.blocks[source]}.{name}") for name in names}
    own = {name: [model.get_parameter(f"{block}.{name}").detach() for block in blocks] for name in names}
    values = {name: torch.stack([tensor.float() for tensor in tensors]).mean(0) for name, tensors in own.items()}
    if config.initial == "least_squares":
        values |= _fitted(model, layers, blocks, names, batches)
    return values


def _fitted(
    model: nn.Module,
    layers: Mapping[str, Layer],
    blocks: Sequence[str],
    names: Sequence[str],
    batches: Sequence[Tensor],
) -> dict[str, Tensor]:
    """Weights of linear layers that fit all blocks of a group best, as the model stores them."""
    linear = [
        path for name in names if (path := name.removesuffix(".weight")) != name and f"{blocks[0]}.{path}" in layers
    ]
    full = [f"{block}.{path}" for block in blocks for path in linear]
    with gather(model, full) as sums:
        for batch in batches:
            sums.begin()
            with suppress(StopForward):
                run_on(model, batch)
    known = sums.finish({name: layers[name].cols for name in full})
    found: dict[str, Tensor] = {}
    for path in linear:
        own = [f"{block}.{path}" for block in blocks]
        modules = [model.get_submodule(name) for name in own]
        W = least_squares([get_weight(module) for module in modules], [known[name].hessian for name in own]).float()
        found[f"{path}.weight"] = W.T.contiguous() if isinstance(modules[0], Conv1D) else W
    return found


def _tie_group(
    model: nn.Module, layers: Mapping[str, Layer], stack: Stack, source: int, members: Sequence[int], shared: Shared
) -> list[LayerReport]:
    """Give the blocks of a group the same tensors, and report what that changes."""
    before = {
        number: {name: model.get_parameter(f"{stack.blocks[number]}.{name}") for name in shared} for number in members
    }
    for name, value in shared.items():
        own = before[source][name]
        if value is not own:
            made = nn.Parameter(value.to(own.dtype), requires_grad=own.requires_grad)
            put_parameter(model, f"{stack.blocks[source]}.{name}", made)
    tie(model, _ties(stack, {source: list(members)}, list(shared)))
    now = find_layers(model)
    return [
        _report(layer, now[layer.name], before[number][f"{path}.weight"], model)
        for number in members
        for name, layer in layers.items()
        if layer.block == stack.blocks[number] and f"{(path := name.removeprefix(f'{layer.block}.'))}.weight" in shared
    ]


def _report(before: Layer, after: Layer, weight: Tensor, model: nn.Module) -> LayerReport:
    shared = model.get_parameter(f"{before.name}.weight")
    return LayerReport(
        name=before.name,
        rows=before.rows,
        cols=before.cols,
        encoding="shared" if after.tied_to is None else f"tied to {after.tied_to}",
        bytes_before=before.nbytes,
        bytes=after.nbytes,
        error=0.0 if shared is weight else relative_error(weight.detach(), shared.detach()),
    )
