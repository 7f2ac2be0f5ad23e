"""What gradual pruning can rank by and drop: each way exact, and equal however a training is cut up or interrupted."""

from __future__ import annotations

import architectures
import jobs
import pytest
import tiny
import torch
import training
from processes import together
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D

import hf_slim
from hf_slim.core.errors import ModelError, PlanError
from hf_slim.core.experts import unfused
from hf_slim.core.forward import run_on
from hf_slim.core.select import find_layers
from hf_slim.core.swap import get_keep
from hf_slim.core.units import Units, find_units
from hf_slim.pruning import gradual
from hf_slim.pruning.checkpoint import FILE
from hf_slim.pruning.gradual import GradualMagnitudePruning
from hf_slim.pruning.groups import unit_scores
from hf_slim.pruning.pruner import Memory, Pruner
from hf_slim.pruning.shadow import add_decay, mask_into
from hf_slim.pruning.targets import Target

ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1}
TAYLOR, SHADOW = {"score": "taylor"}, {"score": "movement", "shadow": True}
WAYS = [{}, TAYLOR, SHADOW]
EXACT = [
    ({"score": "movement"}, {}),
    ({"shadow": True}, {}),
    (TAYLOR, {"scope": "global"}),
    (SHADOW, {"scope": "global"}),
    (TAYLOR, {"pattern": "2:4"}),
    (SHADOW, {"pattern": "2:4"}),
    ({}, {"pattern": "block:4"}),
    (TAYLOR, {"pattern": "block:4"}),
]
PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}
SCHEDULE = {"sparsity": 0.5, "begin": 1, "end": 6, "every": 1}
SHORT = {"sparsity": 0.5, "begin": 1, "end": 3, "every": 1}


def make(folder, pruning, model=None, *, callbacks=(), samples=32, **options):
    callback = GradualMagnitudePruning(pruning)
    trainer = Trainer(
        tiny.llama() if model is None else model,
        training.arguments(folder, TrainingArguments, **{"max_steps": 8, **ADAMW, **options}),
        train_dataset=training.rows(samples=samples),
        eval_dataset=training.rows(samples=2),
        data_collator=training.Pad(),
        callbacks=[callback, *callbacks],
    )
    return trainer, callback


def train(folder, pruning, model=None, **options):
    trainer, callback = make(folder, pruning, model, **options)
    trainer.train()
    return trainer, callback


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


class Watch(TrainerCallback):
    """Notes the masks after every step, and the zeros that forward passes see."""

    def __init__(self):
        self.callback, self.masks = None, []

    def on_step_end(self, args, state, control, **kwargs):
        for name, target in self.callback.targets.items():
            assert torch.equal(target.weight != 0, self.callback.masks[name]), name
        self.masks.append({name: keep.clone() for name, keep in self.callback.masks.items()})


def watched(folder, pruning, **options):
    watch = Watch()
    trainer, watch.callback = make(folder, pruning, callbacks=[watch], **options)
    trainer.train()
    return trainer, watch


