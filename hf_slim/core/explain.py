"""Pydantic's findings in the words of a recipe: what was expected, what was found, and the fix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from hf_slim.core.errors import PlanError, nearest

Entry = TypeVar("Entry", bound=BaseModel)
Path = tuple[str | int, ...]

_WHOLE = "expected a whole number, got {got}"
_NUMBER = "expected a number, got {got}"
_TEXT = "expected text, got {got}; put it in quotes"
_SWITCH = "expected true or false, got {got}"
_LIST = "expected a list such as [a, b], got {got}"
_MAPPING = "expected a mapping such as {{key: value}}, got {got}"
_CHOICE = "{got} is not one of {expected}"

_MESSAGES = {
    "missing": "key {key!r} is missing; add it",
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_parsing_size": _WHOLE,
    "int_from_float": _WHOLE,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "finite_number": "expected a finite number, got {got}",
    "string_type": _TEXT,
    "string_too_short": "expected text of {min_length} or more characters, got {got}",
    "string_unicode": "{got} is half of a surrogate pair, which is not text; write the character itself",
    "bool_type": _SWITCH,
    "bool_parsing": _SWITCH,
    "list_type": _LIST,
    "tuple_type": _LIST,
    "set_type": _LIST,
    "dict_type": _MAPPING,
    "model_type": _MAPPING,
    "model_attributes_type": _MAPPING,
    "too_short": "expected {min_length} or more entries, got {actual_length}",
    "too_long": "expected at most {max_length} entries, got {actual_length}",
    "literal_error": _CHOICE,
    "enum": _CHOICE,
    "greater_than": "{got} is too small, must be more than {gt}",
    "greater_than_equal": "{got} is too small, at least {ge}",
    "less_than": "{got} is too large, must be less than {lt}",
    "less_than_equal": "{got} is too large, at most {le}",
    "multiple_of": "{got} is not a multiple of {multiple_of}",
    "value_error": "{error}",
    "assertion_error": "{error}",
}


class InnerError(ValueError):
    """A validator's own validation of another model failed.

    Args:
        path: where that model's data lies below the value being validated.
        model: the model.
        error: what pydantic found.
    """

    def __init__(self, path: Path, model: type[BaseModel], error: ValidationError):
        super().__init__(str(error))
        self.path, self.model, self.error = path, model, error


def explain(error: ValidationError, model: type[BaseModel], data: Any) -> Iterator[tuple[Path, Path, str]]:
    """Every finding as (path of the offending value, path that the message speaks of, message).

    Findings about one value, as when no branch of a union fits, come as one.

    Args:
        error: what validating `data` raised.
        model: what `data` was validated as; its fields are the known keys.
        data: plain dicts and lists.
    """
    merged: dict[tuple[Path, Path], list[str]] = {}
    for path, about, message in _findings(error, model):
        key = _existing(path, data), _existing(about, data)
        merged.setdefault(key, []).append(message)
    for (path, about), messages in merged.items():
        yield path, about, ", or ".join(dict.fromkeys(messages))


def _findings(error: ValidationError, model: type[BaseModel], prefix: Path = ()) -> Iterator[tuple[Path, Path, str]]:
    for finding in error.errors(include_url=False):
        loc, context = finding["loc"], finding.get("ctx", {})
        path, cause = prefix + loc, context.get("error")
        if isinstance(cause, InnerError):
            yield from _findings(cause.error, cause.model, path + cause.path)
        elif finding["type"] == "extra_forbidden":
            yield path, path[:-1], f"unknown key {loc[-1]!r}; {_hint(str(loc[-1]), model, loc[:-1])}"
        else:
            where = path[:-1] if finding["type"] == "missing" else path
            rare = finding["msg"].replace("{", "{{").replace("}", "}}") + ", got {got}"
            template = _MESSAGES.get(finding["type"], rare)
            yield where, where, template.format(got=shown(finding["input"]), key=loc[-1] if loc else "", **context)


def _hint(name: str, model: type[BaseModel], loc: Path) -> str:
    known = {key for owner in _models_at(model, loc) for key in owner.model_fields}
    return nearest(name, known) if known else "it takes no options"


def _models_at(model: type[BaseModel], loc: Path) -> list[type[BaseModel]]:
    """The models that the value at `loc` may be. List positions and names of union branches are not fields."""
    models = [model]
    for word in loc:
        fields = [owner.model_fields[word] for owner in models if word in owner.model_fields]
        models = [inner for field in fields for inner in _models_in(field.annotation)] if fields else models
    return models


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _existing(path: Path, data: Any) -> Path:
    """`path` without what pydantic added to it: words that are not in the data."""
    kept: Path = ()
    for word in path:
        children: Any = dict(enumerate(data)) if isinstance(data, list) else data
        if isinstance(children, dict) and word in children:
            kept, data = (*kept, word), children[word]
        elif data == word:  # a stage given by its bare name
            kept = (*kept, word)
    return kept


def shown(value: Any) -> str:
    """A value as a recipe's author wrote it, cut to a line."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    text = repr(value)
    return text if len(text) <= 60 else text[:56] + " ..."


def read_entries(
    model: type[Entry], entries: Sequence[Entry | Mapping[str, Any]] | None, name: str
) -> tuple[Entry, ...]:
    """A list of options, each checked against a model.

    Args:
        name: what the list is called, for errors.

    Raises:
        PlanError: unknown options or values; all problems at once.
    """
    read, problems = [], []
    for i, entry in enumerate(entries or ()):
        try:
            read.append(model.model_validate(entry))
        except ValidationError as error:
            for _, about, message in explain(error, model, entry):
                problems.append(f"{name}[{i}]{''.join(f'.{word}' for word in about)}: {message}")
    if problems:
        raise PlanError(problems)
    return tuple(read)
