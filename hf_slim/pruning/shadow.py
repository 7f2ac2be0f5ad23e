"""Dense weights behind masked ones, so that masks can move (SR-STE, Zhou et al. 2021, arXiv:2102.04010, eq. 9).

    forward     W = keep ⊙ D
    backward    D <- D - lr (dL/dW + decay (1 - keep) ⊙ D)

Pruned weights keep their values in D and go on learning: the gradient of the masked weight W is passed straight through
to all of D. When masks are taken anew, from D, a weight that has grown may come back. The decay pulls pruned weights
towards zero, so that masks settle.

The model's parameter holds W, the masked weight, whenever anyone looks: in forward and backward passes, in evaluation
and in checkpoints. Only for the optimizer's step it holds D. So no forward pass is replaced, and the zeros that a
checkpoint shows are the real ones. D is saved beside the checkpoint.

A weight of D that is exactly zero was pruned before training began: it gets no gradient and does not come back.

W, D, g: [rows, cols]; keep: Bool [rows, cols].
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hf_slim.pruning.masks import drop


def uncover(
    W: Float[Tensor, "rows cols"],
    g: Float[Tensor, "rows cols"] | None,
    D: Float[Tensor, "rows cols"],
    alive: Bool[Tensor, "rows cols"] | None,
    decay: float,
) -> None:
    """Before the optimizer's step, in place: put D into W, and the decay of pruned weights into g.

    Args:
        W: keep ⊙ D, so that D - W is what is pruned.
        alive: False where D is zero for good; None if it is so nowhere.
    """
    if g is not None:
        g.add_(torch.sub(D, W), alpha=decay)
        if alive is not None:
            drop(g, alive)
    W.copy_(D)


def cover(
    W: Float[Tensor, "rows cols"],
    D: Float[Tensor, "rows cols"],
    keep: Bool[Tensor, "rows cols"],
    alive: Bool[Tensor, "rows cols"] | None,
) -> None:
    """After the optimizer's step, in place: take D out of W, and mask W."""
    if alive is not None:
        drop(W, alive)
    D.copy_(W)
    drop(W, keep)
