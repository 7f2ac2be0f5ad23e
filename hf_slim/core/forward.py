"""What every evaluation shares: the model in evaluation mode, its device, its logits, and the limits of its inputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from math import sqrt
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hf_slim.core.errors import DataError, ModelError
from hf_slim.core.precision import fast_dtype, in_dtype


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside; afterwards every submodule is in the mode it was in.

    On a CPU without arithmetic for the model's dtype it computes in float32 meanwhile (`core/precision.py`).
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    dtype = getattr(model, "dtype", torch.float32)
    try:
        with torch.no_grad(), in_dtype(model, fast_dtype(dtype, device_of(model))):
            yield
    finally:
        for module, training in modes:
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """Where the model takes its input: the device of its embedding, for a model spread over devices.

    Weights that accelerate keeps elsewhere between two uses, on disk for one, are on the meta device; its hook knows
    where they are used.
    """
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    modules = [module for module in (embedding, model) if isinstance(module, nn.Module)]
    hooks = [hook for module in modules if (hook := getattr(module, "_hf_hook", None)) is not None]
    chain = [single for hook in hooks for single in getattr(hook, "hooks", [hook])]
    used = [hook.execution_device for hook in chain if getattr(hook, "execution_device", None) is not None]
    if used:
        return torch.device(used[0])
    tensors = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward names this argument."""
    return argument in inspect.signature(model.forward).parameters


def inputs_of(model: nn.Module) -> tuple[set[str], bool]:
    """Names of what the model's forward takes, below adapters and DeepSpeed's engine, and whether it takes others."""
    inside: Any = getattr(model, "module", model)
    inside = inside.get_base_model() if hasattr(inside, "get_base_model") else inside
    parameters = inspect.signature(inside.forward).parameters.values()
    any_other = {p.name for p in parameters if p.kind == inspect.Parameter.VAR_KEYWORD}
    return {p.name for p in parameters} - any_other, bool(any_other)


def run_on(model: nn.Module, ids: Int[Tensor, "batch length"]) -> Any:
    """What the model puts out for token windows, without a cache.

    The decoder of an encoder-decoder is fed the same windows, moved by one as in training: it predicts token i of the
    window from those before it, and looks at the encoded window.
    """
    ids = ids.to(device_of(model))
    options: dict[str, Any] = {"use_cache": False} if accepts(model, "use_cache") else {}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and accepts(model, "decoder_input_ids"):
        options["decoder_input_ids"] = shift_right(model, ids)
    return model(input_ids=ids, **options)


def shift_right(model: nn.Module, ids: Int[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
    """Windows that begin with the decoder's start token and lack their last one."""
    config: Any = model.config
    known = (getattr(config, f"{kind}_token_id", None) for kind in ("decoder_start", "bos", "pad"))
    start = next((token for token in known if token is not None), 0)
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)


def logits_of(model: nn.Module, ids: Int[Tensor, "batch length"]) -> Float[Tensor, "*shape classes"]:
    """The model's logits in its own dtype: [batch, length, vocabulary], or [batch, classes] of a classifier."""
    return run_on(model, ids).logits


def is_causal(model: nn.Module) -> bool:
    """Whether position i predicts token i + 1. A module that is no Transformers model is taken at its word."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return False
    return bool(getattr(model, "can_generate", lambda: True)())


def is_classifier(model: nn.Module) -> bool:
    """Whether the model predicts one class for a whole text."""
    return getattr(model, "loss_type", None) == "ForSequenceClassification"


def require_causal(model: nn.Module, measure: str) -> None:
    """Raises ModelError unless the model predicts the next token."""
    if not is_causal(model):
        raise ModelError(
            f"{measure} needs a causal language model, got {type(model).__name__}; "
            "for encoders and classifiers use evaluate.agreement, which compares with the original"
        )


def require_context(model: nn.Module, length: int) -> None:
    """Raises DataError if the model has fewer positions than `length` tokens need."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise DataError(f"{length} tokens do not fit the {positions} positions of {type(model).__name__}; use less")


def standard_error(means: Float[Tensor, " windows"]) -> float | None:
    """Standard error of the mean of independent windows; None for a single one."""
    if len(means) < 2:
        return None
    return float(means.double().std() / sqrt(len(means)))
