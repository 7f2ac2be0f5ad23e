"""Teachers that are not simply beside the student: their weights on disk, or stored as codes; and several processes."""

from __future__ import annotations

import processes
import pytest
import runs
import tiny
import torch
import training
from accelerate import disk_offload
from transformers import AutoModelForCausalLM

import hf_slim
from hf_slim import DistillationConfig, DistillationTrainer, cli
from hf_slim.core.select import find_layers
from hf_slim.core.swap import densify

DISTIL = "distill.logits: {{alpha: 0.5, steps: 3, batch_size: {rows}, learning_rate: 1.0e-2, warmup: 0}}"


def learn(folder, teacher, **options):
    args = training.arguments(folder, DistillationConfig, alpha=0.5, max_steps=3, **options)
    data = {"train_dataset": training.rows(samples=16), "data_collator": training.Pad()}
    trainer = DistillationTrainer(tiny.llama(), teacher, args, **data)
    trainer.train()
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in trainer.teacher.parameters()}
    assert not trainer.teacher.training
    return training.weights(trainer.model)


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"features": [{"kind": "hidden"}]}], ids=str)
def test_a_teacher_whose_weights_are_on_disk_teaches_the_same(tmp_path, options):
    whole = learn(tmp_path / "a", tiny.llama(seed=1), **options)
    teacher = disk_offload(tiny.llama(seed=1), str(tmp_path / "weights"), torch.device("cpu"))
    teacher.hf_device_map = {"": "disk"}  # as from_pretrained(device_map=...) leaves it
    assert all(p.is_meta for p in teacher.parameters())
    assert training.relative(learn(tmp_path / "b", teacher, **options), whole) < 1e-6


@pytest.mark.parametrize("method", ["quantize.rtn", "share.kmeans"])
def test_a_compressed_teacher_teaches_as_its_dense_weights_would(tmp_path, method):
    teacher = tiny.llama(seed=1)
    hf_slim.compress(teacher, method, bits=4)
    teacher.save_pretrained(tmp_path / "teacher")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    taught = learn(tmp_path / "a", stored)
    for layer in find_layers(teacher).values():
        if layer.encoding is not None:
            densify(teacher, layer.name)
    assert training.relative(taught, learn(tmp_path / "b", teacher)) < 1e-4
    assert training.relative(taught, learn(tmp_path / "c", tiny.llama(seed=1))) > 1e-4  # its codes were asked


def run_here(recipe, out, rows):
    stages = f"stages.0.batch_size={rows}"
    assert cli.main(["run", recipe, "--out", out, stages]) == 0
    return training.weights(AutoModelForCausalLM.from_pretrained(out))


def test_a_recipe_in_two_processes_trains_as_in_one_with_twice_the_batch(tmp_path):
    place = runs.Place(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    train = f"  train: {{source: {tmp_path / 'calibration.txt'}, samples: 12, length: 16}}"
    recipe.write_text(place.yaml(DISTIL.format(rows=4), head=train))
    one = run_here(str(recipe), str(tmp_path / "one"), 4)
    two, other = processes.together(run_here, str(recipe), str(tmp_path / "two"), 2)
    assert torch.equal(two, other)
    start = training.weights(tiny.llama())
    assert training.relative(two - start, one - start) < 1e-4
