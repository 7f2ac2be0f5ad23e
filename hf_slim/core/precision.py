"""Computing in another dtype than the one weights are stored in, for a while and without a trace.

A CPU without bfloat16 arithmetic multiplies bfloat16 matrices several times slower than float32 ones (eight times on an
AVX2 machine, measured). Going up to float32 and back changes no stored weight: a bfloat16 number is a float32 number.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hf_slim.core.arithmetic import fast_dtype
from hf_slim.encodings.modules import EncodedModule

__all__ = ["fast_dtype", "in_dtype"]


@contextmanager
def in_dtype(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Parameters in `dtype` inside, in their own dtype again afterwards.

    Buffers (rotary tables, scales) are left alone. Layers that are encoded meanwhile end up in the dtype that the
    model's parameters had before.
    """
    dtypes = {name: p.dtype for name, p in model.named_parameters() if p.is_floating_point()}  # not bitsandbytes' codes
    encoded = {name: m.compute_dtype for name, m in model.named_modules() if isinstance(m, EncodedModule)}
    usual = next(iter([*dtypes.values(), *encoded.values()]), dtype)
    if all(found == dtype for found in [*dtypes.values(), *encoded.values()]):
        yield
        return
    _cast(model, dict.fromkeys(dtypes, dtype), dict.fromkeys(encoded, dtype), dtype)
    try:
        yield
    finally:
        _cast(model, dtypes, encoded, usual)


def _cast(
    model: nn.Module, parameters: dict[str, torch.dtype], modules: dict[str, torch.dtype], usual: torch.dtype
) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(parameters.get(name, usual))
    for name, module in model.named_modules():
        if isinstance(module, EncodedModule):
            module.compute_in(modules.get(name, usual))
