"""Units of a block that can go as a whole: MLP neurons, and attention heads.

    neuron    one input column of the reader (down), and the rows of the writers (gate, up) that feed it and no other
    head      a run of input columns of the reader (o), and the rows (of q, k, v) that feed it and no other: one
              key/value head with all the query heads that share it

No list of architectures and no names. Which rows feed which columns is found out with gradients (`core/wiring.py`):
units are the shortest runs of columns such that no row feeds two of them, unless it feeds all. Where one key/value
head serves all queries, its rows feed all columns, so the units are the query heads. Then the find is proved on the
copy with small random weights: with some units removed the block must put out what it puts out with the same units set
to zero. Numbers that the block's modules keep about themselves are changed in proportion until it does; the fewest that
it takes are remembered as the units' `counts`. What cannot be proved is not found: heads with a position bias that all
blocks share (T5, ALiBi), values normed across heads.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from os.path import commonpath
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PretrainedConfig, PreTrainedModel

from hf_slim.core.capture import BlockInput, capture
from hf_slim.core.errors import ModelError
from hf_slim.core.experts import Experts, unfused
from hf_slim.core.forward import evaluating
from hf_slim.core.probe import FAILURES, numbers
from hf_slim.core.reshape import countable, remove_units, scale_counts, shape_of, split_count, zero_units
from hf_slim.core.select import Layer, find_layers, find_stacks
from hf_slim.core.wiring import Run, Wiring, with_small_weights

Kind = Literal["neuron", "head"]

_TOKENS = 32  # enough for every unit to show itself
_DEPTHS = ("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
_SAME = 1e-5  # relative difference that float32 arithmetic may make


@dataclass(frozen=True)
class Units:
    """Units of one kind that one layer reads.

    Args:
        kind: "neuron" (one column each) or "head".
        block: name of the block they lie in.
        reader: full name of the layer whose input columns are what the units put out.
        columns: their columns in the reader's weight [rows, cols].
        writers: {full name of a layer: its rows that feed a unit and nothing else}.
        counts: full names of numbers that modules keep, in proportion to the number of units; "config.x" at the end is
            a number in the module's view of the config.
    """

    kind: Kind
    block: str
    reader: str
    columns: Int[Tensor, "units size"]
    writers: Mapping[str, Int[Tensor, "units rows"]]
    counts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.columns)

    def below(self, block: str, prefix: str) -> Units:
        """The same units in another block, whose layers have the same shapes: names that are below `prefix`."""
        return replace(
            self,
            block=block,
            reader=f"{prefix}.{self.reader}",
            writers={f"{prefix}.{name}": rows for name, rows in self.writers.items()},
            counts=tuple(f"{prefix}.{path}" for path in self.counts),
        )


def find_units(model: nn.Module, kinds: Sequence[Kind] = ("neuron", "head")) -> list[Units]:
    """Units of every block, in the model's order; experts must be unfused (`core/experts.py`).

    Args:
        model: with its weights; a model on the meta device has `expected_units`.
        kinds: which to look for.
    """
    with evaluating(model):
        return _find(model, model, kinds)


def expected_units(skeleton: PreTrainedModel, kinds: Sequence[Kind] = ("neuron", "head")) -> list[Units]:
    """Units of a model on the meta device: what `find_units` will find once it has its weights.

    What enters its blocks is taken from a real model of the same config, with few blocks and few tokens.
    """
    small = few_blocks(skeleton)
    with unfused(small), evaluating(small):
        return _find(skeleton, small, kinds)


def _find(model: nn.Module, running: nn.Module, kinds: Sequence[Kind]) -> list[Units]:
    """Units of `model`, whose blocks are handed what those of `running` are."""
    layers = find_layers(model)
    found: list[Units] = []
    for stack, twin in zip(find_stacks(model), find_stacks(running), strict=True):
        calls = capture(running, twin.blocks, [_ids(running)])[0]
        shapes = {block: _shapes(layers, block) for block in stack.blocks}
        known: list[tuple[dict[str, tuple[int, int]], list[Units]]] = []
        for block in stack.blocks:
            module = model.get_submodule(block)
            alike = next((units for shape, units in known if shape == shapes[block]), None)
            if alike is None:
                same = [b for b in twin.blocks if shapes[b] == shapes[block]] or twin.blocks[-1:]
                runs = [_on_numbers(calls, b) for b in dict.fromkeys((same[0], same[-1]))]
                alike = _search(module, shapes[block], runs, kinds)
                known.append((shapes[block], alike))
            found += [units.below(block, block) for units in alike]
            if "neuron" in kinds:
                found += _of_experts(module, block)
    return found


def _shapes(layers: Mapping[str, Layer], block: str) -> dict[str, tuple[int, int]]:
    """Rows and columns of a block's linear layers, those of experts apart, by names below it."""
    own = (layer for layer in layers.values() if layer.block == block and not layer.routed)
    return {layer.name.removeprefix(f"{block}."): (layer.rows, layer.cols) for layer in own}


def _ids(model: nn.Module) -> Int[Tensor, "1 tokens"]:
    table: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    return torch.arange(2, 2 + _TOKENS)[None] % len(table.weight)


