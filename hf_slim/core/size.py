"""Counting: weights of a model, and the bytes that its tensors take when they are saved."""

from __future__ import annotations

from torch import Tensor, nn

from hf_slim.encodings.modules import EncodedModule


def stored_bytes(model: nn.Module) -> int:
    """Bytes of everything that is saved, a shared tensor once. Works on the meta device too."""
    return sum(tensor.nbytes for tensor in _saved(model).values())


def count_weights(model: nn.Module) -> int:
    """Weights of the dense model: an encoded layer counts rows x cols, a shared weight once."""
    encoded = {name: m for name, m in model.named_modules() if isinstance(m, EncodedModule)}
    inside = {f"{name}.{key}" for name, module in encoded.items() for key in module.tensors()}
    others = sum(tensor.numel() for name, tensor in _saved(model).items() if name not in inside)
    return sum(m.rows * m.cols for m in encoded.values()) + others


def _saved(model: nn.Module) -> dict[str, Tensor]:
    """Tensors by name, a shared one by its first."""
    first: dict[int, str] = {}
    tensors = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    return {name: tensors[name] for name in first.values()}
