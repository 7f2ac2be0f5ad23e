"""Gradual pruning in real training runs: exact sparsity, masks that hold, and resumed runs equal to straight ones."""

from __future__ import annotations

import logging

import pytest
import tiny
import torch
import training
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D

from hf_slim.core.errors import ModelError, PlanError
from hf_slim.core.select import Select
from hf_slim.distillation.trainer import DistillationConfig, DistillationTrainer
from hf_slim.pruning import callback as hooks
from hf_slim.pruning.gradual import Config, GradualMagnitudePruning, gradual_masks
from hf_slim.pruning.targets import find_targets
from hf_slim.pruning.trainer import PruningTrainer

KINDS = {"llama": "causal", "gpt2": "causal", "opt": "causal", "bert": "masked", "bert_classifier": "sequence"}
ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1}


class Watch(TrainerCallback):
    """Runs after the pruning callback and notes the zeros of every layer after each step."""

    def __init__(self, callback):
        self.callback, self.zeros, self.seen = callback, [], []

    def on_optimizer_step(self, args, state, control, *, model, **kwargs):
        modules = linears(model)
        self.seen.append({name: (module.weight == 0) for name, module in modules.items()})

    def on_step_end(self, args, state, control, **kwargs):
        self.zeros.append(self.callback.report())


def make(folder, pruning, model=None, *, kind="causal", callbacks=(), **options):
    return PruningTrainer(
        tiny.llama() if model is None else model,
        training.arguments(folder, TrainingArguments, **{"max_steps": 8, **ADAMW, **options}),
        pruning,
        train_dataset=training.rows(kind, samples=32),
        eval_dataset=training.rows(kind, samples=4),
        data_collator=training.Pad(),
        callbacks=list(callbacks),
    )


def linears(model):
    return {name: target.module for name, target in find_targets(model, Select()).items()}


def zeros(module):
    return int((module.weight == 0).sum())


@pytest.mark.parametrize("name", KINDS)
def test_final_sparsity_is_exact_and_only_in_the_blocks(tmp_path, name):
    trainer = make(tmp_path, {"sparsity": 0.6, "every": 1}, tiny.ALL[name](), kind=KINDS[name])
    trainer.train()
    targets = linears(trainer.model)
    assert trainer.pruning.report().keys() == targets.keys()
    assert len(targets) >= 8
    for layer, module in targets.items():
        assert zeros(module) == round(0.6 * module.weight.numel())
        assert trainer.pruning.report()[layer] == pytest.approx(0.6, abs=1 / module.weight.numel())
    for module in trainer.model.modules():
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding) and module not in targets.values():
            assert zeros(module) <= module.weight.shape[-1]  # a padding row at most


def test_global_sparsity_is_exact_in_total_and_differs_by_layer(tmp_path):
    trainer = make(tmp_path, {"sparsity": 0.6, "scope": "global", "every": 1})
    first = linears(trainer.model)["model.layers.0.mlp.up_proj"]
    first.weight.data *= 0.1
    trainer.train()
    modules = linears(trainer.model).values()
    total = sum(module.weight.numel() for module in modules)
    assert sum(zeros(module) for module in modules) == round(0.6 * total)
    assert trainer.pruning.sparsity == round(0.6 * total) / total
    assert zeros(first) > 0.9 * first.weight.numel()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_n_m_pattern_holds_along_rows(tmp_path, name):
    trainer = make(tmp_path, {"pattern": "2:4", "every": 1}, tiny.ALL[name]())
    trainer.train()
    for layer, keep in trainer.pruning.masks.items():
        module = trainer.model.get_submodule(layer)
        W = module.weight.T if isinstance(module, Conv1D) else module.weight
        assert torch.equal(keep, W != 0)
        assert (keep.reshape(len(W), -1, 4).sum(-1) == 2).all()


