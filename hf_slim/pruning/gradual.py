"""Gradual magnitude pruning: prune while training, so that the rest can make up for it (Zhu & Gupta, arXiv:1710.01878).

Every few steps the smallest weights are set to zero, more of them each time (`schedule`), and stay zero (`masks`). A
weight that is exactly zero counts as pruned, so the weights W alone determine the mask:

    keep(W, s) = (magnitude mask of W at sparsity s) and (W != 0)

Hence pruned weights never come back, zeros of an earlier stage survive (a matrix that is zero throughout before pruning
begins excepted: it has yet to be trained), and a run resumed from a checkpoint, where W and the step are all there is,
goes on bit for bit as if it had never stopped.

The callback works in any `Trainer`: ours, a plain one, or another subclass. At every step
- `on_pre_optimizer_step` clears the gradients of pruned weights, so that no optimizer state grows on them;
- `on_optimizer_step` sets pruned weights back to zero: momentum and Adam's state from before they were pruned, and
  decoupled decay, move them otherwise;
- `on_step_end` updates the masks when the schedule says so, before anything is evaluated or saved;
- `on_save` takes the masks anew from the weights, as a resumed run will.

Where we differ from the paper: n:m patterns drop one more weight of every group whenever the cubic curve passes the
next multiple of 1/m; ranking over all layers together is a choice. The Trainer clips gradients before the first of
these hooks, so the norm that it clips by still includes the gradients of pruned weights.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, StrictFloat, StrictInt, ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D

from hf_slim.core.context import Context
from hf_slim.core.errors import ModelError, PlanError
from hf_slim.core.explain import explain
from hf_slim.core.layers import plan_targets, put_layer
from hf_slim.core.method import MethodConfig, Rules
from hf_slim.core.probe import is_plain_linear
from hf_slim.core.report import LayerReport, StageReport
from hf_slim.core.select import Layer, Select, find_layers, select_layers
from hf_slim.core.swap import densify, get_weight
from hf_slim.core.training import TrainingOptions, require_loss, train
from hf_slim.encodings import Sparse
from hf_slim.pruning.masks import global_masks, magnitude_mask, n_m_mask
from hf_slim.pruning.pattern import Pattern, column_problems, parse_pattern, survivors
from hf_slim.pruning.schedule import Schedule, plan_schedule

logger = logging.getLogger(__name__)

RULES = Rules(needs=("train",), makes=("zeros",), preserves=("zeros",), paper="Zhu & Gupta 2017, arXiv:1710.01878")

Steps = Annotated[StrictInt, Field(ge=0)] | Annotated[StrictFloat, Field(ge=0, le=1)]


class Config(MethodConfig):
    """Options of `prune.gradual`; `begin`, `end` and `every` are steps if whole, shares of training if floats."""

    sparsity: float = Field(0.5, ge=0, lt=1, description="share of weights to drop; an n:m pattern sets its own")
    initial_sparsity: float = Field(0.0, ge=0, lt=1, description="share dropped at once when pruning begins")
    begin: Steps = Field(0.0, description="first update of the masks, in steps or as a share of training")
    end: Steps = Field(0.8, description="last update of the masks; what follows trains with fixed masks")
    every: Steps = Field(0.05, description="distance between updates of the masks")
    pattern: Pattern = Field("unstructured", description="'unstructured', or 'n:m': keep n of every m columns")
    scope: Literal["layer", "global"] = Field("layer", description="rank within each layer, or over all of them")
    layers: Select = Select()
    training: TrainingOptions = Field(TrainingOptions(), description="how to train, where this is a stage of its own")

    @property
    def final_sparsity(self) -> float:
        """Sparsity at the end: the n:m pattern's own, if there is one."""
        n_m = parse_pattern(self.pattern)
        return self.sparsity if n_m is None else 1 - n_m[0] / n_m[1]


