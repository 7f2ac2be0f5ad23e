"""Least-squares refit of a layer that loses columns: what stays takes over what went, as far as it can.

    min over W', b'  E |W x + b - W' x_K - b'|^2        K: the columns that stay, P: those that go

With C = E x x^T (or the covariance, where the mean m = E x is known and the layer has a bias):

    W' = W_K + W_P C_PK (C_KK + eps I)^-1,        b' = b + W m - W' m_K

At eps = 0 this is W C[:, K] C_KK^-1, written so that eps pulls towards the weights that are there instead of towards
zero: a column that is never active keeps its weight, and without any data the layer is merely cut. For each row the
solution is the optimal brain surgeon's (Hassibi & Stork 1993) for columns that are removed together.

Shapes: W [rows, cols]; C [cols, cols]; x, m, keep [cols]; W' [rows, kept]; b' [rows]. Everything is float64: neurons
are so alike that C_KK of a trained model has a condition number beyond float32's digits.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

RIDGE = 1e-6  # of the mean of C_KK's diagonal
RIDGES = (RIDGE, 1e-4, 1e-2, 0.1, 1.0)


def refit_columns(
    W: Float[Tensor, "rows cols"], C: Float[Tensor, "cols cols"], keep: Bool[Tensor, " cols"], ridge: float = RIDGE
) -> Float[Tensor, "rows kept"]:
    """Weights of the columns that stay, refitted to the layer's outputs.

    Args:
        W: the layer's weight.
        C: second moment of its inputs, up to a factor; may be singular, or zero.
        keep: True where a column stays.
        ridge: eps, as a share of the mean of C_KK's diagonal; ten times more after every failure to factorise.

    Returns:
        W', float32.
    """
    return _refitted(W.double(), C.double(), keep, ridge).float()


def refit_affine(
    W: Float[Tensor, "rows cols"],
    C: Float[Tensor, "cols cols"],
    mean: Float[Tensor, " cols"],
    keep: Bool[Tensor, " cols"],
    ridge: float = RIDGE,
) -> tuple[Float[Tensor, "rows kept"], Float[Tensor, " rows"]]:
    """The same for a layer whose bias may change too.

    Args:
        W, keep, ridge: see `refit_columns`.
        C: E x x^T exactly (no other factor), for it is compared with the mean.
        mean: E x.

    Returns:
        W' and what to add to the bias, float32.
    """
    W, m = W.double(), mean.double()
    left = _refitted(W, C.double() - torch.outer(m, m), keep, ridge)
    return left.float(), (W @ m - left @ m[keep]).float()


def refit_loss(
    W: Float[Tensor, "rows cols"],
    C: Float[Tensor, "cols cols"],
    keep: Bool[Tensor, " cols"],
    left: Float[Tensor, "rows kept"],
) -> float:
    """E |W x - W' x_K|^2 over E |W x|^2; 0 for a layer that puts out nothing anyway.

    Args:
        left: W', by a refit or `W[:, keep]`.
    """
    W, C = W.double(), C.double()
    gone = W.clone()
    gone[:, keep] -= left.double()
    power = float(((W @ C) * W).sum())
    return float(((gone @ C) * gone).sum()) / power if power > 0 else 0.0


def choose_ridge(
    W: Float[Tensor, "rows cols"], halves: tuple[Tensor, Tensor], keep: Bool[Tensor, " cols"]
) -> float | None:
    """The ridge whose refit to one half of the data serves the other half best.

    Few tokens say little about many columns: on stories260K, with 129 neurons left of 172 and 256 tokens, a refit at
    `RIDGE` took perplexity from 11.2 to 43.

    Args:
        halves: C of each half of the tokens, or their covariances.

    Returns:
        One of `RIDGES`; None where it is best not to refit at all.
    """

    def loss(ridge: float | None) -> float:
        return sum(
            refit_loss(W, other, keep, W[:, keep] if ridge is None else refit_columns(W, half, keep, ridge))
            for half, other in (halves, halves[::-1])
        )

    return min((None, *RIDGES), key=loss)


def _refitted(W: Tensor, C: Tensor, keep: Tensor, ridge: float) -> Tensor:
    kept, gone = W[:, keep], W[:, ~keep]
    if not gone.shape[1] or not kept.shape[1]:
        return kept.clone()
    inner, cross = C[keep][:, keep], C[~keep][:, keep]
    mean = inner.diagonal().mean()
    if mean <= 0:
        return kept.clone()
    while True:
        damped = inner + ridge * mean * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return kept + torch.cholesky_solve((gone @ cross).T, lower).T
        ridge *= 10
