"""How much a model suffers when one layer alone is pruned by magnitude, at several sparsities.

    change = loss of the model with that layer pruned - loss of the model         nats a token

on windows of text, for causal language models. Models of other kinds have no loss without labels; theirs is the KL
divergence from what they predicted before, a position or a window. Layers of one kind in one block (the experts') count
as one. Sensitivities hardly add up: they say which layers to spare, not what pruning all of them costs.

Weights are never written to: a pruned copy of a layer stands in its place for the moment. A run starts from the block
that the layer lies in (`resuming.py`), so all layers together cost about half of as many forward passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_slim.core.errors import DataError, ModelError, PlanError
from hf_slim.core.experts import unfused
from hf_slim.core.forward import evaluating, is_causal
from hf_slim.core.layers import check_weights
from hf_slim.core.model import check_tokens
from hf_slim.core.progress import Progress
from hf_slim.core.select import Layer, Select, find_layers, find_stacks, select_layers
from hf_slim.core.swap import get_weight, set_module
from hf_slim.core.tables import make_table, short_count
from hf_slim.evaluation.agreement import divergence
from hf_slim.evaluation.perplexity import negative_log_likelihood
from hf_slim.insight.batches import token_batches
from hf_slim.insight.names import kind_names
from hf_slim.insight.resuming import Resumable
from hf_slim.pruning.masks import magnitude_mask

SPARSITIES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class SensitivityRow:
    """One layer, or all layers of one kind.

    Args:
        name: of the layer or kind.
        kind: its kind.
        block: number of its block, from 0, counted over all stacks; None for all blocks or none.
        weights: how many were pruned together.
        change: what pruning did to the loss, at each sparsity.
    """

    name: str
    kind: str
    block: int | None
    weights: int
    change: tuple[float, ...]


@dataclass(frozen=True)
class SensitivityInsight:
    """What `sensitivity` found; rows in the model's order.

    Args:
        measure: "loss" (change in nats a token) or "kl" (from the model itself, in nats).
        base: the model's own loss; 0 for "kl".
        tokens: predictions that were compared.
        sparsities: those that `change` was measured at.
    """

    measure: str
    base: float
    tokens: int
    sparsities: tuple[float, ...]
    rows: tuple[SensitivityRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return asdict(self)

    def table(self, limit: int | None = None) -> Group:
        """A table for rich, the most sensitive layers first.

        Args:
            limit: rows to show; None for all.
        """
        ordered = sorted(self.rows, key=lambda row: -max(row.change))
        rows = [[r.name, short_count(r.weights), *(f"{c:+.4f}" for c in r.change)] for r in ordered[:limit]]
        columns = ["pruned alone", "weights", *(f"{s:.0%}" for s in self.sparsities)]
        what = f"change of the loss, {self.base:.4f} nats a token" if self.measure == "loss" else "KL divergence, nats"
        hidden = len(ordered) - len(rows)
        rest = f"; {hidden} less sensitive ones not shown" if hidden else ""
        return Group(make_table(columns, rows), f"{what}, over {self.tokens} predictions{rest}")

    def plot(self, path: str | Path) -> Path:
        """Write a PNG: a heat map for every sparsity, blocks by kinds; bars where kinds were pruned whole."""
        from hf_slim.insight.plots import plot_sensitivity

        return plot_sensitivity(self, Path(path))


@dataclass(frozen=True)
class _Job:
    """Layers that are pruned together."""

    name: str
    kind: str
    block: int | None
    layers: tuple[Layer, ...]


def sensitivity(
    model: PreTrainedModel,
    data: Any,
    *,
    tokenizer: Any = None,
    sparsities: Sequence[float] = SPARSITIES,
    by_kind: bool = False,
    layers: Select | None = None,
    length: int | None = None,
    samples: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> SensitivityInsight:
    """Prune one layer after the other by magnitude, each alone, and see what it does. The model is left as it is.

    Args:
        data, tokenizer, length, samples, seed: text or tokens, see `activations`.
        sparsities: shares of a layer's weights to drop.
        by_kind: prune all layers of a kind together instead: a few runs, where layer by layer takes hundreds.
        layers: which layers; by default all linear layers in blocks.

    Raises:
        PlanError: sparsities outside [0, 1), patterns that match nothing; DataError: unusable data; ModelError: NaN or
        infinite weights, no layers.
    """
    wrong = [s for s in sparsities if not 0 <= s < 1]
    if wrong or not sparsities:
        raise PlanError(f"sparsities are shares of weights to drop, at least 0 and below 1, got {list(sparsities)}")
    batches = token_batches(data, tokenizer, length, samples, seed)
    for batch in batches:
        check_tokens(model, batch, "data")
    if is_causal(model) and all(batch.shape[1] < 2 for batch in batches):
        raise DataError("data: one token a sequence predicts nothing; give longer sequences")
    with unfused(model):
        chosen = select_layers(find_layers(model), layers or Select())
        if not chosen:
            raise ModelError(f"{type(model).__name__}: no linear layers in repeated blocks, so there is none to prune")
        check_weights(model, chosen)
        blocks = [block for stack in find_stacks(model) for block in stack.blocks]
        jobs = _jobs(chosen, blocks, by_kind)
        with evaluating(model):
            tracked = (progress or Progress()).track(
                _measured(model, blocks, jobs, sparsities, batches),
                "pruning " + ("kinds" if by_kind else "layers"),
                total=len(batches) * len(jobs),
            )
            base, tokens, changes = 0.0, 0, torch.zeros(len(jobs), len(sparsities), dtype=torch.float64)
            for number, found in tracked:
                if number == 0:
                    base, tokens = base + found.base, tokens + found.tokens
                changes[number] += torch.tensor(found.changes, dtype=torch.float64)
    rows = [
        SensitivityRow(job.name, job.kind, job.block, sum(x.rows * x.cols for x in job.layers), tuple(change))
        for job, change in zip(jobs, (changes / tokens).tolist(), strict=True)
    ]
    return SensitivityInsight(
        "loss" if is_causal(model) else "kl", base / tokens, tokens, tuple(sparsities), tuple(rows)
    )


@dataclass(frozen=True)
class _Found:
    """Sums over the predictions of one batch."""

    base: float
    tokens: int
    changes: list[float]


def _measured(
    model: nn.Module, blocks: list[str], jobs: list[_Job], sparsities: Sequence[float], batches: list[Tensor]
) -> Iterator[tuple[int, _Found]]:
    """Numbers of jobs with what they did to each batch."""
    for batch in batches:
        dense = Resumable(model, blocks, batch)
        base, tokens = _loss(model, dense.logits, dense.logits, batch)
        for number, job in enumerate(jobs):
            changes, places = [], [layer.block for layer in job.layers]
            for sparsity in sparsities:
                with _pruned(model, job.layers, sparsity):
                    changes.append(_loss(model, dense.run(places), dense.logits, batch)[0] - base)
            yield number, _Found(base, tokens, changes)


def _loss(model: nn.Module, logits: Tensor, dense: Tensor, ids: Tensor) -> tuple[float, int]:
    """Sum over all predictions of the loss, or of the divergence from the dense model's; how many there are."""
    if is_causal(model):
        nats, count = negative_log_likelihood(logits, ids)
        return float(nats.sum()), count
    kl, _ = divergence(logits.flatten(0, -2), dense.flatten(0, -2))
    return float(kl.double().sum()), len(kl)


