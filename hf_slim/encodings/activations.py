"""Activations as 8-bit integers, chosen token by token while the model runs.

    s = max|x| / 127.5,   q = clamp(round(x / s), -128, 127),   x ~ q s      (x [tokens, cols]; one s a token)

With weights W = p t, one scale t a row, the product is an integer one rescaled: y = (q pᵀ) s t. Half a step of the
largest value is clipped, as `compressed-tensors` does it: an exported model computes the same integers. Gradients pass
the rounding as if it were not there (straight-through; Bengio et al. 2013, arXiv:1308.3432).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

HALF_RANGE = 127.5


def quantize_tokens(
    x: Float[Tensor, "*tokens cols"],
) -> tuple[Float[Tensor, "*tokens cols"], Float[Tensor, "*tokens 1"]]:
    """Integers in [-128, 127], held in float32, and the scale of every token. A token of zeros stays zero."""
    x = x.float()
    scale = x.detach().abs().amax(-1, keepdim=True).div_(HALF_RANGE).clamp_(min=torch.finfo(torch.float32).tiny)
    steps = x / scale
    if not steps.requires_grad:
        return steps.round_().clamp_(-128, 127), scale
    return steps + (steps.detach().round().clamp_(-128, 127) - steps.detach()), scale
