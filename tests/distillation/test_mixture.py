"""Several divergences at once, and weights and temperatures that change while a model is trained."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
import training
from torch.testing import assert_close
from transformers import HfArgumentParser

from hf_slim.core.errors import PlanError, RecipeError
from hf_slim.core.stage import make_stage
from hf_slim.distillation.losses import against_teacher, sum_over_logits
from hf_slim.distillation.mixture import Mixture
from hf_slim.distillation.trainer import DistillationConfig, DistillationTrainer

TWO = [
    {"kind": "forward_kl", "weight": 0.5},
    {"kind": "skewed_reverse_kl", "skew": 0.3, "weight": 2.0, "temperature": 1.5, "schedule": "linear"},
]


def make(folder, callbacks=(), **options):
    args = training.arguments(folder, DistillationConfig, **{"max_steps": 1, **options})
    data = {"train_dataset": training.rows(), "data_collator": training.Pad()}
    return DistillationTrainer(tiny.llama(), tiny.llama(seed=1), args, callbacks=list(callbacks), **data)


def expected(trainer, parts, alpha=1.0):
    """Mean over labels of the weighted divergences and the label loss, from the logits of both models."""
    inputs = training.Pad()(training.rows())
    features = {k: v for k, v in inputs.items() if k != "labels"}
    with torch.no_grad():
        s, t = (model(**features).logits[:, :-1].flatten(0, 1) for model in (trainer.model, trainer.teacher))
    targets = inputs["labels"][:, 1:].flatten()
    keep = targets != -100
    total = torch.zeros(())
    for weight, temperature, name, skew in parts:
        loss = against_teacher(lambda tokens: t[tokens], temperature, name, skew=skew)
        total = total + alpha * weight * sum_over_logits(s, keep, [(1.0, loss)])[0]
    total = total + (1 - alpha) * torch.nn.functional.cross_entropy(s, targets, reduction="sum")
    return float(total / keep.sum())


def loss_at(trainer, step, steps=10):
    trainer.state.global_step, trainer.state.max_steps = step, steps
    trainer.model.train()  # a Llama has no dropout
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, training.Pad()(training.rows())))


@pytest.mark.parametrize("fused", [None, False])
def test_the_loss_is_the_weighted_sum_of_all_divergences(tmp_path, fused):
    trainer = make(tmp_path, divergences=TWO, temperature=3.0, fused=fused)
    forward = (0.5, 3.0, "forward_kl", 0.1)
    for step, share in ((0, 2.0), (5, 1.0), (10, 0.0)):
        parts = [forward, (share, 1.5, "skewed_reverse_kl", 0.3)]
        assert loss_at(trainer, step) == pytest.approx(expected(trainer, parts), rel=1e-5)


def test_the_gradient_of_a_mixture_is_the_sum_of_gradients():
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    keep, mixture = torch.tensor([True, True, False, True, True, True]), Mixture(DistillationConfig(divergences=TWO))
    from hf_slim.distillation.losses import against_mixture

    mixed, apart = s.clone().requires_grad_(), s.clone().requires_grad_()
    sum_over_logits(mixed, keep, [(1.0, against_mixture(lambda tokens: t[tokens], mixture.parts(0.5)))])[0].backward()
    terms = [
        (0.5, against_teacher(lambda tokens: t[tokens], 1.0)),
        (1.0, against_teacher(lambda tokens: t[tokens], 1.5, "skewed_reverse_kl", skew=0.3)),
    ]
    sum_over_logits(apart, keep, terms)[0].backward()
    assert_close(mixed.grad, apart.grad, rtol=1e-12, atol=0)


def test_alpha_and_the_temperature_are_annealed(tmp_path):
    trainer = make(
        tmp_path, alpha=0.8, alpha_schedule="linear", temperature=3.0, temperature_schedule="linear", fused=False
    )
    for step, alpha, temperature in ((0, 0.8, 3.0), (5, 0.4, 2.0), (10, 0.0, 1.0)):
        parts = [(1.0, temperature, "forward_kl", 0.1)]
        assert loss_at(trainer, step) == pytest.approx(expected(trainer, parts, alpha), rel=1e-5)


def test_evaluation_weighs_as_at_the_start(tmp_path):
    trainer = make(tmp_path, alpha=0.8, alpha_schedule="cosine", temperature=3.0, temperature_schedule="cosine")
    trainer.state.global_step, trainer.state.max_steps = 9, 10
    found = trainer.evaluate(training.rows())["eval_loss"]
    trainer.state.global_step = 0
    assert trainer.evaluate(training.rows())["eval_loss"] == found


def test_a_teacher_whom_nobody_listens_to_any_more_is_not_asked(tmp_path):
    trainer = make(tmp_path, alpha_schedule="linear")
    assert trainer.teacher is not None
    trainer.teacher.forward = None
    assert loss_at(trainer, 10) == pytest.approx(expected_labels(trainer), rel=1e-5)


def expected_labels(trainer):
    inputs = training.Pad()(training.rows())
    with torch.no_grad():
        logits = trainer.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergences": [{"kind": "forward_k"}]}, r"divergences\[0\]\.kind"),
        ({"divergences": [{"kind": "jsd", "wieght": 1}]}, "did you mean 'weight'"),
        ({"divergences": TWO, "divergence": "jsd"}, "give one of the two"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(PlanError, match=message):
        DistillationConfig(**options)


def test_a_command_line_gives_lists_as_json():
    actions = HfArgumentParser(DistillationConfig)._option_string_actions
    assert actions["--divergences"].type is actions["--features"].type is str
    args = DistillationConfig(divergences=json.dumps(TWO), features='[{"kind": "hidden"}]')
    assert args.divergences == TWO
    assert args.features == [{"kind": "hidden"}]
    with pytest.raises(PlanError, match="features is not valid JSON"):
        DistillationConfig(features="[{kind: hidden}]")


def test_a_schedule_that_does_not_exist_is_named():
    config = DistillationConfig()
    config.alpha_schedule = "linaer"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(PlanError, match="did you mean 'linear'"):
        config.__post_init__()


def test_a_recipe_takes_them_and_refuses_what_cannot_hold():
    make_stage("distill.logits", {"divergences": TWO, "alpha_schedule": "linear", "temperature_schedule": "cosine"})
    for options, message in (
        ({"divergences": TWO, "beta": 0.3}, "give one"),
        ({"divergences": TWO, "teacher_cache": {"k": 8}}, "a teacher cache allows forward_kl alone, got divergences"),
        ({"temperature_schedule": "linear", "teacher_cache": {"k": 8}}, "a teacher cache holds one temperature"),
        ({"divergences": TWO, "vocabulary": "universal", "teacher": "other"}, "has a divergence of its own"),
    ):
        with pytest.raises(RecipeError, match=message):
            make_stage("distill.logits", options)
