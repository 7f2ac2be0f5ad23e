"""The fused loss is the unfused one, and never holds logits of the whole batch."""

from __future__ import annotations

import architectures
import pytest
import tiny
import torch
import training
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from hf_slim.core.errors import PlanError
from hf_slim.distillation import fused, losses
from hf_slim.distillation.divergences import DIVERGENCES
from hf_slim.distillation.losses import against_labels, against_teacher, sum_over_logits
from hf_slim.distillation.trainer import DistillationConfig, DistillationTrainer

TOKENS, WIDTH, VOCAB = 40, 8, 64


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation puts out."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def problem(dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    hidden, weight, teacher = random(TOKENS, WIDTH), random(VOCAB, WIDTH), random(TOKENS, VOCAB)
    labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
    keep = torch.rand(TOKENS, generator=generator) > 0.3
    return hidden, weight, random(VOCAB) if bias else None, teacher, labels, keep


def terms_of(teacher, labels, divergence="forward_kl"):
    return [(0.7, against_teacher(lambda tokens: teacher[tokens], 2.0, divergence)), (0.3, against_labels(labels))]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", 7 * VOCAB)


def both(hidden, weight, bias, teacher, labels, keep, divergence="forward_kl", weights=None):
    """[(sums, gradients)] of the fused and of the unfused loss."""
    results = []
    for fuse in (True, False):
        leaves = [None if x is None else x.clone().requires_grad_() for x in (hidden, weight, bias)]
        terms = terms_of(teacher, labels, divergence)
        if fuse:
            sums = fused.sum_over_hidden(*leaves, keep, terms, weights)
        else:
            sums = sum_over_logits(torch.nn.functional.linear(*leaves), keep, terms, weights)
        (3 * sums[0]).backward()
        results.append((sums.detach(), [x.grad for x in leaves if x is not None]))
    return results


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_fused_is_unfused(divergence, bias):
    (ours, gradients), (theirs, expected) = both(*problem(bias=bias), divergence, torch.linspace(0, 2, TOKENS))
    assert_close(ours, theirs, rtol=1e-5, atol=0)
    for a, b in zip(gradients, expected, strict=True):
        assert training.relative(a, b) < 1e-5


