"""Teachers in bitsandbytes' 4 or 8 bits: frozen, in eval mode, and loaded so by a recipe's stage."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import hf_slim
from hf_slim.core.context import Context
from hf_slim.core.errors import PlanError
from hf_slim.core.model import ModelSource
from hf_slim.distillation import logits
from hf_slim.distillation.trainer import DistillationConfig, DistillationTrainer

CONFIGS = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


def rows() -> list[dict]:
    return [{"input_ids": ids, "labels": ids} for ids in tiny.ids(8)]


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_the_trainer_takes_a_quantized_teacher(format, tmp_path):
    folder = tiny.save(tiny.llama(seed=1), tmp_path / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(folder, quantization_config=CONFIGS[format])
    teacher.train()
    student = tiny.llama()
    args = DistillationConfig(str(tmp_path / "out"), max_steps=4, learning_rate=1e-3, report_to=[], use_cpu=True)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    trainer = DistillationTrainer(student, teacher, args, train_dataset=rows())
    trainer.train()
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert any(not torch.equal(a, b) for a, b in zip(student.parameters(), tiny.llama().parameters(), strict=True))


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_stage_loads_its_original_quantized(format, tmp_path):
    source = ModelSource(tiny.save(tiny.llama(torch.bfloat16), tmp_path))
    config = logits.Config(teacher_quantization=format, steps=2, learning_rate=1e-3)
    teacher = logits.load_teacher(config, Context(source=source))
    assert teacher.config.quantization_config.quant_method == "bitsandbytes"
    assert not teacher.training
    model = tiny.llama(torch.bfloat16, seed=1)
    report = logits.apply(model, config, Context(source=source, windows=lambda role: tiny.ids(8)))
    assert report.metrics["steps"] == 2


def test_an_original_in_memory_is_not_quantized_behind_the_back():
    with pytest.raises(PlanError, match="works while a teacher is loaded"):
        hf_slim.compress(
            tiny.llama(), "distill.logits", data=tiny.ids(), original=tiny.llama(), teacher_quantization="nf4"
        )
