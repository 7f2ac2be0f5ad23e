"""What one-shot pruning on calibration data shares: options, budgets, the walk, and tuning a block's survivors.

A method of this kind says how one layer is pruned, given what the walk learned about its input (`Prune`). Here that
is done layer by layer and block by block, stored, counted, and, with `iterations`, improved: the survivors, norms and
biases of a block learn to make it put out what the dense block did (`core/tuning.py`), with the masks fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import Adam
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.errors import DataError
from hf_slim.core.layers import Encoded, plan_targets
from hf_slim.core.method import MethodConfig
from hf_slim.core.report import LayerReport, StageReport
from hf_slim.core.select import Layer, Select
from hf_slim.core.swap import densify, get_keep, get_weight
from hf_slim.core.tuning import BETAS, Masked, dense_parts, tune
from hf_slim.core.walk import Block, Solution, Statistics, walk
from hf_slim.encodings import Sparse
from hf_slim.encodings.modules import EncodedModule
from hf_slim.pruning import pattern as patterns
from hf_slim.pruning.budget import Budget, KeepMask, layer_sparsities
from hf_slim.pruning.pattern import Pattern


class Config(MethodConfig):
    """Options of every one-shot method that takes data."""

    per_layer: ClassVar[tuple[str, ...]] = ("sparsity", "pattern")

    sparsity: float = Field(0.5, ge=0, lt=1, description="share of weights to drop; an n:m pattern sets its own")
    pattern: Pattern = Field("unstructured", description="'unstructured', or 'n:m': keep n of every m columns")
    budget: Budget = Field("uniform", description="each layer alike; by outliers (OWL); by measured 'sensitivity'")
    layers: Select = Select()

    @model_validator(mode="after")
    def _fitting_pattern(self) -> Config:
        if patterns.block_of(self.pattern) > 1:
            raise ValueError(
                f"pattern: {self.pattern} is for prune.magnitude and prune.gradual; take 'unstructured' or 'n:m'"
            )
        return self

    @model_validator(mode="after")
    def _fitting_budget(self) -> Config:
        if self.budget == "uniform":
            return self
        if self.pattern != "unstructured":
            raise ValueError(f"budget: {self.pattern} prunes every layer alike, so budget is 'uniform'; leave it out")
        if self.layers.overrides or self.layers.first or self.layers.last:
            raise ValueError(f"budget: {self.budget} sets every layer's sparsity; give no options to single layers")
        return self


class SolverConfig(Config):
    """Options of methods that repair the error with the survivors."""

    damping: float = Field(0.01, gt=0, le=1, description="share of mean(diag H) added to the diagonal")
    refit: int = Field(
        10, ge=0, description="steps of least squares on the survivors once the mask is known; 0 for none"
    )
    min_tokens: int = Field(32, ge=1, description="an expert that fewer tokens were routed to is pruned by wanda")
    tokens_per_column: float = Field(1.0, ge=0, description="least calibration tokens for every column of a layer")
    iterations: int = Field(0, ge=0, description="steps a block in which its survivors learn; 0 for none")
    batch_tokens: int = Field(1024, ge=1, description="tokens in such a step, whole windows")
    weight_rate: float = Field(0.01, gt=0, le=1, description="learning rate of survivors, in units of their rms")
    dense_rate: float = Field(
        0.005, ge=0, le=1, description="relative learning rate of the block's norms and biases; 0 leaves them alone"
    )


@dataclass(frozen=True)
class Job:
    """What one layer is to become.

    Args:
        config: the options as they hold for this layer.
        sparsity: share of its weights to drop, by the budget.
        earlier: False where an earlier stage pruned; None where none did.
    """

    layer: Layer
    config: Any
    sparsity: float
    earlier: Bool[Tensor, "rows cols"] | None


@dataclass(frozen=True)
class Pruned:
    """A pruned layer.

    Args:
        values: float32 or the weight's dtype, zero where `keep` is False.
        encoded: how it is stored, where that is not as plain survivors.
        notes: fallbacks.
    """

    values: Float[Tensor, "rows cols"]
    keep: Bool[Tensor, "rows cols"]
    encoded: Encoded | None = None
    notes: tuple[str, ...] = ()


# (W [rows, cols] in the model's dtype, what `Prepare` made of the statistics, job) -> what is left of the layer.
Prune = Callable[[Tensor, Any, Job], Pruned]
# Statistics -> what layers with the same input share.
Prepare = Callable[[Statistics], Any]


def encoding(layer: Layer, config: Config) -> Sparse:
    """Mask and survivors. Under a measured budget a layer's own count is known only once the data is."""
    config = config.at(layer)
    return patterns.stored(layer, config.pattern, config.sparsity)


def problems(layer: Layer, config: Config) -> list[str]:
    """Why a layer cannot be pruned this way."""
    return patterns.column_problems(layer.name, layer.cols, config.at(layer).pattern)


def check_tokens(layers: list[Layer], tokens: int, config: SolverConfig) -> None:
    """Refuse calibration too short to tell a layer's inputs apart. Experts are counted when their tokens are known.

    Raises:
        DataError: layers with more columns than there are tokens.
    """
    short: dict[int, list[str]] = {}
    for layer in layers:
        if not layer.routed and tokens < config.tokens_per_column * layer.cols:
            short.setdefault(layer.cols, []).append(layer.name)
    if short:
        raise DataError(
            [
                f"{names[0]} and {len(names) - 1} more have {cols} columns, but calibration has {tokens} tokens: their "
                "second moments are singular, and what is fitted to them does not carry over; give more samples or "
                "longer ones, set tokens_per_column: 0 to go on, or take prune.wanda, which needs few"
                for cols, names in sorted(short.items())
            ]
        )


