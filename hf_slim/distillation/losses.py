"""Distillation losses over tokens (Hinton et al. 2015, arXiv:1503.02531; reverse KL as in MiniLLM, arXiv:2306.08543).

With p = softmax(t / T) of the teacher's logits t and q = softmax(s / T) of the student's logits s, per kept token

    forward KL   T² Σ_v p (log p - log q)      dL/ds = T (q - p)
    reverse KL   T² Σ_v q (log q - log p)      dL/ds = T q (log q - log p - KL(q || p))
    label loss   -log softmax(s)[y]            dL/ds = softmax(s) - onehot(y)

all in nats; T² keeps the size of the gradients when the temperature changes. Every loss is a *sum* over the kept
tokens, because only the caller knows how many the whole batch holds, over all micro-batches and all processes.

Shapes: logits [tokens, vocab], keep [tokens]. Tokens that are not kept neither count nor receive a gradient.

Where we differ from an autograd one-liner, and why: a batch of 8192 tokens over 150 000 words is 5 GB in fp32, and
autograd would hold five such arrays. Loss and gradient are computed here together, a chunk of tokens at a time in fp32
(fp64 for fp64 input); what survives is one gradient in the dtype of the student's logits. No second derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import log_softmax, pad

Divergence = Literal["forward_kl", "reverse_kl"]
IGNORED = -100  # the label that transformers and torch give to a position without a target

# 2**23 fp32 numbers (32 MiB) a temporary: large enough to keep the cores busy, small beside any batch of logits
_CHUNK_ELEMENTS = 2**23


def positions(
    shape: tuple[int, ...],
    labels: Int[Tensor, "*batch"] | None = None,
    attention_mask: Tensor | None = None,
    *,
    shift: bool,
) -> tuple[Int[Tensor, " tokens"] | None, Bool[Tensor, " tokens"]]:
    """Target and weight of each position, the same whatever the padding.

    A position counts if it has a target (where labels are given) and is no padding itself (where a mask is given).

    Args:
        shape: shape of the logits without the vocabulary: [batch, sequence], or [batch] for sequence classification.
        labels: class indices of that shape; -100 marks a position without a target.
        attention_mask: nonzero where the input is real, of that shape.
        shift: True if the output at position i predicts label i + 1 (causal language models).

    Returns:
        targets [tokens] (None without labels) and keep [tokens], with tokens = prod(shape).
    """
    targets, keep = None, None
    if labels is not None:
        targets = pad(labels[:, 1:], (0, 1), value=IGNORED) if shift else labels
        keep = targets != IGNORED
    if attention_mask is not None:
        real = attention_mask != 0
        keep = real if keep is None else keep & real
    if keep is None:
        keep = torch.ones(shape, dtype=torch.bool)
    return None if targets is None else targets.reshape(-1), keep.reshape(-1)


def kl_divergence(
    student: Float[Tensor, "tokens vocab"],
    teacher: Float[Tensor, "tokens vocab"],
    keep: Bool[Tensor, " tokens"],
    temperature: float = 2.0,
    divergence: Divergence = "forward_kl",
) -> Float[Tensor, ""]:
    """Sum over kept tokens of T² KL, in nats; 0 if and only if both distributions agree on every kept token.

    Args:
        student: logits that receive the gradient.
        teacher: logits taken as constants; -inf is allowed and means probability zero.
        keep: True for the tokens that count.
        temperature: T > 0, divides both logits.
        divergence: "forward_kl" is KL(teacher || student), "reverse_kl" is KL(student || teacher).
    """
    row_loss = _forward_kl if divergence == "forward_kl" else _reverse_kl

    def chunk_loss(s: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        log_q = log_softmax(s / temperature, dim=-1)
        log_p = log_softmax(teacher[tokens].to(s.dtype) / temperature, dim=-1)
        loss, gradient = row_loss(log_p, log_q)
        return loss.sum() * temperature**2, gradient.mul_(temperature)

    return _ChunkedSum.apply(student, keep.to(student.device), chunk_loss)


def label_cross_entropy(
    student: Float[Tensor, "tokens vocab"],
    targets: Int[Tensor, " tokens"],
    keep: Bool[Tensor, " tokens"],
) -> Float[Tensor, ""]:
    """Sum over kept tokens of the cross entropy with the labels, in nats, at temperature 1.

    Args:
        student: logits that receive the gradient.
        targets: class indices, 0 <= target < vocab wherever `keep` is True.
        keep: True for the tokens that count.
    """

    def chunk_loss(s: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        log_q = log_softmax(s, dim=-1)
        y = targets[tokens].unsqueeze(1)
        loss = -log_q.gather(1, y).sum()
        return loss, log_q.exp_().scatter_add_(1, y, log_q.new_full((), -1.0).expand_as(y))

    return _ChunkedSum.apply(student, keep.to(student.device), chunk_loss)


def _forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) per row and its gradient with respect to the logits of q."""
    p = log_p.exp()
    loss = ((log_p - log_q) * p).masked_fill_(p == 0, 0.0).sum(-1)  # 0 log 0 = 0, also where log p = -inf
    return loss, log_q.exp().sub_(p)


def _reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p) per row and its gradient with respect to the logits of q."""
    q = log_q.exp()
    log_ratio = (log_q - log_p).masked_fill_(q == 0, 0.0)
    loss = (q * log_ratio).sum(-1, keepdim=True)
    return loss.squeeze(-1), q.mul_(log_ratio.sub_(loss))


class _ChunkedSum(torch.autograd.Function):
    """Sum of a per-token loss whose gradient is known in closed form, a chunk of kept tokens at a time."""

    @staticmethod
    def forward(
        ctx,
        logits: Tensor,
        keep: Tensor,
        chunk_loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        total = logits.new_zeros((), dtype=dtype)
        gradient = torch.zeros_like(logits) if ctx.needs_input_grad[0] else None
        rows = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
        for tokens in keep.nonzero().squeeze(1).split(rows):
            loss, chunk_gradient = chunk_loss(logits[tokens].to(dtype), tokens)
            total += loss
            if gradient is not None:
                gradient[tokens] = chunk_gradient.to(gradient.dtype)
        ctx.gradient = gradient
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream: Tensor) -> tuple[Tensor, None, None]:
        # scaled out of place: a second backward through a retained graph must find the gradient unscaled
        return ctx.gradient * upstream[0].to(ctx.gradient.dtype), None, None
