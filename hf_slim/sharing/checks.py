"""What k-means cannot work on, said in full before anything is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_slim.core.errors import SlimError


def check_books(values: Tensor, clusters: int, weights: Tensor | None, iterations: int) -> None:
    """Raise everything that is wrong with books [books, n] at once."""
    problems = []
    if values.ndim != 2 or values.numel() == 0 or not values.is_floating_point():
        problems.append(
            f"k-means needs a non-empty floating-point tensor [books, n], got {values.dtype} {list(values.shape)}"
        )
    elif not values.sum(dtype=torch.float64).isfinite():  # far cheaper than a look at every value
        bad = (~values.isfinite()).any(1).nonzero().flatten().tolist()
        problems.append(
            f"k-means needs finite values, got NaN or infinity in {len(bad)} of {len(values)} books, the first at "
            f"index {bad[0]}: mend or exclude the layer"
        )
    if not 1 <= clusters <= 256:
        problems.append(f"clusters must be 1 to 256 (codes are bytes), got {clusters}")
    if iterations < 1:
        problems.append(f"iterations must be at least 1, got {iterations}")
    if weights is not None and weights.shape != values.shape:
        problems.append(f"weights must have the shape of the values {list(values.shape)}, got {list(weights.shape)}")
    elif weights is not None and not (weights.isfinite() & (weights >= 0)).all():
        problems.append("weights must be finite and not negative: they are importances, such as squared gradients")
    if problems:
        raise SlimError(problems)


def check_matrix(W: Tensor, bits: int, scope: object, weights: Tensor | None, keep: Tensor | None) -> None:
    """Raise everything that is wrong with a matrix [rows, cols] at once."""
    problems = []
    if W.ndim != 2:
        problems.append(f"W must be a matrix [rows, cols], got shape {list(W.shape)}")
    if not 1 <= bits <= 8:
        problems.append(f"bits must be 1 to 8, got {bits}")
    if scope not in ("tensor", "row") and not (isinstance(scope, int) and scope >= 1):
        problems.append(f'scope must be "tensor", "row" or a positive number of rows, got {scope!r}')
    if weights is not None and weights.shape != W.shape:
        problems.append(f"weights must have the shape of W {list(W.shape)}, got {list(weights.shape)}")
    if keep is not None and (keep.shape != W.shape or keep.dtype != torch.bool):
        problems.append(f"keep must be a boolean mask of shape {list(W.shape)}, got {keep.dtype} {list(keep.shape)}")
    if problems:
        raise SlimError(problems)
