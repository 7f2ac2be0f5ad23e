"""What the neurons of a model's MLPs put out on someone's text: how often nothing, and how much otherwise.

h_tj is what neuron j puts out for token t, the *input* of the MLP's second linear layer (Hu et al. 2016,
arXiv:1607.03250). A neuron's average percentage of zeros, APoZ, is the share of tokens with

    |h_tj| = 0                                        after ReLU
    |h_tj| < fraction * rms of the whole layer's h    after SiLU, GELU and gates, which never put out exactly zero

Which of the two holds is measured, not read off a name: a layer counts as one with exact zeros when the median of its
neurons (those apart that put out nothing but zeros) is at zero for more than EXACT of the tokens.

The text is read twice: the rms of a layer is known only after the first time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import Float
from rich.console import Group
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_slim.core.errors import ModelError, PlanError
from hf_slim.core.experts import unfused
from hf_slim.core.forward import evaluating, run_on
from hf_slim.core.model import check_tokens
from hf_slim.core.progress import Progress
from hf_slim.core.swap import get_weight
from hf_slim.core.tables import make_table, short_count, short_share
from hf_slim.core.units import find_units
from hf_slim.insight.batches import token_batches
from hf_slim.insight.names import told_apart
from hf_slim.pruning.neurons import NeuronSums, apoz, apoz_below, contribution, neuron_sums, no_sums, over_one_std
from hf_slim.pruning.neurons import threshold as threshold_of

EXACT = 0.05


@dataclass(frozen=True)
class NeuronRow:
    """The neurons of one MLP.

    Args:
        layer: name of the linear layer that reads them.
        tokens: how many they were run on; those routed to it, for an expert.
        exact: whether APoZ counts exact zeros, or what is below `threshold`.
        threshold: fraction * rms of the layer.
        mean, std: of the neurons' APoZ.
        over: neurons over mean + 1 std: those that Network Trimming removes.
        dead: neurons that were never above the threshold (never above zero, if `exact`).
        zeros: each neuron's share of tokens with exactly zero.
        apoz: each neuron's APoZ.
        contribution: each neuron's E|h_j| ||W_:j||, the mean length of what it adds to the residual stream.
    """

    layer: str
    tokens: int
    exact: bool
    threshold: float
    mean: float
    std: float
    over: int
    dead: int
    zeros: tuple[float, ...]
    apoz: tuple[float, ...]
    contribution: tuple[float, ...]

    @property
    def weakest_tenth(self) -> float:
        """Share of all contributions that the least contributing tenth of the neurons makes; .1 if all are equal."""
        ordered = sorted(self.contribution)
        return sum(ordered[: len(ordered) // 10]) / (sum(ordered) or 1.0)


@dataclass(frozen=True)
class ActivationInsight:
    """What `activations` found; rows in the model's order.

    Args:
        fraction: of a layer's rms, under which an output counts as nothing.
        tokens: how many were run.
    """

    fraction: float
    tokens: int
    rows: tuple[NeuronRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON, each neuron's to 6 digits."""
        found = asdict(self)
        for row in found["rows"]:
            for key in ("zeros", "apoz", "contribution"):
                row[key] = [float(f"{value:.6g}") for value in row[key]]
        return found

    def table(self) -> Group:
        """A table for rich, a line for every MLP."""
        labels, common = told_apart([row.layer for row in self.rows])
        columns = ["MLP", "neurons", "tokens", "nothing is", "zeros", "APoZ", "std", "over", "dead", "least 10%"]
        rows = [
            [label, str(len(r.apoz)), short_count(r.tokens), "0" if r.exact else f"<{r.threshold:.2g}"]
            + [short_share(value) for value in (sum(r.zeros) / len(r.zeros), r.mean, r.std)]
            + [str(r.over), str(r.dead), short_share(r.weakest_tenth)]
            for label, r in zip(labels, self.rows, strict=True)
        ]
        return Group(
            make_table(columns, rows),
            f"neurons: input of {common}; APoZ: share of tokens for which a neuron puts out nothing;",
            "over: neurons over mean + std; dead: nothing for every token; least 10%: what the least contributing",
            "tenth of neurons contributes",
        )

    def plot(self, path: str | Path) -> Path:
        """Write a PNG: APoZ of every neuron as a heat map, a line for each MLP; and how contributions add up."""
        from hf_slim.insight.plots import plot_activations

        return plot_activations(self, Path(path))


