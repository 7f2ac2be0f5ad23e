"""Slow, obvious float64 versions of the evaluation kernels, one position at a time."""

from __future__ import annotations

import numpy as np


def log_softmax(logits):
    shifted = np.asarray(logits, dtype=np.float64) - np.max(logits)
    return shifted - np.log(np.sum(np.exp(shifted)))


def nats_of_window(logits, ids):
    """Sum over positions of -log p(next token); logits [length, vocab], ids [length]."""
    return -sum(log_softmax(logits[i])[ids[i + 1]] for i in range(len(ids) - 1))


def kl_of_row(logits, original):
    """KL(original || model) in nats of one distribution, classes ruled out by the original left out."""
    log_q, log_p = log_softmax(logits), log_softmax(original)
    return sum(np.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True) if np.isfinite(p))
