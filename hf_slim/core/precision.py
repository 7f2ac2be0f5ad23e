"""Computing in another dtype than the one weights are stored in, for a while and without a trace.

A CPU without bfloat16 arithmetic multiplies bfloat16 matrices several times slower than float32 ones (eight times on an
AVX2 machine, measured). Going up to float32 and back changes no stored weight: a bfloat16 number is a float32 number.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hf_slim.encodings.modules import EncodedModule


def fast_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in: `dtype`, or float32 where the CPU has no arithmetic for it."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    if dtype == torch.bfloat16:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = torch.cpu._is_amx_fp16_supported()
    return dtype if native else torch.float32


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
