"""Feature losses: their kernels against loops, their layer maps, and their place in the trainer."""

from __future__ import annotations

import architectures
import numpy as np
import pytest
import tiny
import torch
import training
from reference import distillation as reference
from safetensors import safe_open
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

import hf_slim
from hf_slim.core.errors import ModelError, PlanError
from hf_slim.distillation import logits
from hf_slim.distillation.feature_kernels import attention_distance, hidden_distance, relation_distance
from hf_slim.distillation.features import Feature, FeatureLosses, read_features
from hf_slim.distillation.layer_map import map_problems, pair_layers
from hf_slim.distillation.schedules import schedule_factor
from hf_slim.distillation.trainer import DistillationConfig, DistillationTrainer

ALL = [
    {"kind": "hidden"},
    {"kind": "hidden", "distance": "cosine", "layers": "last", "weight": 0.5},
    {"kind": "embedding"},
    {"kind": "attention", "layers": [[0, 1], [-1, -1]]},
    {"kind": "attention", "distance": "mse"},
    {"kind": "relation", "layers": "last"},
]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHTS = torch.tensor([[1.0, 0.0, 2.0, 0.5], [0.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
REAL = torch.tensor([[True] * 4, [True, True, True, False]])


def test_hidden_distances_are_sums_over_tokens():
    s, t, w = random(4, 6), random(4, 6, seed=1), WEIGHTS[0]
    mse = sum(w[i] * np.mean((s[i] - t[i]).numpy() ** 2) for i in range(4))
    cosine = sum(w[i] * (1 - s[i] @ t[i] / s[i].norm() / t[i].norm()) for i in range(4))
    assert hidden_distance(s, t, w.float(), "mse").item() == pytest.approx(mse.item(), rel=1e-5)
    assert hidden_distance(s, t, w.float(), "cosine").item() == pytest.approx(cosine.item(), rel=1e-5)
    assert hidden_distance(s, s, w.float(), "mse") == 0
    assert hidden_distance(s, 3 * s, w.float(), "cosine").abs() < 1e-6
    assert hidden_distance(s, -s, w.float(), "cosine").item() == pytest.approx(2 * w.sum().item())


def test_attention_distances_match_a_loop():
    s, t = random(2, 3, 4, 4).softmax(-1), random(2, 3, 4, 4, seed=1).softmax(-1)
    t[..., -1] = 0  # what padding gets
    expected = reference.attention_kl(s.numpy(), t.numpy(), WEIGHTS.numpy())
    assert attention_distance(s, t, WEIGHTS.float(), "kl").item() == pytest.approx(expected, rel=1e-5)
    squares = (((s - t) ** 2).sum(-1).mean(1) * WEIGHTS).sum().item()
    assert attention_distance(s, t, WEIGHTS.float(), "mse").item() == pytest.approx(squares, rel=1e-5)
    assert attention_distance(s, s, WEIGHTS.float(), "kl") == 0


def test_relations_match_a_loop_and_need_no_equal_widths():
    s, t = random(2, 4, 6), random(2, 4, 12, seed=1)
    maps = [reference.relation_maps(x.numpy(), REAL.numpy(), 3) for x in (s, t)]
    expected = reference.attention_kl(*maps, WEIGHTS.numpy())
    assert relation_distance(s, t, WEIGHTS.float(), REAL, 3).item() == pytest.approx(expected, rel=1e-5)
    assert relation_distance(s, s, WEIGHTS.float(), REAL, 3) == 0


def test_relations_do_not_see_padding_or_order():
    s, t, w = random(2, 4, 6), random(2, 4, 12, seed=1), WEIGHTS.float()
    plain = relation_distance(s, t, w, REAL, 3)
    other = s.clone()
    other[1, 3] = 100.0
    assert_close(relation_distance(other, t, w, REAL, 3), plain)
    order = torch.tensor([2, 0, 3, 1])
    assert_close(relation_distance(s[:, order], t[:, order], w[:, order], REAL[:, order], 3), plain)


def test_gradients_of_feature_distances_are_finite_at_equality():
    s = random(2, 4, 6).float().requires_grad_()
    t = s.detach().clone()
    total = relation_distance(s, t, WEIGHTS.float(), REAL, 3)
    total = total + sum(hidden_distance(s[0], t[0], WEIGHTS[0].float(), d) for d in ("mse", "cosine"))
    assert torch.autograd.grad(total, s)[0].abs().max() < 1e-6


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "pairs"),
    [
        ("uniform", 3, 12, [(0, 3), (1, 7), (2, 11)]),
        ("uniform", 2, 2, [(0, 0), (1, 1)]),
        ("uniform", 4, 6, [(0, 1), (1, 2), (2, 4), (3, 5)]),
        ("last", 3, 2, [(2, 1)]),
        (((0, 5), (-1, -1)), 3, 6, [(0, 5), (2, 5)]),
    ],
    ids=str,
)
def test_layer_maps(layers, student, teacher, pairs):
    assert not map_problems(layers, student, teacher)
    assert pair_layers(layers, student, teacher) == pairs


def test_a_teacher_with_too_few_layers_is_refused():
    assert "the teacher has 2 blocks and the student 3; use layers: last" in map_problems("uniform", 3, 2)[0]
    student, teacher = map_problems(((3, 1), (0, 2)), 3, 2)
    assert "the student has 3 blocks, numbered 0 to 2, and the pairs name 3" in student
    assert "the teacher has 2 blocks, numbered 0 to 1, and the pairs name 2" in teacher


def test_schedules():
    values = {s: [schedule_factor(s, x) for x in (0, 0.25, 0.5, 1, 2)] for s in ("constant", "linear", "cosine")}
    assert values["constant"] == [1.0] * 5
    assert values["linear"] == [1.0, 0.75, 0.5, 0.0, 0.0]
    assert values["cosine"] == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.0, 0.0])