def activations(
    model: PreTrainedModel,
    data: Any,
    *,
    tokenizer: Any = None,
    fraction: float = 0.1,
    length: int | None = None,
    samples: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> ActivationInsight:
    """Look at what every MLP neuron of a model puts out on a text, experts included. The model is left as it is.

    Args:
        data: texts, token ids, a `datasets.Dataset`, or padded batches with their attention masks; padding is not
            counted (see `token_batches`).
        tokenizer: needed for texts.
        fraction: of a layer's rms, under which an output counts as nothing; above 0.
        length, samples, seed: tokens in a window, number of windows, draw of windows.

    Raises:
        PlanError: fraction not above 0; DataError: unusable data; ModelError: no MLP found.
    """
    if not fraction > 0:
        raise PlanError(f"fraction is the part of a layer's rms under which outputs count as nothing, got {fraction}")
    batches = token_batches(data, tokenizer, length, samples, seed)
    for batch in batches:
        check_tokens(model, batch, "data")
    progress = progress or Progress()
    with unfused(model):
        found = find_units(model, ("neuron",))
        if not found:
            raise ModelError(f"{type(model).__name__}: no MLP found, so there are no neurons to look at")
        columns = {unit.reader: unit.columns[:, 0] for unit in found}
        with evaluating(model):
            first = _read(model, columns, dict.fromkeys(columns, 0.0), progress.track(batches, "first reading"))
            thresholds = {name: threshold_of(sums, fraction) for name, sums in first.items()}
            sums = _read(model, columns, thresholds, progress.track(batches, "second reading"))
            rows = [
                _row(name, sums[name], thresholds[name], get_weight(model.get_submodule(name))[:, where])
                for name, where in columns.items()
            ]
    return ActivationInsight(fraction, sum(batch.numel() for batch in batches), tuple(rows))


def _read(
    model: nn.Module, columns: dict[str, Tensor], thresholds: dict[str, float], batches: Iterator[Tensor]
) -> dict[str, NeuronSums]:
    """Sums over all batches for each reader of neurons."""
    sums = {name: no_sums(len(where)) for name, where in columns.items()}
    with _watching(model, columns, thresholds, sums):
        for batch in batches:
            run_on(model, batch)
    return sums


@contextmanager
def _watching(
    model: nn.Module, columns: dict[str, Tensor], thresholds: dict[str, float], sums: dict[str, NeuronSums]
) -> Iterator[None]:
    def add(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        h = args[0][..., columns[name].to(args[0].device)]
        found = neuron_sums(h, thresholds[name])
        sums[name] = sums[name] + found

    handles = [model.get_submodule(name).register_forward_pre_hook(partial(add, name)) for name in columns]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _row(name: str, sums: NeuronSums, threshold: float, W: Float[Tensor, "rows neurons"]) -> NeuronRow:
    zeros = apoz(sums)
    exact = counts_zeros(zeros)
    share = zeros if exact else apoz_below(sums)
    return NeuronRow(
        layer=name,
        tokens=int(sums.tokens),
        exact=exact,
        threshold=threshold,
        mean=float(share.mean()),
        std=float(share.std(correction=0)),
        over=int(over_one_std(share).sum()),
        dead=int((share == 1).sum()),
        zeros=tuple(zeros.tolist()),
        apoz=tuple(share.tolist()),
        contribution=tuple(contribution(sums, W.to(sums.magnitude.device)).tolist()),
    )


def counts_zeros(zeros: Float[Tensor, " neurons"]) -> bool:
    """Whether a layer puts out exact zeros as ReLU does, from its neurons' shares of zeros."""
    alive = zeros[zeros < 1]
    return bool(len(alive)) and float(alive.median()) > EXACT