@pytest.mark.parametrize(("way", "pattern"), EXACT, ids=str)
def test_final_sparsity_is_exact_to_one_weight(tmp_path, way, pattern):
    _, callback = train(tmp_path, {**SHORT, "sparsity": 0.45, **way, **pattern}, max_steps=4)
    shares = [(int((~keep).sum()), keep.numel()) for keep in callback.masks.values()]
    if "scope" in pattern:
        assert sum(zeros for zeros, _ in shares) == round(0.45 * sum(total for _, total in shares))
    elif pattern.get("pattern") == "2:4":
        for keep in callback.masks.values():
            assert (keep.reshape(len(keep), -1, 4).sum(-1) == 2).all()
    else:
        block = 4 if pattern else 1
        assert all(zeros == block * round(0.45 * total / block) for zeros, total in shares)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_resumed_run_equals_a_straight_one(tmp_path, way):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 5}
    straight, pruned = train(tmp_path / "straight", {**SHORT, "end": 4, **way}, **options)
    resumed, again = make(tmp_path / "resumed", {**SHORT, "end": 4, **way}, tiny.llama(seed=9), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    assert torch.equal(training.weights(resumed.model), training.weights(straight.model))
    assert all(torch.equal(again.masks[name], keep) for name, keep in pruned.masks.items())
    assert (tmp_path / "straight" / "checkpoint-3" / FILE).exists() == bool(way)


@pytest.mark.parametrize("way", [TAYLOR, SHADOW], ids=str)
def test_accumulating_micro_batches_is_one_large_batch(tmp_path, way):
    results = []
    for rows, accumulated in ((8, 1), (2, 4)):
        cut = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulated}
        trainer, callback = train(tmp_path, {**SHORT, **way}, max_steps=3, optim="sgd", **cut)
        results.append((training.weights(trainer.model) - training.weights(tiny.llama()), callback.masks))
    assert training.relative(results[1][0], results[0][0]) < 1e-5
    assert all(torch.equal(results[1][1][name], keep) for name, keep in results[0][1].items())


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_two_processes_are_one_with_twice_the_batch(tmp_path, way):
    start = training.weights(tiny.llama())
    one = jobs.prune_gradually(tmp_path, way, rows_per_process=4)
    two = together(jobs.prune_gradually, tmp_path, way, 2)
    assert [one["processes"], *(each["processes"] for each in two)] == [1, 2, 2]
    for each in two:
        assert training.relative(each["weights"] - start, one["weights"] - start) < 1e-5
        assert all(torch.equal(each["masks"][name], keep) for name, keep in one["masks"].items())


def test_bfloat16_training_is_exact_too(tmp_path):
    _, watch = watched(tmp_path, {**SHORT, **SHADOW}, bf16=True, max_steps=4)
    assert all(int((~keep).sum()) == round(0.5 * keep.numel()) for keep in watch.masks[-1].values())


def test_masks_move_only_with_a_shadow_and_only_until_the_end(tmp_path):
    for shadow in (False, True):
        _, watch = watched(tmp_path, {**SCHEDULE, "initial_sparsity": 0.4, "shadow": shadow}, learning_rate=5e-2)
        came_back = [
            any(bool((~before[name] & after[name]).any()) for name in before)
            for before, after in zip(watch.masks, watch.masks[1:], strict=False)
        ]
        assert any(came_back) == shadow
        assert not any(came_back[5:])


def test_decay_pulls_what_is_pruned_towards_zero(tmp_path):
    norms = []
    for decay in (0.0, 5.0):
        options = {"optim": "sgd", "learning_rate": 0.05, "weight_decay": 0.0, "max_steps": 5}
        pruning = {"sparsity": 0.5, "schedule": "one_shot", "end": 5, "every": 5, "shadow": True, "decay": decay}
        trainer, callback = make(tmp_path, pruning, callbacks=[Stop(4)], **options)
        trainer.train()
        pruner = callback._pruner
        norms.append(sum(float((D * ~pruner.keep[name]).norm()) for name, D in pruner.dense.items()))
    assert norms[1] < 0.6 * norms[0]


def test_only_pruned_weights_decay():
    """By hand: the gradient gets decay times D where D is masked."""
    D, keep = torch.tensor([[1.0, -2.0, 4.0]]), torch.tensor([[True, False, False]])
    W, g = D * keep, torch.ones(1, 3)
    add_decay(g, W, D, decay=0.5)
    assert g.tolist() == [[1.0, 0.0, 3.0]]
    mask_into(W, D, keep)
    assert W.tolist() == [[1.0, 0.0, 0.0]]
    assert D.tolist() == [[1.0, -2.0, 4.0]]


def test_the_parameter_and_the_shadow_trade_places_whatever_the_layout():
    """One step by hand on a linear layer, a transposed one and an expert of a fused weight: W masked, D all moved."""
    dense = torch.arange(1.0, 13.0).view(3, 4)
    fused = nn.Module()
    fused.up = nn.Parameter(torch.stack([dense, dense]))
    linear, turned = nn.Linear(4, 3, bias=False), Conv1D(3, 4)
    linear.weight.data, turned.weight.data = dense.clone(), dense.T.contiguous()
    for target in (Target(linear), Target(turned, turned=True), Target(fused, "up", expert=1)):
        parameter = target.module.get_parameter(target.parameter)
        pruner = Pruner({"W": target}, lambda weights, sparsity, **_: {"W": weights["W"] > 6}, Memory(decay=0.0))
        pruner.update(0.5, 0)
        parameter.grad = torch.ones_like(parameter)
        pruner.before_step()
        assert torch.equal(target.weight, dense)
        torch.optim.SGD([parameter], lr=0.5).step()
        pruner.after_step()
        assert torch.equal(target.weight, (dense - 0.5) * (dense > 6))
        assert torch.equal(pruner.dense["W"], dense - 0.5)
        assert parameter.is_contiguous()
    assert torch.equal(fused.up[0], dense - 0.5)  # no target: trained as ever