def gradual_masks(weights: Mapping[str, Tensor], sparsity: float, config: Config) -> dict[str, Tensor]:
    """Masks at one moment of the schedule.

    Args:
        weights: matrices [rows, cols] by name.
        sparsity: the schedule's, from 0 to `config.final_sparsity`.

    Returns:
        keep: Bool[rows, cols] by name; False wherever a weight is zero already. At sparsity 0 zero matrices are kept.
    """
    if sparsity == 0:
        return {name: (W != 0) | ~W.any() for name, W in weights.items()}
    if (n_m := parse_pattern(config.pattern)) is not None:
        n, m = n_m
        drop = min(m - n, math.floor(sparsity * m + 1e-6))  # in floating point, 3 (1 - 2/3) may fall short of 1
        keep = {name: n_m_mask(W, m - drop, m) for name, W in weights.items()}
    elif config.scope == "global":
        keep = global_masks(weights, sparsity)
    else:
        keep = {name: magnitude_mask(W, sparsity) for name, W in weights.items()}
    return {name: mask.logical_and_(weights[name] != 0) for name, mask in keep.items()}


def encoding(layer: Layer, config: Config) -> Sparse:
    """How a layer will be stored once it is trained and pruned."""
    left = survivors(layer.rows, layer.cols, config.pattern, config.sparsity)
    return Sparse(survivors=left if layer.survivors is None else min(left, layer.survivors))


def problems(layer: Layer, config: Config) -> list[str]:
    """Why a layer cannot be pruned this way."""
    return column_problems(layer.name, layer.cols, config.pattern)


def callback(model: PreTrainedModel, config: Config) -> GradualMagnitudePruning:
    """The callback for a stage that trains. Layers that are stored sparse become dense for as long as it trains."""
    for layer in plan_targets(model, "prune.gradual", config):
        if layer.encoding is not None:
            densify(model, layer.name)
    return GradualMagnitudePruning(config)


