"""The few things that differ when several processes run: accelerate's, under short names."""

from __future__ import annotations

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return PartialState().is_main_process


def device() -> torch.device:
    """Where this process computes: its accelerator, or the CPU."""
    return torch.device(PartialState().device or "cpu")


def wait_for_all() -> None:
    """Return when every process has come here."""
    PartialState().wait_for_everyone()


def sum_over_processes(sums: Tensor) -> Tensor:
    """Sums of all processes together, float32 on the CPU."""
    return reduce(sums.float().to(PartialState().device), reduction="sum").cpu()  # pyright: ignore
