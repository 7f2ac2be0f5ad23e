"""What the weights of a model look like, a row for every kind of layer: how many are small, how heavy the tails are.

Trained weights are near-normal with a peak at zero. The peak is what magnitude pruning removes: in a table of the share
of weights under 0.01, 0.1, 0.5 and 1 standard deviation, a normal distribution has .008, .080, .383 and .683. A high
kurtosis says that few weights carry much, and that a grid from the smallest to the largest weight is mostly empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, Literal

from rich.console import Group
from torch import Tensor, nn

from hf_slim.core.experts import unfused
from hf_slim.core.layers import check_weights
from hf_slim.core.progress import Progress
from hf_slim.core.select import Layer, find_layers
from hf_slim.core.swap import get_weight
from hf_slim.core.tables import make_table, short_count, short_share
from hf_slim.insight.magnitudes import exact_quantiles, excess_kurtosis, first_reading, second_reading
from hf_slim.insight.names import kind_names

THRESHOLDS = (0.01, 0.1, 0.5, 1.0)
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999)
PART = 2**22  # weights whose float64 copy exists at a time: 32 MB


@dataclass(frozen=True)
class WeightRow:
    """The weights of one kind of layer, or of one layer.

    Args:
        name: of the kind, or of the layer.
        layers, weights: how many they are.
        sigma: standard deviation.
        kurtosis: excess kurtosis, 0 for normal weights.
        zeros: share that is exactly zero.
        under: {t: share of |w| < t sigma}.
        beyond: share of |w| > 3 sigma; normal weights have .0027.
        largest: largest |w|, in sigmas.
        quantiles: {q: |w| below which that share lies}: the threshold that prunes it.
        histogram: counts of w / sigma in bins of 0.1 from -8.05 to 8.05; the outermost hold what lies beyond.
    """

    name: str
    layers: int
    weights: int
    sigma: float
    kurtosis: float
    zeros: float
    under: Mapping[float, float]
    beyond: float
    largest: float
    quantiles: Mapping[float, float]
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class WeightInsight:
    """What `weights` found; rows in the model's order."""

    rows: tuple[WeightRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return asdict(self)

    def table(self) -> Group:
        """Two tables for rich: shares of small and large weights, and quantiles of the magnitude."""
        small = make_table(
            [
                "kind",
                "weights",
                "sigma",
                "kurtosis",
                "zero",
                *(f"<{t:g}s".replace("0.", ".") for t in THRESHOLDS),
                "max",
            ],
            [
                [r.name, short_count(r.weights), f"{r.sigma:.3g}", f"{r.kurtosis:.1f}"]
                + [short_share(value) for value in (r.zeros, *r.under.values())]
                + [f"{r.largest:.0f}s"]
                for r in self.rows
            ],
        )
        note = "zero, <.5s: shares of weights; s: standard deviation (normal weights: .008 .080 .383 .683)"
        quantiles = make_table(
            ["|w| of the smallest", *(f"{q:.0%}" for q in QUANTILES[:-1])],
            [[r.name, *(f"{value:.2g}" for value in r.quantiles.values())][:-1] for r in self.rows],
        )
        return Group(small, note, "", quantiles)

    def plot(self, path: str | Path) -> Path:
        """Write a PNG: a histogram for every row, counts on a logarithmic scale, beside the normal curve."""
        from hf_slim.insight.plots import plot_weights

        return plot_weights(self, Path(path))


def weights(
    model: nn.Module, *, by: Literal["kind", "layer"] = "kind", progress: Progress | None = None
) -> WeightInsight:
    """Look at the weights of all linear layers and embeddings, as the model computes with them.

    Args:
        model: any Transformers model; layers that are stored encoded are decoded one at a time. Left as it is.
        by: a row for every kind of layer (all `q_proj` together), or one for every layer.

    Raises:
        ModelError: NaN or infinite weights, by name.
    """
    with unfused(model):
        layers = [layer for layer in find_layers(model).values() if layer.tied_to is None]
        check_weights(model, layers)
        kinds = kind_names(layers)
        groups: dict[str, list[Layer]] = {}
        for layer in layers:
            groups.setdefault(kinds[layer.name] if by == "kind" else layer.name, []).append(layer)
        tracked = (progress or Progress()).track(groups.items(), "weights")
        return WeightInsight(tuple(_row(model, name, members) for name, members in tracked))


def _row(model: nn.Module, name: str, layers: Sequence[Layer]) -> WeightRow:
    first = reduce(add, (first_reading(part) for part in _parts(model, layers)))
    second = reduce(add, (second_reading(part, first, THRESHOLDS, QUANTILES) for part in _parts(model, layers)))
    n = first.count
    return WeightRow(
        name=name,
        layers=len(layers),
        weights=n,
        sigma=first.sigma,
        kurtosis=excess_kurtosis(first, second),
        zeros=first.zeros / n,
        under={t: count / n for t, count in zip(THRESHOLDS, second.under.tolist(), strict=True)},
        beyond=second.beyond / n,
        largest=first.largest / first.sigma if first.sigma else 0.0,
        quantiles=dict(zip(QUANTILES, exact_quantiles(first, second, QUANTILES), strict=True)),
        histogram=tuple(second.histogram.tolist()),
    )


def _parts(model: nn.Module, layers: Sequence[Layer]) -> Iterator[Tensor]:
    for layer in layers:
        yield from get_weight(model.get_submodule(layer.name)).reshape(-1).split(PART)
