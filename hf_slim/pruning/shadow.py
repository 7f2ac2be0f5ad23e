"""Dense weights behind masked ones, so that masks can move (SR-STE, Zhou et al. 2021, arXiv:2102.04010, eq. 9).

    forward     W = keep ⊙ D
    backward    D <- D - lr (dL/dW + decay (1 - keep) ⊙ D)

Pruned weights keep their values in D and go on learning: the gradient of the masked weight W is passed straight through
to all of D. When masks are taken anew, from D, a weight that has grown may come back. The decay pulls pruned weights
towards zero, so that masks settle.

The model's parameter holds W, the masked weight, whenever anyone looks: in forward and backward passes, in evaluation
and in checkpoints. Only for the optimizer's step it holds D: the two trade places, without a copy where a parameter is
one matrix. So no forward pass is replaced, and the zeros that a checkpoint shows are the real ones. D is saved beside
the checkpoint.

A weight of D that is exactly zero was pruned before training began: it gets no gradient and does not come back.

W, D, g: [rows, cols]; keep: Bool [rows, cols].
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def add_decay(
    g: Float[Tensor, "rows cols"], W: Float[Tensor, "rows cols"], D: Float[Tensor, "rows cols"], decay: float
) -> None:
    """g += decay (1 - keep) ⊙ D, in place. W = keep ⊙ D is lost: its memory saves that of a difference."""
    g.sub_(W.sub_(D), alpha=decay)


def mask_into(W: Float[Tensor, "rows cols"], D: Float[Tensor, "rows cols"], keep: Bool[Tensor, "rows cols"]) -> None:
    """W = keep ⊙ D."""
    torch.mul(D, keep.view(torch.uint8), out=W)
