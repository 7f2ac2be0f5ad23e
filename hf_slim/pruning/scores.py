"""What a weight is worth while it is trained: scores that rank the weights, the highest stay.

    magnitude   |w|                                         needs no state
    movement    S <- S - w g                                Sanh et al. 2020, arXiv:2005.07683, eq. 3
    taylor      S <- beta S + (1 - beta) |w g|              first order: what the loss would change by without w
                                                            (Molchanov et al. 2019, arXiv:1906.10771)

g = dL/dw is the whole batch's gradient, as the optimizer is about to use it: accumulated over micro-batches and
averaged over processes (and clipped, if the Trainer clips). So scores do not depend on how a batch is cut up. Movement
keeps what moves away from zero, however small it still is; it helps when a pretrained model learns a task, at high
sparsity.

Where we differ from movement pruning: scores are plain sums, whose learning rate would change no ranking; no optimizer
of their own smooths them. Before the first step there is no gradient: whatever is pruned then goes by magnitude.

W, g, S: [rows, cols]; S is float32.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Score = Literal["magnitude", "movement", "taylor"]


def add_movement(S: Float[Tensor, "rows cols"], W: Float[Tensor, "rows cols"], g: Float[Tensor, "rows cols"]) -> None:
    """One step's movement, added to S in place."""
    S.addcmul_(W.float(), g.float(), value=-1)


def blend_taylor(
    S: Float[Tensor, "rows cols"], W: Float[Tensor, "rows cols"], g: Float[Tensor, "rows cols"], smoothing: float
) -> None:
    """One step's |w g|, blended into S in place; `smoothing` is the share that S keeps."""
    S.lerp_((W.float() * g.float()).abs_(), 1 - smoothing)


def dead_last(scores: Float[Tensor, "rows cols"], W: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
    """The scores, and -inf where a weight is zero: it is pruned already."""
    return scores.masked_fill(W == 0, -torch.inf)
