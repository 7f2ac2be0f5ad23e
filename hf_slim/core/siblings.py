"""Layers of a block that read the very same tensor, such as q, k and v: found by running a small model of the same
config; names decide nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_slim.core.experts import unfused
from hf_slim.core.forward import evaluating, run_on
from hf_slim.core.select import Layer, find_layers, find_stacks
from hf_slim.core.units import few_blocks


def siblings(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Layers that share their input, by the name of each that lies in a block.

    Args:
        model: may lie on the meta device.

    Returns:
        {layer: the layers of its block that are handed the same tensor, itself among them, in the model's order}.
        Layers of experts stand alone: which of them run depends on the text.
    """
    small = few_blocks(model)
    with unfused(small), evaluating(small):
        read = _inputs(small)
        twins = _by_block(find_layers(small))
    blocks, found = _by_block(find_layers(model)), {}
    for stack, twin in zip(find_stacks(model), find_stacks(small), strict=True):
        for block in stack.blocks:
            shapes = _shapes(blocks[block], block)
            alike = next((b for b in twin.blocks if _shapes(twins[b], b) == shapes), twin.blocks[-1])
            source = {layer.name: read.get(alike + layer.name.removeprefix(block)) for layer in blocks[block]}
            for name, x in source.items():
                found[name] = (name,) if x is None else tuple(other for other, y in source.items() if y is x)
    return found


def _by_block(layers: Mapping[str, Layer]) -> dict[str, list[Layer]]:
    found: dict[str, list[Layer]] = {}
    for layer in layers.values():
        if layer.block is not None:
            found.setdefault(layer.block, []).append(layer)
    return found


def _shapes(layers: list[Layer], block: str) -> dict[str, tuple[int, int]]:
    return {layer.name.removeprefix(block): (layer.rows, layer.cols) for layer in layers if not layer.routed}


def _inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """What each layer was handed, the tensor itself; without those of experts."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0]

        return hook

    layers = [layer for layer in find_layers(model).values() if layer.block is not None and not layer.routed]
    handles = [model.get_submodule(layer.name).register_forward_pre_hook(note(layer.name)) for layer in layers]
    try:
        table: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
        run_on(model, torch.arange(2, 34)[None] % len(table.weight))
    finally:
        for handle in handles:
            handle.remove()
    return seen
