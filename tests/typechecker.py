"""The run-time type checker that the test run puts around every annotated function of hf_slim.

Named by `--jaxtyping-packages` in pyproject.toml. beartype alone refuses an int where a float is annotated; Python's
typing rules (PEP 484) accept it, and so do the kernels.

jaxtyping opens a scope of axis names around every call and checks the arguments twice, with the names and then with
the result. A function that names no axis needs neither: beartype alone checks it, in a fraction of the time.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, get_args

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray
from jaxtyping._decorator import _destring_annotation

check = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=TypeError))
_with_axes = jaxtyping.jaxtyped


def _jaxtyped(fn: Any = None, *, typechecker: Callable) -> Any:
    """What jaxtyping's import hook calls for each function and class, instead of `jaxtyping.jaxtyped`."""
    if fn is None:
        return functools.partial(_jaxtyped, typechecker=typechecker)
    if inspect.isclass(fn):
        if dataclasses.is_dataclass(fn) and "__init__" in vars(fn):
            fn.__init__ = _jaxtyped(fn.__init__, typechecker=typechecker)
        return fn
    hints = {name: _destring_annotation(hint, fn.__globals__) for name, hint in fn.__annotations__.items()}
    if any(map(_names_axes, hints.values())):
        return _with_axes(fn, typechecker=typechecker)
    fn.__annotations__ = hints
    return typechecker(fn)


def _names_axes(hint: Any) -> bool:
    """Whether an annotation holds an array type, at any depth."""
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return True
    return isinstance(hint, str) or any(map(_names_axes, get_args(hint)))


jaxtyping.jaxtyped = _jaxtyped  # each decorator of the hook looks it up anew; the first one brings this module in