def test_a_units_score_counts_what_writes_it_and_what_reads_it():
    columns, rows = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0, 1], [2, 3]])
    units = Units("head", "", "reader", columns, {"writer": rows})
    scores = {"reader": torch.tensor([[1.0, 2.0, 3.0, 4.0]]), "writer": torch.tensor([[30.0], [20.0], [10.0], [5.0]])}
    assert unit_scores(units, scores).tolist() == [53.0, 22.0]
    scores["writer"][2:], scores["reader"][0, 2] = -torch.inf, -torch.inf
    assert unit_scores(units, scores).tolist() == [53.0, 4.0]


def test_zeros_from_before_stay_zero_in_the_shadow(tmp_path):
    model = tiny.llama()
    up = model.model.layers[0].mlp.up_proj.weight
    up.data[:, ::2] = 0
    train(tmp_path, {**SCHEDULE, "sparsity": 0.6, "shadow": True}, model)
    assert (up[:, ::2] == 0).all()
    assert int((up == 0).sum()) == round(0.6 * up.numel())


def test_movement_keeps_what_moves_away_from_zero():
    """By hand: the score is the sum of -w g over the steps."""
    from hf_slim.pruning.scores import add_movement, blend_taylor

    W, g = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[-1.0, -3.0, 2.0]])
    S = torch.zeros(1, 3)
    add_movement(S, W, g)
    add_movement(S, W, g)
    assert S.tolist() == [[2.0, -12.0, -2.0]]
    S = torch.ones(1, 3)
    blend_taylor(S, W, g, smoothing=0.75)
    assert S.tolist() == [[1.0, 2.25, 1.0]]


