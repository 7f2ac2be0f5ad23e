"""Network Trimming (Hu et al. 2016, arXiv:1607.03250): measure which neurons of an MLP do nothing, remove them, repeat.

    for each round, block by block, so that a block sees what the trimmed blocks before it put out:
        measure    h [tokens, neurons], the input of the MLP's second linear layer, on calibration text
        remove     neurons whose APoZ is above mean + 1 std of their layer, or the least important `share`:
                   a row of the first layers (gate and up, with biases), a column of the second
        refit      the second layer W by least squares, so that the neurons that stay take over (`refit.py`)
        train      the whole model against the original one, if asked to

Neurons are found by trying (`core/units.py`): ReLU, GELU, SwiGLU, gate and up fused, each expert's own. Scores are in
`neurons.py`. The layers really become smaller, so a removed neuron costs neither bytes nor time.

Where we differ, and why: the paper trims CNNs with ReLU. SiLU and GELU never put out zero, so APoZ counts outputs below
a fraction of the layer's rms instead (`apoz_below`; for ReLU those include the zeros). The refit is ours, with a ridge
that one half of the tokens chooses for the other; so are other scores, of which `surgeon` is the greedy choice that
foresees it. Without refit a layer that has a bias gets FLAP's compensation (An et al. 2023, arXiv:2312.11983),
b += W[:, removed] E[h]; no bias is added where there is none, since stock Transformers could not load it. A layer that
is stored sparse is not refitted either: its zeros stay. An expert that few tokens were routed to is trimmed by its
weights' norms.

Perplexity of stories260K (172 neurons a layer, SwiGLU) on held-out TinyStories, 64 windows of 256 tokens each to
calibrate and to test, 4.19 before; a share of every layer's neurons removed, without and with refit:

                    25 %             50 %
    apoz_below      11.78   7.66     65.30   22.18
    contribution     9.96   7.07     43.61   19.71
    flap             8.69   6.64     36.18   18.12
    minitron        10.46   7.12     49.06   21.57
    surgeon          8.82   6.64     33.17   15.79

A global ranking by `surgeon` reaches 6.62 and 15.48; the paper's rule removes 15 % and reaches 5.46. Three rounds reach
6.64 and 15.99, no better than one. With training against the original in between, rounds do not pay at equal cost
either: at 50 %, 90 steps after one round reach 8.88, 30 steps after each of three 9.66.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.errors import PlanError
from hf_slim.core.layers import check_weights
from hf_slim.core.method import MethodConfig, Rules
from hf_slim.core.report import LayerReport, StageReport
from hf_slim.core.select import Layer, Select, find_layers, select_layers
from hf_slim.core.swap import get_weight
from hf_slim.core.units import Units, expected_units, find_units
from hf_slim.core.walk import Block, Removal, Statistics, walk
from hf_slim.distillation import logits
from hf_slim.encodings import Sparse
from hf_slim.encodings.modules import EncodedModule
from hf_slim.pruning.measured import Measured, measure
from hf_slim.pruning.neurons import (
    apoz,
    apoz_below,
    contribution,
    flap,
    global_counts,
    kept_count,
    minitron,
    most_important,
    over_one_std,
    surgeon,
    to_multiple,
)
from hf_slim.pruning.refit import choose_ridge, refit_affine, refit_columns, refit_loss

RULES = Rules(needs=("calibration",), preserves=("zeros",), paper="Hu et al. 2016, arXiv:1607.03250")

Score = Literal["apoz", "apoz_below", "contribution", "flap", "minitron", "surgeon"]

FALLBACK = "judged by its weights"

_UPDATES = 64  # of the inverse, while `surgeon` removes neurons from a layer


class Config(MethodConfig):
    """Options of `prune.apoz`."""

    per_layer: ClassVar[tuple[str, ...]] = ("share",)

    share: float | None = Field(
        None, gt=0, lt=1, description="share of neurons to remove; if not given, those over mean + 1 std of their layer"
    )
    score: Score | None = Field(
        None, description="what makes a neuron matter; if not given, surgeon for a share, apoz_below for the rule"
    )
    fraction: float = Field(0.1, gt=0, description="apoz_below counts outputs below this fraction of the layer's rms")
    scope: Literal["layer", "global"] = Field("layer", description="share of each layer, or of all layers together")
    floor: float = Field(0.2, gt=0, lt=1, description="share that every layer keeps under a global ranking")
    multiple_of: int = Field(1, ge=1, description="widths are multiples of this, such as 8 or 64, rounded to nearest")
    refit: bool = Field(True, description="fit the second layer to its old outputs by least squares")
    rounds: int = Field(1, ge=1, description="measure and remove so many times, a part of the share each time")
    training: logits.Config | None = Field(None, description="after every round, as distill.logits does it")
    min_tokens: int = Field(32, ge=1, description="an expert that saw fewer tokens is judged by its weights alone")
    layers: Select = Field(Select(), description="the MLPs' second layers (down_proj, fc2)")

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if self.share is None and self.score not in (None, "apoz", "apoz_below"):
            raise ValueError(f"mean + 1 std is a rule about APoZ; with score {self.score!r} give share, such as 0.25")
        if self.scope == "global" and (self.share is None or self.share > 1 - self.floor):
            raise ValueError(
                f"scope 'global' needs a share of at most 1 - floor = {1 - self.floor:g}, got {self.share}"
            )
        if self.training is not None and self.training.student != "self":
            raise ValueError("training.student: the trimmed model itself is trained; leave student out")
        if self.scope == "global" and (self.layers.first or self.layers.last or self.layers.overrides):
            raise ValueError("scope 'global' ranks all layers together, so no layer can have a share of its own")
        return self


def importance(
    score: Score, W: Float[Tensor, "rows neurons"], known: Measured, affine: bool, count: int = 0
) -> Float[Tensor, " neurons"]:
    """How much each neuron matters, float64.

    Args:
        affine: the layer has a bias, so that a neuron's mean costs nothing (for `surgeon`).
        count: how many will be removed, if that is known; `surgeon` then finds them greedily.
    """
    scores = {
        "apoz": lambda: 1 - apoz(known.sums),
        "apoz_below": lambda: 1 - apoz_below(known.sums),
        "contribution": lambda: contribution(known.sums, W),
        "flap": lambda: flap(known.sums, W),
        "minitron": lambda: minitron(known.sums),
        "surgeon": lambda: surgeon(W, known.moment(affine), count, max(1, count // _UPDATES)),
    }
    return scores[score]()


def norms(W: Float[Tensor, "rows neurons"], writers: Sequence[Float[Tensor, "neurons _"]]) -> Float[Tensor, " neurons"]:
    """Product of the norms of all weights of a neuron: its importance where there is no data."""
    return torch.stack([W.double().norm(dim=0), *(V.double().norm(dim=1) for V in writers)]).prod(0)


def make_up(
    W: Float[Tensor, "rows neurons"], known: Measured, keep: Bool[Tensor, " neurons"], affine: bool, refit: bool
) -> tuple[Float[Tensor, "rows kept"] | None, Float[Tensor, " rows"] | None, float]:
    """How the layer makes up for neurons that go.

    Args:
        affine: the layer has a bias, which may change.
        refit: by least squares, if that serves unseen tokens; else only the bias takes over the mean.

    Returns:
        New weights (None: as they are), what to add to the bias (None: it has none), and the squared error of the
        output that is left, relative to the output's variance (affine) or power.
    """
    weight, bias, ridge = None, None, None
    if refit and known.halves is not None:
        first, second = (half.moment(affine) for half in known.halves)
        ridge = choose_ridge(W, (first, second), keep)
    if ridge is not None and affine:
        weight, bias = refit_affine(W, known.C, known.sums.mean, keep, ridge)
    elif ridge is not None:
        weight = refit_columns(W, known.C, keep, ridge)
    elif affine:
        bias = (W.double()[:, ~keep] @ known.sums.mean[~keep]).float()
    left = W[:, keep].float() if weight is None else weight
    return weight, bias, max(0.0, refit_loss(W, known.moment(affine), keep, left))


def plan(layers: dict[str, Layer], config: Config, model: PreTrainedModel) -> dict[str, Layer]:
    """The layers as they will be: known beforehand where every layer loses a given share.

    Raises:
        PlanError: everything that cannot be done.
    """
    planned: dict[str, Layer] = {}
    for units in _chosen(expected_units(model, ("neuron",)), layers, config):
        share = config.at(layers[units.reader]).share
        if share is None or config.scope == "global":
            continue
        gone = len(units) - kept_count(len(units), share, config.multiple_of)
        planned[units.reader] = _smaller(layers[units.reader], 0, gone)
        for name, rows in units.writers.items():
            planned[name] = _smaller(planned.get(name, layers[name]), gone * rows.shape[1], 0)
    return planned


def needs(config: Config) -> tuple[str, ...]:
    """The data that it needs with these options."""
    return RULES.needs if config.training is None else RULES.needs + logits.needs(config.training)


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Trim the MLPs of a model, round by round."""
    layers = find_layers(model)
    units = _chosen(find_units(model, ("neuron",)), layers, config)
    check_weights(model, [layers[name] for u in units for name in (u.reader, *u.writers)])
    if config.training is not None:
        context = logits.keep_previous(model, config.training, context)
        if context.examples("train") is None:
            context.tokens("train")
    widths = {u.reader: len(u) for u in units}
    rows: dict[str, LayerReport] = {}
    rounds: list[dict[str, Any]] = []
    for number in range(1, config.rounds + 1):
        own = context if config.rounds == 1 else _of_round(context, number)
        if number > 1:
            layers = find_layers(model)
            units = [u for u in find_units(model, ("neuron",)) if u.reader in widths]
        for row in _Round(
            model, config, own, layers, {u.reader: u for u in units}, widths, number / config.rounds
        ).trim():
            rows[row.name] = _together(rows.get(row.name), row)
        rounds.append({"neurons": sum(_width(model, name) for name in widths)})
        if config.training is not None:
            rounds[-1]["training"] = logits.apply(model, config.training, own).metrics
    notes = [f"{row.name}: {note}" for row in rows.values() for note in row.notes]
    if not rows:
        notes.append("no neuron was removed: none stands out from its layer; with share the least important ones go")
    metrics = {"neurons_before": sum(widths.values()), "neurons": rounds[-1]["neurons"], "rounds": rounds}
    return StageReport(layers=list(rows.values()), metrics=metrics, notes=notes)


