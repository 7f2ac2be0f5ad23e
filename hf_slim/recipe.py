"""A recipe: which model, which data, and the stages that make the model smaller, as closed typed YAML.

    model: HuggingFaceTB/SmolLM2-135M-Instruct
    data: {calibration: {source: builtin, samples: 32, length: 512}}
    stages:
      - quantize.gptq: {bits: 4, group_size: 64}
      - evaluate.perplexity

A recipe is text or it is a `Recipe`, and either gives the other back. Whatever is wrong is reported at once, each
problem with its line, what was found, and the fix. Nothing in a recipe is ever executed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from hf_slim.core import strict_yaml
from hf_slim.core.data import DataConfig
from hf_slim.core.errors import RecipeError, nearest
from hf_slim.core.explain import explain, shown
from hf_slim.core.stage import StageList, address_of
from hf_slim.core.strict_yaml import Document, Path
from hf_slim.core.tasks import Task
from hf_slim.methods import FAMILIES


def _not_empty(stages: StageList) -> StageList:
    if not stages:
        raise ValueError("has no entry; a recipe needs at least one method, such as - quantize.rtn")
    return stages


class Recipe(BaseModel):
    """Everything that decides what a run computes.

    Args:
        model: Hub id, local folder or GGUF file; None when the command line gives it.
        revision: branch, tag or commit of a Hub model.
        seed: of every random choice.
        dtype: of the weights in memory; "auto" is the dtype they are stored in.
        task: what the model is to be used for; a head that its checkpoint lacks is drawn by the seed. None for what the
            checkpoint is made for.
        num_labels: classes of a classifier; None for what the model's config says.
        data: text for calibration, evaluation and training.
        stages: the methods, in order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[str, Field(min_length=1)] | None = None
    revision: Annotated[str, Field(min_length=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    task: Task | None = None
    num_labels: Annotated[int, Field(ge=2)] | None = None
    data: DataConfig = DataConfig()
    stages: Annotated[StageList, AfterValidator(_not_empty)]

    @model_validator(mode="after")
    def _classes_have_a_task(self) -> Recipe:
        if self.num_labels is not None and self.task is None:
            raise ValueError("num_labels is the number of a classifier's classes; add task: sequence-classification")
        return self

    @classmethod
    def from_yaml(
        cls, source: str | os.PathLike[str], overrides: Sequence[str] = (), name: str | None = None
    ) -> Recipe:
        """Read a recipe.

        Args:
            source: YAML text as a `str`, or a file as a `pathlib.Path`.
            overrides: `key=value` words, such as "seed=3", "quantize.gptq.bits=3" or "stages.1.bits=3" (counted from
                0); the value is YAML.
            name: what messages call the text; a file's path by default.

        Raises:
            RecipeError: everything wrong with the text and the overrides.
        """
        if isinstance(source, str):
            text, name = source, name or "recipe"
        else:
            text, name = strict_yaml.read_file(source), name or os.fspath(source)
        document = strict_yaml.parse(text, name)
        if document.value is None:
            raise RecipeError(f"{name}: is empty; a recipe needs 'stages:' and a list of methods")
        if not isinstance(document.value, dict):
            raise RecipeError(f"{name}: expected 'key: value' lines at the top, got {shown(document.value)}")
        for override in overrides:
            _override(document, override)
        return cls._from_document(document)

    @classmethod
    def _from_document(cls, document: Document) -> Recipe:
        recipe = None
        try:
            recipe = cls.model_validate(document.value)
        except ValidationError as error:
            order = {path: position for position, path in enumerate(document.origins)}
            found = explain(error, cls, document.value)
            for path, about, message in sorted(found, key=lambda each: order.get(document.known(each[0]), -1)):
                document.complain(path, message, about)
        else:
            for path, message in _misread(document.value, recipe.model_dump()):
                document.complain(path, message)
        if recipe is None or document.problems:
            raise RecipeError(document.problems)
        return recipe

    def to_yaml(self) -> str:
        """Text that `from_yaml` reads back as an equal recipe. Options equal to their default are left out."""
        return strict_yaml.dump(self.model_dump(mode="json", exclude_defaults=True))

    def to_dict(self) -> dict[str, Any]:
        """Every option, defaults too, as JSON can hold it and in a fixed order: what fingerprints are taken of."""
        return self.model_dump(mode="json")


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file; see `Recipe.from_yaml`.

    Raises:
        RecipeError: the file cannot be read, or everything wrong with it and the overrides.
    """
    name = os.fspath(path)
    return Recipe.from_yaml(strict_yaml.read_file(name), overrides, name)


def _misread(written: Any, read: Any, path: Path = ()) -> Iterator[tuple[Path, str]]:
    """Values that pydantic takes but their author cannot have meant: `true` for 1, and numbers that are not finite."""
    if isinstance(written, dict) and isinstance(read, dict):
        for key in [key for key in written if key in read]:
            yield from _misread(written[key], read[key], (*path, key))
    elif isinstance(written, list) and isinstance(read, (list, tuple)):
        for index, (before, after) in enumerate(zip(written, read, strict=False)):
            yield from _misread(before, after, (*path, index))
    elif isinstance(written, bool) and isinstance(read, (int, float)) and not isinstance(read, bool):
        yield path, f"expected a number, got {shown(written)}"
    elif isinstance(read, float) and not math.isfinite(read):
        yield path, f"expected a finite number, got {shown(written)}"


def _override(document: Document, override: str) -> None:
    """Put the value of one `key=value` in its place, or note why that is impossible."""
    name = f"override {override!r}"
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")) or key.count(".") >= strict_yaml.MAX_DEPTH:
        document.problems.append(f"{name}: expected key=value, such as seed=3 or quantize.gptq.bits=3")
        return
    try:
        value = strict_yaml.parse(text, name)
        path = _find(document.value, key)
    except RecipeError as error:
        document.problems += [p if p.startswith(name) else f"{name}: {p}" for p in error.problems]
        return
    document.problems += value.problems
    _assign(document.value, path, value.value)
    document.origins = {old: where for old, where in document.origins.items() if old[: len(path)] != path}
    for length in range(len(path)):
        document.origins.setdefault(path[: length + 1], name)


def _find(data: dict[str, Any], key: str) -> Path:
    """The path in `data` that an override's key means; its last words need not exist yet."""
    words = key.split(".")
    if words[0] not in FAMILIES:
        return _descend(data, (), words)
    address, rest = ".".join(words[:2]), words[2:]
    stages = dict(_stages(data))
    matches = [path for path, method in stages.items() if method == address]
    if not matches:
        hint = nearest(address, set(stages.values())) if stages else "it has no stages"
        raise RecipeError(f"no stage {address!r} in this recipe; {hint}")
    if len(matches) > 1:
        choices = " or ".join(".".join(str(word) for word in (*path[:-1], *rest)) for path in matches)
        raise RecipeError(f"{len(matches)} stages are {address!r}; say which: {choices}")
    return _descend(data, matches[0], rest)


def _stages(data: Any, path: Path = ()) -> Iterator[tuple[Path, str]]:
    """Every stage's (path, address), those inside other stages too."""
    children = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, child in children:
        address = address_of(child) if isinstance(data, list) else None
        if address:
            yield (*path, key, address), address
        yield from _stages(child, (*path, key))


def _descend(data: Any, start: Path, words: Sequence[str]) -> Path:
    """Extend `start` by `words`; a word that is a position in a list of stages goes on to that stage's options."""
    path = start
    for word in start:
        data = _child(data, word)
    for position, word in enumerate(words):
        if isinstance(data, list):
            if not (word.isascii() and word.isdigit() and len(word) < 10 and int(word) < len(data)):
                where = ".".join(map(str, path))
                raise RecipeError(f"{where!r} has no entry {word!r}; it has {len(data)}, counted from 0")
            path, data = (*path, int(word)), data[int(word)]
            address = address_of(data)
            if address and position + 1 < len(words):
                path, data = (*path, address), _child(data, address)
        elif data is None or isinstance(data, dict):
            path, data = (*path, word), _child(data, word)
        else:
            raise RecipeError(f"{'.'.join(map(str, path))!r} is {shown(data)} and holds no {word!r}")
    return path


def _child(data: Any, word: str | int) -> Any:
    if isinstance(data, list) and isinstance(word, int):
        return data[word]
    return data.get(word) if isinstance(data, dict) else None


def _assign(data: Any, path: Path, value: Any) -> None:
    for word in path[:-1]:
        if not isinstance(_child(data, word), (dict, list)):
            data[word] = {}
        data = data[word]
    data[path[-1]] = value
