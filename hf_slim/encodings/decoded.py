"""The weight that an encoded layer shows: decoded on demand, and refusing to be written to."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from hf_slim.core.errors import SlimError


class DecodedWeight(Tensor):
    """What `.weight` of an encoded layer returns: a copy that says so when somebody writes to it.

    PEFT's merge assigns `layer.weight.data`, initializers fill in place; on a decoded copy that would be lost without
    a word. What is computed from it is a plain tensor.
    """

    _is_hf_initialized = True  # Transformers' initializers pass over it: GPT-2's reach into child layers
    _HARMLESS = ("requires_grad_", "share_memory_", "detach_")
    _WRITES = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name, kwargs = func.__name__, kwargs or {}
        in_place = name.endswith("_") and not name.endswith("__") and name not in cls._HARMLESS
        if (in_place or name in cls._WRITES) and isinstance(next(iter([*args, *kwargs.values()])), cls):
            _refuse_write()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    def __deepcopy__(self, memo):
        return self.as_subclass(Tensor).clone()

    @property
    def data(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self

    @data.setter
    def data(self, value):
        _refuse_write()


def _refuse_write() -> NoReturn:
    raise SlimError(
        "the weight of an encoded layer cannot be assigned: it is stored as codes. Keep a LoRA adapter beside the "
        "encoded model, or make the model dense first (model.dequantize()) and merge then"
    )