def prune_model(
    model: PreTrainedModel,
    method: str,
    config: Config,
    context: Context,
    prepare: Prepare,
    prune: Prune,
    keep_mask: KeepMask,
) -> StageReport:
    """Prune the chosen layers block by block.

    Args:
        method: its address.
        prepare: called once for all layers with the same input.
        prune: called for every layer.
        keep_mask: masks that a sensitivity budget measures.
    """
    chosen = plan_targets(model, method, config)
    windows = context.tokens("calibration")
    tuning = isinstance(config, SolverConfig) and config.iterations > 0
    if isinstance(config, SolverConfig):
        check_tokens(chosen, windows.numel(), config)
    stored = {name: parameter.dtype for name, parameter in model.named_parameters()}
    shares = {layer.name: config.at(layer).sparsity for layer in chosen}
    if config.budget != "uniform":
        shares = layer_sparsities(model, chosen, config.budget, config.sparsity, windows, context, keep_mask)
    pruner = _Pruner(
        model, {layer.name: layer for layer in chosen}, config, shares, context.seed, stored, prepare, prune
    )
    rows = walk(
        model, chosen, windows, pruner.solve_and_tune if tuning else pruner.solve, context,
        squares=not isinstance(config, SolverConfig), reference=tuning,
        batch_tokens=config.batch_tokens if isinstance(config, SolverConfig) and tuning else None,
    )  # fmt: skip
    return _report(rows)


def _report(rows: list[LayerReport]) -> StageReport:
    zeros, total = sum(row.metrics["zeros"] for row in rows), sum(row.rows * row.cols for row in rows)
    fallbacks = sum(any(note.startswith("pruned by ") for note in row.notes) for row in rows)
    return StageReport(
        layers=rows,
        metrics={"sparsity": zeros / total, "fallbacks": fallbacks},
        notes=[f"{row.name}: {note}" for row in rows for note in row.notes],
    )


@dataclass(frozen=True)
class _Pruner:
    """What stays the same from block to block. `stored`: dtypes that parameters are stored in."""

    model: nn.Module
    layers: Mapping[str, Layer]
    config: Config
    shares: Mapping[str, float]
    seed: int
    stored: Mapping[str, torch.dtype]
    prepare: Prepare
    prune: Prune

    def solve(self, statistics: Mapping[str, Statistics], block: Block | None) -> dict[str, Solution]:
        return {
            name: self._solution(name, pruned, measured) for name, (pruned, measured) in self._each(statistics).items()
        }

    def solve_and_tune(self, statistics: Mapping[str, Statistics], block: Block | None) -> dict[str, Solution]:
        config = self.config
        assert isinstance(config, SolverConfig)
        if block is None:
            found = self.solve(statistics, block)
            return {name: _noted(solution, "outside of blocks: not tuned") for name, solution in found.items()}
        found = self._each(statistics)
        parts = {
            f"{name.removeprefix(block.name + '.')}.weight": Masked(pruned.values, pruned.keep, self._dtype(name))
            for name, (pruned, _) in found.items()
        }
        for name in found:
            if isinstance(self.model.get_submodule(name), EncodedModule):
                densify(self.model, name)
        dense = dense_parts(block, self.stored) if config.dense_rate else {}
        survivors = Adam([part.shift for part in parts.values()], lr=config.weight_rate, betas=BETAS, fused=True)
        rest = [Adam([part.shift for part in dense.values()], lr=config.dense_rate, betas=BETAS)] if dense else []
        tuned = tune(block, parts | dense, [survivors, *rest], config.iterations, self.seed)
        if not tuned.after < tuned.before:
            return {n: _noted(self._solution(n, *pair), "tuning found nothing better") for n, pair in found.items()}
        for name, part in dense.items():
            block.put(name, part().detach().to(part.dtype))
        errors = {"block_error_before": tuned.before, "block_error": tuned.after}
        return {
            name: self._solution(name, replace(pruned, values=part().detach()), measured | errors)
            for (name, (pruned, measured)), part in zip(found.items(), parts.values(), strict=True)
        }

    def _dtype(self, name: str) -> torch.dtype:
        return self.stored.get(f"{name}.weight", self.layers[name].dtype)

    def _each(self, statistics: Mapping[str, Statistics]) -> dict[str, tuple[Pruned, dict[str, float]]]:
        shared: dict[int, Any] = {}
        found = {}
        for name, known in statistics.items():
            layer, module = self.layers[name], self.model.get_submodule(name)
            if id(known.sums) not in shared:
                shared[id(known.sums)] = self.prepare(known)
            W = get_weight(module)
            job = Job(layer, self.config.at(layer), self.shares[name], get_keep(module))
            pruned = self.prune(W, shared[id(known.sums)], job)
            found[name] = pruned, _measured(W, pruned, known)
        return found

    def _solution(self, name: str, pruned: Pruned, measured: dict[str, float]) -> Solution:
        encoded = pruned.encoded
        if encoded is None:
            values = pruned.values.to(get_weight(self.model.get_submodule(name)).dtype)
            encoded = patterns.pack(values, pruned.keep, self.config.at(self.layers[name]).pattern)
        return Solution(encoded, measured, pruned.notes)


def _measured(W: Tensor, pruned: Pruned, known: Statistics) -> dict[str, float]:
    """Zeros, and where H is known tr((W - X) H (W - X)^T) / tr(W H W^T)."""
    found = {"zeros": float(pruned.keep.numel() - int(pruned.keep.sum()))}
    if known.sums.dim() == 2:
        lost, total = (((A @ known.hessian) * A).sum().item() for A in (W.float() - pruned.values.float(), W.float()))
        found["output_error"] = lost / total if total > 0 else 0.0
    return found


def _noted(solution: Solution, note: str) -> Solution:
    return replace(solution, notes=(*solution.notes, note))
