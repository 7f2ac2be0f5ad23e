"""The weights that training prunes, wherever a model keeps them.

A target is one matrix [rows, cols] with its gradient: of a linear layer, of GPT-2's `Conv1D` (stored transposed), of
one expert inside a fused weight [experts, rows, cols], or of a layer under a LoRA adapter. All are views of the model's
own parameters, so that the optimizer, checkpoints and everything else of the Trainer find what they know.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_slim.core.errors import PlanError
from hf_slim.core.experts import Layout, read_layout
from hf_slim.core.probe import is_plain_linear
from hf_slim.core.select import Layer, Select, find_layers, find_stacks, select_layers
from hf_slim.core.swap import densify
from hf_slim.encodings import Sparse
from hf_slim.pruning.adapters import adapter_layers, merged_weight


@dataclass(frozen=True, eq=False)
class Target:
    """One matrix to prune.

    Args:
        module: whose parameter it is.
        parameter: the parameter's name there.
        turned: it is stored [cols, rows].
        expert: its number within a fused weight; None for a weight of its own.
        adapter: the LoRA layer on top of `module`, or None.
    """

    module: nn.Module
    parameter: str = "weight"
    turned: bool = False
    expert: int | None = None
    adapter: Any = None

    @property
    def weight(self) -> Tensor:
        """[rows, cols], a view."""
        return self.oriented(self._stored.detach())

    @property
    def gradient(self) -> Tensor | None:
        """[rows, cols], a view; None where there is none."""
        return None if self._stored.grad is None else self.oriented(self._stored.grad)

    @property
    def bias(self) -> Tensor | None:
        """[rows], a view; None where there is none."""
        bias = getattr(self.module, "bias" if self.expert is None else f"{self.parameter}_bias", None)
        return bias if bias is None or self.expert is None else bias.detach()[self.expert]

    @property
    def effective(self) -> Tensor:
        """[rows, cols]: the weight that the layer works with, an adapter's share included."""
        return self.weight if self.adapter is None else merged_weight(self.adapter, self.weight)

    @property
    def trained(self) -> bool:
        """Whether it gets gradients."""
        return self._stored.requires_grad

    def exchange(self, W: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        """Put W into the parameter; what it held. W becomes the parameter's memory if it has that to itself."""
        if self.expert is None:
            held = self._stored.data
            self._stored.data = self.oriented(W)  # turned twice, it lies as the parameter does
            return self.oriented(held)
        held = self.weight.clone()
        self.weight.copy_(W)
        return held

    def oriented(self, stored: Tensor) -> Tensor:
        """The target's part of a tensor that is laid out as the parameter, as [rows, cols]."""
        part = stored if self.expert is None else stored[self.expert]
        return part.T if self.turned else part

    @property
    def _stored(self) -> Tensor:
        return getattr(self.module, self.parameter)


def find_targets(model: nn.Module, select: Select) -> dict[str, Target]:
    """Linear layers to prune by name, within blocks unless `select` says more; experts of fused weights among them.

    A weight that an embedding shares is left out, and so is the second of two layers that share one. Adapters' own
    matrices are no targets.

    Raises:
        PlanError: nothing is left, or a pattern matches no layer.
    """
    taken = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    adapters = adapter_layers(model)
    layers, fused = _without_adapters(find_layers(model), adapters), fused_layers(model)
    targets: dict[str, Target] = {}
    for layer in select_layers(layers | {name: found for name, (found, _) in fused.items()}, select):
        if layer.name in fused:
            targets[layer.name] = fused[layer.name][1]
            continue
        adapter = adapters.get(layer.name)
        module = model.get_submodule(layer.name) if adapter is None else adapter.base_layer
        if (type(module) is Conv1D or is_plain_linear(module)) and id(module.weight) not in taken:
            targets[layer.name] = Target(module, turned=isinstance(module, Conv1D), adapter=adapter)
            taken.add(id(module.weight))
    if not targets:
        raise PlanError(
            f"prune.gradual: {type(model).__name__} has no linear layer to prune among those that layers selects; "
            "name some in layers.include"
        )
    return targets


def make_dense(model: nn.Module, select: Select) -> None:
    """Turn the selected layers that are stored sparse into dense ones, which train if their values did."""
    adapters = adapter_layers(model)
    layers = _without_adapters(find_layers(model), adapters)
    if not any(isinstance(layer.encoding, Sparse) for layer in layers.values()):
        return
    for layer in select_layers(layers, select):
        if isinstance(layer.encoding, Sparse) and layer.kind == "linear":
            name = f"{layer.name}.base_layer" if layer.name in adapters else layer.name
            trained = model.get_submodule(name).values.requires_grad
            densify(model, name)
            model.get_submodule(name).weight.requires_grad_(trained)  # pyright: ignore[reportCallIssue]


def fused_layers(model: nn.Module) -> dict[str, tuple[Layer, Target]]:
    """The matrices of fused experts, under the names that they have as layers of their own."""
    places = {b: (i, len(stack.blocks)) for stack in find_stacks(model) for i, b in enumerate(stack.blocks)}
    found: dict[str, tuple[Layer, Target]] = {}
    for name, module in model.named_modules():
        if (layout := read_layout(module)) is not None:
            block = next((block for block in places if name.startswith(f"{block}.")), None)
            place = None if block is None else places[block]
            for layer, target in _experts(name, module, layout):
                found[layer.name] = dataclasses.replace(layer, block=block, place=place), target
    return found


def _experts(name: str, module: nn.Module, layout: Layout) -> Iterable[tuple[Layer, Target]]:
    for number in range(layout.experts):
        for matrix in layout.matrices:
            target = Target(module, matrix, layout.transposed, number)
            rows, cols = target.weight.shape
            full = f"{name}.{number}.{matrix}"
            yield Layer(full, "linear", rows, cols, target.weight.dtype, routed=True), target


def _without_adapters(layers: dict[str, Layer], adapters: dict[str, Any]) -> dict[str, Layer]:
    """The layers as they were called before adapters wrapped them; without the adapters' own."""
    plain: dict[str, Layer] = {}
    for name, layer in layers.items():
        owner = next((adapter for adapter in adapters if name.startswith(f"{adapter}.")), None)
        if owner is None or name == f"{owner}.base_layer":
            plain[owner or name] = dataclasses.replace(layer, name=owner or name)
    return plain
