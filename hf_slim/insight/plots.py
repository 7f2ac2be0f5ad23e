"""PNG plots of what was found. Drawn without a display and without matplotlib's global state."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_slim.core.errors import ArtifactError, PlanError
from hf_slim.insight.magnitudes import BINS, REACH
from hf_slim.insight.names import told_apart

if TYPE_CHECKING:
    from hf_slim.insight.activations import ActivationInsight
    from hf_slim.insight.sensitivity import SensitivityInsight, SensitivityRow
    from hf_slim.insight.weights import WeightInsight, WeightRow

INK, BLUE, RED, PALE = "#22303c", "#3b76a8", "#c8553d", "#e9eef2"
POINTS = 200  # columns of a heat map, however many neurons there are
NAMED = 40  # rows that all get a label
EDGES = np.linspace(-REACH, REACH, BINS + 1)


def plot_folder(folder: str | Path) -> Path:
    """Make the folder for plots, before hours are spent on what is to be drawn.

    Raises:
        ArtifactError: it cannot be made; PlanError: matplotlib is not installed.
    """
    _figure(1.0, 1.0)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"plots: cannot make the folder {str(folder)!r}: {error.strerror}") from None
    return Path(folder)


def plot_weights(insight: WeightInsight, path: Path) -> Path:
    """A grid of histograms, counts on a logarithmic scale, each with the normal curve of the same spread."""
    columns = min(4, max(1, math.ceil(math.sqrt(len(insight.rows)))))
    rows = math.ceil(len(insight.rows) / columns)
    figure = _figure(3.4 * columns, 2.5 * rows + 0.9)
    for number, row in enumerate(insight.rows):
        axes = figure.add_subplot(rows, columns, number + 1)
        _histogram(axes, row)
        if number % columns == 0:
            axes.set_ylabel("weights in a bin")
        if number + columns >= len(insight.rows):
            axes.set_xlabel("weight / sigma")
    figure.suptitle("Weights, beside a normal distribution (line); red: |w| < 0.5 sigma", color=INK, fontsize=12)
    return _save(figure, path)


def plot_activations(insight: ActivationInsight, path: Path) -> Path:
    """APoZ of each MLP's neurons, sorted, as a heat map, and the share of all output that the smallest add up to."""
    figure = _figure(11.5, 1.8 + max(2.6, min(9.0, 0.2 * len(insight.rows))))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    grid = np.array([_sorted_points(row.apoz) for row in insight.rows])
    image = left.imshow(grid, aspect="auto", vmin=0, vmax=1, cmap="YlGnBu", interpolation="nearest")
    labels, common = told_apart([row.layer for row in insight.rows])
    _label_rows(left, labels)
    left.set_ylabel(f"input of {common}")
    left.set_xticks(np.linspace(-0.5, POINTS - 0.5, 5), ["0 %", "25 %", "50 %", "75 %", "100 %"])
    left.set_xlabel("neurons of the layer, from idle to busy")
    left.set_title(f"APoZ: share of tokens at 0, or under {insight.fraction:g} rms", color=INK, fontsize=11)
    figure.colorbar(image, ax=left, fraction=0.04, pad=0.02)
    _contributions(figure, right, insight)
    return _save(figure, path)


def plot_sensitivity(insight: SensitivityInsight, path: Path) -> Path:
    """Heat maps, blocks by kinds, one for every sparsity; bars where no layer has a block."""
    what = "change of the loss, nats a token" if insight.measure == "loss" else "KL divergence, nats"
    figure = _bars(insight, what) if any(row.block is None for row in insight.rows) else _heat_maps(insight, what)
    return _save(figure, path)


def _histogram(axes: Any, row: WeightRow) -> None:
    counts = np.array(row.histogram)
    centres = (EDGES[:-1] + EDGES[1:]) / 2
    axes.stairs(counts, EDGES, fill=True, color=BLUE)
    axes.stairs(np.where(np.abs(centres) < 0.5, counts, 0), EDGES, fill=True, color=RED)
    axes.plot(centres, row.weights * _normal_bins(), color=INK, linewidth=1)
    axes.set_yscale("log")
    axes.set_ylim(0.5, max(2.0, 2.5 * counts.max()))
    axes.set_xlim(-REACH, REACH)
    axes.set_title(row.name, color=INK, fontsize=10, loc="left")
    facts = f"zero {row.zeros:.1%}\n<0.5s {row.under[0.5]:.1%}\nkurtosis {row.kurtosis:.1f}\nmax {row.largest:.0f}s"
    axes.text(0.98, 0.95, facts, transform=axes.transAxes, ha="right", va="top", fontsize=7, color=INK)


def _normal_bins() -> np.ndarray:
    """Share of a normal distribution in each bin."""
    return np.diff([0.5 * (1 + math.erf(edge / math.sqrt(2))) for edge in EDGES])


