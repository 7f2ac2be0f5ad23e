"""Gradual pruning: prune while training, so that the rest can make up for it (Zhu & Gupta, arXiv:1710.01878).

Every few steps the weights that score lowest are set to zero, more of them each time (`schedule`), and stay zero. What
scores: magnitude, movement or a Taylor estimate (`scores`). What goes: single weights anywhere, by n:m or in blocks
(`masks`), or whole neurons and heads (`groups`). A weight that is exactly zero counts as pruned:

    keep(W, S, s) = (mask of the highest S at sparsity s) and (W != 0),        S = |W| unless scores say else

Hence pruned weights never come back, and zeros of an earlier stage survive (a matrix that is zero throughout before
pruning begins excepted: it has yet to be trained). With `shadow` they may come back, from dense weights that train
behind the masked ones (`shadow`), until the masks are fixed at `end`. With magnitudes W and the step are all there is,
so a run resumed from a checkpoint goes on bit for bit as if it had never stopped; scores and shadows are saved beside
the checkpoint (`checkpoint`) to the same end.

The callback works in any `Trainer`: ours, a plain one, or another subclass such as TRL's. At every step
- `on_pre_optimizer_step` clears the gradients of pruned weights, unless the optimizer is one that moves every weight
  by its own gradient alone (AdamW, SGD): then they make no difference;
- `on_optimizer_step` sets pruned weights back to zero: momentum and Adam's state from before they were pruned, and
  decoupled decay, move them otherwise;
- `on_step_end` updates the masks when the schedule says so, before anything is evaluated or saved;
- `on_save` takes the masks anew from the weights, as a resumed run will.

Experts in fused weights are pruned where they lie. Under LoRA adapters the merged weight is ranked (`adapters`).

The hooks pass over weights and gradients once or twice a step, at the speed of memory, whatever the batch. Of a step
of 256 tokens (Llama, 10 blocks of width 576, 49152 tokens, float32, AdamW, one thread) they take 1.1 % with magnitudes,
2.3 % with movement, 3.1 % with Taylor scores and 4.9 % with a shadow. Taking new masks takes half a step, with scores
one.

Where we differ from the paper: n:m patterns drop one more weight of every group whenever the curve passes the next
multiple of 1/m; ranking over all layers together is a choice. The Trainer clips gradients before the first of these
hooks, so the norm that it clips by still includes the gradients of pruned weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, StrictFloat, StrictInt, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.experts import unfused
from hf_slim.core.layers import plan_layers, plan_targets, put_layer
from hf_slim.core.method import MethodConfig, Rules
from hf_slim.core.report import LayerReport, StageReport
from hf_slim.core.select import Layer, Select, find_layers
from hf_slim.core.swap import densify, get_weight
from hf_slim.core.training import TrainingOptions, configured, require_loss, train_with
from hf_slim.core.units import Units, expected_units
from hf_slim.encodings import Sparse
from hf_slim.integration.transformers import mark
from hf_slim.methods import find_method
from hf_slim.pruning.callback import PruningHooks
from hf_slim.pruning.groups import choose_units, prunable, survivors, unit_masks
from hf_slim.pruning.masks import global_masks, n_m_highest
from hf_slim.pruning.pattern import Pattern, block_of, column_problems, pack, parse_pattern, stored
from hf_slim.pruning.schedule import Curve
from hf_slim.pruning.scores import Score, dead_last

RULES = Rules(
    needs=("train",), makes=("zeros",), preserves=("zeros", "tied"), paper="Zhu & Gupta 2017, arXiv:1710.01878"
)

Steps = Annotated[StrictInt, Field(ge=0)] | Annotated[StrictFloat, Field(ge=0, le=1)]


class Config(MethodConfig):
    """Options of `prune.gradual`; `begin`, `end` and `every` are steps if whole, shares of training if floats."""

    sparsity: float = Field(0.5, ge=0, lt=1, description="share of weights to drop; an n:m pattern sets its own")
    initial_sparsity: float = Field(0.0, ge=0, lt=1, description="share dropped at once when pruning begins")
    schedule: Curve = Field("cubic", description="how sparsity grows: 'cubic', 'linear', or 'one_shot' at begin")
    begin: Steps = Field(0.0, description="first update of the masks, in steps or as a share of training")
    end: Steps = Field(0.8, description="last update of the masks; what follows trains with fixed masks")
    every: Steps = Field(0.05, description="distance between updates of the masks")
    pattern: Pattern = Field(
        "unstructured",
        description="'unstructured'; 'n:m': keep n of every m columns; 'block:b': b columns of a row together",
    )
    units: Literal["weight", "neuron", "head"] = Field(
        "weight", description="what is dropped: weights, or whole MLP neurons or key/value heads with their queries"
    )
    scope: Literal["layer", "global"] = Field("layer", description="rank within each layer, or over all of them")
    score: Score = Field(
        "magnitude", description="'magnitude', 'movement', or 'taylor': first-order change of the loss"
    )
    smoothing: float = Field(0.9, ge=0, lt=1, description="share of a taylor score that a step leaves of the old one")
    shadow: bool = Field(False, description="pruned weights train on unseen, and may come back until end")
    decay: float = Field(2e-4, ge=0, description="pull of pruned weights in the shadow towards zero")
    lr_cycles: bool = Field(False, description="learning rate falls linearly from each update of the masks to the next")
    lr_floor: float = Field(0.1, ge=0, le=1, description="where a learning rate cycle ends, as a share of its peak")
    layers: Select = Select()
    training: TrainingOptions = Field(TrainingOptions(), description="how to train, where this is a stage of its own")

    @property
    def final_sparsity(self) -> float:
        """Sparsity at the end: the n:m pattern's own, if there is one."""
        n_m = parse_pattern(self.pattern)
        return self.sparsity if n_m is None else 1 - n_m[0] / n_m[1]

    @model_validator(mode="after")
    def _options_fit(self) -> Config:
        if self.schedule == "one_shot" and self.initial_sparsity:
            raise ValueError(
                f"schedule: one_shot drops everything at begin, got initial_sparsity {self.initial_sparsity}; "
                "leave that out, or set schedule: cubic"
            )
        if self.units != "weight" and self.pattern != "unstructured":
            raise ValueError(f"units: {self.units} go as a whole, got pattern {self.pattern!r}; leave one of them out")
        return self


