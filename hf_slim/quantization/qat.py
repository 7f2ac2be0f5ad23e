"""Quantization-aware training: train the weights as they will be rounded (ParetoQ, Liu et al. 2025, arXiv:2502.02631).

Every forward pass sees W_q, the weights W [rows, cols] on their grid; gradients pass the rounding straight through to W
and to one learned scale a group (LSQ). What is stored in the end are the codes and scales of the last forward pass, so
the stored model is the trained one. `fake.py` has the equations and the levels: at 3 bits and more integers, at 2 and 1
bits levels centered on zero, or {-1, 0, 1}, after ParetoQ.

`FakeQuantize` works in any `Trainer`. It gives each layer a child, `fake`, and a forward pass of its own; the layer
remains an `nn.Linear` (or `Conv1D`) with its `weight`, so that pruning, adapters, checkpoints and the optimizer find
what they look for. Parameters must exist before the optimizer is made, hence it all happens when the Trainer is made.

As a stage it trains on labels; in `during` of `distill.logits` it learns from the original, which is better where data
is scarce. Weights that are zero stay zero, also those that `prune.gradual` makes so in the same `during`, before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MethodType
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, TrainerCallback
from transformers.pytorch_utils import Conv1D

from hf_slim.core.context import Context
from hf_slim.core.errors import ModelError, PlanError
from hf_slim.core.layers import Encoded, plan_targets, put_layer, worth_masking
from hf_slim.core.method import MethodConfig, Rules
from hf_slim.core.parallel import require_whole_weights
from hf_slim.core.report import LayerReport, StageReport
from hf_slim.core.select import Layer, Select, find_layers
from hf_slim.core.swap import densify, get_weight
from hf_slim.core.training import TrainingOptions, configured, require_loss, train_with
from hf_slim.encodings import Affine
from hf_slim.integration.transformers import mark
from hf_slim.quantization.fake import FakeWeight, Grid, Levels

RULES = Rules(
    needs=("train",), makes=("codes",), preserves=("zeros", "tied"), paper="Liu et al. 2025, arXiv:2502.02631"
)


class Config(MethodConfig):
    """Options of `quantize.qat`."""

    per_layer: ClassVar[tuple[str, ...]] = ("bits", "group_size", "symmetric", "levels")

    bits: int = Field(4, ge=1, le=8, description="bits a code takes")
    group_size: int | None = Field(64, ge=1, description="columns that share a scale; null for one scale a row")
    symmetric: bool = Field(True, description="no stored zero points; the scale is signed")
    levels: Levels | None = Field(
        None,
        description="'integer', 'centered' (1 and 2 bits; no level at zero) or 'ternary' (2 bits; -1, 0, 1); "
        "null for centered at 1 and 2 bits where symmetric, integer otherwise",
    )
    scale_learning_rate: float = Field(
        1e-3, gt=0, description="a relative one: the share of itself that a scale moves in a step of Adam"
    )
    layers: Select = Select()
    training: TrainingOptions = Field(TrainingOptions(), description="how to train, where this is a stage of its own")

    @model_validator(mode="after")
    def _levels_fit(self) -> Config:
        if self.levels in ("centered", "ternary") and not self.symmetric:
            raise ValueError(f"levels: {self.levels!r} is symmetric; set symmetric: true, or levels: integer")
        if self.levels == "centered" and self.bits > 2:
            raise ValueError(f"levels: 'centered' is for 1 and 2 bits, got bits: {self.bits}; set levels: integer")
        if self.levels == "ternary" and self.bits != 2:
            raise ValueError(f"levels: 'ternary' takes 2 bits a code, got bits: {self.bits}; set bits: 2")
        return self

    @property
    def grid(self) -> Grid:
        """What these options round to."""
        few = self.bits <= 2 and self.symmetric
        return Grid(self.bits, self.group_size, self.symmetric, self.levels or ("centered" if few else "integer"))


def encoding(layer: Layer, config: Config) -> Affine:
    """How a layer will be stored once it is trained."""
    return _stored(layer, config.at(layer).grid)


def callback(model: PreTrainedModel, config: Config) -> FakeQuantize:
    """The callback for a stage that trains."""
    plan_targets(model, "quantize.qat", config)
    return FakeQuantize(config)


def store(model: PreTrainedModel, trained: FakeQuantize) -> list[LayerReport]:
    """Store the layers that the callback has trained as codes."""
    layers = find_layers(model)
    return [put_layer(model, layers[name], encoded) for name, encoded in trained.encoded.items()]


def needs(config: Config) -> tuple[str, ...]:
    """The data that it needs: a classifier's with classes."""
    return (*RULES.needs, "labels")


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Train the model on its own loss and quantize it meanwhile."""
    require_loss(model, "quantize.qat")
    quantization = callback(model, config)
    metrics = train_with(quantization, model, config.training, context)
    return StageReport(layers=store(model, quantization), metrics=metrics)


class FakeQuantize(TrainerCallback):
    """Quantizes a model while any `Trainer` trains it.

        quantization = FakeQuantize(bits=2)
        Trainer(model, args, callbacks=[quantization], ...).train()
        quantization.store(model)
        model.save_pretrained(folder)

    Pass it when the Trainer is made; checkpoints, resuming, gradient accumulation, mixed precision and data parallelism
    are the Trainer's own. Weight decay, if any, draws scales towards where they began. A checkpoint holds float weights
    and, beside them, the scales: to be resumed, not to be served.

    Args:
        config: a `Config`, or a mapping of its fields.
        options: single fields of `Config`, which take precedence.

    Raises:
        PlanError: unknown or contradictory options. When the Trainer is made: layers that cannot be quantized, sharded
            parameters. When training begins: the Trainer had been made before this callback was added.
        ModelError: weights that are not finite, when the Trainer is made and when training ends.
    """

    def __init__(self, config: Config | Mapping[str, Any] | None = None, **options: Any):
        self.config = configured("quantize.qat", Config, config, options)
        self.encoded: dict[str, Encoded] = {}
        self._modules: dict[str, nn.Module] = {}

    def on_init_end(self, args, state, control, *, model, **kwargs):
        """Fit the grids and give every layer its scales, before there is an optimizer."""
        require_whole_weights("quantize.qat")
        targets = plan_targets(model, "quantize.qat", self.config)
        if twice := [t.name for t in targets if hasattr(model.get_submodule(t.name), "fake")]:
            raise PlanError(
                f"a FakeQuantize is at work in {', '.join(twice)}; finish with its store(model), "
                "or start from the model as it was"
            )
        rate = self.config.scale_learning_rate / args.learning_rate
        for layer in targets:
            if layer.encoding is not None:
                densify(model, layer.name)
            module = self._modules[layer.name] = model.get_submodule(layer.name)
            module.fake = FakeWeight(get_weight(module), self.config.at(layer).grid, rate)
            module.forward = MethodType(_forward, module)

    def on_train_begin(self, args, state, control, *, model, **kwargs):
        """Refuse to train scales that the optimizer does not know."""
        if not self._modules or any(model.get_submodule(name) is not m for name, m in self._modules.items()):
            raise PlanError(
                "FakeQuantize adds parameters, which the optimizer must know: pass callbacks=[...] and model=... "
                "when the Trainer is made; add_callback and model_init are too late"
            )

    @torch.no_grad()
    def on_train_end(self, args, state, control, *, model, **kwargs):
        """Take codes and scales of the model that is handed over."""
        layers = find_layers(model)
        weights = {name: get_weight(module) for name, module in self._modules.items()}
        if bad := [name for name, W in weights.items() if not torch.isfinite(W).all()]:
            raise ModelError([f"{name} holds NaN or infinite values; training diverged" for name in bad])
        self.encoded = {name: _encode(layers[name], self._modules[name].fake, W) for name, W in weights.items()}

    def store(self, model: PreTrainedModel) -> list[LayerReport]:
        """Put the trained codes and scales in the place of the float weights; the model then saves as such."""
        reports = store(model, self)
        mark(model)
        self._modules, self.encoded = {}, {}
        return reports


def _stored(layer: Layer, grid: Grid) -> Affine:
    """How a layer on this grid is stored: zeros are masked where that takes less room, or no level is zero."""
    return grid.encoding(layer.survivors if grid.levels == "centered" else worth_masking(layer, grid.bits))


def _encode(layer: Layer, fake: FakeWeight, W: Tensor) -> Encoded:
    """One weight as it will be stored."""
    keep = W != 0
    left = int(keep.sum())
    stored = _stored(replace(layer, survivors=left if left < W.numel() else None), fake.grid)
    return stored, fake.pack(W, None if stored.survivors is None else keep)


def _forward(module: nn.Module, x: Tensor) -> Tensor:
    """A linear layer whose weight is rounded."""
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    return F.linear(x, module.fake(weight).to(x.dtype), module.bias)
