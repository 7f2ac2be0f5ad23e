"""What several processes do together in tests, and one process does for comparison."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import tiny
import torch
import training
from transformers import Trainer, TrainingArguments

import hf_slim
from hf_slim.core.parallel import processes
from hf_slim.core.training import Windows
from hf_slim.distillation import teacher_cache
from hf_slim.pruning.gradual import GradualMagnitudePruning


def prune_gradually(folder: Path, options: dict[str, Any], rows_per_process: int) -> dict[str, Any]:
    """Trained weights and masks. The whole batch is 2 accumulated x processes x rows_per_process samples."""
    args = training.arguments(
        folder,
        TrainingArguments,
        max_steps=4,
        per_device_train_batch_size=rows_per_process,
        gradient_accumulation_steps=2,
        dataloader_drop_last=True,
    )
    pruning = GradualMagnitudePruning(sparsity=0.5, begin=1, end=3, every=1, **options)
    trainer = Trainer(
        tiny.llama(),
        args,
        train_dataset=training.rows(samples=32),
        data_collator=training.Pad(),
        callbacks=[pruning],
    )
    trainer.train()
    return {"weights": training.weights(trainer.model), "masks": pruning.masks, "processes": trainer.args.world_size}


def compress_alike(methods: dict[str, dict[str, Any]]) -> dict[str, dict[str, torch.Tensor]]:
    """State of a model that was compressed, by method; every process is handed the same windows.

    Sums and numbers of tokens are so many times those of one process, which changes no bit of their quotients.
    """
    windows = tiny.ids(16, 32, seed=1).repeat_interleave(processes().num_processes, dim=0)
    states = {}
    for method, options in methods.items():
        model = tiny.llama()
        hf_slim.compress(model, method, data=windows, **options)
        states[method] = model.state_dict()
    return states


def write_cache(folder: str) -> list[float]:
    """Write the shards of a teacher cache that are this process's own, of three; read some of each."""
    assert processes().num_processes == int(os.environ.get("WORLD_SIZE", 1))
    teacher_cache._TOKENS_A_SHARD = 16
    options = teacher_cache.CacheOptions(draws=5)
    cache = teacher_cache.write_cache(folder, tiny.llama(seed=1), Windows(tiny.ids(6, 8), labels=True), options)
    assert cache.key.shards == 3
    return cache.read([0, 3, 5]).ids.sum(1).tolist()
