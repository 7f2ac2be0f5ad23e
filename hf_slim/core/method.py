"""What every method has in common: a closed Config, and what it does to the properties of a model's weights.

A method is a module, found by its address: `quantize.gptq` is `hf_slim/quantization/gptq.py`. It has

- a docstring whose first line names the method and its paper,
- `Config`, a `MethodConfig`,
- `RULES`, a `Rules`,
- pure kernels,
- `plan(layers, config, model) -> dict[str, Layer]` where it changes layers: how they will be after it,
- `apply(model, config, context) -> StageReport`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import GenericAlias
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from hf_slim.core.explain import InnerError

if TYPE_CHECKING:
    from hf_slim.core.select import Layer


C = TypeVar("C", bound="MethodConfig")


class MethodConfig(BaseModel):
    """Options of a method: closed (an unknown key is an error) and frozen.

    `layers: {"*.down_proj": {bits: 8}, first: {bits: 8}}` gives some layers options of their own, of those that the
    class names in `per_layer`. Of the options in `one_of` one alone may be given; a layer's own takes its place.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    per_layer: ClassVar[tuple[str, ...]] = ()
    one_of: ClassVar[tuple[str, ...]] = ()

    def at(self: C, layer: Layer) -> C:
        """The options as they hold for one layer."""
        options = self._overrides_for(layer)
        return type(self).model_validate(self._with(options)) if options else self

    def changed(self) -> set[str]:
        """Names of the options that are not at their defaults. Not `model_fields_set`: a report names every option, and
        has to be read as the recipe that it is of."""
        return {name for name, known in type(self).model_fields.items() if getattr(self, name) != known.default}

    @model_validator(mode="after")
    def _check_overrides(self: C) -> C:
        layers: Any = getattr(self, "layers", None)
        overrides = {} if layers is None else {"first": layers.first, "last": layers.last} | layers.overrides
        overrides = {pattern: options for pattern, options in overrides.items() if options}
        known = type(self).model_fields
        fixed = sorted({key for options in overrides.values() for key in options if key in known} - {*self.per_layer})
        if fixed:
            can = ", ".join(self.per_layer) or "none"
            raise ValueError(f"layers: {', '.join(fixed)} cannot differ from layer to layer; what can: {can}")
        adapter = TypeAdapter(GenericAlias(dict, (str, type(self))))
        try:
            adapter.validate_python({pattern: self._with(options) for pattern, options in overrides.items()})
        except ValidationError as error:
            raise InnerError(("layers",), type(self), error) from None
        return self

    def _overrides_for(self, layer: Layer) -> dict[str, Any]:
        layers: Any = getattr(self, "layers", None)
        return {} if layers is None else layers.options_of(layer)

    def _with(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options that hold for all layers, as they were given, and those of one layer."""
        replaced = {"layers", *(self.one_of if not options.keys().isdisjoint(self.one_of) else ())}
        return {key: getattr(self, key) for key in self.model_fields_set if key not in replaced} | options


@dataclass(frozen=True)
class Rules:
    """How a method combines with the stages before it. Properties are words such as "dense", "zeros", "codes".

    Args:
        needs: data the method cannot do without: "calibration", "train", "held_out", "original".
        makes: properties that the weights have after it ("zeros": pruned weights; "codes": stored as integers;
            "centroids": shared values, which can be trained).
        preserves: properties made by an earlier stage that survive it. What is not listed is undone, and the planner
            refuses such an order.
        otherwise: what else can be done about a property that is not preserved, {property: advice}.
        wants_training: what it leaves is of use only once it has been trained; the planner says so where nothing does.
        paper: short reference for tables, "Authors year, arXiv:number".
    """

    needs: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    preserves: tuple[str, ...] = ()
    otherwise: Mapping[str, str] = field(default_factory=dict)
    wants_training: bool = False
    paper: str = ""
