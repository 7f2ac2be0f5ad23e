"""Which layers a method works on: found by type and position, never by a list of known architectures.

A *block* is a child of an `nn.ModuleList` that holds linear layers (the outermost such list). Methods work on the
linear layers inside blocks unless told otherwise; output heads, poolers and classifiers take part when a pattern names
them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_slim.core.errors import PlanError, nearest
from hf_slim.core.experts import Experts
from hf_slim.core.probe import embedding_scale, is_plain_linear
from hf_slim.encodings import Encoding
from hf_slim.encodings.modules import EncodedEmbedding, EncodedLinear, EncodedModule, TiedHead
from hf_slim.encodings.tied import TiedLinear

Kind = Literal["linear", "head", "embedding"]


class Select(BaseModel):
    """Layers by name, and options that hold for some of them only.

    Args:
        include: patterns of names to work on; None for every linear layer inside the model's blocks.
        exclude: patterns of names to leave alone.
        first, last: options for the layers of the first and the last block of every stack.
        overrides: {pattern: options}. In a recipe they stand beside the other keys, `"*.down_proj": {bits: 8}`: a key
            with a mapping is a pattern. Where several match, the later one wins, and any wins over first and last.

    A pattern (`*`, `?`, `[abc]`) matches a full name or the end of one after a dot, as PEFT's target_modules do:
    "q_proj" and "layers.0.*" both work. A pattern that matches nothing is an error.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    first: dict[str, Any] = {}
    last: dict[str, Any] = {}
    overrides: dict[str, dict[str, Any]] = Field(default={}, repr=False)

    @model_validator(mode="before")
    @classmethod
    def _gather_overrides(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        patterns = {k: v for k, v in data.items() if isinstance(v, Mapping) and k not in cls.model_fields}
        if not patterns:
            return data
        rest = {k: v for k, v in data.items() if k not in patterns}
        return rest | {"overrides": dict(rest.get("overrides", {})) | patterns}

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        fields = ("include", "exclude", "first", "last")
        written = {k: getattr(self, k) for k in fields if getattr(self, k) not in (None, (), {})}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in written.items()} | self.overrides

    def options_of(self, layer: Layer) -> dict[str, Any]:
        """What differs for this layer."""
        options: dict[str, Any] = {}
        if layer.place is not None:
            number, count = layer.place
            options |= (self.first if number == 0 else {}) | (self.last if number == count - 1 else {})
        for pattern, override in self.overrides.items():
            if matches(layer.name, pattern):
                options |= override
        return options


@dataclass(frozen=True)
class Layer:
    """One layer that has a weight [rows, cols].

    Args:
        kind: "linear", "head" (the output embedding) or "embedding" (the input embedding).
        block: name of the block it lies in, or None.
        encoding: how its weight is stored by now; None for dense.
        tied_to: name of the layer that owns the weight, when it is shared.
        survivors: weights that pruning left, None when not pruned.
        place: number of its block in the stack, from 0, and how many blocks that has; None outside of blocks.
        routed: it belongs to an expert, and sees only the tokens that a router sends there.
        elsewhere: bytes of its stored tensors that are those of another layer.
    """

    name: str
    kind: Kind
    rows: int
    cols: int
    dtype: torch.dtype
    block: str | None = None
    encoding: Encoding | None = None
    tied_to: str | None = None
    survivors: int | None = None
    place: tuple[int, int] | None = None
    routed: bool = False
    elsewhere: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that its weight takes as it is stored now."""
        if self.tied_to is not None:
            return 0
        if self.encoding is None:
            return self.rows * self.cols * self.dtype.itemsize
        return self.encoding.nbytes(self.rows, self.cols, self.dtype) - self.elsewhere

    def encoded(self, encoding: Encoding) -> Layer:
        """The same layer, stored in another way."""
        survivors = getattr(encoding, "survivors", None)
        return dataclasses.replace(self, encoding=encoding, survivors=survivors, elsewhere=0)


@dataclass(frozen=True)
class Stack:
    """A run of blocks, one feeding the next."""

    name: str
    blocks: tuple[str, ...]


def find_stacks(model: nn.Module) -> list[Stack]:
    """The outermost `nn.ModuleList`s whose children hold linear layers, in the model's order."""
    stacks: list[Stack] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{stack.name}.") for stack in stacks)
        if isinstance(module, nn.ModuleList) and not inside and any(_is_linear(m) for m in module.modules()):
            stacks.append(Stack(name, tuple(f"{name}.{i}" for i in range(len(module)))))
    return stacks


def choose_stack(model: nn.Module, name: str | None) -> Stack:
    """The stack of that name, or the only one.

    Raises:
        PlanError: no such stack, or several to choose from.
    """
    stacks = {stack.name: stack for stack in find_stacks(model)}
    if not stacks:
        raise PlanError("the model has no repeated blocks")
    if name is None and len(stacks) > 1:
        raise PlanError(f"the model has several stacks of blocks; name one in `stack`: {', '.join(stacks)}")
    if name is not None and name not in stacks:
        raise PlanError(f"stack: {name!r} is none of the model's; {nearest(name, stacks)}")
    return stacks[name or next(iter(stacks))]