@contextmanager
def _pruned(model: nn.Module, layers: Sequence[Layer], sparsity: float) -> Iterator[None]:
    """Copies of the layers without their smallest weights stand in their places inside."""
    stock = {layer.name: model.get_submodule(layer.name) for layer in layers}
    try:
        for name, module in stock.items():
            set_module(model, name, _pruned_copy(module, sparsity))
        yield
    finally:
        for name, module in stock.items():
            set_module(model, name, module)


def _pruned_copy(module: nn.Module, sparsity: float) -> nn.Linear:
    W = get_weight(module)
    copy = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
    copy.weight = nn.Parameter(W * magnitude_mask(W, sparsity), requires_grad=False)
    copy.bias = module.bias  # pyright: ignore[reportAttributeAccessIssue]
    return copy.eval()


def _jobs(layers: Sequence[Layer], blocks: Sequence[str], by_kind: bool) -> list[_Job]:
    kinds = kind_names(layers)
    groups: dict[tuple[str | None, str], list[Layer]] = {}
    for layer in layers:
        groups.setdefault((None if by_kind else layer.block or layer.name, kinds[layer.name]), []).append(layer)
    jobs = []
    for (place, kind), members in groups.items():
        name = kind if by_kind else members[0].name if len(members) == 1 else f"{place}.*.{kind}"
        number = blocks.index(place) if place in blocks else None
        jobs.append(_Job(name, kind, number, tuple(members)))
    return jobs