def test_n_m_pattern_grows_one_weight_of_a_group_at_a_time():
    W = {"W": torch.randn(4, 8, generator=torch.Generator().manual_seed(0))}
    config = Config(pattern="1:3", layers=Select())
    W = {"W": W["W"][:, :6]}
    kept = [int(gradual_masks(W, s, config)["W"].sum()) for s in (0.0, 0.3, 1 / 3, 0.6, config.final_sparsity)]
    assert kept == [24, 24, 16, 16, 8]


@pytest.mark.parametrize("options", [{}, {"scope": "global"}, {"pattern": "2:4"}], ids=str)
def test_a_weight_that_is_zero_counts_as_pruned(options):
    """Also where more weights are zero than the schedule asks for, and ties are decided by position."""
    W = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    W[:, 4:] = 0
    keep = gradual_masks({"W": W}, 0.25, Config(**options))["W"]
    assert not keep[W == 0].any()
    assert keep[W != 0].any()
    assert torch.equal(gradual_masks({"W": W}, 0.0, Config(**options))["W"], W != 0)
    assert gradual_masks({"W": torch.zeros(6, 8)}, 0.0, Config(**options))["W"].all()


def test_zeros_of_an_earlier_stage_survive_until_pruning_begins_and_after(tmp_path):
    model = tiny.llama()
    up = model.model.layers[0].mlp.up_proj.weight
    up.data[:, ::2] = 0
    watch = Watch(None)
    trainer = make(tmp_path, {"sparsity": 0.3, "begin": 4, "end": 6, "every": 1}, model)
    watch.callback = trainer.pruning
    trainer.add_callback(watch)
    trainer.train()
    assert all(measured["model.layers.0.mlp.up_proj"] == 0.5 for measured in watch.zeros)
    assert (up[:, ::2] == 0).all()


@pytest.mark.parametrize("options", [{}, {"optim": "sgd", "optim_args": "momentum=0.9"}, {"bf16": True}], ids=str)
def test_masks_hold_in_every_step_and_only_grow(tmp_path, options):
    trainer = make(
        tmp_path, {"sparsity": 0.7, "every": 2, "initial_sparsity": 0.2}, gradient_accumulation_steps=2, **options
    )
    watch = Watch(trainer.pruning)
    trainer.add_callback(watch)
    trainer.train()
    schedule = trainer.pruning.schedule
    for step, measured in enumerate(watch.zeros, start=1):
        for name, share in measured.items():
            numel = trainer.model.get_submodule(name).weight.numel()
            assert share == pytest.approx(round(schedule.sparsity(step) * numel) / numel, abs=1e-9)
    for before, after in zip(watch.seen, watch.seen[1:], strict=False):
        for name in before:
            assert (before[name] <= after[name]).all()
    moved = training.weights(trainer.model) - training.weights(tiny.llama())
    assert moved.abs().max() > 0


def test_bfloat16_weights_are_pruned_exactly(tmp_path):
    trainer = make(tmp_path, {"sparsity": 0.5, "every": 1}, tiny.llama(torch.bfloat16))
    trainer.train()
    for module in linears(trainer.model).values():
        assert zeros(module) == round(0.5 * module.weight.numel())


def test_gradients_of_pruned_weights_reach_only_optimizers_that_let_no_other_weight_feel_them(tmp_path):
    """AdamW trains the very same weights, whether they are cleared or not; Adafactor, whose scales are shared, not."""

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            cleared.append(
                all((target.gradient[target.weight == 0] == 0).all() for target in trainer.pruning.targets.values())
            )

    schedule = {"sparsity": 0.5, "initial_sparsity": 0.5, "end": 1, "begin": 0}
    trained = {}
    for optim, listed in (("adamw_torch", True), ("adamw_torch", False), ("adafactor", False)):
        cleared = []
        with pytest.MonkeyPatch.context() as patch:
            if not listed:
                patch.setattr(hooks, "_ELEMENTWISE", ())
            trainer = make(tmp_path, schedule, optim=optim, max_steps=4)
            trainer.add_callback(Gradients())
            trainer.train()
        assert cleared == [not listed] * 4
        trained[optim, listed] = training.weights(trainer.model)
    assert torch.equal(trained["adamw_torch", True], trained["adamw_torch", False])