@dataclass
class _Round:
    """One round.

    Args:
        layers, units: as they are before this round; units by their reader.
        widths: neurons of every layer before the first round.
        progress: what part of the share is gone after this round, above 0 to 1.
    """

    model: PreTrainedModel
    config: Config
    context: Context
    layers: Mapping[str, Layer]
    units: Mapping[str, Units]
    widths: Mapping[str, int]
    progress: float

    def trim(self) -> list[LayerReport]:
        """Measure, remove, refit."""
        counts = self._global_counts() if self.config.scope == "global" else self._counts()
        return self._walk(lambda name, known: self._removal(name, known, counts.get(name)), self.context)

    def _walk(self, handle: Callable[[str, Measured], Removal | None], context: Context) -> list[LayerReport]:
        """Have every layer's measurements handled, block by block."""

        def solve(statistics: Mapping[str, Statistics], block: Block | None) -> dict[str, Removal]:
            measured = {} if block is None else measure(self.model, statistics, block, self.config.fraction)
            found = {name: handle(name, known) for name, known in measured.items()}
            return {name: removal for name, removal in found.items() if removal is not None}

        chosen, windows = [self.layers[name] for name in self.units], context.tokens("calibration")
        return walk(self.model, chosen, windows, solve, context, units=list(self.units.values()))

    def _counts(self) -> dict[str, int]:
        """How many neurons each layer keeps; those that the paper's rule decides about are left out."""
        shares = {name: self.config.at(self.layers[name]).share for name in self.units}
        of = self.config.multiple_of
        return {n: kept_count(self.widths[n], s * self.progress, of) for n, s in shares.items() if s is not None}

    def _global_counts(self) -> dict[str, int]:
        """The same from a walk that changes nothing: only once all are measured is it known who matters least."""
        scores: dict[str, Tensor] = {}

        def look(name: str, known: Measured) -> None:
            scores[name], _ = self._importance(name, known, 0)

        self._walk(look, replace(self.context, blocks=None))
        least = {n: min(len(s), max(1, math.floor(self.config.floor * self.widths[n]))) for n, s in scores.items()}
        kept = kept_count(sum(self.widths.values()), (self.config.share or 0) * self.progress)
        counts = global_counts(scores, sum(map(len, scores.values())) - kept, least)
        return {name: to_multiple(n, len(scores[name]), self.config.multiple_of) for name, n in counts.items()}

    def _importance(self, name: str, known: Measured, count: int) -> tuple[Tensor, tuple[str, ...]]:
        """A layer's scores, and a note where they come from the weights."""
        units, module = self.units[name], self.model.get_submodule(name)
        if self.layers[name].routed and (tokens := int(known.sums.tokens)) < self.config.min_tokens:
            writers = [get_weight(self.model.get_submodule(w))[rows].flatten(1) for w, rows in units.writers.items()]
            return norms(get_weight(module), writers), (f"{FALLBACK}: only {tokens} tokens were routed to it",)
        score = self.config.score or ("apoz_below" if self.config.at(self.layers[name]).share is None else "surgeon")
        return importance(score, get_weight(module), known, _has_bias(module), count), ()

    def _removal(self, name: str, known: Measured, kept: int | None) -> Removal | None:
        """What becomes of one layer; None where it stays as it is."""
        units, module = self.units[name], self.model.get_submodule(name)
        scores, notes = self._importance(name, known, 0 if kept is None else max(0, len(units) - kept))
        if kept is None:
            out = 0 if notes else int(over_one_std(1 - scores).sum())
            kept = min(len(units), math.ceil((len(units) - out) / self.config.multiple_of) * self.config.multiple_of)
        if kept >= len(units):
            return None
        keep = most_important(scores, kept)
        dense = not isinstance(module, EncodedModule)
        weight, change, error = make_up(
            get_weight(module), known, keep, _has_bias(module), self.config.refit and dense and not notes
        )
        bias = None if change is None else module.bias + change.to(module.bias)  # pyright: ignore
        return Removal(units, keep.cpu(), weight, bias, {"neurons": kept, "output_error": error}, notes)


