"""Saying in the config that a model has become smaller, so that it is a plain model that stock Transformers loads.

No list of architectures and of what their configs call a width: an entry is taken for the right one when the model that
it builds has the shapes that were looked for. A change is accepted only where it explains some differences entirely, in
every block, and makes no new ones.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_slim.core.skeleton import REFUSALS, Difference, build, differences, read

BUILDS = 32  # skeletons that a search may build; one takes a third of a second for 30 blocks
DEPTH = 4  # entries that are changed together
WIDTH = 3  # beginnings of such a change that are followed
_COMMON = frozenset(vars(PretrainedConfig()))


@dataclass(frozen=True)
class Entry:
    """One number of a config, or of the text part of one."""

    part: str
    key: str
    value: int

    def write(self, config: PretrainedConfig) -> None:
        """Put it into a config."""
        setattr(getattr(config, self.part) if self.part else config, self.key, self.value)


def express(model: PreTrainedModel) -> list[Difference]:
    """Change the model's config (and copies of it that modules hold) so that it builds what the model has become.

    Returns:
        The differences that no entry of the config can say.
    """
    base = build(type(model), model.config)
    if base is None:
        return []
    left = differences(read(model), read(base))
    while left:
        found = _Search(model, left).run()
        if found is None:
            break
        left = found.left
        adopt(model, found.config)
    return left


def adopt(model: PreTrainedModel, config: PretrainedConfig) -> None:
    """Write what is new in `config` into the model's own config, and into the copies that its modules hold."""
    before, after = build(type(model), model.config), build(type(model), config)
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = vars(module).get("config")
        if not isinstance(own, PretrainedConfig) or id(own) in seen:
            continue
        seen.add(id(own))
        old, new = (_config_of(skeleton, name) for skeleton in (before, after))
        if old is not None and new is not None:
            _take_over(own, old, new)


def _config_of(skeleton: nn.Module | None, name: str) -> PretrainedConfig | None:
    known = {} if skeleton is None else dict(skeleton.named_modules())
    return vars(known[name]).get("config") if name in known else None


def _take_over(own: PretrainedConfig, old: PretrainedConfig, new: PretrainedConfig) -> None:
    for key, value in vars(new).items():
        before = vars(old).get(key)
        if isinstance(value, PretrainedConfig) and isinstance(before, PretrainedConfig):
            _take_over(getattr(own, key), before, value)
        elif (value != before or key not in vars(old)) and key not in _COMMON and not key.startswith("_"):
            setattr(own, key, copy.deepcopy(value))


@dataclass(frozen=True)
class _Try:
    config: PretrainedConfig
    left: list[Difference]


