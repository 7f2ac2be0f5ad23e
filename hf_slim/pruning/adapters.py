"""LoRA adapters on pruned layers: what is pruned stays zero while they train and when they are merged.

    y = x Wᵀ + dropout(x) (keep ⊙ s B A)ᵀ           in training
    W <- keep ⊙ (W + s B A)                          merged

An adapter's own product s B A (Hu et al. 2021, arXiv:2106.09685) is dense, so a plain merge brings back what was
pruned. Masked in training as it will be masked in the end, the merged model computes what the trained one did. That
takes the product of B and A, a matrix of the layer's shape, in every pass.

W [rows, cols], B [rows, r], A [r, cols], keep Bool [rows, cols]. Only plain LoRA has this form; other adapters are
refused on pruned layers, and merged in their own way on dense ones.
"""

from __future__ import annotations

import sys
from types import MethodType
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hf_slim.core.errors import ModelError
from hf_slim.core.swap import encode_layer, get_keep, get_weight, set_module
from hf_slim.encodings.modules import EncodedModule
from hf_slim.pruning.pattern import pack


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers that wrap a layer of the model, by that layer's name."""
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and isinstance(getattr(module, "base_layer", None), nn.Module)
    }


def is_plain_lora(layer: Any) -> bool:
    """Whether all that the layer's active adapters do is to add s B A to the weight."""
    from peft.tuners.lora import Linear

    return (
        isinstance(layer, Linear)
        and not any(layer.lora_bias.get(adapter) for adapter in layer.active_adapters)
        and not any(adapter in layer.lora_variant for adapter in layer.active_adapters)
    )


def unwrap(model: nn.Module) -> None:
    """Put the layers that adapters wrap in the adapters' place."""
    for name, layer in adapter_layers(model).items():
        set_module(model, name, layer.base_layer)


def merged_weight(layer: Any, W: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
    """W and what the active adapters add to it; weights of W that are zero stay zero, unless all are."""
    with torch.no_grad():
        total = W.clone()
        for adapter in _active(layer):
            total += _delta(layer, adapter).to(total.dtype)
        return total.mul_(_kept(W))


def mask_adapters(layer: Any, keep: Bool[Tensor, "rows cols"]) -> None:
    """Let a LoRA layer's adapters change only the weights that `keep` marks; a mask that changes later, too."""
    layer.kept = keep
    layer.forward = MethodType(_forward, layer)


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Merge LoRA adapters into the model below them, like PEFT's method of that name; zeros stay zero.

    The result computes what the adapted model does if its adapters were trained under `GradualMagnitudePruning`
    (`sparsity=0.0` prunes nothing further and holds the zeros that are there).

    Args:
        model: a `PeftModel`; not to be used any more.

    Returns:
        The model below the adapters. Layers that were stored sparse are so again.

    Raises:
        ModelError: no adapters, adapters that are merged already, and others than plain LoRA on pruned layers; all
            problems at once, before anything is changed.
    """
    adapters = adapter_layers(model)
    if problems := _merge_problems(model, adapters):
        raise ModelError(problems)
    merged: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in adapters.items():
        base = layer.base_layer
        if not is_plain_lora(layer):
            layer.merge()
            continue
        W = get_weight(base)
        keep = get_keep(base) if isinstance(base, EncodedModule) else getattr(layer, "kept", _kept(W))
        merged[name] = merged_weight(layer, W).mul_(keep), keep
        if not isinstance(base, EncodedModule):
            W.copy_(merged[name][0])
    sparse = {layer.base_layer: name for name, layer in adapters.items() if isinstance(layer.base_layer, EncodedModule)}
    plain: nn.Module = model.unload()  # pyright: ignore[reportCallIssue]
    for name, module in list(plain.named_modules()):
        if module in sparse:
            encode_layer(plain, name, *pack(*merged[sparse[module]]))
    return plain


def _merge_problems(model: nn.Module, adapters: dict[str, Any]) -> list[str]:
    if not adapters or not hasattr(model, "unload"):
        return [f"{type(model).__name__} has no adapters to merge; pass the PeftModel that was trained"]
    problems = []
    for name, layer in adapters.items():
        base = layer.base_layer
        if layer.merged:
            problems.append(f"{name}: an adapter is merged already; call unmerge_adapter() first")
        elif isinstance(base, EncodedModule) and not (base.encoding.lossless and get_keep(base) is not None):
            problems.append(f"{name} is stored as {base.encoding.describe()}, which takes no adapter in")
        elif not is_plain_lora(layer) and _is_pruned(base):
            problems.append(f"{name} is pruned, and its adapter is more than plain LoRA: merging would fill its zeros")
    return problems


def _is_pruned(base: nn.Module) -> bool:
    if not isinstance(base, nn.Linear | Conv1D | EncodedModule):
        return False
    W = get_weight(base)
    return bool(W.any()) and not bool(W.all())


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What a LoRA layer computes, its adapters masked."""
    if layer.disable_adapters or layer.merged or kwargs.get("adapter_names") is not None:
        return type(layer).forward(layer, x, *args, **kwargs)
    y = layer.base_layer(x)
    for adapter in _active(layer):
        delta = _delta(layer, adapter) * layer.kept
        y = y + F.linear(layer.lora_dropout[adapter](x.to(delta.dtype)), delta).to(y.dtype)
    return y


def _active(layer: Any) -> list[str]:
    return [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]


def _delta(layer: Any, adapter: str) -> Float[Tensor, "rows cols"]:
    delta = layer.get_delta_weight(adapter)
    return delta.T if isinstance(layer.base_layer, Conv1D) else delta


def _kept(W: Float[Tensor, "rows cols"]) -> Bool[Tensor, "rows cols"]:
    """A weight that is zero is a pruned one, unless all are."""
    return (W != 0) | ~W.any()
