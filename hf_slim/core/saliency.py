"""How much the loss cares about each token at each layer: squared gradients at the layers' outputs.

    s_ik = mean over outputs j in group k of (dloss / dz_ij)**2,     z = the layer's output, token i

Weighing tokens by s turns H = sum x xᵀ into the Hessian of GuidedQuant (Kim et al. 2025, arXiv:2505.07004, eq. 7): the
error that a layer makes then counts by what it does to the loss, not by its size. Gradients are the dense model's, for
the mean next-token loss on the calibration windows. Every group's weights are scaled to a mean of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hf_slim.core.capture import own_share
from hf_slim.core.errors import ModelError
from hf_slim.core.forward import evaluating, logits_of, require_causal
from hf_slim.core.progress import Progress


def token_weights(
    model: nn.Module,
    names: Sequence[str],
    windows: Int[Tensor, "samples length"],
    groups: int,
    progress: Progress,
) -> dict[str, list[Float[Tensor, "tokens groups"]]]:
    """Weights of all calibration tokens for each layer, in the batches that the walk will run.

    Args:
        model: dense; left as it is.
        names: layers; the width of their outputs need not be a multiple of `groups`.
        windows: calibration tokens; one window at a time is held with its activations.
        groups: runs of outputs that get weights of their own.

    Raises:
        ModelError: no causal language model, or gradients that are NaN or infinite.
    """
    require_causal(model, "weighing tokens by gradients")
    batches = own_share(windows)
    found: dict[str, list[list[Tensor]]] = {name: [[] for _ in batches] for name in names}
    with evaluating(model), _only_activations(model):
        for number, batch in enumerate(progress.track(batches, "gradients")):
            for window in batch:
                for name, squares in _squared_gradients(model, names, window[None], groups).items():
                    found[name][number].append(squares)
    return {name: _scaled(name, [torch.cat(parts) for parts in per_batch]) for name, per_batch in found.items()}


def _squared_gradients(model: nn.Module, names: Sequence[str], ids: Tensor, groups: int) -> dict[str, Tensor]:
    squares: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(gradient: Tensor) -> None:
            flat = gradient.detach().reshape(-1, gradient.shape[-1]).float().square()
            squares[name] = torch.stack([part.mean(1) for part in flat.tensor_split(groups, dim=1)], dim=1)

        return lambda module, args, out: out.register_hook(keep) and None

    with ExitStack() as hooks, torch.enable_grad():
        for name in names:
            hooks.callback(model.get_submodule(name).register_forward_hook(hook(name)).remove)
        embedding = model.get_input_embeddings()  # pyright: ignore
        hooks.callback(embedding.register_forward_hook(lambda m, args, out: out.requires_grad_()).remove)
        logits = logits_of(model, ids)
        F.cross_entropy(logits[0, :-1].float(), ids[0, 1:].to(logits.device)).backward()
    return squares


@contextmanager
def _only_activations(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_()


def _scaled(name: str, batches: list[Tensor]) -> list[Tensor]:
    mean = torch.cat(batches).mean(0)
    if not torch.isfinite(mean).all():
        raise ModelError(f"{name}: gradients of the calibration loss are NaN or infinite")
    return [batch / mean.clamp(min=torch.finfo(mean.dtype).tiny) for batch in batches]
