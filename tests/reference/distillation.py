"""Slow, obvious oracles for the distillation losses: numpy in double precision, one token after another."""

from __future__ import annotations

import numpy as np


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    scaled = np.exp((logits - logits.max()) / temperature)
    return scaled / scaled.sum()


def kl(student: np.ndarray, teacher: np.ndarray, keep: np.ndarray, temperature: float, divergence: str) -> float:
    """Sum over kept tokens of T² KL in nats; "forward_kl" is KL(teacher || student)."""
    total = 0.0
    for s, t, kept in zip(student, teacher, keep, strict=True):
        p, q = softmax(t, temperature), softmax(s, temperature)
        if divergence == "reverse_kl":
            p, q = q, p
        for a, b in zip(p, q, strict=True):
            if kept and a > 0:
                total += a * np.log(a / b) * temperature**2
    return total


def cross_entropy(student: np.ndarray, targets: np.ndarray, keep: np.ndarray) -> float:
    """Sum over kept tokens of -log softmax(student)[target]."""
    return sum(-np.log(softmax(s, 1.0)[y]) for s, y, kept in zip(student, targets, keep, strict=True) if kept)


def causal_loss(
    student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, temperature: float, alpha: float
) -> float:
    """alpha · mean T² KL(teacher || student) + (1 - alpha) · mean cross entropy, [batch, sequence, vocab] logits.

    The output at position i is compared where label i + 1 is given.
    """
    kl_total, label_total, count = 0.0, 0.0, 0
    for row in range(labels.shape[0]):
        for i in range(labels.shape[1] - 1):
            if labels[row, i + 1] == -100:
                continue
            here = (student[row, i : i + 1], teacher[row, i : i + 1], np.array([True]))
            kl_total += kl(*here, temperature, "forward_kl")
            label_total += cross_entropy(student[row, i : i + 1], labels[row, i + 1 : i + 2], np.array([True]))
            count += 1
    return (alpha * kl_total + (1 - alpha) * label_total) / max(count, 1)


def divergence(p: np.ndarray, q: np.ndarray, name: str, beta: float, skew: float) -> float:
    """A divergence of two distributions over words, word by word; 0 log 0 = 0."""

    def kl_of(a: np.ndarray, b: np.ndarray) -> float:
        return sum(x * np.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    if name == "forward_kl" or (name == "jsd" and beta == 0):
        return kl_of(p, q)
    if name == "reverse_kl" or (name == "jsd" and beta == 1):
        return kl_of(q, p)
    if name == "jsd":
        m = beta * p + (1 - beta) * q
        return beta * kl_of(p, m) + (1 - beta) * kl_of(q, m)
    if name == "skewed_kl":
        return kl_of(p, skew * p + (1 - skew) * q)
    return kl_of(q, (1 - skew) * p + skew * q)


def top_k_kl(p: np.ndarray, q: np.ndarray, words: list[int]) -> float:
    """KL(p || q) when all other words are one."""
    others = [v for v in range(len(p)) if v not in words]
    a, b = ([*x[words], x[others].sum()] for x in (p, q))
    return sum(x * np.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


def attention_kl(student: np.ndarray, teacher: np.ndarray, weights: np.ndarray) -> float:
    """Σ over queries of weight · mean over heads of KL(teacher || student), maps [batch, heads, query, key]."""
    total = 0.0
    for b, i in np.ndindex(weights.shape):
        for h in range(student.shape[1]):
            for s, t in zip(student[b, h, i], teacher[b, h, i], strict=True):
                if t > 0:
                    total += weights[b, i] * t * np.log(t / s) / student.shape[1]
    return total


def relation_maps(x: np.ndarray, real: np.ndarray, heads: int) -> np.ndarray:
    """softmax(X Xᵀ / √d) over real positions, [batch, heads, length, length] of x [batch, length, heads · d]."""
    batch, length, width = x.shape
    d = width // heads
    maps = np.zeros((batch, heads, length, length))
    for b, h, i in np.ndindex(batch, heads, length):
        own = x[b, :, h * d : (h + 1) * d]
        scores = np.array([own[i] @ own[j] / np.sqrt(d) for j in range(length)])
        maps[b, h, i, real[b]] = softmax(scores[real[b]], 1.0)
    return maps