def find_layers(model: nn.Module) -> dict[str, Layer]:
    """Every layer that hf_slim can work on, by name, in the model's order. Works on the meta device too."""
    places = {b: (i, len(stack.blocks)) for stack in find_stacks(model) for i, b in enumerate(stack.blocks)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    table = getattr(model, "get_input_embeddings", lambda: None)()
    experts = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Experts))
    owner = _owners(model)
    seen: set[int] = set()
    layers: dict[str, Layer] = {}
    for name, module in model.named_modules():
        kind: Kind
        if module is table and (isinstance(module, EncodedEmbedding) or embedding_scale(module) is not None):
            kind = "embedding"
        elif _is_linear(module):
            kind = "head" if module is head else "linear"
        else:
            continue
        block = next((b for b in places if name.startswith(f"{b}.")), None)
        layer = _describe(name, module, kind, block, owner.get(name))
        place = None if block is None else places[block]
        elsewhere = _elsewhere(module, seen)
        layers[name] = dataclasses.replace(layer, place=place, routed=name.startswith(experts), elsewhere=elsewhere)
    return layers


def select_layers(layers: dict[str, Layer], select: Select, kinds: Sequence[Kind] = ("linear", "head")) -> list[Layer]:
    """Layers of those kinds that `select` names, in the model's order, without those that share another's weight.

    Raises:
        PlanError: patterns that match no layer, all of them at once.
    """
    candidates = [layer for layer in layers.values() if layer.kind in kinds]
    names = [layer.name for layer in candidates]
    problems = [
        f"layers.{what}: {pattern!r} matches no layer; {nearest(pattern, _shapes_of_names(names))}"
        for what, patterns in (("include", select.include or ()), ("exclude", select.exclude))
        for pattern in patterns
        if not any(matches(name, pattern) for name in names)
    ]
    chosen = [layer for layer in candidates if layer.tied_to is None and _chosen(layer, select)]
    problems += [
        f"layers: {pattern!r} matches none of the layers to compress; "
        + nearest(pattern, _shapes_of_names([layer.name for layer in chosen]))
        for pattern in select.overrides
        if not any(matches(layer.name, pattern) for layer in chosen)
    ]
    if problems:
        raise PlanError(problems)
    return chosen


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern names this layer: its full name, or the end of it after a dot."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _chosen(layer: Layer, select: Select) -> bool:
    if any(matches(layer.name, pattern) for pattern in select.exclude):
        return False
    if select.include is None:
        return layer.block is not None and layer.kind == "linear"
    return any(matches(layer.name, pattern) for pattern in select.include)


def _is_linear(module: nn.Module) -> bool:
    return type(module) in (Conv1D, EncodedLinear, TiedHead, TiedLinear) or is_plain_linear(module)


def _describe(name: str, module: nn.Module, kind: Kind, block: str | None, owner: str | None) -> Layer:
    if isinstance(module, EncodedModule):
        dtype, encoding = module.compute_dtype, module.encoding
        survivors = getattr(encoding, "survivors", None)
        return Layer(name, kind, module.rows, module.cols, dtype, block, encoding, owner, survivors)
    if isinstance(module, TiedHead):
        dtype = module._source[0].compute_dtype
        return Layer(name, kind, module.out_features, module.in_features, dtype, block, None, owner)
    weight: torch.Tensor = module.weight  # pyright: ignore[reportAssignmentType]
    rows, cols = weight.shape[::-1] if isinstance(module, Conv1D) else weight.shape
    return Layer(name, kind, rows, cols, weight.dtype, block, None, owner)


def _elsewhere(module: nn.Module, seen: set[int]) -> int:
    """Bytes of an encoded layer's tensors that a layer before it has too: those `seen`, by their ids."""
    own = module._parameters if isinstance(module, EncodedModule) else {}
    stored = [parameter for name, parameter in own.items() if parameter is not None and name != "bias"]
    shared = sum(parameter.nbytes for parameter in stored if id(parameter) in seen)
    seen |= {id(parameter) for parameter in stored}
    return shared


def _owners(model: nn.Module) -> dict[str, str]:
    """Modules whose weight belongs to another module: {module: owner}."""
    names = {module: name for name, module in model.named_modules()}
    tied = {name: names[m._source[0]] for name, m in model.named_modules() if isinstance(m, TiedHead)}
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target.endswith(".weight") and source.endswith(".weight"):
            tied[target.removesuffix(".weight")] = source.removesuffix(".weight")
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and (owner := owners.setdefault(id(weight), name)) != name:
            tied.setdefault(name, owner)
    return tied


def _shapes_of_names(names: Iterable[str]) -> list[str]:
    """Last parts of names: what people write in patterns."""
    return sorted({name.rpartition(".")[2] for name in names})
