"""Which weights survive: the largest magnitudes (LeCun et al. 1989; Han et al. 2015, arXiv:1506.02626), pure functions.

    unstructured   drop the round(s · n) smallest |w| of a matrix, or of all matrices together
    n:m            keep the n largest |w| of every m consecutive weights of a row

A mask `keep` has the shape of its weight and is True where the weight survives. Counts are exact to one weight. Equal
magnitudes are told apart by position (row by row, the earlier one is dropped; matrices in the order given), so a mask
is a function of the weights alone, and weights that are zero already are dropped first.

Where we differ from the usual threshold `|w| > sorted(|w|)[int(s · n)]`, and why: that drops one weight at s = 0, and
any number of weights when magnitudes tie, as they do in bfloat16. The threshold is found without sorting: a histogram
of the upper halves of the bit patterns, which order non-negative floats as integers do, leaves one bin to search.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hf_slim.core.errors import PlanError

_BINS = 2**15  # upper 16 bits of a non-negative fp32


def magnitude_mask(W: Float[Tensor, "rows cols"], sparsity: float) -> Bool[Tensor, "rows cols"]:
    """True for all but the round(sparsity * rows * cols) weights of smallest magnitude.

    Args:
        W: weights, finite.
        sparsity: share of weights to drop, 0 <= sparsity < 1.

    Raises:
        PlanError: sparsity outside [0, 1).
    """
    return global_masks({"W": W}, sparsity)["W"]


def global_masks(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Masks that drop the round(sparsity * n) smallest magnitudes of all n weights of all matrices together.

    Args:
        weights: matrices [rows, cols] by name, finite, on one device.
        sparsity: share of all weights to drop, 0 <= sparsity < 1.

    Returns:
        keep: Bool[rows, cols] by name.

    Raises:
        PlanError: sparsity outside [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise PlanError(f"sparsity is the share of weights set to zero, at least 0 and below 1, got {sparsity}")
    count = round(sparsity * sum(W.numel() for W in weights.values()))
    if count == 0:
        return {name: torch.ones_like(W, dtype=torch.bool) for name, W in weights.items()}
    threshold = _kth_magnitude(weights.values(), count)
    keep = {name: W.abs().float() >= threshold for name, W in weights.items()}
    spare = count - sum(int((~mask).sum()) for mask in keep.values())
    for name, W in weights.items():
        ties = (W.abs().float() == threshold).nonzero()[:spare]
        keep[name][tuple(ties.T)] = False
        spare -= len(ties)
    return keep


def n_m_mask(W: Float[Tensor, "rows cols"], n: int, m: int) -> Bool[Tensor, "rows cols"]:
    """True for the n weights of largest magnitude among every m consecutive columns.

    Args:
        W: weights, finite, cols a multiple of m.
        n: survivors a group, 0 <= n <= m.
        m: columns a group.

    Raises:
        PlanError: n not in 0..m, or columns that groups of m do not fill.
    """
    rows, cols = W.shape
    if not 0 <= n <= m or m < 1:
        raise PlanError(f"n:m keeps n of every m weights, so 0 <= n <= m, got {n}:{m}")
    if cols % m:
        raise PlanError(f"{n}:{m} needs a multiple of {m} columns, got {cols}; leave this layer out")
    magnitude = W.abs().float().reshape(rows, cols // m, m)
    drop = magnitude.argsort(dim=-1, stable=True)[..., : m - n]
    keep = torch.ones_like(magnitude, dtype=torch.bool).scatter_(-1, drop, False)
    return keep.reshape(rows, cols)


def _kth_magnitude(weights: Iterable[Tensor], k: int) -> Tensor:
    """The k-th smallest |w|, k >= 1, over all tensors; a scalar in fp32. Holds one tensor's copy at a time."""
    weights = list(weights)
    counts = sum(torch.bincount(_bits(W) >> 16, minlength=_BINS) for W in weights)
    cumulative = torch.as_tensor(counts).cumsum(0)
    bin_ = int(torch.searchsorted(cumulative, k))
    below = int(cumulative[bin_ - 1]) if bin_ else 0
    candidates = torch.cat([bits[(bits >> 16) == bin_] for bits in map(_bits, weights)])
    return candidates.kthvalue(k - below).values.view(torch.float32)


def _bits(W: Tensor) -> Tensor:
    """Bit patterns of |W| in fp32, as integers, flattened: they sort as the magnitudes do."""
    return W.abs().float().reshape(-1).view(torch.int32)
