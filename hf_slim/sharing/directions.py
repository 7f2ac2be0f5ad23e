"""Directions of a layer's output: the linear algebra behind low rank, in float64.

    outputs of x       y = W x,  E[y yᵀ] = W H Wᵀ with H = E[x xᵀ] = S Sᵀ,  W S = U diag(s) Vᵀ
    rank r             W ~ U_r (U_rᵀ W):  tr((W - M) H (W - M)ᵀ) = sum of s_i² over i > r, the least of any rank r

That is the PCA of the layer's outputs, and it is whitened SVD (SVD-LLM) as well: by Eckart and Young the best rank-r
matrix in the norm |. S| is [W S]_r S^-1 = U_r U_rᵀ W. Whitened SVD divides by S, which needs H positive definite, and
gives inputs that calibration did not contain arbitrary answers. The projection divides by nothing: H may have any rank,
and an unseen input is projected like all others. Nor is S formed: U is made of the eigenvectors of W H Wᵀ, a tall W
first turned into Q R. Energies are then exact to 1e-16 of the largest, which is all that a sum of them needs.

A table of tokens weighs its rows instead (a token's share of the text), so there the columns are projected:
M = W S V_r V_rᵀ S^-1 with V_r from the eigenvectors of Sᵀ Wᵀ diag(f) W S; every token has the best coefficients in it.

Shapes: W, M [rows, cols]; H, S [cols, cols]; U [rows, directions]; A [rows, rank]; B [rank, cols].
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

ROWS_AT_ONCE = 8192  # of a table, in float64


def output_directions(
    W: Float[Tensor, "rows cols"], H: Float[Tensor, "cols cols"] | None = None
) -> tuple[Float[Tensor, "rows directions"], Float[Tensor, " directions"]]:
    """Principal directions of the outputs and their energies s_i², falling; both float64.

    Args:
        H: second moments of the inputs (any scale, any rank); None for the identity: plain SVD of the weight.
    """
    W = W.double()
    Q, R = torch.linalg.qr(W) if W.shape[0] > W.shape[1] else (None, W)
    energies, U = torch.linalg.eigh(_gram(R, H))
    U = U.flip(1)
    return U if Q is None else Q @ U, energies.flip(0).clamp(min=0)


def output_energies(
    W: Float[Tensor, "rows cols"], H: Float[Tensor, "cols cols"] | None = None
) -> Float[Tensor, " directions"]:
    """The energies of `output_directions` alone, in a third of the time."""
    W = W.double()
    R = torch.linalg.qr(W, mode="r").R if W.shape[0] > W.shape[1] else W
    return torch.linalg.eigvalsh(_gram(R, H)).flip(0).clamp(min=0)


def _gram(R: Float[Tensor, "directions cols"], H: Float[Tensor, "cols cols"] | None) -> Tensor:
    return R @ R.T if H is None else R @ H.double() @ R.T


def project(
    W: Float[Tensor, "rows cols"], U: Float[Tensor, "rows rank"]
) -> tuple[Float[Tensor, "rows rank"], Float[Tensor, "rank cols"]]:
    """A and B with A B = U Uᵀ W, balanced."""
    return balanced(U, U.T @ W.double())


def table_directions(
    W: Float[Tensor, "rows cols"], frequency: Float[Tensor, " rows"], H: Float[Tensor, "cols cols"]
) -> tuple[Float[Tensor, "cols directions"], Float[Tensor, "directions cols"], Float[Tensor, " directions"]]:
    """S V, (S V)^-1 and the energies, falling, of sum over rows v of f_v |(W_v - M_v) S|².

    Args:
        frequency: f, not negative.
        H: positive definite.
    """
    values, Q = torch.linalg.eigh(H.double())
    S, inverse = Q * values.sqrt(), (Q / values.sqrt()).T
    gram = torch.zeros_like(S)
    for rows, f in zip(W.split(ROWS_AT_ONCE), frequency.split(ROWS_AT_ONCE), strict=True):
        seen = (rows.double() @ S) * f.double().sqrt()[:, None]
        gram.addmm_(seen.T, seen)
    energies, V = torch.linalg.eigh(gram)
    V = V.flip(1)
    return S @ V, V.T @ inverse, energies.flip(0).clamp(min=0)


def project_table(
    W: Float[Tensor, "rows cols"], into: Float[Tensor, "cols rank"], out: Float[Tensor, "rank cols"]
) -> tuple[Float[Tensor, "rows rank"], Float[Tensor, "rank cols"]]:
    """A and B with A B = W (S V) (S V)^-1, the first of the directions alone, balanced; A in float32."""
    return balanced(torch.cat([(rows.double() @ into).float() for rows in W.split(ROWS_AT_ONCE)]), out)


def balanced(
    A: Float[Tensor, "rows rank"], B: Float[Tensor, "rank cols"]
) -> tuple[Float[Tensor, "rows rank"], Float[Tensor, "rank cols"]]:
    """The same product with a column of A as long as its row of B.

    Training then moves both alike, and of all scalings this one loses least when both are rounded: an error of A's
    column i counts |B_i|², and one step for all of A is set by the largest.
    """
    ratio = (B.norm(dim=1) / A.norm(dim=0).double()).sqrt()
    ratio = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
    return A * ratio.to(A.dtype), B / ratio[:, None]


def refit_left(
    W: Float[Tensor, "rows cols"], B: Float[Tensor, "rank cols"], H: Float[Tensor, "cols cols"] | None = None
) -> Float[Tensor, "rows rank"]:
    """A of least squares for a B that has been rounded: W H Bᵀ (B H Bᵀ)^-1, float64.

    Args:
        H: None for the identity.
    """
    B = B.double()
    BH = B if H is None else B @ H.double()
    return W.double() @ BH.T @ torch.linalg.pinv(BH @ B.T, hermitian=True)


def follow_drift(
    W: Float[Tensor, "rows cols"], drift: Float[Tensor, "cols cols"], H: Float[Tensor, "cols cols"], share: float = 1.0
) -> Float[Tensor, "rows cols"]:
    """The weight that answers the compressed model's inputs x^ most like W answers the dense model's x: least squares.

    E |W x - M x^|² is least at M = W + W D H^-1, and at rank r at the best one for this M under H.

    Args:
        drift: D = E[(x - x^) x^ᵀ].
        H: E[x^ x^ᵀ], damped: positive definite, a pull towards W.
        share: how far from W to M.
    """
    W = W.double()
    return W + share * torch.linalg.solve(H.double(), (W @ drift.double()).T).T


def damp(H: Float[Tensor, "cols cols"], damping: float) -> Float[Tensor, "cols cols"]:
    """H + damping * mean(diag H) * I, float64; the identity where nothing was ever fed."""
    H, eye = H.double(), torch.eye(len(H), dtype=torch.float64, device=H.device)
    mean = H.diagonal().mean()
    return H + damping * mean * eye if mean > 0 else eye
