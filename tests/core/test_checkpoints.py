"""Checkpoints of models whose weights have other names on disk: a resumed training is the straight one."""

from __future__ import annotations

import copy

import architectures
import pytest
import tiny
import torch
import training
from transformers import Trainer

import hf_slim
from hf_slim.core.checkpoints import Resumes, load_converted
from hf_slim.core.errors import DataError

STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}


def mixture(seed):
    return architectures.make("Mixtral", seed)


def distil(folder, seed, compressed=False, **options):
    args = training.arguments(folder, hf_slim.DistillationConfig, alpha=0.5, **STEPS, **options)
    student = mixture(seed)
    if compressed:
        hf_slim.compress(student, "share.kmeans", bits=2, centroids="float32")
    data = {"train_dataset": training.rows(samples=16), "eval_dataset": training.rows(samples=4)}
    return hf_slim.DistillationTrainer(student, mixture(7), args, data_collator=training.Pad(), **data)


def prune(folder, seed):
    args, pruning = training.arguments(folder, **STEPS), {"sparsity": 0.5, "every": 1}
    data = {"train_dataset": training.rows(samples=16), "data_collator": training.Pad()}
    return hf_slim.PruningTrainer(mixture(seed), args, pruning, **data)


@pytest.mark.parametrize("make", [distil, prune])
def test_experts_are_resumed_as_they_were(tmp_path, make):
    straight, resumed = make(tmp_path, 0), make(tmp_path, 1)
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(training.weights(resumed.model), training.weights(straight.model))


def test_compressed_experts_are_resumed_as_they_were(tmp_path):
    straight, resumed = (distil(tmp_path, 0, compressed=True) for _ in range(2))
    start = training.weights(resumed.model)
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(training.weights(resumed.model), training.weights(straight.model))
    assert not torch.equal(training.weights(resumed.model), start)


def test_the_best_checkpoint_is_taken_back_with_its_experts(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "greater_is_better": True}
    trainer = distil(tmp_path, 0, metric_for_best_model="eval_loss", **best)  # the highest loss: of the second step
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    stored = type(trainer.model).from_pretrained(tmp_path / "checkpoint-2")
    assert torch.equal(training.weights(trainer.model), training.weights(stored))


def test_parameters_stay_the_tensors_that_they_are(tmp_path):
    model, other = mixture(0), mixture(1)
    other.save_pretrained(tmp_path)
    before = {name: id(p) for name, p in model.named_parameters()}
    training_ = Resumes(model, training.arguments(tmp_path / "out"))
    training_._load_from_checkpoint(str(tmp_path))
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert torch.equal(training.weights(model), training.weights(other))


def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing():
    model = mixture(0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DataError, match=r"lacks \d+ weights of MixtralForCausalLM, model\."):
        load_converted(model, tiny.llama(layers=1).state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_stock_trainer_still_needs_this(tmp_path):
    model, other = mixture(0), mixture(1)
    other.save_pretrained(tmp_path)
    Trainer(model, training.arguments(tmp_path / "out"))._load_from_checkpoint(str(tmp_path))
    assert not torch.equal(training.weights(model), training.weights(other))