def test_options_are_closed_and_all_problems_come_at_once():
    with pytest.raises(PlanError) as caught:
        read_features(
            [
                {"kind": "hiden"},
                {"kind": "hidden", "wieght": 1},
                {"kind": "attention", "distance": "cosine"},
                {"kind": "hidden", "relation_heads": 2},
            ]
        )
    text = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    assert "features[0].kind" in text
    assert "did you mean 'weight'" in text
    assert "distance of attention must be kl or mse, got cosine" in text
    assert "belong to kind: relation" in text


def wide(layers=3, width=48, heads=6):
    """A Llama of another width than `tiny.llama`, with eager attention."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # the library's small random weights make every block do next to nothing
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 2.0 * parameter.shape[-1] ** -0.5)
    return model


def narrow():
    return wide(layers=2, width=24)


def make(folder, features, models=None, **options):
    student, teacher = models or (narrow(), wide())
    args = training.arguments(
        folder, DistillationConfig, **{"max_steps": 1, "alpha": 0.6, **options}, features=features
    )
    return DistillationTrainer(student, teacher, args, train_dataset=training.rows(), data_collator=training.Pad())


class Projected(TrainerCallback):
    """Notes the gradient of the projections as the optimizer is about to use it."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.gradient = torch.cat([p.grad.flatten().clone() for p in projections(self.trainer)])


def gradients(folder, pad=None, **options):
    trainer = make(folder, ALL, **options)
    trainer.data_collator = pad or trainer.data_collator
    recorded, beside = training.Gradients(), Projected(trainer)
    trainer.add_callback(recorded)
    trainer.add_callback(beside)
    trainer.train()
    return torch.cat([recorded.steps[0], beside.gradient])


def projections(trainer):
    return list(trainer.features.projections.parameters())