class _Search:
    """Looks for entries of the config that explain differences; a few at a time, those that explain most first."""

    def __init__(self, model: PreTrainedModel, wanted: list[Difference]):
        self.model, self.wanted = model, wanted
        self.builds = 0
        self.seen: set[tuple[Entry, ...]] = set()

    def run(self) -> _Try | None:
        start = _Try(_bare(self.model.config), self.wanted)
        found = self._from(start, ())
        if found is None:
            self.seen.clear()
            self.builds = 0
            pinned = self._pinned(start)
            found = None if pinned is None else self._from(pinned, ())
        return found

    def _from(self, start: _Try, entries: tuple[Entry, ...]) -> _Try | None:
        """Depth first: a step must explain something that was not; at the end nothing new may be left over."""
        tries: list[tuple[int, int, tuple[Entry, ...], _Try]] = []
        for number, entry in enumerate(_candidates(start, self.wanted)):
            chosen = (*entries, entry)
            tried = self._build(start.config, chosen)
            if tried is None or not _keys(start.left) - _keys(tried.left):
                continue
            if self._explains(tried.left):
                return tried
            tries.append((len(tried.left), number, chosen, tried))
        if len(entries) + 1 < DEPTH:
            for _, _, chosen, tried in sorted(tries, key=lambda found: found[:2])[:WIDTH]:
                if (found := self._from(tried, chosen)) is not None:
                    return found
        return None

    def _build(self, config: PretrainedConfig, entries: tuple[Entry, ...]) -> _Try | None:
        key = tuple(sorted(entries, key=lambda e: (e.part, e.key, e.value)))
        if key in self.seen or self.builds >= BUILDS or len({(e.part, e.key) for e in entries}) < len(entries):
            return None
        self.seen.add(key)
        self.builds += 1
        config = copy.deepcopy(config)
        try:
            entries[-1].write(config)
            config = type(config).from_dict(config.to_dict())  # what will be read from disk
        except REFUSALS:
            return None
        skeleton = build(type(self.model), config)
        if skeleton is None:
            return None
        return _Try(config, differences(read(self.model, config), read(skeleton)))

    def _explains(self, left: list[Difference]) -> bool:
        """Whether something is explained, nothing is new, and nothing is explained in some blocks only."""
        before, after = _keys(self.wanted), _keys(left)
        kinds = {_kind(key) for key in before - after}
        return after < before and not any(_kind(key) in kinds for key in after)

    def _pinned(self, start: _Try) -> _Try | None:
        """The config with the width of a head written down, which many derive from two entries that will change."""
        text = start.config.get_text_config()
        heads = getattr(text, "num_attention_heads", None)
        width = getattr(text, "hidden_size", None)
        if getattr(text, "head_dim", None) is not None or not heads or not width or width % heads:
            return None
        part = next((key for key, value in vars(start.config).items() if value is text), "")
        tried = self._build(start.config, (Entry(part, "head_dim", width // heads),))
        return tried if tried is not None and _keys(tried.left) == _keys(start.left) else None


def _candidates(state: _Try, wanted: Sequence[Difference]) -> Iterator[Entry]:
    """Entries that could be meant by the differences: those that a differing size is, or is a multiple of."""
    pairs: dict[tuple[int, int], None] = {}
    uneven = _uneven(wanted)
    for difference in state.left:
        kind = _kind((difference.name, difference.what))
        if type(difference.built) is int and type(difference.found) is int and kind not in uneven:
            pairs[difference.built, difference.found] = None
    found: dict[Entry, int] = {}
    for old, new in pairs:
        for part, key, value in _entries(state.config):
            if value is None:
                found.setdefault(Entry(part, key, new), 1 << 30)
            elif value > 1 and old > 0 and old % value == 0 and new % (old // value) == 0:
                found.setdefault(Entry(part, key, new // (old // value)), old // value)
    yield from sorted(found, key=lambda entry: found[entry])


def _uneven(wanted: Sequence[Difference]) -> set[tuple[str, Any]]:
    """Kinds of differences that are not the same in every block."""
    values: dict[tuple[str, Any], set[Any]] = {}
    for difference in wanted:
        values.setdefault(_kind((difference.name, difference.what)), set()).add(difference.found)
    return {kind for kind, found in values.items() if len(found) > 1}


def _entries(config: PretrainedConfig) -> Iterator[tuple[str, str, int | None]]:
    text = config.get_text_config()
    parts = {"": config} | {key: value for key, value in vars(config).items() if value is text}
    for part, owner in parts.items():
        for key, value in vars(owner).items():
            if key in _COMMON or key.startswith("_") or key.endswith("_id"):
                continue
            if type(value) is int or value is None:
                yield part, key, value


def _bare(config: PretrainedConfig) -> PretrainedConfig:
    """A copy that says nothing of how weights are stored."""
    config = copy.deepcopy(config)
    config.__dict__.pop("quantization_config", None)
    return config


def _keys(found: Sequence[Difference]) -> set[tuple[str, Any]]:
    return {(difference.name, difference.what) for difference in found}


def _kind(key: tuple[str, Any]) -> tuple[str, Any]:
    return re.sub(r"\d+", "*", key[0]), key[1]
