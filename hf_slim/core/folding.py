"""Where scales can be folded into a block: one positive number a channel, divided out at its source, multiplied back in
where the channel is used, so that the block computes what it did.

    norm           w / t, b / t                        (or (1 + w) / t - 1, for norms that multiply by 1 + w)
    linear layer   W[r] / t_r, b_r / t_r               its output channel r
    consumers      W[:, c] * t_m(c)                    linear layers whose input column c comes from channel m(c)

No list of architectures and no names. A copy of the block is run on random numbers while one source is scaled, every
channel by a number of its own. Layers whose input columns grow by these very numbers are its consumers, and the numbers
say which channel a column comes from: v to o with its heads repeated, the last rows of a fused q, k, v, up to down
through act(gate) * up, fc1 to fc2 through ReLU. Then the fold is proved: with other random scales, undone in the
consumers, the block's output must stay the same. Whatever else reads the channel (a residual, a router, a nonlinear
activation) makes that fail, and the fold is not used.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hf_slim.core.capture import BlockInput, capture
from hf_slim.core.forward import evaluating
from hf_slim.core.probe import numbers
from hf_slim.core.select import Layer, find_stacks
from hf_slim.core.swap import densify, get_weight
from hf_slim.encodings.modules import EncodedModule

Kind = Literal["norm", "one_plus", "linear"]

_TOKENS = 32  # tokens of the probe: enough for every channel to show itself
_SAME = 1e-4  # relative difference that float32 arithmetic may make


@dataclass(frozen=True)
class Fold:
    """A place for scales. Names are those below the block.

    Args:
        source: module that the scales are divided out of.
        kind: "norm" (its weight multiplies), "one_plus" (1 + its weight does) or "linear".
        consumers: linear layers that they are multiplied into.
        channels: for every input column of the consumers, the channel of the source that it comes from.
        width: channels of the source; those that no column comes from keep scale 1.
        dtype: the source's parameters are stored in.
    """

    source: str
    kind: Kind
    consumers: tuple[str, ...]
    channels: Int[Tensor, " cols"]
    width: int
    dtype: torch.dtype

    def shared(self, values: Float[Tensor, " cols"], reduce: Literal["mean", "amax"]) -> Float[Tensor, " channels"]:
        """One value a source channel from one a column (columns that share a channel must share its scale).

        Channels that no column comes from get 1.
        """
        out = torch.ones(self.width, dtype=values.dtype, device=values.device)
        return out.scatter_reduce_(0, self.channels.to(values.device), values, reduce, include_self=False)

    def spread(self, scales: Float[Tensor, " channels"]) -> Float[Tensor, " cols"]:
        """The scale of every column."""
        return scales[self.channels.to(scales.device)]


def divided(parameter: Tensor, scales: Float[Tensor, " channels"], kind: Kind = "norm") -> Tensor:
    """A source's parameter (vector or matrix, float32) with the scales divided out; biases are of kind "norm"."""
    t = scales.view(-1, *[1] * (parameter.dim() - 1))
    return (1 + parameter) / t - 1 if kind == "one_plus" else parameter / t


def storable(
    weight: Float[Tensor, " channels"], scales: Float[Tensor, " channels"], kind: Kind, dtype: torch.dtype
) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
    """A norm's new weight, rounded to `dtype`, and the scales that were really divided out.

    Multiplying these into the consumers takes back what the rounding changed.
    """
    new = divided(weight, scales, kind).to(dtype).float()
    one = 1.0 if kind == "one_plus" else 0.0
    ratio = (one + weight) / (one + new)
    sound = torch.isfinite(ratio) & (ratio > 0)  # not where the norm's factor is zero
    return new, torch.where(sound, ratio, scales)


@dataclass(frozen=True)
class Folded:
    """A block's parameters after folding.

    Args:
        weights: weights [rows, cols] of linear layers, for those that changed.
        columns: scales [cols] that were multiplied into a layer's columns, for consumers.
        dense: parameters that stay dense (norms, biases), by their name below the block.
    """

    weights: dict[str, Tensor]
    columns: dict[str, Tensor]
    dense: dict[str, Tensor]


@torch.no_grad()
def fold(module: nn.Module, folds: Mapping[Fold, Tensor] | Sequence[tuple[Fold, Tensor]]) -> Folded:
    """What the parameters of a block become; the block is left as it is.

    Args:
        folds: folds with their scales [channels], > 0.
    """
    pairs = list(folds.items()) if isinstance(folds, Mapping) else list(folds)
    weights: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for found, wanted in pairs:
        source: Any = module.get_submodule(found.source)
        scales = wanted.float()
        if found.kind == "linear":
            W = weights.get(found.source, get_weight(source).float())
            weights[found.source] = divided(W, scales)
        else:
            dense[f"{found.source}.weight"], scales = storable(source.weight.float(), scales, found.kind, found.dtype)
        if getattr(source, "bias", None) is not None:
            dense[f"{found.source}.bias"] = divided(source.bias.float(), scales).to(found.dtype).float()
        for name in found.consumers:
            W = weights.get(name, get_weight(module.get_submodule(name)).float())
            columns[name] = found.spread(scales)
            weights[name] = W * columns[name]
    return Folded(weights, columns, dense)


