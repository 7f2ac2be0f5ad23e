"""DeepSpeed ZeRO on processors: two processes with partitioned models learn, and save, what one with whole ones does.

accelerate knows no backend for DeepSpeed without accelerators, so that gloo is named to it here. `make zero` installs
DeepSpeed and runs this.
"""

from __future__ import annotations

import os

import processes
import pytest
import tiny
import training
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM

from hf_slim import DistillationConfig, DistillationTrainer

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed; `make zero` installs it and runs these tests")


def zero(stage):
    given = {"zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}}
    given["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # else small parameters are not partitioned
    names = ("gradient_clipping", "train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
    return {"deepspeed": given | dict.fromkeys(names, "auto") | {"zero_allow_untested_optimizer": True}}


def learn(folder, rows, options):
    student, teacher = tiny.llama(), tiny.llama(layers=3, seed=1)
    args = training.arguments(
        folder,
        DistillationConfig,
        alpha=0.7,
        features=[{"kind": "hidden"}, {"kind": "relation"}],
        max_steps=4,
        max_grad_norm=1.0,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=2,
        logging_steps=1,
        **options,
    )
    data = {"train_dataset": training.rows(samples=32), "data_collator": training.Pad()}
    trainer = DistillationTrainer(student, teacher, args, **data)
    trainer.train()
    trainer.save_model(f"{folder}/saved")
    return {
        "logs": [{k: v for k, v in log.items() if "loss" in k} for log in trainer.state.log_history],
        "held": [sum(p.numel() for p in model.parameters()) for model in (trainer.model, trainer.teacher)],
    }


def learn_together(folder, rows, options):
    os.environ.pop("ACCELERATE_USE_CPU")
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_CPU)
    return learn(folder, rows, {"use_cpu": False} | options)


def learnt(folder):
    """How far the saved weights are from the first ones."""
    return training.weights(AutoModelForCausalLM.from_pretrained(folder / "saved")) - training.weights(tiny.llama())


@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_with_partitioned_models_are_one_with_whole_ones(tmp_path, stage):
    one = learn(str(tmp_path / "one"), 4, {})
    two, _ = processes.together(learn_together, str(tmp_path / "two"), 2, zero(stage))
    assert (two["held"] == [0, 0]) == (stage == 3)
    assert training.relative(learnt(tmp_path / "two"), learnt(tmp_path / "one")) < 1e-3
    for a, b in zip(two["logs"], one["logs"], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
