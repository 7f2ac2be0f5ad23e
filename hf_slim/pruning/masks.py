"""Which weights survive: those that score highest, by default by magnitude (LeCun et al. 1989; Han et al. 2015,
arXiv:1506.02626); pure functions.

    unstructured   drop the round(s · n) lowest scores of a matrix, or of all matrices together
    block:b        the same for runs of b consecutive weights of a row; a run's score is the sum of its weights'
    n:m            keep the n highest of every m consecutive weights of a row

A mask `keep` has the shape of its weight and is True where the weight survives. Counts are exact to one weight, or one
run. Equal scores are told apart by position (row by row, the earlier one is dropped; matrices in the order given), so a
mask is a function of the scores alone. A score of -inf says that a weight is pruned already: such weights go first.

Where we differ from the usual threshold `|w| > sorted(|w|)[int(s · n)]`, and why: that drops one weight at s = 0, and
any number of weights when magnitudes tie, as they do in bfloat16. The threshold is found without sorting: a histogram
of the upper halves of the bit patterns, turned so that they order as the numbers do, leaves one bin to search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hf_slim.core.errors import PlanError

Key = Callable[[Tensor], Tensor]

_HALF = 2**15  # of the values that the upper 16 bits of a number take


def magnitude_mask(W: Float[Tensor, "rows cols"], sparsity: float, block: int = 1) -> Bool[Tensor, "rows cols"]:
    """True for all but the round(sparsity * rows * cols) weights of smallest magnitude.

    Args:
        W: weights, finite.
        sparsity: share of weights to drop, 0 <= sparsity < 1.
        block: consecutive columns that stay or go together; divides cols.

    Raises:
        PlanError: sparsity outside [0, 1), or columns that blocks do not fill.
    """
    return global_masks({"W": W}, sparsity, block)["W"]


def global_masks(
    weights: Mapping[str, Tensor], sparsity: float, block: int = 1, key: Key | None = None
) -> dict[str, Tensor]:
    """Masks that drop the round(sparsity * n) smallest magnitudes of all n weights of all matrices together.

    Args:
        weights: matrices [rows, cols] by name, finite, on one device.
        sparsity: share of all weights to drop, 0 <= sparsity < 1.
        block: consecutive columns that stay or go together; divides all numbers of columns.
        key: makes float32 scores of a matrix, one at a time; magnitudes if not given.

    Returns:
        keep: Bool[rows, cols] by name.

    Raises:
        PlanError: sparsity outside [0, 1), or columns that blocks do not fill.
    """
    key = key or _magnitude
    if block == 1:
        return highest(weights, sparsity, key)
    runs = {name: block_scores(key(W), block) for name, W in weights.items()}
    return {name: keep.repeat_interleave(block, dim=1) for name, keep in highest(runs, sparsity).items()}


def drop(W: Float[Tensor, "rows cols"], keep: Bool[Tensor, "rows cols"]) -> None:
    """Set all of W to zero that `keep` does not mark, in place.

    Bytes and floats multiply in one vectorised pass; with Bool, or filled, it takes two to ten times as long.
    """
    W.mul_(keep.view(torch.uint8))


def n_m_mask(W: Float[Tensor, "rows cols"], n: int, m: int) -> Bool[Tensor, "rows cols"]:
    """True for the n weights of largest magnitude among every m consecutive columns.

    Args:
        W: weights, finite, cols a multiple of m.
        n: survivors a group, 0 <= n <= m.
        m: columns a group.

    Raises:
        PlanError: n not in 0..m, or columns that groups of m do not fill.
    """
    return n_m_highest(_magnitude(W), n, m)


def n_m_highest(scores: Float[Tensor, "rows cols"], n: int, m: int) -> Bool[Tensor, "rows cols"]:
    """True for the n highest scores among every m consecutive columns; otherwise as `n_m_mask`."""
    rows, cols = scores.shape
    if not 0 <= n <= m or m < 1:
        raise PlanError(f"n:m keeps n of every m weights, so 0 <= n <= m, got {n}:{m}")
    if cols % m:
        raise PlanError(f"{n}:{m} needs a multiple of {m} columns, got {cols}; leave this layer out")
    groups = scores.reshape(rows, cols // m, m)
    drop = groups.argsort(dim=-1, stable=True)[..., : m - n]
    keep = torch.ones_like(groups, dtype=torch.bool).scatter_(-1, drop, False)
    return keep.reshape(rows, cols)


def block_scores(scores: Float[Tensor, "rows cols"], block: int) -> Float[Tensor, "rows blocks"]:
    """Sums over runs of `block` consecutive columns, without those of -inf; -inf where there is nothing else.

    Raises:
        PlanError: columns that blocks do not fill.
    """
    rows, cols = scores.shape
    if cols % block:
        raise PlanError(f"blocks of {block} need a multiple of {block} columns, got {cols}; leave this layer out")
    runs = scores.reshape(rows, cols // block, block)
    pruned = runs == -torch.inf
    return runs.masked_fill(pruned, 0.0).sum(-1).masked_fill_(pruned.all(-1), -torch.inf)


def highest(scores: Mapping[str, Tensor], sparsity: float, key: Key = Tensor.float) -> dict[str, Tensor]:
    """Masks that drop the round(sparsity * n) lowest of all n scores of all tensors together.

    Args:
        scores: tensors by name, without NaN, on one device.
        sparsity: share to drop, 0 <= sparsity < 1.
        key: makes float32 scores of a tensor, one at a time, where they are not given as such.

    Returns:
        keep: Bool by name, of the tensors' shapes.

    Raises:
        PlanError: sparsity outside [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise PlanError(f"sparsity is the share of weights set to zero, at least 0 and below 1, got {sparsity}")
    count = round(sparsity * sum(S.numel() for S in scores.values()))
    if count == 0:
        return {name: torch.ones_like(S, dtype=torch.bool) for name, S in scores.items()}
    threshold = _kth_lowest(scores.values(), count, key)
    keep = {name: key(S) >= threshold for name, S in scores.items()}
    spare = count - sum(int((~mask).sum()) for mask in keep.values())
    for name, S in scores.items():
        ties = (key(S) == threshold).nonzero()[:spare]
        keep[name][tuple(ties.T)] = False
        spare -= len(ties)
    return keep


def _kth_lowest(tensors: Iterable[Tensor], k: int, key: Key) -> Tensor:
    """The k-th lowest score, k >= 1, over all tensors; a scalar in fp32. Holds one tensor's copy at a time."""
    tensors = list(tensors)
    counts = sum(torch.bincount((_ordered(key(T)) >> 16) + _HALF, minlength=2 * _HALF) for T in tensors)
    cumulative = torch.as_tensor(counts).cumsum(0)
    bin_ = int(torch.searchsorted(cumulative, k))
    below = int(cumulative[bin_ - 1]) if bin_ else 0
    candidates = torch.cat([bits[(bits >> 16) + _HALF == bin_] for bits in (_ordered(key(T)) for T in tensors)])
    return _turned(candidates.kthvalue(k - below).values).view(torch.float32)


def _ordered(values: Tensor) -> Tensor:
    """Integers, flattened, that order as these float32 numbers do."""
    return _turned((values + 0.0).reshape(-1).view(torch.int32))  # -0.0 + 0.0 is 0.0, its equal


def _turned(bits: Tensor) -> Tensor:
    """Bit patterns of negative numbers grow with their magnitude: turn them round; its own inverse."""
    return (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)


def _magnitude(W: Tensor) -> Tensor:
    return W.abs().float()
