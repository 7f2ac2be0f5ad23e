"""Wanda (Sun et al. 2023, arXiv:2306.11695, eq. 1): drop small |weight| times the norm of its input, row by row.

    score[r, c] = |W[r, c]| * sqrt(x2[c]),    x2[c] = 2/n sum over tokens of x[c]**2, the diagonal of H

W, score, keep [rows, cols]; x2 [cols]. Within a row, the weights of lowest score go; for a pattern "n:m", all but the
n highest of every m consecutive columns. The others keep their values. One pass over the data, without any matrix of
second moments.

Where we differ from the authors' code: `sparsity` is exact to one weight a layer, and to one weight a row (they cut
the count of every row down to a whole number); the score takes a mean square instead of a norm, which ranks alike.
Weights that an earlier pruning dropped stay zero, and count. An expert that no token was routed to is pruned by
magnitude.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.method import Rules
from hf_slim.core.report import StageReport
from hf_slim.core.select import Layer
from hf_slim.core.walk import Statistics
from hf_slim.encodings import Sparse
from hf_slim.pruning import oneshot
from hf_slim.pruning.masks import n_m_mask
from hf_slim.pruning.oneshot import Job, Pruned
from hf_slim.pruning.pattern import parse_pattern

RULES = Rules(
    needs=("calibration",),
    makes=("zeros",),
    preserves=("zeros", "codes", "tied"),
    paper="Sun et al. 2023, arXiv:2306.11695",
)


class Config(oneshot.Config):
    """Options of `prune.wanda`."""


def keep_mask(
    W: Float[Tensor, "rows cols"],
    squares: Float[Tensor, " cols"],
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    earlier: Bool[Tensor, "rows cols"] | None = None,
) -> Bool[Tensor, "rows cols"]:
    """True where a weight stays.

    Args:
        W: weights, finite.
        squares: mean squares of the inputs, at any scale; all zero ranks by magnitude.
        sparsity: share of weights to drop, 0 <= sparsity < 1: round(sparsity * rows * cols) in all, in every row as
            many or one fewer or more than in the others. An n:m pattern sets its own.
        pattern: "unstructured" or "n:m".
        earlier: False where a weight is pruned already.
    """
    norms = squares.float().sqrt() if squares.any() else torch.ones_like(squares, dtype=torch.float32)
    score = W.float().abs() * norms
    if earlier is not None:
        score.masked_fill_(~earlier, -1.0)
    n_m = parse_pattern(pattern)
    if n_m is not None:
        keep = n_m_mask(score.clamp(min=0), *n_m)
    else:
        rows, cols = W.shape
        ends = round(sparsity * rows * cols) * torch.arange(rows + 1, device=W.device) // rows
        rank = score.argsort(dim=1, stable=True).argsort(dim=1)
        keep = rank >= ends.diff()[:, None]
    return keep if earlier is None else keep & earlier


def prune(W: Tensor, known: Statistics, job: Job) -> Pruned:
    """Wanda on one layer; by magnitude where no token ever reached it."""
    keep = keep_mask(W, known.squares, job.sparsity, job.config.pattern, job.earlier)
    return Pruned(W * keep, keep, notes=() if known.tokens else ("pruned by magnitude: no token was routed to it",))


def instead(W: Tensor, known: Statistics, job: Job, why: str) -> Pruned:
    """Wanda where another method cannot work, and why not."""
    pruned = prune(W, known, job)
    return pruned if pruned.notes else replace(pruned, notes=(f"pruned by wanda: {why}",))


def encoding(layer: Layer, config: Config) -> Sparse:
    """Mask and survivors."""
    return oneshot.encoding(layer, config)


def problems(layer: Layer, config: Config) -> list[str]:
    """Why a layer cannot be pruned this way."""
    return oneshot.problems(layer, config)


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Prune block by block."""
    return oneshot.prune_model(model, "prune.wanda", config, context, lambda known: known, prune, keep_mask)
