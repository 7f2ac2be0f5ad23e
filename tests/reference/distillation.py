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
