"""Prune a tiny model gradually for a few steps; run by one process or by several, and compared by the tests."""

from __future__ import annotations

import json
import sys

import tiny
import torch
import training
from transformers import Trainer, TrainingArguments

from hf_slim.pruning.gradual import GradualMagnitudePruning


def run(folder: str, options: dict, rows_per_process: int) -> dict:
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
    return {
        "weights": training.weights(trainer.model),
        "masks": pruning.masks,
        "processes": trainer.args.world_size,
        "main": trainer.is_world_process_zero(),
    }


if __name__ == "__main__":
    results = [run(sys.argv[1], options, rows_per_process=2) for options in json.loads(sys.argv[2])]
    if results[0]["main"]:
        torch.save(results, f"{sys.argv[1]}/results.pt")