@pytest.mark.parametrize(("kind", "scope"), [("neuron", "global"), ("head", "global"), ("head", "layer")])
def test_whole_units_go(tmp_path, kind, scope):
    trainer, callback = train(tmp_path, {**SHORT, "units": kind, "scope": scope, **TAYLOR}, max_steps=4)
    found = find_units(trainer.model, (kind,))
    assert callback.masks.keys() == {name for units in found for name in (units.reader, *units.writers)}
    left = []
    for units in found:
        dead = (callback.masks[units.reader][:, units.columns] == 0).all(-1).all(0)
        for name, rows in units.writers.items():
            assert torch.equal(dead, (callback.masks[name][rows] == 0).flatten(1).all(1))
        left.append(len(units) - int(dead.sum()))
        assert (
            int((~callback.masks[units.reader]).sum())
            == int(dead.sum()) * callback.masks[units.reader][:, units.columns[0]].numel()
        )
    assert min(left) >= 1
    assert sum(left) == sum(map(len, found)) - round(0.5 * sum(map(len, found)))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("Llama", "neuron"), ("GPT-2", "neuron"), ("GPT-2", "head"), ("OPT", "neuron"), ("Mixtral", "neuron")],
)
def test_units_that_training_dropped_can_be_cut_out(name, kind):
    """Planned bytes are right, biases of what is gone are zero, and the smaller model computes the same."""
    model = architectures.make(name)
    layers = find_layers_of(model)
    options = {"sparsity": 0.5, "units": kind, "training": {"steps": 2, "batch_size": 2, "learning_rate": 1e-2}}
    with unfused(model):
        planned = gradual.plan(layers, gradual.Config(**options), model)
    hf_slim.compress(model, "prune.gradual", data=tiny.ids(4, 12), **options)
    stored = find_layers_of(model)
    assert planned
    assert {name: stored[name].nbytes for name in planned} == {name: x.nbytes for name, x in planned.items()}
    assert all(stored[name].encoding is None for name in stored.keys() - planned.keys())
    with unfused(model):
        found = find_units(model, (kind,))
        for units in found:
            for layer, rows in units.writers.items():
                bias = getattr(model.get_submodule(layer), "bias", None)
                assert bias is None or int((bias[rows] == 0).all(1).sum()) == len(units) // 2
    before = run_on(model.eval(), tiny.ids(4, 12)).logits.detach()
    report = hf_slim.compress(model, "prune.structurize", kinds=(kind,))
    assert report.metrics[f"removed_{kind}s"] == sum(len(units) // 2 for units in found)
    assert torch.allclose(run_on(model, tiny.ids(4, 12)).logits, before, atol=1e-4 * float(before.abs().max()))
    smaller = find_layers_of(model)
    assert all(smaller[u.reader].cols == stored[u.reader].cols // 2 for u in found)


def test_zeros_of_layers_without_units_stay(tmp_path):
    model = tiny.llama()
    attention = model.model.layers[0].self_attn.q_proj.weight
    attention.data[:, ::2] = 0
    trainer, callback = train(tmp_path, {**SHORT, "units": "neuron"}, model, max_steps=3)
    assert (attention[:, ::2] == 0).all()
    assert (attention[:, 1::2] != 0).all()
    assert callback.sparsity == 0.5
    names = {row.name for row in callback.store(trainer.model)}
    assert names == callback.masks.keys()
    assert "model.layers.0.self_attn.q_proj" in names
    assert "model.layers.1.self_attn.q_proj" not in names


def test_what_the_callback_pruned_is_stored_and_saved_sparse(tmp_path):
    trainer, callback = train(tmp_path, SHORT, max_steps=3)
    model = trainer.model.eval()
    before = run_on(model, tiny.ids()).logits
    masks = {name: keep.clone() for name, keep in callback.masks.items()}
    reports = callback.store(model)
    assert {row.name for row in reports} == masks.keys()
    assert all(row.bytes < row.bytes_before for row in reports)
    model.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(get_keep(loaded.get_submodule(name)), keep) for name, keep in masks.items())
    assert torch.equal(run_on(loaded.eval(), tiny.ids()).logits, before)


def find_layers_of(model):
    with unfused(model):
        return find_layers(model)


def test_experts_in_fused_weights_are_pruned_where_they_lie(tmp_path):
    model = architectures.make("Mixtral")
    before = {name: p.shape for name, p in model.named_parameters()}
    _, callback = train(tmp_path, SHORT | TAYLOR, model, max_steps=4)
    assert {name: p.shape for name, p in model.named_parameters()} == before
    experts = [name for name in callback.masks if ".experts." in name]
    assert experts
    fused = [p for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3]
    masks = sum(int((~callback.masks[name]).sum()) for name in experts)
    assert masks == sum(int((p == 0).sum()) for p in fused)
    assert all(int((~callback.masks[n]).sum()) == round(0.5 * callback.masks[n].numel()) for n in experts)


def test_learning_rate_starts_anew_with_every_update(tmp_path):
    rates = []

    class Rates(TrainerCallback):
        def on_optimizer_step(self, args, state, control, *, optimizer, **kwargs):
            rates.append(optimizer.param_groups[0]["lr"])

    pruning = {"sparsity": 0.5, "begin": 2, "end": 6, "every": 2, "lr_cycles": True, "lr_floor": 0.5}
    options = {"save_strategy": "steps", "save_steps": 3, "learning_rate": 1.0, "logging_steps": 1, "optim": "sgd"}
    trainer, _ = train(tmp_path, pruning, callbacks=[Rates()], **options)
    assert rates == [1.0, 0.75] * 4
    logged = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert logged == rates
    resumed, _ = make(tmp_path, pruning, callbacks=[Rates()], **options)
    rates.clear()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert rates == [0.75, 1.0, 0.75, 1.0, 0.75]


def test_what_is_dropped_at_once_is_dropped_in_the_first_update(tmp_path):
    _, watch = watched(tmp_path, {"sparsity": 0.5, "initial_sparsity": 0.4, "begin": 2, "end": 6, "every": 2})
    shares = [1 - float(next(iter(masks.values())).float().mean()) for masks in watch.masks]
    assert shares[0] == 0
    assert shares[1] == pytest.approx(0.4, abs=1e-3)
    assert shares[5:] == [pytest.approx(0.5, abs=1e-3)] * 3


def test_one_shot_holds(tmp_path):
    _, watch = watched(tmp_path, {"sparsity": 0.5, "schedule": "one_shot", "begin": 2, "every": 1})
    assert all(keep.all() for keep in watch.masks[0].values())
    assert all(torch.equal(watch.masks[1][name], keep) for name, keep in watch.masks[-1].items())


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_run_that_was_stopped_can_be_finished(tmp_path, way):
    trainer, callback = make(tmp_path, {**SHORT, **way}, callbacks=[Stop(2)])
    trainer.train()
    assert callback.sparsity < 0.48
    callback.finish()
    for target in callback.targets.values():
        assert int((target.weight == 0).sum()) == round(0.5 * target.weight.numel())


def test_float16_scores_see_gradients_without_their_scale():
    """Trained with and without a gradient scaler, a step that overflows among them: the same scores."""
    scores = []
    for scaled in (False, True):
        model, callback = tiny.llama(), GradualMagnitudePruning(score="taylor")
        args = type("Args", (), {"max_grad_norm": 0.0, "fsdp": None, "deepspeed": None, "output_dir": "out"})
        state = type("State", (), {"max_steps": 10, "global_step": 0, "stateful_callbacks": None})
        callback.on_train_begin(args, state, None, model=model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        wrapped = type("Wrapped", (), {"optimizer": optimizer, "scaler": scaler if scaled else None})()
        for step in range(3):
            ids = tiny.ids(seed=step)
            optimizer.zero_grad()
            scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
            if scaled and step == 1:
                model.model.layers[0].mlp.up_proj.weight.grad[0, 0] = torch.inf
            if scaled or step != 1:
                callback.on_pre_optimizer_step(args, state, None, optimizer=wrapped)
                scaler.step(optimizer)
                scaler.update()
                callback.on_optimizer_step(args, state, None)
        scores.append(callback._pruner.scores)
    for name, S in scores[0].items():
        assert training.relative(scores[1][name], S) < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "one_shot", "initial_sparsity": 0.2}, "drops everything at begin, got initial_sparsity 0.2"),
        ({"units": "head", "pattern": "2:4"}, "units: head go as a whole, got pattern '2:4'"),
        ({"score": "gradient"}, "prune.gradual.score"),
        ({"lr_floor": 1.5}, "prune.gradual.lr_floor"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(PlanError, match=message):
        GradualMagnitudePruning(options)


@pytest.mark.parametrize(
    ("pruning", "options", "message"),
    [
        ({"units": "head", "sparsity": 0.8}, {}, "would remove all of its 2 heads; set sparsity below 0.75"),
        ({"units": "head", "layers": {"include": ["*.mlp.*"]}}, {}, "no heads whose layers are all among those"),
        ({"pattern": "block:16"}, {}, "40 columns, no multiple of 16"),
        (
            {"lr_cycles": True},
            PLATEAU,
            "function of the step",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_a_weight_changes(tmp_path, pruning, options, message):
    trainer, _ = make(tmp_path, {"initial_sparsity": 0.3, **pruning}, **options)
    before = training.weights(trainer.model)
    with pytest.raises(PlanError, match=message):
        trainer.train()
    assert torch.equal(training.weights(trainer.model), before)


def test_scores_of_frozen_layers_are_refused(tmp_path):
    model = tiny.llama()
    model.model.layers[0].requires_grad_(False)
    trainer, _ = make(tmp_path, {"score": "taylor"}, model)
    with pytest.raises(PlanError, match="7 layers get no gradients"):
        trainer.train()


def test_a_checkpoint_without_the_scores_is_refused(tmp_path):
    train(tmp_path, SHORT, save_strategy="steps", save_steps=2, max_steps=3)
    trainer, _ = make(tmp_path, SHORT | TAYLOR, max_steps=3)
    with pytest.raises(ModelError, match=f"without {FILE} beside the checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