@torch.no_grad()
def put_weight(module: nn.Module, name: str, W: Float[Tensor, "rows cols"]) -> None:
    """Make W the dense weight of the layer called `name`."""
    layer: Any = module.get_submodule(name)
    if isinstance(layer, EncodedModule):
        densify(module, name)
        layer = module.get_submodule(name)
    get_weight(layer).copy_(W)  # a view of the parameter


def find_folds(model: nn.Module, layers: Sequence[Layer], ids: Int[Tensor, "samples length"]) -> dict[str, list[Fold]]:
    """Every fold among these layers, by the name of the block.

    Args:
        layers: linear layers whose weights may be changed: a linear source and all consumers are among them.
        ids: any window of tokens; only its shape matters.

    Returns:
        Folds of each block that has layers; no layer is a consumer in more than one.
    """
    if ids.numel() == 0:
        return {}
    shared = _used_twice(model)
    dtypes = {name: p.dtype for name, p in model.named_parameters()} | {f"{x.name}.weight": x.dtype for x in layers}
    found: dict[str, list[Fold]] = {}
    with evaluating(model):
        for stack in find_stacks(model):
            own = {b: [x.name.removeprefix(f"{b}.") for x in layers if x.block == b] for b in stack.blocks}
            if not any(own.values()):
                continue
            call = capture(model, stack.blocks, [ids[:1, :_TOKENS]])[0]
            for block in (name for name in stack.blocks if own[name]):
                probe = _Probe(model.get_submodule(block), own[block], call, block)
                taken = {p.removeprefix(f"{block}.") for p in shared}
                stored = {n.removeprefix(f"{block}."): d for n, d in dtypes.items() if n.startswith(f"{block}.")}
                found[block] = _search(probe, taken, stored)
    return found