@pytest.mark.usefixtures("small_chunks")
def test_bfloat16_rounds_as_the_unfused_loss_does():
    (ours, gradients), (theirs, expected) = both(*problem(torch.bfloat16))
    assert ours.dtype == torch.float32
    assert_close(ours, theirs, rtol=1e-3, atol=0)
    exact = both(*(x.double() if x.is_floating_point() else x for x in problem(torch.bfloat16)))[1][1]
    for a, b, c in zip(gradients, expected, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert training.relative(a.double(), c) < 1.5 * training.relative(b.double(), c) < 0.1


def test_autocast_computes_as_autocast_does():
    with torch.autocast("cpu", torch.bfloat16):
        (ours, gradients), (theirs, expected) = both(*problem())
    assert_close(ours, theirs, rtol=1e-4, atol=0)
    for a, b in zip(gradients, expected, strict=True):
        assert a.dtype == torch.float32
        assert training.relative(a, b) < 0.01
    assert abs(ours[0] - both(*problem())[0][0][0]) > 1e-5  # it did round


def test_nothing_kept_gives_zero_with_a_gradient():
    hidden, weight, bias, teacher, labels, keep = problem()
    (ours, gradients), _ = both(hidden, weight, bias, teacher, labels, torch.zeros_like(keep))
    assert (ours == 0).all()
    assert all((g == 0).all() for g in gradients)


def test_a_frozen_head_gets_no_gradient_and_a_second_backward_the_same():
    hidden, weight, _, teacher, labels, keep = problem()
    hidden.requires_grad_()
    loss = fused.sum_over_hidden(hidden, weight, None, keep, terms_of(teacher, labels))[0]
    loss.backward(retain_graph=True)
    first = hidden.grad.clone()
    loss.backward()
    assert weight.grad is None
    assert torch.equal(hidden.grad, 2 * first)


@pytest.mark.usefixtures("small_chunks")
def test_no_tensor_is_as_large_as_the_logits():
    hidden, weight, bias, _, labels, keep = problem()
    teacher, seen = torch.nn.Linear(WIDTH, VOCAB), torch.randn(TOKENS, WIDTH)
    terms = [(0.7, against_teacher(fused.teacher_rows(teacher, seen), 2.0)), (0.3, against_labels(labels))]
    hidden.requires_grad_(), weight.requires_grad_()
    with Largest() as largest:
        fused.sum_over_hidden(hidden, weight, bias, keep, terms)[0].backward()
    assert largest.numbers == max(7 * VOCAB, VOCAB * WIDTH)


@pytest.mark.parametrize("name", architectures.KINDS)
def test_models_whose_logits_are_what_their_head_puts_out_are_told_apart(name):
    reason = fused.why_not(architectures.make(name))
    scaled = name == "Gemma 2"
    assert (reason is not None) == scaled
    assert not scaled or "soft cap" in reason


def make(folder, models=None, rows=None, **options):
    models = models or (tiny.llama(), tiny.llama(seed=1, layers=3))
    args = training.arguments(folder, DistillationConfig, **{"max_steps": 1, "alpha": 0.6, **options})
    rows = training.rows() if rows is None else rows
    return DistillationTrainer(*models, args, train_dataset=rows, data_collator=training.Pad())


def gradients(folder, models=None, **options):
    recorded, trainer = training.Gradients(), make(folder, models and models(), **options)
    trainer.add_callback(recorded)
    trainer.train()
    return recorded.steps[0]


def adapted():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    student = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    return student, tiny.llama(seed=1)


PAIRS = {"llama": None, "untied": lambda: (tiny.llama(tied=False), tiny.llama(seed=1)), "lora": adapted}


@pytest.mark.parametrize("models", PAIRS)
def test_the_trainer_fuses_where_it_can_and_gets_the_same_gradient(tmp_path, models, monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", 7 * tiny.VOCABULARY)
    calls = []
    monkeypatch.setattr(fused, "sum_over_hidden", lambda *a, f=fused.sum_over_hidden: calls.append(1) or f(*a))
    plain = gradients(tmp_path, PAIRS[models], fused=False)
    assert not calls
    assert training.relative(gradients(tmp_path, PAIRS[models]), plain) < 1e-5
    assert calls


def test_a_training_step_holds_no_logits(tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", 4 * tiny.VOCABULARY)
    trainer, inputs = make(tmp_path), training.Pad()(training.rows())
    trainer.model.train()
    with Largest() as largest:
        trainer.compute_loss(trainer.model, inputs).backward()
    assert largest.numbers < inputs["input_ids"].numel() * tiny.VOCABULARY


def test_evaluation_hands_out_logits_to_who_asks(tmp_path):
    trainer = make(tmp_path)
    trainer.compute_metrics = lambda prediction: {"width": prediction.predictions.shape[-1]}
    metrics = trainer.evaluate(training.rows())
    assert metrics["eval_width"] == tiny.VOCABULARY
    quiet = make(tmp_path, prediction_loss_only=True).evaluate(training.rows())
    assert quiet["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)


def test_a_model_that_cannot_be_fused_is_refused_if_asked_and_else_trained(tmp_path):
    models = architectures.make("Gemma 2"), architectures.make("Gemma 2", seed=1)
    with pytest.raises(PlanError, match="fused=True is not possible here: Gemma2ForCausalLM changes what its head"):
        make(tmp_path, models, fused=True)
    make(tmp_path, models).train()


def test_a_head_that_is_no_plain_layer_now_is_left_alone():
    head = torch.nn.Linear(2, 3)
    assert fused.is_plain(head)
    handle = head.register_forward_hook(lambda *_: None)
    assert not fused.is_plain(head)
    handle.remove()
    with fused.replaced(head, lambda x: x):
        assert not fused.is_plain(head)
        assert head(1) == 1
    assert fused.is_plain(head)
    assert not fused.is_plain(torch.nn.Identity())
