"""Embedding tables that a head shares: what rounding a token's row costs where it is read, and where it predicts.

Row v of the table enters the model wherever token v stands, a share f_v of all positions, and its product with the
final hidden state h is token v's logit. Let e_v be the row's rounding error. To second order the loss grows by

    input    f_v * e_v' G e_v,               G: what the loss charges for noise in an embedding
    output   E[p_v (1 - p_v) (e_v' h)**2]    about f_v * e_v' E[h h'] e_v, as a token is predicted as often as it comes

so a token's frequency weighs both sides alike, and since rows share no bits and no scales it leaves the best rounding
of a row as it is: what changes it is H = E[h h'] + share * mean(diag) * I, the same for all rows, with the input side,
of which nothing else is known, taken as equal in all directions. GPTQ's error feedback rounds to that.

Measured on a trained 260k-weight Llama (64 columns, 512 tokens), KL to the original with nothing but the table rounded,
one scale a row: 8, 6, 4 bits plain 9.3e-5, 1.45e-3, 2.63e-2; columns weighted by diag H in the clipping search alone
7.3e-5, 1.03e-3, 1.74e-2; this with share 0.1 5.8e-5, 8.7e-4, 1.42e-2. Four bins of tokens by frequency, each with
a Hessian of its own (hidden states weighted by p (1 - p), or f_v on the input side alone) gave 1.43e-2 and 1.57e-2 at 4
bits with share 0.3, one Hessian 1.44e-2: not worth it. An untied table has the input side only, and is rounded plainly.
"""

from __future__ import annotations

from contextlib import suppress

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hf_slim.core.capture import own_share
from hf_slim.core.forward import evaluating, run_on
from hf_slim.core.select import Layer, find_layers
from hf_slim.core.statistics import StopForward, gather

INPUT_SHARE = 0.1  # the input side, as a share of the mean square of the hidden state; 0.01 to 1 is about as good


def joint_hessian(H: Float[Tensor, "cols cols"], share: float = INPUT_SHARE) -> Float[Tensor, "cols cols"]:
    """What rounding a row costs on both sides: H of the head's inputs, and the same error in every direction.

    Args:
        H: 2/n sum h h' of the final hidden states.
        share: weight of the input side, of the mean of diag H.
    """
    return H + share * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype, device=H.device)


@torch.no_grad()
def head_hessian(
    model: nn.Module, table: Layer, windows: Int[Tensor, "samples length"]
) -> Float[Tensor, "cols cols"] | None:
    """H of what the heads tied to a table are fed in the model as it is; None for an untied table."""
    layers = find_layers(model).values()
    heads = [layer.name for layer in layers if layer.tied_to == table.name and layer.kind == "head"]
    if not heads:
        return None
    with evaluating(model), gather(model, heads) as sums:
        for batch in own_share(windows):
            sums.begin()
            with suppress(StopForward):
                run_on(model, batch)
    H = sums.finish({heads[0]: table.cols})[heads[0]].hessian
    return H if torch.isfinite(H).all() and H.any() else None  # the walk will name the layer where NaN begins
