"""A model with fewer tokens: rows of embedding and head that go, and every number that names a token.

Which tensors have a row a token is not guessed: skeletons with the one and the other number of tokens are compared.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_slim.core.errors import ModelError
from hf_slim.core.report import LayerReport
from hf_slim.core.reshape import set_count
from hf_slim.core.shapes import derive
from hf_slim.core.skeleton import build, differences, read

_LISTS = ("suppress_tokens", "begin_suppress_tokens")


def trim_tokens(model: PreTrainedModel, kept: list[int]) -> list[LayerReport]:
    """Take all other tokens out of a model, in place: embeddings, head, biases, configs, generation config.

    Args:
        kept: ids that stay, ascending; the first becomes 0.

    Raises:
        ModelError: before anything is changed: the class does not follow `vocab_size`, or would count positions
            otherwise.
    """
    new = {old: number for number, old in enumerate(kept)}
    config = copy.deepcopy(model.config)
    _renumber(config, new)
    config.get_text_config().vocab_size = len(kept)
    before, after = build(type(model), model.config), build(type(model), config)
    if before is None or after is None or not (found := differences(read(after), read(before))):
        raise ModelError(f"{type(model).__name__}: its config does not say how many tokens it has; cannot trim it")
    _check_padding(model, new)
    made: dict[int, Tensor] = {}
    rows: list[LayerReport] = []
    index = torch.tensor(kept)
    for difference in found:
        if type(difference.what) is int:
            rows += _cut(model, difference.name, difference.what, index, made)
        elif difference.what != "":
            set_count(model.get_submodule(difference.name), str(difference.what), difference.found)
    for own in _configs(model):
        _renumber(own, new)
        if "vocab_size" in vars(own):
            own.vocab_size = len(kept)
    for module in model.modules():
        if type(getattr(module, "padding_idx", None)) is int:
            module.padding_idx = new.get(module.padding_idx, module.padding_idx)  # pyright: ignore
    return rows


def _cut(model: nn.Module, name: str, axis: int, index: Tensor, made: dict[int, Tensor]) -> list[LayerReport]:
    """Take rows out of one tensor; one that is shared stays shared."""
    place, _, key = name.rpartition(".")
    module = model.get_submodule(place)
    owner: Any = module._parameters if key in module._parameters else module._buffers
    old = owner[key]
    if id(old) in made:
        owner[key] = made[id(old)]
        derive(module)
        return []
    cut = old.detach().index_select(axis, index.to(old.device))
    owner[key] = nn.Parameter(cut, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else cut
    made[id(old)] = owner[key]
    derive(module)
    if cut.dim() != 2:
        return []
    size: dict[str, Any] = {"rows": cut.shape[0], "cols": cut.shape[1], "bytes_before": old.nbytes, "bytes": cut.nbytes}
    return [LayerReport(name=place, encoding="dense", error=0.0, **size)]


def _configs(model: nn.Module) -> list[Any]:
    """Every config that the model or one of its modules holds, and how it generates."""
    found: dict[int, Any] = {}
    for module in model.modules():
        for key in ("config", "generation_config"):
            own = vars(module).get(key)
            if own is not None:
                found[id(own)] = own
            if isinstance(own, PretrainedConfig):
                text = own.get_text_config()
                found[id(text)] = text
    return list(found.values())


def _named_ids(config: Any) -> dict[str, Any]:
    return {
        key: value
        for key, value in vars(config).items()
        if value is not None and (key.endswith("token_id") or key in _LISTS)
    }


def reserved_ids(model: nn.Module, size: int) -> set[int]:
    """Ids that the configs of a model give a meaning to, of those that exist."""
    found: set[int] = set()
    for config in _configs(model):
        for key, value in _named_ids(config).items():
            if key not in _LISTS:
                found |= {number for number in (value if isinstance(value, list) else [value]) if 0 <= number < size}
    return found


def _renumber(config: Any, new: dict[int, int]) -> None:
    """Give the ids in a config their new numbers; what is not there any more goes."""
    for key, value in _named_ids(config).items():
        if isinstance(value, list):
            setattr(config, key, [new[number] for number in value if number in new])
        else:
            setattr(config, key, new.get(value, None if value >= 0 else value))


def _check_padding(model: PreTrainedModel, new: dict[int, int]) -> None:
    """RoBERTa counts positions from the padding token's id on: it must stay what it is."""
    table = model.get_input_embeddings()
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        positions = isinstance(module, nn.Embedding) and module is not table and len(module.weight) != len(table.weight)  # pyright: ignore
        if positions and type(padding) is int and new.get(padding, padding) != padding:
            raise ModelError(
                f"{name} counts positions from the padding token's id {padding}, which would become {new[padding]}; "
                "keep the tokens before it with keep: [...]"
            )