def _on_numbers(call: BlockInput, block: str) -> Run:
    """Runs a block on random numbers, with the other arguments that `block` was handed, in float32."""
    hidden = numbers(*call.hidden.shape).to(call.hidden.device)
    args, kwargs = tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, call.call(block, hidden))

    def run(module: nn.Module) -> Tensor:
        out = module(*args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    return run


def _of_experts(module: nn.Module, block: str) -> Iterator[Units]:
    """Neurons of every expert of a block; those of one shape are alike."""
    for name, experts in module.named_modules():
        if not isinstance(experts, Experts):
            continue
        known: dict[str, list[Units]] = {}
        for number in range(experts.layout.experts):
            expert = experts.expert(number)
            shapes = {n: shape_of(layer) for n, layer in expert.named_children()}
            alike = str(shapes)
            if alike not in known:
                x = numbers(_TOKENS, shapes[experts.layout.up][1])
                known[alike] = _search(expert, shapes, [lambda e, x=x, m=experts: m._run(e, x)], ("neuron",))
            for units in known[alike]:
                yield units.below(block, f"{block}.{name}.{number}")


def _search(
    module: nn.Module, shapes: Mapping[str, tuple[int, int]], runs: Sequence[Run], kinds: Sequence[Kind]
) -> list[Units]:
    """Units of one module, names below it; every one is proved on all runs."""
    small = with_small_weights(module, shapes)
    try:
        wiring = Wiring(small, list(shapes), runs[0])
    except FAILURES as error:
        raise ModelError(f"a {type(module).__name__} cannot be run on its own to find its units: {error}") from error
    found = (_read_by(wiring, small, reader, runs, kinds) for reader in wiring.inputs)
    return [units for units in found if units is not None]


def _read_by(
    wiring: Wiring, module: nn.Module, reader: str, runs: Sequence[Run], kinds: Sequence[Kind]
) -> Units | None:
    cols = wiring.inputs[reader].shape[-1]
    for size in (s for s in range(1, cols // 2 + 1) if cols % s == 0):
        kind: Kind = "neuron" if size == 1 else "head"
        separate = wiring.separates(reader, size)
        if separate is None or (kind == "neuron" and separate and kind not in kinds):
            return None
        if not separate:
            continue
        if kind not in kinds:
            continue
        writers = wiring.writers(reader, size)
        if writers:
            proved = _proved(module, Units(kind, "", reader, torch.arange(cols).view(-1, size), writers), runs)
            if proved is not None:
                return proved
    return None


def _proved(module: nn.Module, units: Units, runs: Sequence[Run]) -> Units | None:
    """The units with the counts that have to follow, or None when removing them is not the same as zeroing them."""
    keep = torch.ones(2, len(units), dtype=torch.bool)
    keep[0, 0] = False
    keep[1, (len(units) + 1) // 2 :] = False
    cases = []
    for mask in keep:
        zeroed, cut = copy.deepcopy(module), copy.deepcopy(module)
        zero_units(zeroed, units, mask)
        remove_units(cut, units, mask)
        cases.append((mask, cut, [run(zeroed) for run in runs]))
    for counts in _guesses(module, units):
        if all(_computes(cut, mask, counts, runs, wanted) for mask, cut, wanted in cases):
            return replace(units, counts=counts)
    return None


def _guesses(module: nn.Module, units: Units) -> Iterator[tuple[str, ...]]:
    """Sets of numbers that may follow the number of units, the smaller ones and the modules' own first."""
    names = [units.reader, *units.writers]
    place = commonpath([f"/{name.replace('.', '/')}" for name in names])[1:].replace("/", ".")
    own, shared = [], []
    for name, part in module.get_submodule(place).named_modules(prefix=place):
        if name in names or type(part).__module__.startswith("torch."):
            continue
        for attribute, value in countable(part).items():
            if value > 0 and value % len(units) == 0:
                path = f"{name}.{attribute}".lstrip(".")
                (shared if attribute.startswith("config.") else own).append(path)
    for size in range(3):
        yield from combinations(own, size)
        yield from (c for c in combinations((*own, *shared), size) if any(path in shared for path in c))


def _computes(
    cut: nn.Module, mask: Bool[Tensor, " units"], counts: tuple[str, ...], runs: Sequence[Run], wanted: list[Tensor]
) -> bool:
    """Whether the cut module, with these counts in proportion, puts out what is wanted."""
    places = {module: dict(vars(module)) for module in (cut.get_submodule(split_count(path)[0]) for path in counts)}
    try:
        scale_counts(cut, counts, mask)
        found = [run(cut) for run in runs]
    except FAILURES:
        return False
    finally:
        for module, numbers_before in places.items():
            vars(module).update(numbers_before)
    return all(_alike(out, goal) for out, goal in zip(found, wanted, strict=True))


def _alike(out: Tensor, goal: Tensor) -> bool:
    return out.shape == goal.shape and bool((out - goal).norm() <= _SAME * goal.norm())


def few_blocks(skeleton: PreTrainedModel) -> PreTrainedModel:
    """A real model of the same config, random and with no more blocks than it takes to see one of each kind."""
    config: PretrainedConfig = copy.deepcopy(skeleton.config)
    layers = find_layers(skeleton)
    needed = 0
    lengths = set()
    for stack in find_stacks(skeleton):
        lengths.add(len(stack.blocks))
        shapes = [_shapes(layers, block) for block in stack.blocks]
        needed = max(needed, *(shapes.index(shape) + 2 for shape in shapes))
    for name in _DEPTHS:
        if getattr(config, name, None) in lengths:
            setattr(config, name, min(needed, getattr(config, name)))
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) in lengths:
            setattr(config, name, value[:needed])
    config.vocab_size = min(config.vocab_size, 4 * _TOKENS)
    if getattr(config, "pad_token_id", None) is not None:
        config.pad_token_id = min(config.pad_token_id, 1)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return type(skeleton)._from_config(config, dtype=torch.float32).eval()