def gradual_masks(
    weights: Mapping[str, Tensor],
    sparsity: float,
    config: Config,
    scores: Mapping[str, Tensor] | None = None,
    groups: Sequence[Units] = (),
) -> dict[str, Tensor]:
    """Masks at one moment of the schedule.

    Args:
        weights: matrices [rows, cols] by name.
        sparsity: the schedule's, from 0 to `config.final_sparsity`.
        scores: float32 [rows, cols] by name; None for magnitudes.
        groups: neurons or heads, where those are to go as a whole.

    Returns:
        keep: Bool[rows, cols] by name; False wherever a weight is zero already. At sparsity 0 zero matrices are kept.
    """
    if sparsity == 0:
        return {name: (W != 0) | ~W.any() for name, W in weights.items()}
    keep = dict(_masks(weights, sparsity, config, scores, groups))
    return {name: mask.logical_and_(weights[name] != 0) for name, mask in keep.items()}


def _masks(
    weights: Mapping[str, Tensor],
    sparsity: float,
    config: Config,
    scores: Mapping[str, Tensor] | None,
    groups: Sequence[Units],
) -> Mapping[str, Tensor]:
    def score(name: str) -> Tensor:
        W = weights[name]
        return W.abs().float() if scores is None else dead_last(scores[name], W)

    together, n_m, block = config.scope == "global", parse_pattern(config.pattern), block_of(config.pattern)
    if groups:
        stay = choose_units(groups, {name: score(name) for name in weights}, sparsity, together=together)
        kept = {name: (W != 0) | ~W.any() for name, W in weights.items()}
        return kept | unit_masks(groups, stay, weights)
    if n_m is not None:
        n, m = n_m
        drop = min(m - n, math.floor(sparsity * m + 1e-6))  # in floating point, 3 (1 - 2/3) may fall short of 1
        return {name: n_m_highest(score(name), m - drop, m) for name in weights}
    if together and scores is None:
        return global_masks(weights, sparsity, block)
    if together:
        return global_masks({name: score(name) for name in weights}, sparsity, block, key=Tensor.float)
    return {name: global_masks({name: score(name)}, sparsity, block, key=Tensor.float)[name] for name in weights}


