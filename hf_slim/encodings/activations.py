"""Activations as 8-bit integers, chosen token by token while the model runs.

    s = max|x| / 127,   q = round(x / s),   x ~ q s        (x [tokens, cols]; one s a token; half goes to even)

With weights W = p t, one scale t a row, the product is an integer one rescaled: y = (q pᵀ) s t. Gradients pass the
rounding as if it were not there (straight-through; Bengio et al. 2013, arXiv:1308.3432).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

LARGEST = 127


def quantize_tokens(
    x: Float[Tensor, "*tokens cols"],
) -> tuple[Float[Tensor, "*tokens cols"], Float[Tensor, "*tokens 1"]]:
    """Integers in [-127, 127], held in float32, and the scale of every token. A token of zeros stays zero."""
    x = x.float()
    scale = x.detach().abs().amax(-1, keepdim=True).div_(LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
    steps = x / scale
    if not steps.requires_grad:
        return steps.round_(), scale
    return steps + (steps.detach().round() - steps.detach()), scale
