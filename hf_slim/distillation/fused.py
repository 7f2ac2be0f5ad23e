"""Losses straight from hidden states and the head's weight: no logits of the whole batch, of neither model.

    s = h Wᵀ + b        dL/dh = G W      dL/dW = Gᵀ h      dL/db = Σ_tokens G      G = dL/ds, of the row losses

Logits of 4096 tokens over 49152 words are 0.8 GB in fp32, and a naive loss holds five or more such arrays. Here they
exist for a chunk of tokens at a time; the gradients are made in the forward pass, from the same chunk, so that the
backward pass only scales them. What survives is a gradient as large as h and one as large as W, summed up in fp32.
The same idea as in Liger-Kernel's fused linear distillation losses; the teacher's logits, too, come from its hidden
states chunk by chunk (`teacher_rows`).

Shapes: hidden h [tokens, width], head's weight W [vocab, width], bias b [vocab].

How a model is brought to it: for one forward pass the module that makes its logits is given another function to
compute (`replaced`). The student's head then puts out the losses, so that the weights of the head are part of what a
wrapper such as DistributedDataParallel watches; the teacher's head puts out what it was given. That is right only if
a model's logits are what its head puts out and nothing else: no scaling, no soft cap. `why_not` finds out, by asking
for the logits of one token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import linear

from hf_slim.core.forward import run_on
from hf_slim.distillation.losses import Term, chunk_sums, chunks


def sum_over_hidden(
    hidden: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocab width"],
    bias: Float[Tensor, " vocab"] | None,
    keep: Bool[Tensor, " tokens"],
    terms: Sequence[Term],
    weights: Float[Tensor, " tokens"] | None = None,
) -> Float[Tensor, " sums"]:
    """What `losses.sum_over_logits` gives for the logits h Wᵀ + b, without these.

    Under autocast the product is computed as autocast would, and gradients return in the dtypes of the arguments.

    Args:
        hidden: h, what reaches the head.
        weight: W.
        bias: b.
        keep: True for the tokens that count.
        terms: losses and their weights in the total.
        weights: of the tokens; 1 if not given.

    Returns:
        [1 + terms]: the weighted total, which alone has a gradient, and each loss for itself.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        return _SumOverHidden.apply(hidden, weight, bias, keep.to(hidden.device), tuple(terms), weights)


class _SumOverHidden(torch.autograd.Function):
    """`sum_over_hidden`, a chunk of kept tokens at a time."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        keep: Tensor,
        terms: tuple[Term, ...],
        weights: Tensor | None,
    ) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        sums = hidden.new_zeros(1 + len(terms), dtype=dtype)
        wanted = ctx.needs_input_grad
        of_hidden = torch.zeros_like(hidden) if wanted[0] else None
        of_weight = torch.zeros_like(weight, dtype=dtype) if wanted[1] else None
        of_bias = torch.zeros_like(bias, dtype=dtype) if bias is not None and wanted[2] else None
        for tokens in chunks(keep, weight.shape[0]):
            h = hidden[tokens]
            of_chunk, slope = chunk_sums(terms, linear(h, weight, bias).to(dtype), tokens, weights)
            sums += of_chunk
            if slope is None or not any(wanted):
                continue
            if of_bias is not None:
                of_bias += slope.sum(0)
            slope = slope.to(h.dtype)  # as autograd hands it to the product
            if of_hidden is not None:
                of_hidden[tokens] = slope @ weight
            if of_weight is not None:
                _add_product(of_weight, slope, h)
        ctx.gradients = [
            gradient if gradient is None else gradient.to(value.dtype)  # pyright: ignore[reportOptionalMemberAccess]
            for gradient, value in ((of_hidden, hidden), (of_weight, weight), (of_bias, bias))
        ]
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        # scaled out of place: a second backward through a retained graph must find the gradients unscaled; by a
        # number in float32, which leaves their dtype alone: 1 / count in bfloat16 is 0.3 % off
        scaled = [g if g is None else g * upstream[0][0] for g in ctx.gradients]
        return (*scaled, None, None, None)


def _add_product(total: Tensor, slope: Tensor, h: Tensor) -> None:
    """total += slopeᵀ h, in total's dtype where the factors have it, else rounded once a chunk."""
    if slope.dtype == total.dtype:
        total.addmm_(slope.T, h)
    else:
        total += slope.T @ h


def teacher_rows(
    head: nn.Module,
    hidden: Float[Tensor, "*batch width"],
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Callable[[Tensor], Tensor]:
    """A function that gives the logits [rows, vocab] of some tokens [rows], from what reaches a teacher's head.

    Args:
        head: called on rows of hidden states; any module, quantized ones too.
        hidden: what the model handed to it.
        around: makes a context to call it in, such as autocast.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])

    def rows(tokens: Tensor) -> Tensor:
        with torch.no_grad(), around():
            return head(flat[tokens.to(flat.device)])

    return rows


@contextmanager
def replaced(head: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, calling the module calls `forward`; an instance's own function shadows that of its class."""
    own = head.__dict__.get("forward")
    head.forward = forward
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own


def head_of(model: nn.Module) -> nn.Module | None:
    """The module that makes a language model's logits; None where there is none, as in classifiers."""
    return getattr(model, "get_output_embeddings", lambda: None)()


def is_plain(head: nn.Module | None) -> bool:
    """Whether a module computes h Wᵀ + b and nothing else now, so that the kernel may compute it instead."""
    return (
        isinstance(head, nn.Linear)
        and type(head).forward is nn.Linear.forward
        and "forward" not in head.__dict__
        and not any((head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks))
    )


def why_not(model: nn.Module) -> str | None:
    """Why the losses of a model cannot be computed from its hidden states; None if they can."""
    name, head = type(model).__name__, head_of(model)
    if head is None:
        return f"{name} has no head over a vocabulary"
    made: list[Tensor] = []
    modes = [(module, module.training) for module in model.modules()]
    handle = head.register_forward_hook(lambda module, args, output: made.append(output))
    try:
        with torch.no_grad():  # in eval mode no random numbers are drawn, which the training would miss
            logits = run_on(model.eval(), torch.zeros(1, 1, dtype=torch.long)).logits
    finally:
        handle.remove()
        for module, training in modes:
            module.training = training
    if len(made) != 1 or logits is not made[0]:
        return (
            f"{name} changes what its head puts out, by scaling or a soft cap for instance, before that is its logits"
        )
    return None