def _chosen(found: Sequence[Units], layers: dict[str, Layer], config: Config) -> list[Units]:
    """The neurons to look at, checked.

    Raises:
        PlanError: everything that cannot be done.
    """
    if not found:
        raise PlanError("no MLP found: no layer in the model's blocks reads what rows of other layers alone put out")
    readers = {u.reader: layers[u.reader] for u in found}
    names = {layer.name for layer in select_layers(readers, config.layers)}
    chosen = [u for u in found if u.reader in names]
    if not chosen:
        raise PlanError("no MLP to trim: layers.exclude leaves nothing")
    if problems := [p for u in chosen for p in _problems(u, layers, config.at(layers[u.reader]))]:
        raise PlanError(problems)
    return chosen


def _problems(units: Units, layers: dict[str, Layer], config: Config) -> list[str]:
    problems = [
        f"{name} is stored as {layers[name].encoding.describe()}, whose rows and columns cannot be taken out; trim "  # pyright: ignore
        f"neurons before that, or name {units.reader} in layers.exclude"
        for name in (units.reader, *units.writers)
        if not isinstance(layers[name].encoding, Sparse | None)
    ]
    if config.multiple_of > len(units):
        problems.append(
            f"{units.reader} reads {len(units)} neurons, fewer than multiple_of {config.multiple_of}; lower it, or "
            "name the layer in layers.exclude"
        )
    if config.share is not None and kept_count(len(units), config.share, config.multiple_of) == 0:
        problems.append(
            f"{units.reader}: share {config.share:g} would remove all of its {len(units)} neurons; "
            f"give at most {1 - 1 / len(units):.4g}"
        )
    return problems


