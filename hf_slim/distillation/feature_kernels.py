"""Distances between what happens inside a student and inside its teacher: sums over positions, by their weights.

    hidden, mse      |P h_s - h_t|² / width                        TinyBERT (arXiv:1909.10351); P: a learned projection
    hidden, cosine   1 - cos(P h_s, h_t)                           DistilBERT (arXiv:1910.01108)
    attention, kl    mean over heads of KL(a_t || a_s)             MiniLM (arXiv:2002.10957)
    attention, mse   mean over heads of Σ_keys (a_s - a_t)²        TinyBERT, of the maps instead of the scores
    relation         mean over heads of KL(R_t || R_s)             MiniLMv2 (arXiv:2012.15828, eq. 2)
                     R = softmax(X Xᵀ / √d) over the real positions, X [length, d] a head's share of the queries,
                     of the keys or of the values

Each is zero if and only if both agree wherever the weight is not zero (P included; cosine: up to a positive factor).
What padding holds has no effect. R compares positions with each other and needs no equal widths, only a number of heads
that divides both; queries and keys are taken before the rotary embedding.

Shapes: hidden [tokens, width], maps [batch, heads, query, key], X [batch, length, heads · d], weights [batch, length].
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cosine_similarity


def hidden_distance(
    student: Float[Tensor, "tokens width"],
    teacher: Float[Tensor, "tokens width"],
    weights: Float[Tensor, " tokens"],
    distance: str,
) -> Float[Tensor, ""]:
    """Sum over tokens of the distance between hidden states; `distance` is "mse" or "cosine"."""
    here = weights.nonzero().squeeze(1)
    s, t = student[here].float(), teacher[here].float()
    rows = (s - t).square().mean(1) if distance == "mse" else 1 - cosine_similarity(s, t, dim=1)
    return rows @ weights[here]


def attention_distance(
    student: Float[Tensor, "batch heads query key"],
    teacher: Float[Tensor, "batch heads query key"],
    weights: Float[Tensor, "batch query"],
    distance: str,
) -> Float[Tensor, ""]:
    """Sum over queries of the distance between attention maps; `distance` is "kl" or "mse"."""
    s, t = student.float(), teacher.float()
    if distance == "mse":
        rows = (s - t).square().sum(-1)
    else:
        tiny = torch.finfo(torch.float32).tiny  # dropout leaves zeros in the student's map
        rows = (t * (t.clamp(min=tiny).log() - s.clamp(min=tiny).log())).sum(-1)
    return (rows.mean(1) * weights).sum()


def relation_distance(
    student: Float[Tensor, "batch length width"],
    teacher: Float[Tensor, "batch length other"],
    weights: Float[Tensor, "batch length"],
    real: Bool[Tensor, "batch length"],
    heads: int,
) -> Float[Tensor, ""]:
    """Sum over positions of KL between the teacher's relations and the student's.

    Args:
        student: queries, keys or values; the width is divided by `heads`.
        teacher: the same of the teacher, of any width divided by `heads`.
        weights: of the positions.
        real: False where there is padding, to which nothing relates.
        heads: relation heads.
    """
    log_s, log_t = _log_relations(student, real, heads), _log_relations(teacher, real, heads)
    p = log_t.exp()
    rows = (p * (log_t - log_s).masked_fill(p == 0, 0.0)).sum(-1)
    return (rows.mean(1) * weights).sum()


def _log_relations(x: Tensor, real: Tensor, heads: int) -> Tensor:
    """log softmax(X Xᵀ / √d), [batch, heads, length, length]; -1e9 stands for -inf, which has no useful gradient."""
    batch, length, width = x.shape
    per_head = x.float().view(batch, length, heads, width // heads).transpose(1, 2)
    scores = per_head @ per_head.transpose(2, 3) * (width // heads) ** -0.5
    return scores.masked_fill(~real[:, None, None, :], -1e9).log_softmax(-1)
