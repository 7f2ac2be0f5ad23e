"""Callbacks together: each keeps what others made, layers are stored once, and what is stored is what was trained."""

from __future__ import annotations

import pytest
import tiny
import torch
import training
from transformers import AutoModelForCausalLM

import hf_slim
from hf_slim import DistillationConfig, DistillationTrainer
from hf_slim.core.errors import PlanError, RecipeError
from hf_slim.core.select import find_layers
from hf_slim.core.stage import make_stage
from hf_slim.core.swap import get_weight
from hf_slim.distillation import during
from hf_slim.integration.transformers import mark
from hf_slim.plan import plan_stage

ATTENTION, MLP = {"layers": {"include": ["*_proj"], "exclude": ["mlp.*"]}}, {"layers": {"include": ["mlp.*"]}}
PRUNE, LATE = {"sparsity": 0.5, "every": 1}, {"sparsity": 0.03, "begin": 3, "end": 4, "every": 1}
ROUND, SHARE = {"bits": 4, "group_size": 16}, {"bits": 3, "scope": "tensor"}
MOVE = {"every": 1, "until": 1.0}

TOGETHER = {
    "pruned and rounded": [("prune.gradual", PRUNE), ("quantize.qat", ROUND)],
    "pruned and rounded asymmetrically": [("prune.gradual", PRUNE), ("quantize.qat", ROUND | {"symmetric": False})],
    "pruned and rounded to levels without zero": [("prune.gradual", PRUNE), ("quantize.qat", {"bits": 2})],
    "pruned to 2:4 and rounded": [("prune.gradual", PRUNE | {"pattern": "2:4"}), ("quantize.qat", ROUND)],
    "pruned units and rounded": [("prune.gradual", PRUNE | {"units": "neuron"}), ("quantize.qat", ROUND)],
    "pruned and shared": [("prune.gradual", PRUNE), ("share.deep_kmeans", SHARE)],
    "pruned a little and shared": [("prune.gradual", PRUNE | {"sparsity": 0.2}), ("share.deep_kmeans", SHARE)],
    "shared and then pruned": [("prune.gradual", LATE), ("share.deep_kmeans", SHARE)],
    "rounded here, shared there": [("quantize.qat", ROUND | ATTENTION), ("share.deep_kmeans", SHARE | MLP)],
    "shared here, pruned there": [("share.deep_kmeans", SHARE | ATTENTION), ("prune.gradual", PRUNE | MLP)],
    "pruned, rounded here, shared there": [
        ("prune.gradual", PRUNE),
        ("quantize.qat", ROUND | ATTENTION),
        ("share.deep_kmeans", SHARE | MLP),
    ],
    "moved here, pruned there": [("share.recluster", MOVE), ("prune.gradual", PRUNE | ATTENTION)],
    "rounded here, moved there": [("quantize.qat", ROUND | ATTENTION), ("share.recluster", MOVE)],
    "shared here, moved there": [("share.deep_kmeans", SHARE | ATTENTION), ("share.recluster", MOVE)],
}


@pytest.mark.parametrize("name", TOGETHER)
def test_what_is_stored_is_what_was_trained(name, tmp_path):
    stages, model = [make_stage(method, options) for method, options in TOGETHER[name]], tiny.llama(layers=1)
    if "moved" in name:
        hf_slim.compress(model, "share.kmeans", bits=2, scope="tensor", **MLP)
    planned, before = during.plan(stages, find_layers(model), model), find_layers(model)
    callbacks = during.start(model, stages)
    DistillationTrainer(
        model=model,
        teacher=tiny.llama(layers=1),
        args=training.arguments(
            tmp_path, DistillationConfig, max_steps=4, optim="adamw_torch", learning_rate=1e-2, weight_decay=0.1
        ),
        train_dataset=training.rows(),
        data_collator=training.Pad(),
        callbacks=callbacks,
    ).train()
    trained = tiny.logits(model)
    assert (trained - tiny.logits(tiny.llama(layers=1))).abs().max() > 0.1
    masks = {name: ~keep for callback in callbacks for name, keep in getattr(callback, "masks", {}).items()}

    rows = during.store(model, stages, callbacks)
    mark(model)
    model.save_pretrained(tmp_path / "stored")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "stored")
    assert (tiny.logits(loaded) - trained).abs().max() < 1e-4
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))

    assert sorted(row.name for row in rows) == sorted(planned), "each layer once"
    stored = find_layers(loaded)
    for row in rows:
        assert stored[row.name].encoding.kind == planned[row.name].encoding.kind
        assert (row.bytes_before, row.bytes) == (before[row.name].nbytes, stored[row.name].nbytes)
    for layer, gone in masks.items():
        assert gone.any()
        assert not get_weight(loaded.get_submodule(layer))[gone].any()


