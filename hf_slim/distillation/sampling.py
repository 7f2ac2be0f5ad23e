"""Sparse targets: a few words of a teacher's distribution, in place of all its logits (RS-KD, arXiv:2503.16870).

    top k     the k most likely words and their log-probabilities; what they lack of 1 is the tail's
    sampled   v_1..v_n ~ proposal ∝ p^τ, each with the share w_i = p(v_i) / (n · proposal(v_i))

Σ_i w_i onehot(v_i) is p in the mean, so that the gradient of the cross entropy with it is that of forward KL in the
mean; with τ = 1 each share is 1/n. Words drawn twice have both shares. Cutting at k without a tail is biased instead:
the student learns that nothing else is possible.

Shapes: logits [tokens, vocab] -> ids [tokens, k or n], log-probabilities or shares of the same shape.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def top(
    logits: Float[Tensor, "tokens vocab"], k: int, temperature: float = 1.0
) -> tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
    """The k most likely words of each token, the most likely first, and their log-probabilities.

    Args:
        logits: the teacher's.
        k: 1 <= k <= vocab.
        temperature: T > 0, divides the logits.
    """
    log_p = _log_probabilities(logits, temperature)
    values, ids = log_p.topk(k, dim=-1)
    return ids, values


def draw(
    logits: Float[Tensor, "tokens vocab"],
    draws: int,
    temperature: float = 1.0,
    exponent: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "tokens draws"], Float[Tensor, "tokens draws"]]:
    """Words drawn with replacement, and the share of each.

    Args:
        logits: the teacher's.
        draws: n >= 1; 50 in the paper.
        temperature: T > 0, divides the logits.
        exponent: τ of the proposal p^τ; below 1 rare words are drawn more often and weigh less.
        generator: of the random numbers.
    """
    log_p = _log_probabilities(logits, temperature)
    proposal = (log_p * exponent).softmax(-1)
    ids = proposal.multinomial(draws, replacement=True, generator=generator)
    return ids, log_p.gather(1, ids).exp_() / (draws * proposal.gather(1, ids))


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
