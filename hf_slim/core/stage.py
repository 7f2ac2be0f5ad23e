"""One step of a recipe: a method's address and its options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_serializer

from hf_slim.core.errors import RecipeError
from hf_slim.core.explain import InnerError, explain, shown
from hf_slim.core.method import MethodConfig
from hf_slim.methods import FAMILIES, find_method


class Stage(BaseModel):
    """A method and its options, already validated: make one with `make_stage`.

    Args:
        method: address such as "quantize.gptq".
        options: instance of that method's `Config`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    options: MethodConfig

    @model_serializer
    def _as_written(self, info: Any) -> Any:
        options = self.options.model_dump(mode=info.mode, exclude_defaults=info.exclude_defaults)
        if info.exclude_defaults and not options:
            return self.method
        return {self.method: options}


def make_stage(address: str, options: Mapping[str, Any] | None = None) -> Stage:
    """Look a method up and validate its options.

    Args:
        address: such as "quantize.gptq".
        options: keyword arguments of the method's `Config`.

    Raises:
        RecipeError: unknown method, or everything wrong with the options.
    """
    config = find_method(address).Config
    written = dict(options or {})
    try:
        return Stage(method=address, options=config.model_validate(written))
    except ValidationError as error:
        found = explain(error, config, written)
        raise RecipeError(
            [f"{'.'.join(map(str, (address, *about)))}: {message}" for _, about, message in found]
        ) from None


def address_of(item: Any) -> str | None:
    """The address in one entry of a list of stages, "quantize.gptq" or {"quantize.gptq": ...}, else None."""
    if isinstance(item, Mapping) and len(item) == 1:
        item = next(iter(item))
    if isinstance(item, str) and item.count(".") == 1 and item.split(".")[0] in FAMILIES:
        return item
    return None


def _read_stage(item: Any) -> Any:
    if isinstance(item, Stage):
        return item
    if isinstance(item, str):
        item = {item: None}
    if not isinstance(item, Mapping) or not item:
        raise ValueError("expected a stage such as quantize.gptq: {bits: 4}, got " + shown(item))
    if len(item) > 1:
        names = ", ".join(repr(name) for name in item)
        raise ValueError(f"a stage has one method, got {len(item)} keys: {names}; start each stage with '-'")
    address, options = next(iter(item.items()))
    try:
        config = find_method(address).Config
    except RecipeError as error:
        raise ValueError(str(error)) from None
    try:
        return Stage(method=address, options=config.model_validate({} if options is None else options))
    except ValidationError as error:
        raise InnerError((address,), config, error) from None


StageList = tuple[Annotated[Stage, BeforeValidator(_read_stage)], ...]
"""Field type that reads stages as a recipe writes them, [{"prune.gradual": {...}}, "evaluate.perplexity"]."""
