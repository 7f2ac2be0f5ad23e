"""Clustered models train: centroids learn in float32, save as declared, resume bit for bit; members may change."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
import training
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer

import hf_slim
from hf_slim import DistillationConfig, DistillationTrainer
from hf_slim.core.errors import PlanError
from hf_slim.core.select import find_layers
from hf_slim.core.size import count_weights, stored_bytes
from hf_slim.core.stage import make_stage
from hf_slim.encodings.modules import EncodedLinear, EncodedModule
from hf_slim.plan import order_problems, plan_stage
from hf_slim.sharing.recluster import ReassignCodes, assign

NAME = "model.layers.1.mlp.up_proj"


def clustered(dtype: torch.dtype = torch.float32, **options):
    model = tiny.llama(dtype)
    hf_slim.compress(model, "share.kmeans", **{"bits": 2, "scope": "tensor", **options})
    return model


def make(folder, model, cls=Trainer, callbacks=(), **options):
    teacher = {} if cls is Trainer else {"teacher": tiny.llama()}
    given = {"max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-3, **options}
    return cls(
        model=model,
        args=training.arguments(folder, DistillationConfig, **given),
        train_dataset=training.rows(samples=16),
        data_collator=training.Pad(),
        callbacks=list(callbacks),
        **teacher,
    )


def centroids(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("centroids")}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(tiny.ids()).logits


@pytest.mark.parametrize("cls", [Trainer, DistillationTrainer])
def test_centroids_learn_save_as_declared_and_resume(cls, tmp_path):
    model, saving = clustered(embeddings={"bits": 4}), {"save_strategy": "steps", "save_steps": 2}
    before = centroids(model)
    assert len(before) == 15
    trainer = make(tmp_path, copy.deepcopy(model), cls, **saving)
    trainer.train()
    trained = trainer.model
    assert all(p.dtype == torch.float32 for p in trained.parameters())
    assert not any(torch.equal(p, before[n]) for n, p in centroids(trained).items())
    for name, module in model.named_modules():
        if isinstance(module, EncodedModule):
            assert torch.equal(module.codes, trained.get_submodule(name).codes)
    again = make(tmp_path, model, cls, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(training.weights(again.model), training.weights(trained))
    found = logits(trained)
    trained.save_pretrained(tmp_path / "stored")
    stored = load_file(tmp_path / "stored" / "model.safetensors")
    assert {t.dtype for n, t in stored.items() if n.endswith("centroids")} == {torch.float16}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "stored")
    assert torch.equal(logits(loaded), found)
    assert stored_bytes(loaded) == stored_bytes(trained) == sum(t.nbytes for t in stored.values())
    assert count_weights(trained) == count_weights(tiny.llama())


def test_steps_that_float16_cannot_tell_add_up():
    module = clustered().get_submodule(NAME)
    start, size = module.centroids.detach().clone(), module.centroids.detach().abs() / 2**14
    with torch.no_grad():
        module.centroids += size
    assert torch.equal(module.tensors()["centroids"], start.half())  # what is computed with, and saved
    assert torch.equal(module.state_dict()["centroids"], start.half())
    with torch.no_grad():
        for _ in range(15):
            module.centroids += size
    assert not torch.equal(module.tensors()["centroids"], start.half())
    module.settle()
    assert torch.equal(module.centroids, module.state_dict()["centroids"].float())


def test_the_gradient_of_a_centroid_is_the_sum_over_its_members():
    model = clustered()
    dense = copy.deepcopy(model).dequantize()
    for m in (model, dense):
        m(input_ids=tiny.ids(), labels=tiny.ids()).loss.backward()
    module = model.get_submodule(NAME)
    W, slope = dense.get_submodule(NAME).weight, dense.get_submodule(NAME).weight.grad
    for k, centroid in enumerate(module.centroids.flatten()):
        assert module.centroids.grad.flatten()[k].item() == pytest.approx(slope[centroid == W].sum().item(), abs=1e-5)


def test_accumulated_batches_are_one_batch(tmp_path):
    found = []
    for steps in (1, 4):
        options = {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps}
        trainer = make(tmp_path, clustered(), optim="sgd", learning_rate=1e-3, **options)
        trainer.train()
        found.append(torch.cat([c.flatten() for c in centroids(trainer.model).values()]))
    assert training.relative(*found) < 1e-4


def test_centroids_follow_the_model_through_dtypes():
    model = clustered(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} == {model.dtype}
    assert model.get_submodule(NAME).state_dict()["centroids"].dtype == torch.float16
    module = model.get_submodule(NAME)
    W = module.weight
    assert torch.equal(module.float().weight, W.float())
    assert torch.equal(module.bfloat16().weight, W)


def test_centroids_train_beside_an_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(clustered(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    before = centroids(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.endswith("centroids"))
    make(tmp_path, model).train()
    after = centroids(model)
    assert not any(torch.equal(after[name], before[name]) for name in before)
    assert any(p.any() for n, p in model.named_parameters() if "lora_B" in n)


def test_only_codes_that_cannot_learn_keep_a_stage_from_training():
    train = make_stage("distill.logits")
    assert order_problems((make_stage("share.kmeans"), train)) == []
    (problem,) = order_problems((make_stage("quantize.rtn"), train))
    assert "stored as integer codes by then; put distill.logits before quantize.rtn" in problem
    (problem,) = order_problems((make_stage("share.kmeans"), make_stage("prune.gradual")))
    assert "those share values by then; put prune.gradual before share.kmeans" in problem
    assert order_problems((make_stage("share.kmeans"), make_stage("evaluate.perplexity"))) == []
    rounded = tiny.llama()
    hf_slim.compress(rounded, "quantize.rtn")
    with pytest.raises(PlanError, match="the student has no trainable parts: 14 layers are stored as codes"):
        hf_slim.compress(rounded, "distill.logits", data=tiny.ids(), original=tiny.llama(), steps=1)


# members that change


@pytest.mark.parametrize(("cols", "dim"), [(12, 1), (13, 4)])
def test_each_run_goes_to_the_nearest_centroid(cols, dim):
    draw = torch.Generator().manual_seed(0)
    W, tables = torch.randn(5, cols, generator=draw), torch.randn(5, 6, dim, generator=draw)
    codes = assign(W, tables)
    runs = torch.nn.functional.pad(W, (0, -cols % dim)).view(5, -1, dim)
    for r in range(5):
        for i, run in enumerate(runs[r]):
            assert codes[r, i] == min(range(6), key=lambda k: (run - tables[r, k]).square().sum().item())


@pytest.mark.parametrize("pruned", [False, True])
def test_weights_that_moved_far_change_their_centroid(pruned, tmp_path):
    model = tiny.llama()
    if pruned:
        hf_slim.compress(model, "prune.magnitude", sparsity=0.7)
    hf_slim.compress(model, "share.kmeans", bits=2, scope="tensor")
    zero = model.get_submodule(NAME).weight == 0
    before, moving = copy.deepcopy(model), ReassignCodes(every=1, until=0.8)
    saving = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.1}
    trainer = make(tmp_path, copy.deepcopy(model), callbacks=[moving], **saving)
    trainer.train()
    again = make(tmp_path, model, callbacks=[ReassignCodes(every=1, until=0.8)], **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(moving.reassigned) == 3
    assert any(moving.reassigned)
    assert all(0 <= share < 1 for share in moving.reassigned)
    codes = [m.get_submodule(NAME).codes for m in (before, trainer.model, again.model)]
    assert not torch.equal(codes[0], codes[1])
    assert torch.equal(codes[1], codes[2])
    assert torch.equal(training.weights(trainer.model), training.weights(again.model))
    layer = trainer.model.get_submodule(NAME)
    assert torch.equal(layer.weight == 0, zero)
    assert {n for n, _ in layer.named_parameters()} == {"centroids"}
    assert layer.forward.__func__ is EncodedLinear.forward
    found = logits(trainer.model)
    trainer.model.save_pretrained(tmp_path / "stored")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "stored")), found)


def test_members_change_during_distillation_and_not_without_centroids():
    model = clustered()
    hf_slim.compress(
        model,
        "distill.logits",
        data=tiny.ids(8),
        original=tiny.llama(),
        steps=2,
        batch_size=2,
        learning_rate=1.0,
        during=[{"share.recluster": {"every": 1, "until": 1.0}}],
    )
    assert not torch.equal(model.get_submodule(NAME).codes, clustered().get_submodule(NAME).codes)
    with pytest.raises(PlanError, match="no layer has centroids that learn"):
        plan_stage(find_layers(tiny.llama()), make_stage("share.recluster"), tiny.llama())
    with pytest.raises(PlanError, match="share\\.recluster\\.every"):
        ReassignCodes(every=0)