def test_a_stage_stores_each_layer_once_and_as_planned():
    model, stages = tiny.llama(layers=1), [{"prune.gradual": PRUNE}, {"quantize.qat": ROUND}]
    options = {"steps": 4, "learning_rate": 1e-2, "during": stages}
    planned = plan_stage(find_layers(model), make_stage("distill.logits", options), model)
    report = hf_slim.compress(model, "distill.logits", data=tiny.ids(4), original=tiny.llama(layers=1), **options)
    assert [row.encoding for row in report.layers] == [layer.encoding.describe() for layer in planned.values()]
    assert len(report.layers) == 7


EACH = "would each store the same layers in its own way: give them different ones"


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["quantize.qat", "prune.gradual"], "prune.gradual would undo .* what quantize.qat makes of them: put"),
        (["share.deep_kmeans", "prune.gradual"], "put prune.gradual before share.deep_kmeans"),
        (["quantize.qat", "share.deep_kmeans"], f"quantize.qat and share.deep_kmeans {EACH}"),
        (["share.deep_kmeans", "quantize.qat"], f"share.deep_kmeans and quantize.qat {EACH}"),
        (["share.deep_kmeans", "share.recluster"], f"share.deep_kmeans and share.recluster {EACH}"),
        (["prune.gradual", "share.recluster"], f"prune.gradual and share.recluster {EACH}"),
        (["quantize.qat", "quantize.qat"], "quantize.qat is named 2 times"),
        ([{"prune.gradual": {"shadow": True}}, "quantize.qat"], "quantize.qat gives zeros no gradients"),
        ([{"prune.gradual": {"shadow": True}}, "share.deep_kmeans"], "leave shadow out"),
        (["quantize.rtn", "quantize.qat"], "quantize.rtn cannot happen during training"),
    ],
)  # fmt: skip
def test_callbacks_that_cannot_work_together_are_refused_when_they_are_read(stages, message):
    with pytest.raises(RecipeError, match=f"distill.logits.during.*{message}"):
        make_stage("distill.logits", {"during": stages})


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(RecipeError) as caught:
        make_stage("distill.logits", {"during": ["quantize.qat", "share.deep_kmeans", "prune.gradual"]})
    text = str(caught.value)
    assert EACH in text
    assert "put prune.gradual before quantize.qat" in text
    assert "put prune.gradual before share.deep_kmeans" in text


def test_layers_that_two_want_are_named_in_the_plan():
    model = tiny.llama(layers=1)
    first = {"quantize.qat": {"layers": {"include": ["q_proj", "k_proj", "up_proj"]}}}
    second = {"share.deep_kmeans": {"layers": {"include": ["k_proj", "up_proj", "v_proj"]}}}
    stage = make_stage("distill.logits", {"during": [first, second]})
    with pytest.raises(PlanError, match=f"{EACH}.*both work on model.layers.0.self_attn.k_proj and 1 more"):
        plan_stage(find_layers(model), stage, model)
    wrong = {"prune.gradual": {"layers": {"include": ["no_such"]}}}
    stage = make_stage("distill.logits", {"during": [wrong, {"quantize.qat": {"layers": {"exclude": ["nor_this"]}}}]})
    with pytest.raises(PlanError) as caught:
        plan_stage(find_layers(model), stage, model)
    assert len(caught.value.problems) == 2
    assert model.model.layers[0].mlp.up_proj.weight.requires_grad
