"""Projections of feature losses: trained beside the student, checkpointed beside the optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from hf_slim.core.errors import ModelError

FILE = "projections.safetensors"


def save(projections: nn.ModuleDict, folder: Path) -> None:
    """Write them into a checkpoint's folder."""
    save_file({name: tensor.contiguous() for name, tensor in projections.state_dict().items()}, folder / FILE)


def load(projections: nn.ModuleDict, folder: Path) -> None:
    """Read them from a checkpoint's folder.

    Raises:
        ModelError: the checkpoint has none, or others.
    """
    path, own = folder / FILE, projections.state_dict()
    saved = load_file(path) if path.exists() else {}
    if {name: tensor.shape for name, tensor in saved.items()} != {name: tensor.shape for name, tensor in own.items()}:
        raise ModelError(
            f"{path} does not hold the projections of these features: needed are {', '.join(own)}, found "
            f"{', '.join(saved) or 'none'}; resume with the features that the checkpoint was trained with"
        )
    projections.load_state_dict(saved)


class Gradients(TrainerCallback):
    """Does for the projections' gradients what the Trainer and its wrappers do for the student's alone.

    They are averaged over processes before a step, and cleared after it.
    """

    def __init__(self, projections: nn.ModuleDict, accelerator: Any):
        self._projections, self._accelerator = projections, accelerator

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self._accelerator.num_processes == 1:
            return
        for p in self._projections.parameters():
            p.grad = self._accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "mean")

    def on_step_end(self, args, state, control, **kwargs):
        self._projections.zero_grad()