def _used_twice(model: nn.Module) -> set[str]:
    """Names of parameters that several modules use, under all of their names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for group in names.values() if len(group) > 1 for name in group}


class _Probe:
    """A float32 copy of a block, its layers dense, that is run on random numbers."""

    def __init__(self, block: nn.Module, layers: Sequence[str], call: BlockInput, name: str):
        self.module = copy.deepcopy(block).float()
        for layer in layers:
            if isinstance(self.module.get_submodule(layer), EncodedModule):
                densify(self.module, layer)
        self.layers = list(layers)
        hidden = numbers(*call.hidden.shape).to(call.hidden.device)
        args, kwargs = call.call(name, hidden)
        self._args, self._kwargs = tree_map_only(
            Tensor, lambda x: x.float() if x.is_floating_point() else x, (args, kwargs)
        )
        self.output, self.inputs = self.run()

    def run(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The block's output, and what its layers were handed, [tokens, cols]."""
        seen: dict[str, Tensor] = {}
        handles = [
            self.module.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: seen.__setitem__(name, args[0].reshape(-1, args[0].shape[-1]))
            )
            for name in self.layers
        ]
        try:
            out = self.module(*self._args, **self._kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return out[0] if isinstance(out, tuple) else out, seen

    @contextmanager
    def scaled(self, source: str, kind: Kind, scales: Tensor) -> Iterator[None]:
        """Inside, the source's channels are divided by the scales."""
        layer: Any = self.module.get_submodule(source)
        with self._keeping([p for p in (layer.weight, getattr(layer, "bias", None)) if p is not None]):
            weight = get_weight(layer) if kind == "linear" else layer.weight
            weight.copy_(divided(weight, scales, kind))
            if getattr(layer, "bias", None) is not None:
                layer.bias.copy_(divided(layer.bias, scales))
            yield

    @contextmanager
    def multiplied(self, consumers: Sequence[str], columns: Tensor) -> Iterator[None]:
        """Inside, the consumers' columns are multiplied by the scales."""
        layers: list[Any] = [self.module.get_submodule(name) for name in consumers]
        with self._keeping([layer.weight for layer in layers]):
            for layer in layers:
                get_weight(layer).mul_(columns)
            yield

    @contextmanager
    def _keeping(self, parameters: list[Tensor]) -> Iterator[None]:
        kept = [parameter.clone() for parameter in parameters]
        try:
            yield
        finally:
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


def _search(probe: _Probe, shared: set[str], dtypes: Mapping[str, torch.dtype]) -> list[Fold]:
    folds: list[Fold] = []
    served: set[str] = set()
    for source, kind, run in _candidates(probe, shared):
        done = {(f.source, f.kind == "linear") for f in folds}
        if (source, kind == "linear") in done or (kind == "one_plus" and (source, False) in done):
            continue
        found = _try(probe, source, kind, run, dtypes[f"{source}.weight"])
        if found is not None and served.isdisjoint(found.consumers) and _proved(probe, found):
            folds.append(found)
            served.update(found.consumers)
    return folds


def _candidates(probe: _Probe, shared: set[str]) -> Iterator[tuple[str, Kind, range]]:
    """Sources worth trying, with the run of their channels that may be scaled."""
    for name, module in probe.module.named_modules():
        weight = module._parameters.get("weight")
        if name not in probe.layers and weight is not None and weight.dim() == 1 and f"{name}.weight" not in shared:
            yield name, "norm", range(len(weight))
            yield name, "one_plus", range(len(weight))
    widths = {probe.inputs[name].shape[1] for name in probe.layers if name in probe.inputs}
    for name in probe.layers:
        if name in probe.inputs and f"{name}.weight" not in shared:
            rows = len(get_weight(probe.module.get_submodule(name)))
            for run in _runs(rows, widths):
                yield name, "linear", run


def _runs(rows: int, widths: set[int]) -> list[range]:
    """Runs of output channels: all of them, and where layers are fused the parts that can feed so many columns.

    The v of a fused q, k, v is the last of three, with fewer heads than q or as many; up is one half beside the gate.
    """
    runs = [range(rows)]
    for cols in sorted(widths):
        if rows in (2 * cols, 3 * cols):
            runs += [range(rows - cols, rows), range(cols)]
        if rows > cols and (rows - cols) % 2 == 0:
            runs.append(range((rows + cols) // 2, rows))
    return list(dict.fromkeys(runs))


def _try(probe: _Probe, source: str, kind: Kind, run: range, dtype: torch.dtype) -> Fold | None:
    """Scale the source, see who follows."""
    module = probe.module.get_submodule(source)
    width = len(get_weight(module)) if kind == "linear" else len(module.weight)  # pyright: ignore
    device = probe.output.device
    order = torch.randperm(len(run), generator=torch.Generator().manual_seed(0)).to(device)
    growth = torch.ones(width, device=device)
    growth[run.start : run.stop] = torch.exp2(1 + order / len(run))  # all different, at least 2
    with probe.scaled(source, kind, 1 / growth):
        _, inputs = probe.run()
    follow = {name: _origin(probe.inputs[name], inputs[name], growth) for name in probe.inputs if name in inputs}
    found = {name: channels for name, channels in follow.items() if channels is not None}
    if not found:
        return None
    channels = next(iter(found.values()))
    if not all(torch.equal(channels, other) for other in found.values()):
        return None
    return Fold(source, kind, tuple(found), channels, width, dtype)


def _origin(
    before: Float[Tensor, "tokens cols"], after: Float[Tensor, "_ cols"], growth: Float[Tensor, " channels"]
) -> Int[Tensor, " cols"] | None:
    """The channel that every column grew with; None when some column did not grow with any.

    A column that was zero throughout (a dead ReLU) is taken to follow the pattern where that is one to one.
    """
    if before.shape != after.shape:
        return None
    power = before.square().sum(0)
    ratio = (after * before).sum(0) / power
    alive = power > 0
    if not alive.any() or not (after - ratio * before)[:, alive].norm() <= _SAME * after.norm():
        return None
    ordered, index = growth.sort()
    upper = torch.searchsorted(ordered, ratio.nan_to_num(0.0)).clamp_(1, len(ordered) - 1)
    nearest = upper - ((ratio - ordered[upper - 1]).abs() < (ratio - ordered[upper]).abs()).long()
    channels = index[nearest]
    grown = (ordered[nearest] > 1) & ((ratio - ordered[nearest]).abs() <= _SAME * ratio)
    if not grown[alive].all():
        return None
    if alive.all():
        return channels
    places = torch.arange(len(channels), device=channels.device)
    offset = (channels - places)[alive][0]
    return places + offset if ((channels - places)[alive] == offset).all() else None


def _proved(probe: _Probe, found: Fold) -> bool:
    """Whether random scales, divided out and multiplied back in, leave the block's output as it was.

    They must matter too: without the consumers' part the output has to be quite another.
    """
    random = torch.rand(len(found.channels), generator=torch.Generator().manual_seed(1))
    scales = found.shared(torch.exp2(2 * random.to(probe.output.device) - 1), "mean")
    with probe.scaled(found.source, found.kind, scales):
        broken, _ = probe.run()
        with probe.multiplied(found.consumers, found.spread(scales)):
            mended, _ = probe.run()
    change = (broken - probe.output).norm()
    left = (mended - probe.output).norm()
    return bool(left <= _SAME * probe.output.norm() and left < 10 * _SAME * change)