def store(model: PreTrainedModel, pruned: GradualMagnitudePruning) -> list[LayerReport]:
    """Store the layers that the callback has pruned as mask and survivors."""
    layers, rows = find_layers(model), []
    for name in pruned.masks:
        W = get_weight(model.get_submodule(name))
        keep = W != 0
        stored = Sparse(survivors=int(keep.sum()))
        metrics = {"zeros": W.numel() - stored.survivors}
        rows.append(put_layer(model, layers[name], (stored, stored.pack(W, keep)), metrics=metrics))
    return rows


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Train the model on its own loss and prune it meanwhile."""
    require_loss(model, "prune.gradual")
    pruning = callback(model, config)
    metrics = train(model, config.training, context, TrainingArguments, partial(Trainer, callbacks=[pruning]))
    rows = store(model, pruning)
    zeros, total = sum(row.metrics["zeros"] for row in rows), sum(row.rows * row.cols for row in rows)
    return StageReport(layers=rows, metrics=metrics | {"sparsity": zeros / total})


class GradualMagnitudePruning(TrainerCallback):
    """Prunes a model while any `Trainer` trains it.

        Trainer(model, args, callbacks=[GradualMagnitudePruning(sparsity=0.8)], ...)

    Works with gradient accumulation, mixed precision and data parallelism; not where parameters are sharded.

    Args:
        config: a `Config`, or a mapping of its fields.
        options: single fields of `Config`, which take precedence.

    Raises:
        PlanError: unknown or contradictory options. When training begins: a schedule that does not fit into it, layers
            that cannot be pruned so, sharded parameters; all before a weight is changed.
        ModelError: weights that are not finite when masks are taken from them.
    """

    def __init__(self, config: Config | Mapping[str, Any] | None = None, **options: Any):
        options = {**(config.model_dump() if isinstance(config, Config) else config or {}), **options}
        try:
            self.config = Config(**options)
        except ValidationError as error:
            found = [(["prune.gradual", *about], text) for _, about, text in explain(error, Config, options)]
            raise PlanError([f"{'.'.join(map(str, key))}: {text}" for key, text in found]) from error
        self.schedule: Schedule | None = None
        self._modules: dict[str, nn.Module] = {}
        self._keep: dict[str, Tensor] = {}

    @property
    def masks(self) -> dict[str, Tensor]:
        """keep, Bool[rows, cols] by layer; empty before training."""
        return dict(self._keep)

    @property
    def sparsity(self) -> float:
        """Share of zeros among all target weights, counted now; 0 before training."""
        counts = [(_zeros(module), module.weight.numel()) for module in self._modules.values()]
        return sum(zeros for zeros, _ in counts) / max(1, sum(total for _, total in counts))

    def report(self) -> dict[str, float]:
        """Share of zeros in each target layer, counted now."""
        return {name: _zeros(module) / module.weight.numel() for name, module in self._modules.items()}

    def on_train_begin(self, args, state, control, *, model, **kwargs):
        """Check everything, then prune as far as the schedule is at this step: 0, or where a checkpoint left off."""
        config = self.config
        self.schedule = plan_schedule(
            state.max_steps,
            initial=config.initial_sparsity,
            final=config.final_sparsity,
            begin=config.begin,
            end=config.end,
            every=config.every,
        )
        if args.fsdp or args.deepspeed:
            raise PlanError("gradual pruning ranks whole weights, which FSDP and DeepSpeed shard; use data parallelism")
        self._modules, self._keep = target_linears(model, config.layers), {}
        widths = {name: _oriented(module).shape[1] for name, module in self._modules.items()}
        if problems := [p for name, cols in widths.items() for p in column_problems(name, cols, config.pattern)]:
            raise PlanError(problems)
        self._update(state.global_step)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Clear the gradients of pruned weights."""
        with torch.no_grad():
            for name, keep in self._keep.items():
                if (gradient := self._modules[name].weight.grad) is not None:
                    _oriented(self._modules[name], gradient).mul_(keep)

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Set pruned weights back to zero."""
        with torch.no_grad():
            for name, keep in self._keep.items():
                _oriented(self._modules[name]).mul_(keep)

    def on_step_end(self, args, state, control, **kwargs):
        """Prune further when the schedule says so; the Trainer evaluates and saves only after this."""
        if self.schedule is not None and self.schedule.is_update(state.global_step):
            self._update(state.global_step)

    def on_save(self, args, state, control, **kwargs):
        """Take the masks anew: a weight that became zero by itself is pruned from here on, as after a resume."""
        self._update(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        """Take the masks of the model that is handed over, and say so if it is less sparse than asked for."""
        self._keep = {name: _oriented(module) != 0 for name, module in self._modules.items()}
        rounding = len(self._keep) / sum(keep.numel() for keep in self._keep.values())
        if self.sparsity < self.config.final_sparsity - rounding:
            logger.warning(
                "The trained model has sparsity %.4f, not %.4f: training stopped early, or load_best_model_at_end "
                "brought back a checkpoint from before the end of the schedule.",
                self.sparsity,
                self.config.final_sparsity,
            )

    @torch.no_grad()
    def _update(self, step: int) -> None:
        """Take masks from the weights as the schedule has it after `step` steps, and apply them."""
        sparsity = self.schedule.sparsity(step) if self.schedule else 0.0
        weights = {name: _oriented(module) for name, module in self._modules.items()}
        if bad := [name for name, W in weights.items() if not torch.isfinite(W).all()]:
            raise ModelError([f"{name} holds NaN or infinite values at step {step}; training diverged" for name in bad])
        for name, keep in gradual_masks(weights, sparsity, self.config).items():
            # the strides of the weight: multiplying a transposed by a plain matrix would take several times as long
            self._keep[name] = torch.empty_like(weights[name], dtype=torch.bool).copy_(keep)
            weights[name].masked_fill_(~self._keep[name], 0.0)


def target_linears(model: nn.Module, select: Select) -> dict[str, nn.Module]:
    """Linear layers to prune by name: `nn.Linear` and GPT-2's `Conv1D`, within blocks unless `select` says more.

    A weight that an embedding shares is left out, and so is the second of two layers that share one.

    Raises:
        PlanError: nothing is left, or a pattern matches no layer.
    """
    taken = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    targets: dict[str, nn.Module] = {}
    for layer in select_layers(find_layers(model), select):
        module = model.get_submodule(layer.name)
        if (type(module) is Conv1D or is_plain_linear(module)) and id(module.weight) not in taken:
            targets[layer.name] = module
            taken.add(id(module.weight))
    if not targets:
        raise PlanError(
            f"prune.gradual: {type(model).__name__} has no linear layer to prune among those that layers selects; "
            "name some in layers.include"
        )
    return targets


def _oriented(module: nn.Module, tensor: Tensor | None = None) -> Tensor:
    """The weight, or a tensor of its shape, as [rows, cols] = [outputs, inputs]; a view."""
    view: Tensor = module.weight.detach() if tensor is None else tensor
    return view.T if isinstance(module, Conv1D) else view


def _zeros(module: nn.Module) -> int:
    return int((module.weight == 0).sum())