def _sorted_points(values: tuple[float, ...]) -> np.ndarray:
    """The values from large to small, read off at POINTS places."""
    ordered = np.sort(np.array(values))[::-1]
    return ordered[np.linspace(0, len(ordered) - 1, POINTS).round().astype(int)]


def _contributions(figure: Any, axes: Any, insight: ActivationInsight) -> None:
    """Cumulative share of contribution over sorted neurons, a curve for every layer, coloured by depth."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colours, last = colormaps["viridis"], max(1, len(insight.rows) - 1)
    for number, row in enumerate(insight.rows):
        ordered = np.sort(np.array(row.contribution))
        share = np.concatenate([[0.0], ordered.cumsum() / (ordered.sum() or 1.0)])
        axes.plot(np.linspace(0, 100, len(share)), 100 * share, color=colours(number / last), linewidth=1)
    axes.plot([0, 100], [0, 100], color=INK, linewidth=0.8, linestyle=":")
    axes.set_xlabel("smallest neurons, % of the layer")
    axes.set_ylabel("% of all contributions")
    axes.set_title("Contribution: mean |h| x norm of the column", color=INK, fontsize=11)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 100)
    axes.grid(color=PALE)
    figure.colorbar(ScalarMappable(Normalize(0, last), colours), ax=axes, label="layer", fraction=0.05, pad=0.02)


def _heat_maps(insight: SensitivityInsight, what: str) -> Any:
    from matplotlib.colors import SymLogNorm

    kinds = list(dict.fromkeys(row.kind for row in insight.rows))
    blocks = sorted({row.block for row in insight.rows if row.block is not None})
    count = len(insight.sparsities)
    figure = _figure(1.8 + count * max(2.2, 0.5 * len(kinds)), 2.4 + max(1.6, min(9.0, 0.22 * len(blocks))))
    changes = np.array([row.change for row in insight.rows])
    most = max(float(np.abs(changes).max()), 1e-6)
    norm = SymLogNorm(most / 100, vmin=-most, vmax=most)
    panels = figure.subplots(1, count, squeeze=False, sharey=True)[0]
    for number, (axes, sparsity) in enumerate(zip(panels, insight.sparsities, strict=True)):
        grid = np.full((len(blocks), len(kinds)), np.nan)
        for row, change in zip(insight.rows, changes, strict=True):
            grid[blocks.index(row.block), kinds.index(row.kind)] = change[number]  # pyright: ignore
        image = axes.imshow(grid, aspect="auto", norm=norm, cmap="RdBu_r", interpolation="nearest")
        if len(blocks) <= NAMED:
            _write_values(axes, grid, most)
        axes.set_xticks(range(len(kinds)), kinds, rotation=60, ha="right", fontsize=8)
        axes.set_title(f"{sparsity:.0%} pruned", color=INK, fontsize=10)
    _label_rows(panels[0], [str(block) for block in blocks])
    panels[0].set_ylabel("block")
    figure.colorbar(image, ax=list(panels), label=what, fraction=0.03, pad=0.02)
    figure.suptitle("What pruning one layer alone costs", color=INK, fontsize=12)
    return figure


def _write_values(axes: Any, grid: np.ndarray, most: float) -> None:
    for (y, x), value in np.ndenumerate(grid):
        if not math.isnan(value):
            colour = "white" if abs(value) > 0.2 * most else INK
            axes.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=6, color=colour)


def _bars(insight: SensitivityInsight, what: str) -> Any:
    figure = _figure(8.0, 1.4 + max(1.6, min(12.0, 0.3 * len(insight.rows))))
    axes = figure.subplots()
    ordered: list[SensitivityRow] = sorted(insight.rows, key=lambda row: max(row.change))
    places, count = np.arange(len(ordered)), len(insight.sparsities)
    height = 0.8 / count
    for number, sparsity in enumerate(insight.sparsities):
        offset = (number - (count - 1) / 2) * height
        changes = [row.change[number] for row in ordered]
        shade = 0.35 + 0.65 * (number + 1) / count
        axes.barh(places + offset, changes, height, color=BLUE, alpha=shade, label=f"{sparsity:.0%} pruned")
    axes.set_yticks(places, [row.name for row in ordered], fontsize=8)
    axes.set_xscale("symlog", linthresh=max(1e-6, max(abs(c) for r in ordered for c in r.change)) / 100)
    axes.set_xlabel(what)
    axes.grid(axis="x", color=PALE)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.set_title("What pruning all layers of one kind costs", color=INK, fontsize=12)
    return figure


def _label_rows(axes: Any, names: list[str]) -> None:
    step = math.ceil(len(names) / NAMED)
    axes.set_yticks(range(0, len(names), step), names[::step], fontsize=7)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlanError(f"plots need matplotlib ({error}); pip install 'hf_slim[plots]'") from None
    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(plot_folder(path.parent) / path.name, format="png", facecolor="white")
    return path
