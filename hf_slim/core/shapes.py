"""A model of other shapes than its class builds: how it is described, and how its skeleton is made again.

After structured pruning a model may have layers of other sizes, different ones in each block, fewer heads, experts,
blocks or tokens. Where the config can say so (the same width everywhere, fewer blocks) it does, and the checkpoint is a
plain one. What it cannot say is stored beside the encodings of layers: the shapes of tensors, and the numbers that
modules hold about themselves. Loading gives the skeleton those before the weights arrive; no code is stored.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_slim.core.errors import ModelError, PlanError
from hf_slim.core.express import adopt, express
from hf_slim.core.reshape import set_count
from hf_slim.core.select import Layer, Stack, find_stacks
from hf_slim.core.skeleton import CONFIG, REFUSALS, Difference, build, read


@dataclass(frozen=True)
class Shapes:
    """What a config cannot say about a model.

    Args:
        tensors: {name of a tensor: its shape}, where the config would give another; dense names, whatever is stored.
        numbers: {name of a module: {attribute: number}}; "config.x" is an entry of the config that only it sees.
    """

    tensors: Mapping[str, Sequence[int]] = field(default_factory=dict)
    numbers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.tensors or self.numbers)


def settle(model: PreTrainedModel) -> Shapes:
    """Let the model's config say what it has become, as far as a config can.

    Returns:
        The rest, to be stored beside it.

    Raises:
        ModelError: blocks are missing that the config still counts.
    """
    left = express(model)
    facts = read(model)
    _check_blocks(model, left)
    tensors: dict[str, list[int]] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for difference in left:
        name = difference.name
        if isinstance(difference.what, str) and difference.what:
            number = difference.found
            numbers.setdefault(name, {})[difference.what] = list(number) if isinstance(number, tuple) else number
        elif name in facts.shapes and (difference.built is not None or name.startswith(_inside(facts.ragged))):
            tensors[name] = list(facts.shapes[name])
    return Shapes(tensors, numbers)


def _inside(modules: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{name}." for name in modules)


def _check_blocks(model: nn.Module, left: Iterable[Difference]) -> None:
    """A list of modules must not be shorter than the config says: nobody would know which ones are gone."""
    lists = {name: len(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    for difference in left:
        if difference.built is None or difference.found is not None or difference.what != "":
            continue
        for name, count in lists.items():
            place = difference.name.removeprefix(f"{name}.").partition(".")[0]
            if difference.name.startswith(f"{name}.") and place.isdigit() and int(place) >= count:
                raise ModelError(
                    f"{name} has {count} blocks, fewer than the model's config says, and which ones is not known: "
                    "take blocks out with hf_slim.core.shapes.keep_blocks(model, stack, kept)"
                )


def reshape(model: nn.Module, shapes: Shapes) -> Shapes:
    """Give a skeleton other shapes and numbers, in place.

    Args:
        model: on the meta device; its tensors are replaced by empty ones.

    Returns:
        What found no place in it.
    """
    made: dict[int, torch.Tensor] = {}  # a tensor that is shared stays shared
    lost: dict[str, Sequence[int]] = {}
    modules = dict(model.named_modules())
    for name, shape in shapes.tensors.items():
        parent, _, key = name.rpartition(".")
        module = modules.get(parent)
        owner = None if module is None else _owner(module, key)
        if module is None or owner is None:
            lost[name] = shape
            continue
        owner[key] = made.setdefault(id(owner[key]), _empty(owner[key], shape))
        derive(module)
    for name, numbers in shapes.numbers.items():
        for key, value in numbers.items() if name in modules else ():
            set_count(modules[name], key, tuple(value) if isinstance(value, list) else value)
    return Shapes(lost, {name: found for name, found in shapes.numbers.items() if name not in modules})


def _owner(module: nn.Module, key: str) -> dict[str, Any] | None:
    owners: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    return next((owner for owner in owners if owner.get(key) is not None), None)


def _empty(like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    tensor = torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
    return nn.Parameter(tensor, requires_grad=like.requires_grad) if isinstance(like, nn.Parameter) else tensor


def derive(module: nn.Module) -> None:
    """The numbers that PyTorch's layers keep about the shape of their weight."""
    weight: Any = module._parameters.get("weight")
    if isinstance(module, Conv1D):
        module.nx, module.nf = weight.shape
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = tuple(weight.shape)


def ragged(layers: Iterable[Layer]) -> list[str]:
    """Layers that have another shape than the same layer of another block: no config can say so."""
    first: dict[str, Layer] = {}
    return [
        layer.name
        for layer in layers
        if layer.block is not None
        and (layer.rows, layer.cols) != ((like := first.setdefault(_kind(layer.name), layer)).rows, like.cols)
    ]


def shape_problems(layers: Iterable[Layer], model: PreTrainedModel, what: str) -> list[str]:
    """Why a model of its shapes cannot be stored where there is nothing but a config to say them.

    Args:
        what: names the format in the message.
    """
    names = ragged(layers)
    stored = getattr(getattr(model.config, "quantization_config", None), "shapes", None)
    names = names or sorted({name.rpartition(".")[0] for name in stored or ()})
    if not names:
        return []
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [
        f"{names[0]}{more}: other shapes than in other blocks, or than the model's config can say, and {what} has one "
        "shape for all; prune every block to the same width, or keep the artifact as it is"
    ]


