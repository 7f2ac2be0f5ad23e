"""LoRA: adapters of low rank learn beside weights that stay as they are (Hu et al. 2021, arXiv:2106.09685).

    y = x Wᵀ + s dropout(x) Aᵀ Bᵀ,      s = alpha / r           in training; W as it is stored, in whatever way
    y = x Wᵀ + dropout(x) (keep ⊙ s B A)ᵀ                       where W is pruned, so that zeros stay zero

W [rows, cols]; A [r, cols], uniform within ±1 / sqrt(cols) at first; B [rows, r], zero at first, so that training
begins with the model as it is. Only A and B are trained, in float32, and `modules_to_save`, in full. Afterwards they
become part of the model, which needs no library for adapters to load and computes what the trained one did:

    W dense                             W <- W + s B A                 merged, at no cost
    W sparse                            W <- keep ⊙ (W + s B A)        merged, at no cost
    W a product C D (+ a base)          C <- [C, s B],  D <- [D; A]    r more columns and rows
    W codes, centroids, hashed values   W + s B A, factors apart       `LowRank` with W as its base: r (rows + cols)
                                                                       numbers more in the model's dtype

Merging into codes would round s B A away. A weight that is quantized and pruned keeps its zeros in the base, and what
is added to them.

Where we differ from PEFT, whose names and first values these are: no wrapped model, because layers keep their class and
name, as checkpoints, plans and artifacts know them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_slim.core.errors import PlanError
from hf_slim.core.layers import Encoded, put_layer
from hf_slim.core.method import MethodConfig
from hf_slim.core.report import LayerReport
from hf_slim.core.select import Layer, Select, matches, select_layers
from hf_slim.core.swap import get_keep, get_weight
from hf_slim.encodings import Affine, Codebook, Encoding, Hashed, LowRank, Sparse
from hf_slim.encodings.modules import EncodedModule

LEARNING_RATE = 2e-4
"""What adapters are usually trained with; the options' own default suits whole models."""


class Lora(MethodConfig):
    """Options of adapters."""

    per_layer: ClassVar[tuple[str, ...]] = ("r", "alpha", "dropout")

    r: int = Field(8, ge=1, description="rank of an adapter")
    alpha: float = Field(16.0, gt=0, description="an adapter's share is scaled by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of an adapter's inputs dropped in training")
    modules_to_save: tuple[str, ...] = Field(
        (), description="names of modules that are trained in full beside them, such as *norm, or a new classifier"
    )
    layers: Select = Select()


def product(
    B: Float[Tensor, "rows r"], A: Float[Tensor, "r cols"], scale: float, keep: Bool[Tensor, "rows cols"] | None = None
) -> Float[Tensor, "rows cols"]:
    """s B A, zero wherever `keep` is False."""
    delta = scale * (B @ A)
    return delta if keep is None else delta * keep


def stored_with(encoding: Encoding | None, r: int) -> Encoding | None:
    """How a weight is stored once an adapter of rank r belongs to it; as before where it is merged.

    Raises:
        PlanError: such a weight takes no adapter.
    """
    if encoding is None or isinstance(encoding, Sparse):
        return encoding
    if isinstance(encoding, LowRank) and encoding.left is None and encoding.right is None:
        return encoding.model_copy(update={"rank": encoding.rank + r})
    if isinstance(encoding, Affine | Codebook | Hashed) and getattr(encoding, "activations", None) is None:
        return LowRank(rank=r, base=encoding)
    raise PlanError(f"is stored as {encoding.describe()}, which no adapter can be added to")


def plan(layers: Mapping[str, Layer], config: Lora, model: nn.Module) -> dict[str, Layer]:
    """The chosen layers as they will be stored; those that adapters are merged into stay as they are.

    Args:
        layers: as they are before it.
        model: the one that they belong to, or its skeleton.

    Raises:
        PlanError: every layer that takes no adapter, or none to choose from; modules that do not exist.
    """
    shared = {layer.tied_to for layer in layers.values() if layer.tied_to is not None}
    chosen = select_layers(dict(layers), config.layers)
    problems = [] if chosen else ["lora: no layer to adapt: the model has none in its blocks, or all are excluded"]
    problems += [
        f"lora.modules_to_save: {pattern!r} matches no module with parameters of its own"
        for pattern, found in _full_modules(model, config).items()
        if not found
    ]
    planned: dict[str, Layer] = {}
    for layer in chosen:
        r, what = config.at(layer).r, f"lora: {layer.name} [{layer.rows}, {layer.cols}]"
        if layer.name in shared:
            problems.append(f"{what} shares its weight with other layers; name it in lora.layers.exclude")
        if r > min(layer.rows, layer.cols):
            problems.append(f"{what} has rank {min(layer.rows, layer.cols)} at most, got r: {r}; lower r")
        try:
            stored = stored_with(layer.encoding, r)
        except PlanError as error:
            problems.append(f"{what} {error.problems[0]}; name it in lora.layers.exclude")
            continue
        planned[layer.name] = layer if stored is None or stored == layer.encoding else layer.encoded(stored)
    if problems:
        raise PlanError(problems)
    return planned


