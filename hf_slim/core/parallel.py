"""The few things that differ when several processes run: accelerate's, under short names."""

from __future__ import annotations

import torch
from accelerate import PartialState


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return PartialState().is_main_process


def device() -> torch.device:
    """Where this process computes: its accelerator, or the CPU."""
    return torch.device(PartialState().device or "cpu")


def wait_for_all() -> None:
    """Return when every process has come here."""
    PartialState().wait_for_everyone()