def _kind(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)  # blocks and experts; fc1 and fc2 are two kinds


def keep_blocks(model: PreTrainedModel, stack: Stack, kept: Sequence[int]) -> None:
    """Take blocks out of a stack, in place: those that stay get new numbers, and the config counts them.

    What counts blocks is brought along: the number that a block's attention has for the key-value cache, lists of the
    config with one entry a block (`layer_types`) or with numbers of blocks (`mlp_only_layers`).

    Args:
        kept: numbers of the blocks that stay, in ascending order.

    Raises:
        PlanError: before anything is changed: no such blocks, none left, or the config cannot say it.
    """
    config = plan_blocks(model, stack, kept)
    _cut(model, stack, kept)
    adopt(model, config)


def plan_blocks(model: PreTrainedModel, stack: Stack, kept: Sequence[int]) -> PretrainedConfig:
    """The config of the model with fewer blocks; needs no weights.

    Raises:
        PlanError: no such blocks, none left, or no config builds what would be left.
    """
    count = len(stack.blocks)
    if not kept or list(kept) != sorted({*kept}) or kept[0] < 0 or kept[-1] >= count:
        raise PlanError(
            f"{stack.name}: blocks {list(kept)} cannot be kept; give some of 0 to {count - 1}, in ascending order"
        )
    cut = build(type(model), model.config)
    if cut is None:
        raise PlanError(f"{stack.name}: {type(model).__name__} cannot be built from its config, so it cannot say so")
    _cut(cut, stack, kept)
    wanted = _structure(cut)
    surplus: list[str] = []
    for config in _shorter(model.config, count, kept):
        built = build(type(model), config)
        if built is not None and (found := _structure(built)) != wanted:
            counts = {s.name: len(s.blocks) for s in find_stacks(built)}
            if counts == {s.name: len(s.blocks) for s in find_stacks(cut)}:
                surplus = sorted(key for key in {**found, **wanted} if found.get(key) != wanted.get(key))
        elif built is not None:
            return config
    gone = next((i for i in range(count) if i not in kept), count)
    why = f"its config would build another {surplus[0]}" if surplus else "no entry of its config counts them"
    raise PlanError(f"{stack.name}.{gone} cannot be taken out: {why}; keep that block")


def _cut(model: nn.Module, stack: Stack, kept: Sequence[int]) -> None:
    blocks: Any = model.get_submodule(stack.name)
    old = [blocks[i] for i in range(len(blocks))]
    numbered = _numbered(old)
    blocks._modules.clear()
    for place, number in enumerate(kept):
        blocks.add_module(str(place), old[number])
        for path, attribute in numbered:
            setattr(old[number].get_submodule(path), attribute, place)


def _numbered(blocks: Sequence[nn.Module]) -> list[tuple[str, str]]:
    """Attributes that are the number of the block, in every block: {(module, attribute)}."""
    found = None
    for number, block in enumerate(blocks):
        own = {
            (path, key)
            for path, module in block.named_modules()
            for key, value in vars(module).items()
            if type(value) is int and value == number
        }
        found = own if found is None else found & own
    return sorted(found or ())


def _structure(model: nn.Module) -> dict[str, Any]:
    """Shapes of all tensors, and whatever plain attributes of a block's modules may depend on its number."""
    facts = read(model)
    blocks = _inside(block for stack in find_stacks(model) for block in stack.blocks)
    plain = {
        f"{name}:{key}": value
        for name, module in model.named_modules()
        for key, value in [*facts.numbers.get(name, {}).items(), *vars(module).items()]
        if name.startswith(blocks) and type(value) in (bool, int, float, str) and not key.startswith(("_", CONFIG))
    }
    return facts.shapes | plain


def _shorter(config: PretrainedConfig, count: int, kept: Sequence[int]) -> Iterator[PretrainedConfig]:
    """Configs that might say it: with one entry less, or two, that are the number of blocks."""
    text = config.get_text_config()
    part = next((key for key, value in vars(config).items() if value is text), "")
    keys = [key for key, value in vars(text).items() if type(value) is int and value == count]
    for chosen in [(key,) for key in keys] + list(combinations(keys, 2)):
        made = copy.deepcopy(config)
        made.__dict__.pop("quantization_config", None)
        owner = getattr(made, part) if part else made
        for key, value in list(vars(text).items()):
            if isinstance(value, list | tuple) and not key.startswith("_"):
                setattr(owner, key, type(value)(renumbered(value, count, kept)))
        for key in chosen:
            setattr(owner, key, len(kept))
        try:
            made = type(made).from_dict(made.to_dict())
        except REFUSALS:
            continue
        yield made


def renumbered(values: Sequence[Any], count: int, kept: Sequence[int]) -> list[Any]:
    """A list of the config: one entry a block, or numbers of blocks, or something else."""
    if len(values) == count:
        return [values[number] for number in kept]
    numbers = all(type(value) is int and 0 <= value < count for value in values)
    if numbers and list(values) == sorted({*values}):
        return [kept.index(value) for value in values if value in kept]
    return list(values)
