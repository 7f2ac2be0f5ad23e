"""Laws of the distillation losses, and agreement with a loop over tokens in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import distillation as reference
from torch.testing import assert_close

from hf_slim.distillation import losses
from hf_slim.distillation.losses import kl_divergence, label_cross_entropy, positions

DIVERGENCES = ("forward_kl", "reverse_kl")


def logits(tokens=7, vocab=11, seed=0, dtype=torch.float64, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, vocab, generator=generator, dtype=torch.float64) * spread).to(dtype)


KEEP = torch.tensor([True, False, True, True, False, True, True])


@pytest.fixture(params=[1, 3, 1000], ids=lambda rows: f"chunks of {rows}")
def chunked(request, monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", request.param * 11)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_kl_matches_reference(divergence, temperature):
    s, t = logits(seed=1), logits(seed=2)
    expected = reference.kl(s.numpy(), t.numpy(), KEEP.numpy(), temperature, divergence)
    assert kl_divergence(s, t, KEEP, temperature, divergence).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.usefixtures("chunked")
def test_cross_entropy_matches_reference():
    s, y = logits(seed=1), torch.tensor([3, -100, 0, 10, -100, 5, 5])
    expected = reference.cross_entropy(s.numpy(), y.numpy(), KEEP.numpy())
    assert label_cross_entropy(s, y, KEEP).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_kl_gradient_matches_autograd(divergence, temperature):
    t = logits(seed=2)
    ours, naive = logits(seed=1).requires_grad_(), logits(seed=1).requires_grad_()
    (3 * kl_divergence(ours, t, KEEP, temperature, divergence)).backward()
    p, q = (t / temperature).softmax(-1), (naive / temperature).softmax(-1)
    a, b = (p, q) if divergence == "forward_kl" else (q, p)
    (3 * temperature**2 * (a * (a.log() - b.log())).sum(-1)[KEEP].sum()).backward()
    assert_close(ours.grad, naive.grad, rtol=1e-10, atol=1e-12)
    assert (ours.grad[~KEEP] == 0).all()


@pytest.mark.usefixtures("chunked")
def test_cross_entropy_gradient_matches_autograd():
    y = torch.tensor([3, -100, 0, 10, -100, 5, 5])
    ours, naive = logits(seed=1).requires_grad_(), logits(seed=1).requires_grad_()
    label_cross_entropy(ours, y, KEEP).backward()
    torch.nn.functional.cross_entropy(naive, y, reduction="sum").backward()
    assert_close(ours.grad, naive.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_kl_is_zero_only_for_equal_distributions(divergence):
    s = logits(seed=1, dtype=torch.float32).requires_grad_()
    loss = kl_divergence(s, s.detach().clone(), KEEP, 2.0, divergence)
    loss.backward()
    assert loss.item() == 0
    assert (s.grad == 0).all()
    other = s.detach().clone()
    other[0, 0] += 0.1
    assert kl_divergence(s, other, KEEP, 2.0, divergence).item() > 1e-5
    other = s.detach().clone()
    other[1] = logits(seed=5, dtype=torch.float32)[1]  # token 1 is not kept
    assert kl_divergence(s, other, KEEP, 2.0, divergence).item() == 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_kl_ignores_a_shift_of_the_logits(divergence):
    s, t = logits(seed=1), logits(seed=2)
    shift = torch.arange(7, dtype=torch.float64)[:, None] * 10
    expected = kl_divergence(s, t, KEEP, 1.5, divergence)
    assert_close(kl_divergence(s + shift, t - 2 * shift, KEEP, 1.5, divergence), expected, rtol=1e-10, atol=1e-10)


def test_divergences_mirror_each_other_and_differ():
    s, t = logits(seed=1), logits(seed=2)
    assert_close(kl_divergence(s, t, KEEP, 2.0, "reverse_kl"), kl_divergence(t, s, KEEP, 2.0, "forward_kl"))
    assert abs(kl_divergence(s, t, KEEP, 2.0, "reverse_kl") - kl_divergence(s, t, KEEP, 2.0, "forward_kl")) > 0.1


def test_high_temperature_tends_to_half_the_variance_of_the_difference():
    """Hinton et al. 2015, section 2.1: T² KL -> Σ (s - t)² / 2V for centred logits; holds only with the factor T²."""
    s, t = logits(seed=1), logits(seed=2)
    difference = s - t
    expected = (difference - difference.mean(-1, keepdim=True)).square().mean(-1)[KEEP].sum() / 2
    assert kl_divergence(s, t, KEEP, 1e4).item() == pytest.approx(expected.item(), rel=1e-2)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bfloat16_logits_are_computed_in_float32(divergence):
    s, t = logits(seed=1, dtype=torch.bfloat16), logits(seed=2, dtype=torch.bfloat16)
    exact = kl_divergence(s.double(), t.double(), KEEP, 2.0, divergence)
    s.requires_grad_()
    loss = kl_divergence(s, t, KEEP, 2.0, divergence)
    loss.backward()
    assert loss.dtype == torch.float32
    assert s.grad.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_words_that_the_teacher_excludes_count_as_probability_zero():
    """Teachers with padded vocabularies put -inf on the padding."""
    s, t = logits(seed=1).requires_grad_(), logits(seed=2)
    t[:, -1] = -torch.inf
    expected = reference.kl(s.detach().numpy(), t.numpy(), KEEP.numpy(), 2.0, "forward_kl")
    loss = kl_divergence(s, t, KEEP, 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(expected)
    assert torch.isfinite(s.grad).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nothing_kept_gives_zero_with_a_gradient(divergence):
    s = logits(seed=1).requires_grad_()
    nothing = torch.zeros(7, dtype=torch.bool)
    (
        kl_divergence(s, logits(seed=2), nothing, 2.0, divergence) + label_cross_entropy(s, KEEP.long(), nothing)
    ).backward()
    assert (s.grad == 0).all()


def test_causal_positions_look_at_the_next_label():
    labels = torch.tensor([[5, 6, -100, 7], [-100, 8, 9, -100]])
    targets, keep = positions((2, 4), labels, shift=True)
    assert keep.view(2, 4).tolist() == [[True, False, True, False], [True, True, False, False]]
    assert targets[keep].tolist() == [6, 7, 8, 9]


def test_unshifted_positions_look_at_their_own_label():
    labels = torch.tensor([[5, -100], [-100, 9]])
    targets, keep = positions((2, 2), labels, shift=False)
    assert targets[keep].tolist() == [5, 9]


def test_positions_without_labels_follow_the_mask():
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert positions((2, 3), None, mask, shift=True)[1].tolist() == [True, True, False, False, True, True]
    assert positions((2, 3), shift=True)[1].all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_are_the_same_whatever_the_padding(side):
    labels = np.array([[4, 5, 6]])
    width = ((0, 0), (2, 0) if side == "left" else (0, 2))
    padded = torch.from_numpy(np.pad(labels, width, constant_values=-100))
    mask = torch.from_numpy(np.pad(np.ones_like(labels), width))
    targets, keep = positions((1, 5), padded, mask, shift=True)
    assert targets[keep].tolist() == [5, 6]