def plan(layers: dict[str, Layer], config: Config, model: PreTrainedModel) -> dict[str, Layer]:
    """The layers as they will be stored; of units, as if every group lost the same share of its own.

    Raises:
        PlanError: everything that cannot be done.
    """
    planned = plan_layers(layers, find_method("prune.gradual"), config)
    if config.units == "weight":
        return planned
    together = config.scope == "global"
    found = expected_units(model, (config.units,))
    groups = prunable(found, planned, config.units, config.sparsity, together=together)
    left = survivors(groups, {name: (layer.rows, layer.cols) for name, layer in layers.items()}, config.sparsity)
    return {
        name: layers[name].encoded(Sparse(survivors=min(count, layers[name].survivors or count)))
        for name, count in left.items()
    }


def encoding(layer: Layer, config: Config) -> Sparse:
    """How a layer will be stored once it is trained and single weights of it are pruned."""
    return stored(layer, config.pattern, config.sparsity)


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
    """Store the layers that the callback has pruned as mask and survivors, but for those that another has stored."""
    layers, rows = find_layers(model), []
    for name in pruned.masks:
        if layers[name].encoding is not None:
            continue
        W = get_weight(model.get_submodule(name))
        encoded = pack(W, W != 0, pruned.config.pattern)
        if name in pruned.held and sum(tensor.nbytes for tensor in encoded[1].values()) >= layers[name].nbytes:
            continue
        metrics = {"zeros": W.numel() - encoded[0].survivors}
        rows.append(put_layer(model, layers[name], encoded, metrics=metrics))
    return rows


def needs(config: Config) -> tuple[str, ...]:
    """The data that it needs: a classifier's with classes."""
    return (*RULES.needs, "labels")


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Train the model on its own loss and prune it meanwhile."""
    require_loss(model, "prune.gradual")
    pruning = callback(model, config)
    metrics = train_with(pruning, model, config.training, context)
    rows = store(model, pruning)
    zeros, total = sum(row.metrics["zeros"] for row in rows), sum(row.rows * row.cols for row in rows)
    return StageReport(layers=rows, metrics=metrics | {"sparsity": zeros / total})


class GradualMagnitudePruning(PruningHooks):
    """Prunes a model while any `Trainer` trains it.

        pruning = GradualMagnitudePruning(sparsity=0.8)
        Trainer(model, args, callbacks=[pruning], ...).train()
        pruning.store(model)
        model.save_pretrained(folder)

    Works with gradient accumulation, mixed precision, data parallelism, and LoRA adapters (then merge them with
    `merge_and_unload`); not where parameters are sharded.

    Args:
        config: a `Config`, or a mapping of its fields.
        options: single fields of `Config`, which take precedence.

    Raises:
        PlanError: unknown or contradictory options. When training begins: a schedule that does not fit into it, layers
            that cannot be pruned so, sharded parameters; all before a weight is changed.
        ModelError: weights that are not finite when masks are taken from them; a checkpoint to resume from that lacks
            the pruning's state.
    """

    def __init__(self, config: Config | Mapping[str, Any] | None = None, **options: Any):
        super().__init__(configured("prune.gradual", Config, config, options), gradual_masks)

    def store(self, model: PreTrainedModel) -> list[LayerReport]:
        """Store what was pruned as masks and survivors, so that `save_pretrained` writes few bytes."""
        with unfused(model):
            reports = store(model, self)
        mark(model)
        return reports
