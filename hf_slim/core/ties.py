"""Tensors that several modules share: how modules come to share one, and how Transformers is told.

A tied tensor is one `nn.Parameter` that lies in several modules. So it is counted and trained once, and it stays one
through `.to()`, a deep copy and a state dict. A layer that is encoded later passes its stored tensors on to those that
share its weight (`TiedLinear`). Who shares with whom is read off the objects, never kept beside them; the first in the
model's order owns the tensor.

A class says which tensors its instances tie, such as the output head and the embedding. `declare` says the rest in the
same words, so that `save_pretrained` writes a tensor once and `from_pretrained` looks for it once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from hf_slim.core.select import find_stacks
from hf_slim.encodings.modules import TiedHead

Ties = dict[str, str]
"""{tensor: the one that it is the same as}, by their names."""


def find_ties(model: nn.Module) -> Ties:
    """The tensors in blocks that are those of an earlier block, under the names that they have in a dense model."""
    inside = _blocks(model)
    owners: dict[int, str] = {}
    ties: Ties = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = owners.setdefault(id(parameter), name)
        if owner != name and name.startswith(inside) and owner.startswith(inside):
            ties[name] = owner
    names = {module: name for name, module in model.named_modules()}
    for name, module in model.named_modules():
        if isinstance(module, TiedHead) and name.startswith(inside):
            ties[f"{name}.weight"] = f"{names[module._source[0]]}.weight"
    return ties


def tie(model: nn.Module, ties: Mapping[str, str]) -> Ties:
    """Let tensors be the same as others, in place; works on the meta device too.

    Returns:
        The ties of which the model lacks a tensor.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    lost: Ties = {}
    for target, source in ties.items():
        if target in parameters and source in parameters:
            put_parameter(model, target, parameters[source])
        else:
            lost[target] = source
    return lost


@contextmanager
def tied(model: nn.Module, ties: Mapping[str, str]) -> Iterator[None]:
    """Tensors are the same as others inside; afterwards each module has its own again."""
    kept = {target: model.get_parameter(target) for target in ties}
    tie(model, ties)
    try:
        yield
    finally:
        for target, parameter in kept.items():
            put_parameter(model, target, parameter)


def declare(model: PreTrainedModel) -> Ties:
    """Tell Transformers what is tied inside of blocks, and nothing that no longer is.

    Returns:
        All ties, those of encoded layers too: these store nothing, and Transformers must not look for them.
    """
    ties = find_ties(model)
    holders: dict[str, Ties] = {}
    for target, source in ties.items():
        module, _, key = target.rpartition(".")
        if key in model.get_submodule(module)._parameters:
            holders.setdefault(module, {})[key] = source
    inside = _blocks(model)
    keys = {k: v for k, v in (getattr(model, "all_tied_weights_keys", None) or {}).items() if not k.startswith(inside)}
    keys |= {f"{name}.{key}": source for name, held in holders.items() for key, source in held.items()}
    model.all_tied_weights_keys = keys  # pyright: ignore[reportAttributeAccessIssue]
    for name, module in model.named_modules():
        if name in holders:
            module._tied_weights_keys = holders[name]  # pyright: ignore[reportAttributeAccessIssue]
        elif name.startswith(inside):
            module.__dict__.pop("_tied_weights_keys", None)
    return ties


def leave_biases(model: PreTrainedModel, on: bool) -> None:
    """Keep Transformers from fitting biases to the weights that it ties while a model is loaded: it takes the rows of a
    Conv1D for its outputs.
    """
    if on:
        model._adjust_bias = _leave  # pyright: ignore[reportAttributeAccessIssue]
    else:
        model.__dict__.pop("_adjust_bias", None)


def _leave(*args: object) -> None:
    """Do nothing."""


def _blocks(model: nn.Module) -> tuple[str, ...]:
    """What the names of all that lies in blocks begin with."""
    return tuple(f"{block}." for stack in find_stacks(model) for block in stack.blocks)


def put_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Let a module have this parameter under the full name `name`."""
    module, _, key = name.rpartition(".")
    model.get_submodule(module)._parameters[key] = parameter
