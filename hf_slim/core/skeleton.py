"""What a model is made of, and how it differs from what its own config builds.

A config says how wide and how deep a model is; pruning may leave another one. `build` makes the model that a config
describes, on the meta device (no weights, a few milliseconds a block), and `differences` compares: shapes of tensors,
and the plain numbers that modules keep about themselves (`num_heads`, `split_size`, `scaling`). Encoded layers have the
shape of the weight that they stand for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_slim.core.experts import Experts
from hf_slim.core.probe import FAILURES, SCALES
from hf_slim.core.reshape import OwnConfig
from hf_slim.encodings.embeddings import EncodedScaledEmbedding
from hf_slim.encodings.modules import EncodedEmbedding, EncodedLinear, TiedHead

DERIVED = ("in_features", "out_features", "nx", "nf", "num_embeddings", "embedding_dim", "normalized_shape")
"""Numbers of PyTorch's layers that follow from the shapes of their tensors."""

CONFIG = "config."  # begins the entries of a config that a module has for itself
REFUSALS = (*FAILURES, StrictDataclassError)
"""What a config may raise that is given a number it was not made for, and what a model built from one may."""

AnyModule = TypeVar("AnyModule", bound=nn.Module)
Number = int | float | tuple[int, ...]


@dataclass(frozen=True)
class Facts:
    """The shapes of a model's tensors, and the numbers that its modules hold.

    Args:
        shapes: {name of a tensor: its shape}; of an encoded layer, its dense weight's.
        numbers: {name of a module: {attribute: number}}; "config.x" is entry x of a config that is its own.
        ragged: names of unfused experts of different sizes; their layers are among the shapes.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    numbers: dict[str, dict[str, Number]] = field(default_factory=dict)
    ragged: tuple[str, ...] = ()


@dataclass(frozen=True)
class Difference:
    """One thing in which a model is not what its config builds.

    Args:
        name: of a tensor, or of a module where `what` is an attribute.
        what: a dimension's number, an attribute, or "" where a whole tensor is there or is not.
        built, found: what the config builds, and what the model has; None for neither.
    """

    name: str
    what: int | str
    built: Any
    found: Any


def build(cls: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel | None:
    """The model that a config describes, without weights; None where the class cannot be built from its config."""
    config = copy.deepcopy(config)
    config.__dict__.pop("quantization_config", None)
    try:
        with torch.device("meta"):
            return cls._from_config(config)
    except REFUSALS:
        return None


def without_weights(model: AnyModule) -> AnyModule:
    """A copy on the meta device, whatever shapes and encodings the model has: no tensor is copied on the way."""
    copies: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        copies[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, copies)


def read(model: nn.Module, config: PretrainedConfig | None = None) -> Facts:
    """The shapes and numbers of a model.

    Args:
        config: what the model's own is to become; what a module's copy shares with either is no number of its own.
    """
    facts = Facts(ragged=tuple(name for name, module in model.named_modules() if _is_ragged(module)))
    shapes, numbers = facts.shapes, facts.numbers
    even = {n: m for n, m in model.named_modules() if isinstance(m, Experts) and n not in facts.ragged}
    inside = tuple(f"{name}.{number}." for name, module in even.items() for number in range(module.layout.experts))
    roots = [c for c in (getattr(model, "config", None), config) if c is not None]
    roots += [text for c in roots if (text := c.get_text_config()) is not c]
    for name, module in model.named_modules():
        if f"{name}.".startswith(inside):
            continue
        for key, shape in _shapes(module):
            shapes[f"{name}.{key}" if name else key] = shape
        numbers[name] = dict(_numbers(module, roots))
    return facts


def differences(model: Facts, built: Facts) -> list[Difference]:
    """How a model differs from another one.

    Numbers count only where a tensor of the same module, or of one inside it, has another shape: elsewhere they are
    what happened while the model ran (a rotary table that grew, a dropout that was switched off).
    """
    found: list[Difference] = []
    for name in {**built.shapes, **model.shapes}:
        old, new = built.shapes.get(name), model.shapes.get(name)
        if old is None or new is None or len(old) != len(new):
            if old != new:
                found.append(Difference(name, "", old, new))
            continue
        found += [Difference(name, i, o, n) for i, (o, n) in enumerate(zip(old, new, strict=True)) if o != n]
    touched = {parent for difference in found for parent in _parents(difference.name)}
    for name, numbers in model.numbers.items():
        other = built.numbers.get(name)
        if name in touched and other is not None:
            keys = [key for key in numbers if key in other or key.startswith(CONFIG)]
            found += [Difference(name, k, other.get(k), numbers[k]) for k in keys if numbers[k] != other.get(k)]
    return found


def _parents(name: str) -> Iterator[str]:
    """The modules that a tensor lies in, the model itself ("") included."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _is_ragged(module: nn.Module) -> bool:
    return isinstance(module, Experts) and not module.is_even()


def _shapes(module: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The shapes of a module's own tensors, under the names that they have in a dense model."""
    if isinstance(module, Experts):
        yield from module.fused_shapes().items()
        return
    if isinstance(module, EncodedLinear | EncodedEmbedding):
        turned = getattr(module, "turned", False)
        yield "weight", (module.cols, module.rows) if turned else (module.rows, module.cols)
        bias = getattr(module, "bias", None)
        if bias is not None:
            yield "bias", tuple(bias.shape)
        return
    if isinstance(module, TiedHead):
        shape = (module.out_features, module.in_features)
        yield "weight", shape[::-1] if getattr(module, "turned", False) else shape
    for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None:
            yield key, tuple(tensor.shape)


def _numbers(module: nn.Module, roots: list[PretrainedConfig]) -> Iterator[tuple[str, Number]]:
    holder = module._stock[0] if isinstance(module, Experts) else module
    for key, value in _plain(vars(holder)):
        if key not in DERIVED:
            yield key, value
    if isinstance(module, EncodedScaledEmbedding):
        yield from dict.fromkeys(SCALES, module.scale).items()
    own = vars(holder).get("config")
    if isinstance(own, OwnConfig):
        own = own.copied()
    if isinstance(own, PretrainedConfig) and not any(own is root for root in roots):
        for key, value in _plain(vars(own)):
            if all(value != getattr(root, key, None) for root in roots):
                yield f"{CONFIG}{key}", value


def _plain(values: Mapping[str, Any]) -> Iterator[tuple[str, Number]]:
    for key, value in values.items():
        numbers = value if isinstance(value, tuple) and value else (value,)
        if not key.startswith("_") and all(type(x) in (int, float) for x in numbers):
            yield key, value
