"""FSDP2 on processors: two processes with sharded student and teacher learn what one with both whole does.

accelerate chooses FSDP for accelerators only, so that its state is told here. What that leaves out: writing a model,
because what torch gathers on processors has no storage that safetensors could read.
"""

from __future__ import annotations

import processes
import pytest
import tiny
import torch
import training
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

import hf_slim
from hf_slim import DistillationConfig, DistillationTrainer
from hf_slim.core.errors import PlanError


class Sharding(DistillationTrainer):
    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        state, policy = self.accelerator.state, "transformer_based_wrap"
        state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy=policy)
        state.distributed_type = DistributedType.FSDP
        self.is_fsdp_enabled = True


def whole(parameter):
    return parameter.full_tensor() + 0 if isinstance(parameter, DTensor) else parameter  # adding waits for the others


def learn(folder, rows, cls=Sharding):
    args = training.arguments(
        folder,
        DistillationConfig,
        alpha=0.7,
        features=[{"kind": "hidden"}],
        max_steps=4,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=2,
        logging_steps=1,
    )
    data = {"train_dataset": training.rows(samples=32), "data_collator": training.Pad()}
    trainer = cls(tiny.llama(), tiny.llama(layers=3, seed=1), args, **data)
    trainer.train()
    parameters = [*trainer.model.parameters(), *trainer.teacher.parameters()]
    return {
        "logs": [{k: v for k, v in log.items() if "loss" in k} for log in trainer.state.log_history],
        "weights": torch.cat([whole(p).detach().flatten() for p in trainer.model.parameters()]),
        "sharded": sum(isinstance(p, DTensor) for p in parameters) / len(parameters),
    }


def test_two_processes_with_sharded_models_are_one_with_whole_ones(tmp_path):
    one = learn(str(tmp_path), 4, DistillationTrainer)
    two, _ = processes.together(learn, str(tmp_path), 2)
    assert (one["sharded"], two["sharded"]) == (0, 1)
    start = training.weights(tiny.llama())
    assert training.relative(two["weights"] - start, one["weights"] - start) < 1e-3
    for a, b in zip(two["logs"], one["logs"], strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("launcher", ["FSDP", "DEEPSPEED"])
def test_what_needs_whole_weights_is_refused(tmp_path, monkeypatch, launcher):
    monkeypatch.setenv(f"ACCELERATE_USE_{launcher}", "true")
    message = "needs whole weights, which (FSDP|DeepSpeed) shards; use data parallelism"
    for callback in (hf_slim.DeepKMeans(bits=2), hf_slim.FakeQuantize(bits=4)):
        with pytest.raises(PlanError, match=message):
            callback.on_init_end(None, None, None, model=tiny.llama())
    with pytest.raises(PlanError, match=message):
        hf_slim.compress(tiny.llama(), "distill.logits", data=tiny.ids(), steps=1, alpha=0)
