"""Addresses of methods: `quantize.gptq` is the module `hf_slim.quantization.gptq`.

Each family's package lists its methods by name in a tuple `METHODS`. Nothing is discovered, nothing registers itself.
"""

from __future__ import annotations

import importlib
import re
from types import ModuleType

from hf_slim.core.errors import RecipeError, nearest
from hf_slim.core.method import MethodConfig

FAMILIES = {
    "distill": "distillation",
    "prune": "pruning",
    "share": "sharing",
    "quantize": "quantization",
    "evaluate": "evaluation",
    "export": "export",
}


def addresses() -> list[str]:
    """Every method's address, family by family."""
    return [
        f"{family}.{name}"
        for family, package in FAMILIES.items()
        for name in importlib.import_module(f"hf_slim.{package}").METHODS
    ]


def find_method(address: str) -> ModuleType:
    """The module behind an address such as "quantize.gptq".

    Raises:
        RecipeError: no such method; the message names the nearest one.
    """
    known = addresses()
    if address not in known:
        raise RecipeError(f"unknown method {address!r}; {nearest(address, known)}")
    family, name = address.split(".")
    return importlib.import_module(f"hf_slim.{FAMILIES[family]}.{name}")


def data_needed(address: str, config: MethodConfig) -> tuple[str, ...]:
    """The data that a method needs with these options: a method whose options ask for more has a function `needs`.

    "labels" among them: the data that it trains or measures a classifier on have classes.
    """
    method = find_method(address)
    return method.needs(config) if hasattr(method, "needs") else method.RULES.needs


def changes_model(address: str) -> bool:
    """Whether a method makes another model of it; evaluations and exports only look."""
    return address.split(".")[0] not in ("evaluate", "export")


def is_export(address: str) -> bool:
    """Whether a method writes the model down in another format."""
    return address.split(".")[0] == "export"


def summary(method: ModuleType) -> str:
    """The name that the method's docstring begins with."""
    return re.split(r" \(|:|, pure", (method.__doc__ or "").strip())[0]
