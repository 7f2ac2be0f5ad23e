"""Distil and prune a tiny model for a few steps; run by one process or by several, and compared by the tests.

The teacher is wider than the student, so that a projection is trained, too.
"""

from __future__ import annotations

import sys

import tiny
import torch
import training
from transformers import LlamaConfig, LlamaForCausalLM

from hf_slim.distillation.trainer import DistillationConfig, DistillationTrainer
from hf_slim.pruning.gradual import GradualMagnitudePruning

FEATURES = [{"kind": "hidden", "weight": 0.1}, {"kind": "relation", "layers": "last", "schedule": "linear"}]


def wide_teacher() -> LlamaForCausalLM:
    """Wider and deeper than `tiny.llama`."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 48, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=tiny.VOCABULARY, num_hidden_layers=3, **sizes)).eval()


def run(folder: str, rows_per_process: int) -> dict:
    """Trained weights and logs. The whole batch is 2 accumulated x processes x rows_per_process samples."""
    args = training.arguments(
        folder,
        DistillationConfig,
        alpha=0.7,
        features=FEATURES,
        max_steps=4,
        per_device_train_batch_size=rows_per_process,
        gradient_accumulation_steps=2,
        logging_steps=2,
        eval_strategy="no",
        per_device_eval_batch_size=rows_per_process,
        dataloader_drop_last=True,
    )
    trainer = DistillationTrainer(
        tiny.llama(),
        wide_teacher(),
        args,
        train_dataset=training.rows(samples=32),
        eval_dataset=training.rows(samples=8),
        data_collator=training.Pad(),
        callbacks=[GradualMagnitudePruning(sparsity=0.5, every=1)],
    )
    trainer.train()
    return {
        "weights": training.weights(trainer.model),
        "projections": training.weights(trainer.features.projections),
        "logs": [{k: v for k, v in log.items() if "loss" in k} for log in trainer.state.log_history],
        "processes": trainer.args.world_size,
        "main": trainer.is_world_process_zero(),
    }


if __name__ == "__main__":
    result = run(sys.argv[1], rows_per_process=2)
    if result["main"]:
        torch.save(result, f"{sys.argv[1]}/result.pt")
