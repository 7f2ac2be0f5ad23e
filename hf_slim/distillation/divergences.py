"""Divergences between a teacher's and a student's distribution, each with its gradient in closed form.

With p of the teacher, q of the student, both softmaxes over the vocabulary, z the student's logits and d = dL/dq,
the chain rule through the softmax is dL/dz = q (d - Σ_v q d). Per row, in nats:

    forward_kl           KL(p || q)                                       dL/dz = q - p
    reverse_kl           KL(q || p)                                       d = log(q / p)
    jsd                  β KL(p || m) + (1-β) KL(q || m), m = βp + (1-β)q   d = (1-β) log(q / m)
    skewed_kl            KL(p || m), m = λp + (1-λ)q                      d = -(1-λ) p / m
    skewed_reverse_kl    KL(q || m), m = (1-λ)p + λq                      d = log(q / m) - λ q / m

Sources: Hinton et al. 2015, arXiv:1503.02531; reverse KL as in MiniLLM, arXiv:2306.08543; generalised Jensen-Shannon
divergence as in GKD, arXiv:2306.13649, with TRL's convention that β = 0 stands for forward and β = 1 for reverse KL
(both are limits of jsd / β(1-β), whereas jsd itself tends to zero there); skewed ones of DistiLLM, arXiv:2402.03898.

Shapes: log_p, log_q [rows, vocab], normalised; a loss [rows] and a gradient [rows, vocab] come back. Where p = 0 the
teacher may hold -inf: 0 log 0 = 0. Everything mixed with a positive share of p stays finite where q = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from hf_slim.core.errors import PlanError, nearest

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl", "skewed_reverse_kl"]
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)
RowKernel: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def row_kernel(divergence: str, beta: float = 0.5, skew: float = 0.1) -> RowKernel:
    """The kernel (log_p, log_q) -> (loss of each row, its gradient with respect to the logits of q).

    Args:
        divergence: one of `DIVERGENCES`.
        beta: of "jsd" alone, the teacher's share of the mixture, 0 to 1; 0 is forward KL, 1 reverse KL.
        skew: of "skewed_kl" and "skewed_reverse_kl" alone, the share mixed in, 0 <= skew < 1; 0 is plain KL.

    Raises:
        PlanError: see `divergence_problems`.
    """
    problems = divergence_problems(divergence, beta, skew)
    if problems:
        raise PlanError(problems)
    kernels: dict[str, RowKernel] = {
        "forward_kl": forward_kl,
        "reverse_kl": reverse_kl,
        "jsd": {0: forward_kl, 1: reverse_kl}.get(beta, lambda log_p, log_q: jsd(log_p, log_q, beta)),
        "skewed_kl": partial(skewed_kl, skew=skew) if skew else forward_kl,
        "skewed_reverse_kl": partial(skewed_reverse_kl, skew=skew) if skew else reverse_kl,
    }
    return kernels[divergence]


def divergence_problems(divergence: str, beta: float, skew: float) -> list[str]:
    """What is wrong with the choice of a divergence; empty if nothing is."""
    problems = []
    if divergence not in DIVERGENCES:
        problems.append(f"divergence: there is no {divergence!r}; {nearest(str(divergence), DIVERGENCES)}")
    if not 0 <= beta <= 1:
        problems.append(f"beta is the teacher's share of jsd's mixture, from 0 to 1, got {beta}; 0.5 treats both alike")
    if not 0 <= skew < 1:
        problems.append(
            f"skew is the share mixed in by skewed divergences, at least 0 and below 1, got {skew}; try 0.1"
        )
    return problems


def is_infinite(divergence: str, beta: float, skew: float) -> bool:
    """Whether a word that the student deems possible, and the teacher does not, makes the loss infinite."""
    return (
        divergence == "reverse_kl" or (divergence, beta) == ("jsd", 1) or (divergence, skew) == ("skewed_reverse_kl", 0)
    )


def forward_kl(
    log_p: Float[Tensor, "rows vocab"], log_q: Float[Tensor, "rows vocab"]
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows vocab"]]:
    """KL(p || q): the student covers all that the teacher deems likely."""
    p = log_p.exp()
    loss = _expectation(p, log_p - log_q)
    return loss, log_q.exp().sub_(p)


def reverse_kl(
    log_p: Float[Tensor, "rows vocab"], log_q: Float[Tensor, "rows vocab"]
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows vocab"]]:
    """KL(q || p): the student concentrates on what the teacher deems likely."""
    q = log_q.exp()
    slope = (log_q - log_p).masked_fill_(q == 0, 0.0)
    return (q * slope).sum(-1), _through_softmax(q, slope)


def jsd(
    log_p: Float[Tensor, "rows vocab"], log_q: Float[Tensor, "rows vocab"], beta: float
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows vocab"]]:
    """β KL(p || m) + (1-β) KL(q || m) with m = βp + (1-β)q; symmetric in p and q for β = 1/2, and never above log 2."""
    p, q, log_m = log_p.exp(), log_q.exp(), _log_mixture(log_p, log_q, beta)
    slope = (log_q - log_m).masked_fill_(q == 0, 0.0)
    loss = beta * _expectation(p, log_p - log_m) + (1 - beta) * (q * slope).sum(-1)
    return loss, _through_softmax(q, slope.mul_(1 - beta))


def skewed_kl(
    log_p: Float[Tensor, "rows vocab"], log_q: Float[Tensor, "rows vocab"], skew: float
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows vocab"]]:
    """KL(p || λp + (1-λ)q): bounded by -log λ, so that words the student misses cannot dominate."""
    p, log_ratio = log_p.exp(), log_p - _log_mixture(log_p, log_q, skew)
    loss = _expectation(p, log_ratio)
    slope = log_ratio.exp_().masked_fill_(p == 0, 0.0).mul_(skew - 1)
    return loss, _through_softmax(log_q.exp(), slope)


def skewed_reverse_kl(
    log_p: Float[Tensor, "rows vocab"], log_q: Float[Tensor, "rows vocab"], skew: float
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows vocab"]]:
    """KL(q || (1-λ)p + λq): bounded by -log λ."""
    q = log_q.exp()
    log_ratio = (log_q - _log_mixture(log_q, log_p, skew)).masked_fill_(q == 0, 0.0)
    loss = (q * log_ratio).sum(-1)
    return loss, _through_softmax(q, log_ratio.sub_(log_ratio.exp(), alpha=skew))


def _log_mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """log(share · a + (1 - share) · b), computed in logarithms."""
    return log_b if share == 0 else torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def _expectation(p: Tensor, values: Tensor) -> Tensor:
    """Σ_v p v per row, where what has no probability counts nothing, though it be infinite; overwrites no argument."""
    return (values * p).masked_fill_(p == 0, 0.0).sum(-1)


def _through_softmax(q: Tensor, slope: Tensor) -> Tensor:
    """The gradient with respect to logits, of the one with respect to q; overwrites q."""
    mean = (q * slope).sum(-1, keepdim=True)
    return q.mul_(slope.sub_(mean))
