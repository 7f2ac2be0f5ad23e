"""Which arithmetic a processor has."""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache
def fast_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in: `dtype`, or float32 where the CPU has no arithmetic for it."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    if dtype == torch.bfloat16:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = torch.cpu._is_amx_fp16_supported()
    return dtype if native else torch.float32