def test_how_a_batch_is_cut_up_or_padded_changes_nothing(tmp_path):
    whole = gradients(tmp_path, per_device_train_batch_size=8)
    parts = gradients(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    padded = gradients(tmp_path, training.Pad(extra=3, side="left"), per_device_train_batch_size=8)
    assert training.relative(parts, whole) < 1e-5
    assert training.relative(padded, whole) < 1e-5


def test_losses_are_logged_and_add_up_by_weight_and_schedule(tmp_path):
    features = [*ALL, {"kind": "relation", "weight": 3.0, "schedule": "linear", "relations": ["value"]}]
    trainer = make(tmp_path, features, max_steps=2, logging_steps=1)
    trainer.train()
    names = ["hidden_loss", "hidden_loss_2", "embedding_loss", "attention_loss", "attention_loss_2", "relation_loss"]
    for step, log in enumerate(log for log in trainer.state.log_history if "loss" in log):
        weights = dict.fromkeys(names, 1.0) | {"hidden_loss_2": 0.5, "relation_loss_2": 3.0 * (1 - step / 2)}
        weights |= {"distillation_loss": 0.6, "label_loss": 0.4}
        assert all(log[name] > 0 for name in weights)
        assert log["loss"] == pytest.approx(sum(weight * log[name] for name, weight in weights.items()), rel=1e-4)


def test_a_copy_has_nothing_to_learn(tmp_path):
    same = [feature for feature in ALL if not isinstance(feature.get("layers"), list)]  # block by block
    trainer = make(tmp_path, same, (wide(), wide()), alpha=1.0)
    trainer.model.eval()
    inputs = training.Pad()(training.rows())
    loss = trainer.compute_loss(trainer.model, inputs)
    assert loss.abs() < 1e-5
    assert not projections(trainer)
    trainer.model.model.layers[1].mlp.down_proj.weight.data.mul_(1.5)
    assert trainer.compute_loss(trainer.model, inputs) > 1e-3


def test_projections_are_trained_checkpointed_and_no_part_of_the_model(tmp_path):
    options = {"max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-2}
    straight = make(tmp_path / "straight", ALL[:3], save_strategy="steps", save_steps=2, **options)
    start = [p.detach().clone() for p in projections(straight)]
    straight.train()
    assert len(start) == 4
    assert all(not torch.equal(a, b) for a, b in zip(start, projections(straight), strict=True))
    resumed = make(tmp_path / "resumed", ALL[:3], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    for a, b in zip(projections(resumed), projections(straight), strict=True):
        assert_close(a, b)
    assert training.relative(training.weights(resumed.model), training.weights(straight.model)) < 1e-6
    with safe_open(tmp_path / "straight" / "checkpoint-4" / "model.safetensors", "pt") as file:
        assert set(file.keys()) <= set(narrow().state_dict())
    (tmp_path / "straight" / "checkpoint-2" / "projections.safetensors").unlink()
    with pytest.raises(ModelError, match="resume with the features that the checkpoint was trained with"):
        make(tmp_path / "again", ALL[:3], **options).train(
            resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2")
        )


@pytest.mark.parametrize("name", ["Llama", "Phi-3", "OPT", "GPT-2", "BERT", "DistilBERT", "Qwen3-MoE"])
def test_architectures_show_their_insides(name):
    model = architectures.make(name)
    features = FeatureLosses(read_features(ALL[:3] + ALL[5:]), model, architectures.make(name, seed=1), 0)
    ids = tiny.ids(2, 8)
    with features.watch(model, teacher=False) as seen, torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert torch.equal(seen.embedding, states[0])
    assert torch.equal(seen.outputs[0], states[1])
    assert {role for _, role in seen.roles} == {"query", "key", "value"}
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not any("Seen" in repr(hook) for hook in hooks)  # the library has some of its own
    if name == "GPT-2":
        joint = model.transformer.h[1].attn.c_attn(model.transformer.h[1].ln_1(states[1]))
        assert_close(torch.cat([seen.roles[1, role] for role in ("query", "key", "value")], -1), joint)
    if name == "Phi-3":
        assert [seen.roles[1, role].shape[-1] for role in ("query", "key", "value")] == [32, 16, 16]


def test_what_models_cannot_show_is_refused_at_once():
    fast = wide()
    fast.set_attn_implementation("sdpa")
    features = [*ALL, {"kind": "relation", "relation_heads": 5}, {"kind": "hidden", "layers": [[7, 0]]}]
    with pytest.raises(PlanError) as caught:
        FeatureLosses(read_features(features), wide(layers=4, heads=4), fast, 0)
    text = "\n".join(caught.value.problems)
    for words in ("the teacher has 3 blocks and the student 4", "the teacher uses sdpa", "4 attention heads and the"):
        assert words in text
    assert "relation_heads=5 does not divide the student's" in text
    assert "the pairs name 7" in text
    with pytest.raises(PlanError, match="no layers were found that make the query, key, value in the student"):
        FeatureLosses([Feature(kind="relation")], architectures.make("Falcon"), wide(), 0)


def test_checkpointing_that_cuts_gradients_off_is_refused(tmp_path):
    with pytest.raises(PlanError, match="reentrant gradient checkpointing"):
        make(tmp_path, ALL, gradient_checkpointing_kwargs={"use_reentrant": True})


def test_gradient_checkpointing_changes_nothing(tmp_path):
    features = [ALL[0], ALL[5]]
    steps = []
    for checkpointing in (False, True):
        recorded = training.Gradients()
        trainer = make(tmp_path, features, gradient_checkpointing=checkpointing)
        trainer.add_callback(recorded)
        trainer.train()
        steps += recorded.steps
    assert training.relative(steps[1], steps[0]) < 1e-5


def test_classifiers_count_every_sequence_once(tmp_path):
    features = [{"kind": "hidden"}, {"kind": "relation"}]
    losses = []
    for pad in (training.Pad(), training.Pad(extra=4)):
        args = training.arguments(tmp_path, DistillationConfig, max_steps=1, features=features)
        models = tiny.bert_classifier(), tiny.bert_classifier(seed=1)
        trainer = DistillationTrainer(*models, args, data_collator=pad)
        with torch.no_grad():
            losses.append(trainer.compute_loss(trainer.model.eval(), pad(training.rows("sequence"))).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_recipe_compares_insides_and_leaves_no_trace(tmp_path):
    model, teacher = tiny.llama(), tiny.llama(seed=1)
    model.set_attn_implementation("sdpa")
    features = [{"kind": "attention", "weight": 2.0}, {"kind": "relation", "schedule": "cosine"}]
    options = {"steps": 2, "alpha": 0.0, "divergence": "jsd", "beta": 0.3, "features": features}
    before = training.weights(model)
    report = hf_slim.compress(model, "distill.logits", data=tiny.ids(8), original=teacher, **options)
    assert report.metrics["steps"] == 2
    assert not torch.equal(training.weights(model), before)
    assert model.config._attn_implementation == "sdpa"
    assert set(model.state_dict()) == set(tiny.llama().state_dict())


def test_features_need_a_teacher_though_alpha_is_zero():
    alone, inside = (
        logits.Config(alpha=0.0),
        logits.Config(alpha=0.0, features=[{"kind": "hidden"}], teacher="some/model"),
    )
    assert logits.needs(alone) == ("train", "labels")
    assert logits.needs(inside) == ("train", "teacher", "labels")
    assert inside.own_teacher == "some/model"
