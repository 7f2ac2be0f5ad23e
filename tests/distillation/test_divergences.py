"""Laws of the divergences and of sparse targets, against loops in double precision and a naive autograd."""

from __future__ import annotations

import math

import pytest
import torch
from reference import distillation as reference
from torch.testing import assert_close

from hf_slim.core.errors import PlanError
from hf_slim.distillation import losses, sampling
from hf_slim.distillation.divergences import row_kernel
from hf_slim.distillation.losses import (
    against_labels,
    against_samples,
    against_teacher,
    against_top_k,
    kl_divergence,
    label_cross_entropy,
    sum_over_logits,
)

CASES = [("forward_kl", 0.5, 0.1), ("reverse_kl", 0.5, 0.1), *(("jsd", b, 0.1) for b in (0.0, 0.2, 0.5, 1.0))]
CASES += [(name, 0.5, skew) for name in ("skewed_kl", "skewed_reverse_kl") for skew in (0.0, 0.1, 0.7)]
KEEP = torch.tensor([True, False, True, True, True])


def logits(seed, tokens=5, vocab=11, dtype=torch.float64):
    return (3 * torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(
        dtype
    )


def naive(s, t, name, beta, skew, temperature=1.0):
    """Each row's divergence, differentiable, in the words of the definition."""
    p, q = (t / temperature).softmax(-1), (s / temperature).softmax(-1)

    def kl(a, b):
        return (torch.xlogy(a, a) - torch.xlogy(a, b)).sum(-1)

    if name == "jsd" and 0 < beta < 1:
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)
    if name in ("forward_kl", "skewed_kl") or (name == "jsd" and beta == 0):
        share = skew if name == "skewed_kl" else 0
        return kl(p, share * p + (1 - share) * q)
    share = skew if name == "skewed_reverse_kl" else 0
    return kl(q, (1 - share) * p + share * q)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_match_the_definition(case):
    s, t = logits(1), logits(2)
    loss, _ = row_kernel(*case)(t.log_softmax(-1), s.log_softmax(-1))
    p, q = t.softmax(-1).numpy(), s.softmax(-1).numpy()
    expected = [reference.divergence(a, b, *case) for a, b in zip(p, q, strict=True)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("chunk", [11, 22, 10**6])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_match_autograd_with_temperature_and_weights(case, chunk, monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", chunk)
    name, beta, skew = case
    t, weights = logits(2), torch.tensor([1.0, 5.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    ours, theirs = logits(1).requires_grad_(), logits(1).requires_grad_()
    loss = kl_divergence(ours, t, KEEP, 1.7, name, beta=beta, skew=skew, weights=weights)
    (3 * loss).backward()
    expected = 1.7**2 * (naive(theirs, t, name, beta, skew, 1.7) * weights)[KEEP].sum()
    (3 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_zero_if_and_only_if_equal(case):
    kernel, s = row_kernel(*case), logits(1, dtype=torch.float32)
    loss, gradient = kernel((s + 4).log_softmax(-1), s.log_softmax(-1))
    assert loss.abs().max() < 1e-6
    assert gradient.abs().max() < 1e-6
    other = s.clone()
    other[0, 3] += 0.5
    moved = kernel(other.double().log_softmax(-1), s.double().log_softmax(-1))[0]
    assert moved[0] > 1e-6
    assert moved[1:].abs().max() < 1e-12


def test_jsd_is_symmetric_and_bounded_at_one_half_alone():
    p, q = logits(2).log_softmax(-1), logits(1).log_softmax(-1)
    half, other = row_kernel("jsd", 0.5), row_kernel("jsd", 0.2)
    assert_close(half(p, q)[0], half(q, p)[0])
    assert (other(p, q)[0] - other(q, p)[0]).abs().max() > 1e-3
    assert_close(other(p, q)[0], row_kernel("jsd", 0.8)(q, p)[0])
    far = torch.eye(11, dtype=torch.float64).mul(1e3)[:5].log_softmax(-1)
    assert half(far, far.roll(1, 0))[0].tolist() == pytest.approx([math.log(2)] * 5)


def test_jsd_tends_to_the_two_divergences():
    p, q = logits(2).log_softmax(-1), logits(1).log_softmax(-1)
    for beta, limit in ((1e-5, "forward_kl"), (1 - 1e-5, "reverse_kl")):
        assert_close(
            row_kernel("jsd", beta)(p, q)[0] / (beta * (1 - beta)), row_kernel(limit)(p, q)[0], rtol=1e-2, atol=0
        )


@pytest.mark.parametrize("name", ["skewed_kl", "skewed_reverse_kl"])
def test_skewed_divergences_are_bounded_where_plain_ones_are_not(name):
    far = torch.eye(11, dtype=torch.float64).mul(1e3)[:5].log_softmax(-1)
    assert row_kernel(name, skew=0.1)(far, far.roll(1, 0))[0].tolist() == pytest.approx([-math.log(0.1)] * 5)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c[0] != "reverse_kl" and c[1] != 1 and c[:3:2] != ("skewed_reverse_kl", 0.0)], ids=str
)
def test_words_that_the_teacher_excludes_have_probability_zero(case):
    s, t = logits(1).requires_grad_(), logits(2)
    t[:, -1] = -torch.inf
    name, beta, skew = case
    loss = kl_divergence(s, t, KEEP, 1.0, name, beta=beta, skew=skew)
    loss.backward()
    assert loss.item() == pytest.approx(naive(s, t, name, beta, skew)[KEEP].sum().item(), rel=1e-9)
    assert torch.isfinite(s.grad).all()


def test_the_teacher_is_imitated_alike_whatever_order_tokens_come_in():
    s, t, order = logits(1).requires_grad_(), logits(2), torch.tensor([3, 1, 4, 0, 2])
    plain = torch.autograd.grad(kl_divergence(s, t, KEEP, 2.0, "jsd"), s)[0]
    moved = torch.autograd.grad(kl_divergence(s[order], t[order], KEEP[order], 2.0, "jsd"), s)[0]
    assert_close(moved, plain)


def test_choices_that_make_no_sense_are_refused_at_once():
    with pytest.raises(PlanError) as caught:
        row_kernel("forward-kl", beta=1.5, skew=1.0)
    assert len(caught.value.problems) == 3
    assert "did you mean 'forward_kl'" in caught.value.problems[0]


def top_k(s, t, k, temperature=1.0):
    return sum_over_logits(s, KEEP, [(1.0, against_top_k(*sampling.top(t, k, temperature), temperature))])[0]


@pytest.mark.parametrize("k", [1, 4, 10])
def test_top_k_is_kl_with_all_other_words_as_one(k):
    s, t = logits(1).requires_grad_(), logits(2)
    loss = top_k(s, t, k, 1.7)
    p, q = (t / 1.7).softmax(-1).numpy(), (s / 1.7).detach().softmax(-1).numpy()
    words = sampling.top(t, k)[0].tolist()
    expected = 1.7**2 * sum(reference.top_k_kl(p[i], q[i], words[i]) for i in range(5) if KEEP[i])
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    assert torch.autograd.gradcheck(lambda x: top_k(x, t, k, 1.7), s, eps=1e-7, atol=1e-6)


def test_top_k_of_all_words_is_forward_kl():
    s, t = logits(1).requires_grad_(), logits(2)
    full = kl_divergence(s, t, KEEP, 1.0)
    assert_close(top_k(s, t, 11), full)
    assert_close(torch.autograd.grad(top_k(s, t, 11), s)[0], torch.autograd.grad(full, s)[0])


def test_top_k_never_exceeds_forward_kl_and_is_zero_for_equals():
    s, t = logits(1), logits(2)
    values = [top_k(s, t, k).item() for k in (1, 3, 6, 11)]
    assert values == sorted(values)
    assert abs(top_k(t, t, 3).item()) < 1e-12


def test_samples_are_unbiased():
    """The loss is linear in the shares, whose mean is p: its gradient's mean is forward KL's."""
    s, t = logits(1).requires_grad_(), logits(2)
    p, every = t.softmax(-1), torch.arange(11).expand(5, 11)
    loss = sum_over_logits(s, KEEP, [(1.0, against_samples(every, p))])[0]
    full = kl_divergence(s, t, KEEP, 1.0)
    assert_close(torch.autograd.grad(loss, s)[0], torch.autograd.grad(full, s)[0])
    assert_close(loss, full - (p * p.log()).sum(-1)[KEEP].sum())


@pytest.mark.parametrize("exponent", [1.0, 0.6])
def test_drawn_shares_are_the_distribution_in_the_mean(exponent):
    t = logits(2) / 3
    ids, shares = sampling.draw(t, 40_000, 2.0, exponent, torch.Generator().manual_seed(0))
    drawn = torch.zeros_like(t).scatter_add_(1, ids, shares)
    assert (drawn - (t / 2).softmax(-1)).abs().max() < 0.01
    if exponent == 1:
        assert_close(shares, torch.full_like(shares, 1 / 40_000))


def test_sampled_gradient_matches_autograd():
    ids = torch.tensor([[1, 1, 4]] * 5)
    shares = torch.rand(5, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ours, theirs = logits(1).requires_grad_(), logits(1).requires_grad_()
    sum_over_logits(ours, KEEP, [(1.0, against_samples(ids, shares, 1.7))])[0].backward()
    log_q = (theirs / 1.7).log_softmax(-1)
    (-(1.7**2) * (shares * log_q.gather(1, ids)).sum(1)[KEEP].sum()).backward()
    assert_close(ours.grad, theirs.grad)


def test_one_pass_over_two_losses_is_both():
    s, t, y = logits(1).requires_grad_(), logits(2), torch.tensor([3, 0, 1, 10, 2])
    terms = [(0.7, against_teacher(lambda tokens: t[tokens], 2.0, "jsd")), (0.3, against_labels(y))]
    sums = sum_over_logits(s, KEEP, terms)
    parts = [kl_divergence(s, t, KEEP, 2.0, "jsd"), label_cross_entropy(s, y, KEEP)]
    expected = 0.7 * parts[0] + 0.3 * parts[1]
    assert_close(sums, torch.stack([expected, *parts]))
    assert_close(torch.autograd.grad(sums[0], s)[0], torch.autograd.grad(expected, s)[0])
