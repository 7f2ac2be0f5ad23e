"""A student of its teacher's class and another config: what fits of the teacher's weights is taken over.

    tensors of the same shape                   copied
    embeddings, norms and the head, if smaller  their first entries, so that all keep the same channels
    everything else                             as the class initialises it, drawn by the seed

Block m of M takes from the teacher's block that `spread` gives it, so first and last meet first and last (DistilBERT's
choice, Sanh et al. 2019, arXiv:1910.01108). What was copied and what is new is reported.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_slim.core.errors import PlanError, nearest
from hf_slim.core.select import find_stacks
from hf_slim.core.shapes import renumbered
from hf_slim.core.skeleton import REFUSALS, build
from hf_slim.core.tasks import drawn_by

Entries = Mapping[str, Any]


@dataclass(frozen=True)
class Inherited:
    """Names of a student's parameters, by where their values came from.

    Args:
        copied: whole from the teacher.
        cut: the first entries of the teacher's.
        fresh: drawn at random.
    """

    copied: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()


def spread(count: int, total: int) -> list[int]:
    """`count` of `total` blocks, evenly spread from the first to the last; the first alone is the first.

    >>> spread(6, 12)
    [0, 2, 4, 7, 9, 11]
    """
    return [round(i * (total - 1) / max(1, count - 1)) for i in range(count)]


def plan_config(model: PreTrainedModel, entries: Entries) -> PretrainedConfig:
    """The teacher's config with other entries; lists with one entry a block follow the blocks.

    Args:
        model: the teacher, or its skeleton.
        entries: such as {"num_hidden_layers": 4}, by the names that the config knows.

    Raises:
        PlanError: unknown entries, more blocks than the teacher has, or no model can be built; all problems at once.
    """
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    owners = {key: _owner(config, key) for key in entries}
    known = {*config.to_dict(), *config.get_text_config().to_dict(), *config.attribute_map}
    problems = [
        f"student.config: {type(config).__name__} has no entry {key!r}; {nearest(key, known)}"
        for key, owner in owners.items()
        if owner is None
    ]
    if problems:
        raise PlanError(problems)
    for key, value in entries.items():
        _renumber_lists(model, owners[key], getattr(owners[key], key), value)
    for key, value in entries.items():
        setattr(owners[key], key, value)
    try:
        made = type(config).from_dict(config.to_dict())
    except REFUSALS as error:
        reason = " ".join(str(error).split())
        raise PlanError(f"student.config: {type(config).__name__} refuses {dict(entries)}: {reason}") from error
    skeleton = build(type(model), made)
    if skeleton is None:
        raise PlanError(f"student.config: no {type(model).__name__} can be built with {dict(entries)}; try other sizes")
    _check_blocks(skeleton, model)
    return made


def inherit(teacher: PreTrainedModel, config: PretrainedConfig, seed: int) -> tuple[PreTrainedModel, Inherited]:
    """A model of this config that starts with what fits of its teacher's weights.

    Args:
        teacher: a dense model; it stays as it is.
        config: of `plan_config`.
        seed: of what is new.
    """
    attention = teacher.config._attn_implementation
    with drawn_by(seed):
        student: Any = type(teacher)._from_config(config, dtype=teacher.dtype, attn_implementation=attention)
    student = student.to(teacher.device).train(teacher.training)
    if teacher.can_generate():
        student.generation_config = copy.deepcopy(teacher.generation_config)
    source, prefixes = dict(teacher.named_parameters()), dict(_prefixes(student, teacher))
    may_be_cut = {id(parameter) for parameter in _along_channels(student)}
    kinds: dict[str, list[str]] = {"copied": [], "cut": [], "fresh": []}
    for name, parameter in student.named_parameters():
        old = source.get(_renamed(name, prefixes))
        kind = _take(parameter, old, id(parameter) in may_be_cut)
        kinds[kind].append(name)
    return student, Inherited(**{kind: tuple(names) for kind, names in kinds.items()})


@torch.no_grad()
def _take(parameter: Tensor, old: Tensor | None, may_be_cut: bool) -> str:
    """Fill a student's parameter from the teacher's, where it fits."""
    if old is None or old.dim() != parameter.dim():
        return "fresh"
    if old.shape == parameter.shape:
        parameter.copy_(old)
        return "copied"
    if may_be_cut and all(new <= had for new, had in zip(parameter.shape, old.shape, strict=True)):
        parameter.copy_(old[tuple(slice(size) for size in parameter.shape)])
        return "cut"
    return "fresh"


def _along_channels(model: PreTrainedModel) -> Iterator[Tensor]:
    """Parameters whose entries are channels, each by itself: embeddings, norms' weights, the head."""
    head = model.get_output_embeddings()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        plain = isinstance(module, nn.Embedding) or module is head
        if plain or all(parameter.dim() == 1 for parameter in own):
            yield from own


def _owner(config: PretrainedConfig, key: str) -> PretrainedConfig | None:
    """The config, or its part about text, that has an entry."""
    return next((part for part in (config.get_text_config(), config) if hasattr(part, key)), None)


def _renumber_lists(model: nn.Module, owner: Any, old: Any, new: Any) -> None:
    """Shorten a config's lists with one entry a block, if an entry that counts blocks goes from `old` to `new`."""
    counts = {len(stack.blocks) for stack in find_stacks(model)}
    if type(old) is not int or type(new) is not int or old not in counts or not 0 < new < old:
        return
    for key, value in list(vars(owner).items()):
        if isinstance(value, list | tuple) and len(value) == old and not key.startswith("_"):
            setattr(owner, key, type(value)(renumbered(value, old, spread(new, old))))


def _check_blocks(student: nn.Module, teacher: nn.Module) -> None:
    problems = [
        f"student.config: {mine.name} would have {len(mine.blocks)} blocks, the teacher's has {len(theirs.blocks)}; "
        "a student cannot have more"
        for mine, theirs in zip(find_stacks(student), find_stacks(teacher), strict=True)
        if len(mine.blocks) > len(theirs.blocks)
    ]
    if problems:
        raise PlanError(problems)


def _prefixes(student: nn.Module, teacher: nn.Module) -> Iterator[tuple[str, str]]:
    """Beginnings of names: every block of the student, and the teacher's that it takes from."""
    for mine, theirs in zip(find_stacks(student), find_stacks(teacher), strict=True):
        for block, number in zip(mine.blocks, spread(len(mine.blocks), len(theirs.blocks)), strict=True):
            yield f"{block}.", f"{theirs.blocks[number]}."


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    found = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
    return name if found is None else prefixes[found] + name.removeprefix(found)