class Killed(Exception):
    pass


class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise Killed


@pytest.mark.parametrize(
    "pruning", [{"sparsity": 0.8, "every": 3}, {"sparsity": 0.6, "scope": "global", "every": 1}], ids=str
)
def test_a_resumed_run_equals_a_straight_one(tmp_path, pruning):
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 10}
    straight = make(tmp_path / "straight", pruning, **options)
    straight.train()
    killed = make(tmp_path / "killed", pruning, callbacks=[Kill()], **options)
    with pytest.raises(Killed):
        killed.train()
    resumed = make(tmp_path / "killed", pruning, tiny.llama(seed=9), **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 10
    assert 0 < killed.pruning.sparsity < straight.pruning.sparsity
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    for name, keep in straight.pruning.masks.items():
        assert torch.equal(resumed.pruning.masks[name], keep)


def test_weights_that_are_zero_by_chance_do_not_tell_resumed_from_straight(tmp_path):
    """Rows that die in training add zeros which no mask chose: the case where a mask rebuilt by rank could differ."""

    class Zero(TrainerCallback):
        def on_step_end(self, args, state, control, *, model, **kwargs):
            if state.global_step == 4:  # right before the checkpoint
                model.model.layers[0].mlp.up_proj.weight.data[::2] = 0

    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    straight = make(tmp_path / "a", {"sparsity": 0.3, "end": 0.3, "every": 1}, callbacks=[Zero()], **options)
    straight.train()
    resumed = make(tmp_path / "b", {"sparsity": 0.3, "end": 0.3, "every": 1}, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert torch.equal(training.weights(resumed.model), training.weights(straight.model))


def test_checkpoints_and_evaluation_see_masked_weights(tmp_path):
    seen = []

    class AtEvaluation(TrainerCallback):
        def on_evaluate(self, args, state, control, *, model, **kwargs):
            seen.append(sum(zeros(m) for m in linears(model).values()))

    options = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    trainer = make(tmp_path, {"sparsity": 0.6, "every": 4, "end": 0.5}, callbacks=[AtEvaluation()], **options)
    trainer.train()
    saved = type(trainer.model).from_pretrained(tmp_path / "checkpoint-4")
    in_file = sum(zeros(m) for m in linears(saved).values())
    total = sum(round(0.6 * m.weight.numel()) for m in linears(saved).values())
    assert seen == [total, total]
    assert in_file == total


def test_accumulating_micro_batches_is_one_large_batch(tmp_path):
    trained = []
    for options in (
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    ):
        trainer = make(tmp_path, {"sparsity": 0.5, "every": 1}, max_steps=4, **options, optim="sgd", learning_rate=0.1)
        trainer.train()
        trained.append(training.weights(trainer.model) - training.weights(tiny.llama()))
    assert torch.equal(trained[0] == 0, trained[1] == 0)
    assert training.relative(trained[1], trained[0]) < 1e-5


def test_padding_changes_nothing(tmp_path):
    trained = []
    for pad in (training.Pad(), training.Pad(extra=5)):
        trainer = make(tmp_path, {"sparsity": 0.5, "every": 1}, max_steps=4, optim="sgd", learning_rate=0.1)
        trainer.data_collator = pad
        trainer.train()
        trained.append(training.weights(trainer.model) - training.weights(tiny.llama()))
    assert training.relative(trained[1], trained[0]) < 1e-5


@pytest.mark.parametrize("cls", [Trainer, DistillationTrainer])
def test_the_callback_does_in_other_trainers_what_it_does_in_ours(tmp_path, cls):
    callback = GradualMagnitudePruning(Config(sparsity=0.9), sparsity=0.5, every=1)
    models = [tiny.llama()] if cls is Trainer else [tiny.llama(), tiny.llama(layers=3, seed=1)]
    args = training.arguments(tmp_path, DistillationConfig, max_steps=6, **ADAMW)
    trainer = cls(*models, args=args, train_dataset=training.rows(), data_collator=training.Pad(), callbacks=[callback])
    trainer.train()
    for module in linears(trainer.model).values():
        assert zeros(module) == round(0.5 * module.weight.numel())
    if cls is Trainer:
        ours = make(tmp_path, {"sparsity": 0.5, "every": 1}, max_steps=6)
        ours.train_dataset = training.rows()
        ours.train()
        assert torch.equal(training.weights(ours.model), training.weights(trainer.model))
    else:
        assert callback.targets.keys().isdisjoint({"model.layers.2.mlp.up_proj"})  # the teacher's third block


def test_a_tied_weight_is_never_touched():
    model = tiny.llama(tied=False)
    block = model.model.layers[0]
    model.model.layers[1].mlp.up_proj.weight = block.mlp.up_proj.weight
    shared = nn.Embedding(72, 40)
    block.lookup, block.mlp.gate_proj.weight = shared, shared.weight
    names = linears(model).keys()
    assert "model.layers.0.mlp.gate_proj" not in names
    assert "model.layers.0.mlp.up_proj" in names
    assert "model.layers.1.mlp.up_proj" not in names


def test_layers_are_chosen_by_patterns(tmp_path):
    trainer = make(tmp_path, {"layers": {"include": ["*_proj"], "exclude": ["layers.0.*"]}}, max_steps=2)
    trainer.train()
    assert trainer.pruning.report().keys() == {
        name for name in linears(trainer.model) if name.startswith("model.layers.1.")
    }


def test_training_logs_the_measured_sparsity(tmp_path):
    trainer = make(tmp_path, {"sparsity": 0.5, "end": 4, "every": 2}, logging_steps=4)
    trainer.train()
    logged = [log["sparsity"] for log in trainer.state.log_history if "sparsity" in log]
    assert logged == [pytest.approx(0.5, abs=1e-3)] * 2


def test_handing_over_a_model_that_is_too_dense_is_said(tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    trainer = make(tmp_path, {"sparsity": 0.5, "every": 1}, callbacks=[Stop()])
    with caplog.at_level(logging.WARNING, logger="hf_slim.pruning.gradual"):
        trainer.train()
    assert "not 0.5000: training stopped early" in caplog.text
    assert all(
        torch.equal(keep, trainer.model.get_submodule(n).weight != 0) for n, keep in trainer.pruning.masks.items()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "prune.gradual.sparsity"),
        ({"sparsty": 0.5}, "did you mean 'sparsity'"),
        ({"begin": -1}, "prune.gradual.begin"),
        ({"pattern": "4:2"}, "0 < n < m"),
        ({"scope": "block"}, "prune.gradual.scope"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(PlanError, match=message):
        GradualMagnitudePruning(options)


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        ({"end": 9}, "step 9, but training has only 8"),
        ({"begin": 0.9, "end": 0.5}, "before its end"),
        ({"initial_sparsity": 0.6}, "above the final sparsity"),
        ({"pattern": "2:16"}, "40 columns, no multiple of 16"),
        ({"layers": {"include": ["nothing"]}}, "'nothing' matches no layer"),
        ({"layers": {"exclude": ["*"]}}, "no linear layer to prune"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_weight_changes(tmp_path, pruning, message):
    trainer = make(tmp_path, {"initial_sparsity": 0.3, **pruning})
    before = training.weights(trainer.model)
    with pytest.raises(PlanError, match=message):
        trainer.train()
    assert torch.equal(training.weights(trainer.model), before)


def test_weights_that_are_not_finite_are_named(tmp_path):
    trainer = make(tmp_path, {"initial_sparsity": 0.3})
    trainer.model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj holds NaN or infinite values at step 0"):
        trainer.train()
