"""Counting: weights of a model, and the bytes that its tensors take when they are saved."""

from __future__ import annotations

from torch import Tensor, nn

from hf_slim.encodings.modules import EncodedModule


def stored_bytes(model: nn.Module) -> int:
    """Bytes of everything that is saved, a shared tensor once. Works on the meta device too."""
    return sum(tensor.nbytes for tensor in _saved(model))


def count_weights(model: nn.Module) -> int:
    """Weights of the dense model: an encoded layer counts rows x cols, a shared weight once."""
    encoded = [m for m in model.modules() if isinstance(m, EncodedModule)]
    inside = {id(t) for m in encoded for t in m.tensors().values()}
    return sum(m.rows * m.cols for m in encoded) + sum(t.numel() for t in _saved(model) if id(t) not in inside)


def _saved(model: nn.Module) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}.values())