def _smaller(layer: Layer, rows: int, cols: int) -> Layer:
    """A layer without so many rows and columns; of a sparse one, survivors are taken to go in proportion."""
    left = replace(layer, rows=layer.rows - rows, cols=layer.cols - cols)
    if layer.encoding is None or layer.survivors is None:
        return left
    survivors = round(layer.survivors * left.rows * left.cols / (layer.rows * layer.cols))
    return left.encoded(layer.encoding.model_copy(update={"survivors": survivors}))


def _of_round(context: Context, number: int) -> Context:
    """Blocks and checkpoints of one round, apart from those of the others."""
    folders = {"blocks": context.blocks, "work": context.work}
    return replace(
        context, **{key: folder / f"round-{number}" for key, folder in folders.items() if folder is not None}
    )


def _together(earlier: LayerReport | None, row: LayerReport) -> LayerReport:
    """One row for a layer that several rounds have changed."""
    if earlier is None:
        return row
    error = 1 - (1 - earlier.error) * (1 - row.error)
    return row.model_copy(
        update={"bytes_before": earlier.bytes_before, "error": error, "notes": [*earlier.notes, *row.notes]}
    )


def _width(model: nn.Module, name: str) -> int:
    return get_weight(model.get_submodule(name)).shape[1]


def _has_bias(module: nn.Module) -> bool:
    return getattr(module, "bias", None) is not None
