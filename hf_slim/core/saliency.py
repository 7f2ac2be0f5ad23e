"""How much the loss cares about each token at each layer, and about each weight: squared gradients.

    s_ik = mean over outputs j in group k of (dloss / dz_ij)**2,     z = the layer's output, token i
    F_rc = mean over windows of (dloss / dW_rc)**2,                  the diagonal of the Fisher information

Weighing tokens by s turns H = sum x xᵀ into the Hessian of GuidedQuant (Kim et al. 2025, arXiv:2505.07004, eq. 7): the
error that a layer makes then counts by what it does to the loss, not by its size. Gradients are the dense model's, for
the mean next-token loss on the calibration windows. Every group's weights are scaled to a mean of one.

F weighs each weight's own error (Kim et al., "SqueezeLLM", arXiv:2306.07629, eq. 4). Its gradients are those of a
window's mean loss, as in the authors' code, not of single tokens, which would take as many backward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from accelerate.utils import reduce
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hf_slim.core.capture import own_share
from hf_slim.core.errors import ModelError
from hf_slim.core.forward import evaluating, logits_of, require_causal
from hf_slim.core.progress import Progress
from hf_slim.encodings.modules import EncodedModule


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
        _loss(model, ids).backward()
    return squares


def _loss(model: nn.Module, ids: Int[Tensor, "one length"]) -> Float[Tensor, ""]:
    logits = logits_of(model, ids)
    return F.cross_entropy(logits[0, :-1].float(), ids[0, 1:].to(logits.device))


def fisher(
    model: nn.Module, names: Sequence[str], windows: Int[Tensor, "samples length"], progress: Progress
) -> dict[str, Float[Tensor, "rows cols"]]:
    """Diagonal of the Fisher information of the layers' weights, over all processes.

    One backward pass a window. Besides the activations of one window, memory holds one float32 number for each weight
    of the layers, and the gradient of one layer at a time. A table that a head shares counts for both of its uses.

    Args:
        model: a causal language model; left as it is, gradients too. Pruned layers count 0 where nothing is stored.
        names: layers or embeddings; of fused experts, those that `unfuse` gives.
        windows: calibration tokens.

    Raises:
        ModelError: no causal language model, or gradients that are NaN or infinite.
    """
    require_causal(model, "weighing weights by gradients")
    batches = own_share(windows)
    with evaluating(model), _only_activations(model):
        stored = {name: _stored_weight(model.get_submodule(name)) for name in names}
        with _sums_of_squares(stored.values()) as sums, torch.enable_grad():
            for batch in progress.track(batches, "gradients"):
                for window in batch:
                    _loss(model, window[None]).backward()
        found = {}
        for name, parameter in stored.items():
            total: Tensor = reduce(sums[parameter], reduction="sum")  # pyright: ignore
            if not torch.isfinite(total).all():
                raise ModelError(f"{name}: gradients of the calibration loss are NaN or infinite")
            found[name] = _as_matrix(model.get_submodule(name), total / len(windows))
    return found


@contextmanager
def _sums_of_squares(parameters: Iterable[nn.Parameter]) -> Iterator[dict[nn.Parameter, Tensor]]:
    """Sums of squared gradients of backward passes inside; the gradients themselves are let go of at once."""
    chosen = list(dict.fromkeys(parameters))
    sums = {p: torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for p in chosen}
    before = [p.grad for p in chosen]

    def add(parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            sums[parameter].addcmul_(parameter.grad.float(), parameter.grad.float())
        parameter.grad = None

    handles = []
    for parameter in chosen:
        parameter.grad = None
        handles.append(parameter.requires_grad_().register_post_accumulate_grad_hook(add))
    try:
        yield sums
    finally:
        for parameter, gradient, handle in zip(chosen, before, handles, strict=True):
            handle.remove()
            parameter.requires_grad_(False).grad = gradient


def _stored_weight(module: nn.Module) -> nn.Parameter:
    """The parameter that the weight is computed from: itself, or what pruning left of it."""
    name = module.encoding.trainable[0] if isinstance(module, EncodedModule) else "weight"
    return module.get_parameter(name)


def _as_matrix(module: nn.Module, squares: Tensor) -> Float[Tensor, "rows cols"]:
    if isinstance(module, EncodedModule):
        stored = module.tensors() | {module.encoding.trainable[0]: squares}
        return module.encoding.decode(stored, module.rows, module.cols)
    return squares.T if isinstance(module, Conv1D) else squares


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