class Adapter(nn.Module):
    """The two factors that learn beside one weight.

    Args:
        rows, cols: of the weight.
        config: the options that hold for it.
        keep: which weights pruning left; None for all.
        generator: draws A.
    """

    keep: Tensor | None

    def __init__(
        self, rows: int, cols: int, config: Lora, keep: Bool[Tensor, "rows cols"] | None, generator: torch.Generator
    ):
        super().__init__()
        self.scale, self.dropout = config.alpha / config.r, config.dropout
        self.lora_A = nn.Parameter((2 * torch.rand(config.r, cols, generator=generator) - 1) * cols**-0.5)
        self.lora_B = nn.Parameter(torch.zeros(rows, config.r))
        self.register_buffer("keep", keep, persistent=False)

    def forward(self, x: Float[Tensor, "*tokens cols"]) -> Float[Tensor, "*tokens rows"]:
        """What is added to the layer's output."""
        x = F.dropout(x.to(self.lora_A.dtype), self.dropout, self.training)
        if self.keep is not None:
            return F.linear(x, self.delta())
        return self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)

    def delta(self) -> Float[Tensor, "rows cols"]:
        """What is added to the weight."""
        return product(self.lora_B, self.lora_A, self.scale, self.keep)

    def factors(self, dtype: torch.dtype) -> tuple[Float[Tensor, "rows r"], Float[Tensor, "r cols"]]:
        """s B and A."""
        return (self.scale * self.lora_B).detach().to(dtype), self.lora_A.detach().to(dtype)


@contextmanager
def adapting(model: PreTrainedModel, layers: Sequence[Layer], config: Lora, seed: int) -> Iterator[dict[str, Adapter]]:
    """Inside, adapters of these layers and the modules asked for are all that is trained; codes may stay codes."""
    generator = torch.Generator().manual_seed(seed)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    quantized = getattr(model, "is_quantized", False)
    adapters: dict[str, Adapter] = {}
    modules: list[Any] = [model.get_submodule(layer.name) for layer in layers]
    model.is_quantized = False  # pyright: ignore  # the Trainer would refuse codes that no PeftModel is around
    model.requires_grad_(False)
    for names in _full_modules(model, config).values():
        for name in names:
            model.get_submodule(name).requires_grad_(True)
    for layer, module in zip(layers, modules, strict=True):
        adapter = Adapter(layer.rows, layer.cols, config.at(layer), _pruned(module), generator)
        module.lora = adapters[layer.name] = adapter.to(next(iter(model.parameters())).device)
        module.forward = MethodType(_forward, module)
    try:
        yield adapters
    finally:
        for module in modules:
            del module.lora, module.forward
        model.is_quantized = quantized  # pyright: ignore
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])


@torch.no_grad()
def absorb(
    model: PreTrainedModel, layers: Sequence[Layer], adapters: Mapping[str, Adapter]
) -> tuple[list[LayerReport], dict[str, int]]:
    """Make trained adapters part of the model.

    Args:
        layers: as they were before training.

    Returns:
        Layers that are stored anew; how many adapters were merged and kept, and what those that were kept take.
    """
    rows: list[LayerReport] = []
    for layer in layers:
        module, adapter = model.get_submodule(layer.name), adapters[layer.name]
        if isinstance(module, EncodedModule):
            rows.append(put_layer(model, layer, _encoded(module, adapter)))
        else:
            W = get_weight(module)
            W.copy_(W.float() + adapter.delta())
    added = [row.bytes - row.bytes_before for row in rows]
    kept = sum(count > 0 for count in added)
    return rows, {"merged": len(layers) - kept, "kept": kept, "kept_bytes": sum(added)}


def _full_modules(model: nn.Module, config: Lora) -> dict[str, list[str]]:
    """Names of the modules that each pattern asks to train in full."""
    own = [name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]
    return {pattern: [name for name in own if matches(name, pattern)] for pattern in config.modules_to_save}


def _encoded(module: EncodedModule, adapter: Adapter) -> Encoded:
    """An encoded weight and its adapter as one."""
    tensors, (B, A) = module.tensors(), adapter.factors(module.compute_dtype)
    stored = stored_with(module.encoding, len(A))
    if isinstance(stored, Sparse):
        keep = get_keep(module)
        assert keep is not None
        W = module.decoded(torch.float32) + adapter.delta()
        return stored, stored.pack(W.to(module.compute_dtype), keep)
    assert isinstance(stored, LowRank)
    if isinstance(module.encoding, LowRank):
        joined = {"left": torch.cat([tensors["left"], B], 1), "right": torch.cat([tensors["right"], A])}
        return stored, tensors | joined
    return stored, stored.pack(B, A, tensors)


def _pruned(module: nn.Module) -> Bool[Tensor, "rows cols"] | None:
    """Which weights an adapter may change, where those are not all: it is merged into a weight that has zeros."""
    if isinstance(module, EncodedModule):
        return get_keep(module) if module.encoding.lossless else None
    W = get_weight(module)
    return W != 0 if W.any() and not W.all() else None


def _forward(module: Any, x: Tensor) -> Tensor:
    """What the layer computes, and its adapter."""
    return type(module).forward(module, x) + module.lora(x).to(x.dtype)
