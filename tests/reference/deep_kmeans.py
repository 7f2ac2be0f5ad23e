"""Deep k-Means written out slowly from the paper: penalties for Autograd, the relaxed one by its traces."""

from __future__ import annotations

import torch
from torch import Tensor


def relaxed(X: Tensor, clusters: int) -> Tensor:
    """1/2 (tr XᵀX - tr FᵀXᵀXF) of vectors that are the columns of X [s, n], F from the whole Gram matrix, constant."""
    F = torch.linalg.eigh((X.T @ X).detach()).eigenvectors[:, -clusters:]
    return (torch.trace(X.T @ X) - torch.trace(F.T @ X.T @ X @ F)) / 2


def hard(x: Tensor, centroids: Tensor, codes: Tensor) -> Tensor:
    """1/2 Σ |x_i - c_{code_i}|² of vectors that are the rows of x [n, s]."""
    total = x.new_zeros(())
    for i, code in enumerate(codes.tolist()):
        total = total + (x[i] - centroids[code]).square().sum() / 2
    return total
