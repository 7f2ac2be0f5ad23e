"""Magnitude pruning in one shot: the smallest weights go (Han et al. 2015, arXiv:1506.02626).

keep[r, c] = |W[r, c]| is among the largest (1 - sparsity) of its layer, or of all chosen layers together ("global");
or, for a pattern "n:m", among the n largest of every m consecutive columns of a row; or, for "block:b", whole runs of
b columns are ranked by the sum of their magnitudes.

W [rows, cols]. What remains is stored as places and surviving values (`encodings/sparse.py`): a layer that lost half of
its bf16 weights takes 9 bits a weight. The count of zeros is exact, to one weight; ties are broken by position.
What an earlier pruning set to zero stays zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.layers import Encoded, plan_targets, put_layer
from hf_slim.core.method import MethodConfig, Rules
from hf_slim.core.report import StageReport
from hf_slim.core.select import Layer, Select
from hf_slim.core.swap import get_keep, get_weight
from hf_slim.encodings import Sparse
from hf_slim.pruning.masks import global_masks, magnitude_mask, n_m_mask
from hf_slim.pruning.pattern import Pattern, block_of, column_problems, pack, parse_pattern, stored

RULES = Rules(makes=("zeros",), preserves=("zeros", "codes", "tied"), paper="Han et al. 2015, arXiv:1506.02626")


class Config(MethodConfig):
    """Options of `prune.magnitude`."""

    sparsity: float = Field(0.5, ge=0, lt=1, description="share of weights to drop; an n:m pattern sets its own")
    pattern: Pattern = Field(
        "unstructured", description="'unstructured', 'n:m': n of every m columns stay, or 'block:b'"
    )
    scope: Literal["layer", "global"] = Field("layer", description="rank within each layer, or over all of them")
    layers: Select = Select()


def keep_masks(weights: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Masks Bool[rows, cols] of weights [rows, cols], by name; True where a weight stays."""
    n_m = parse_pattern(config.pattern)
    if n_m is not None:
        return {name: n_m_mask(W, *n_m) for name, W in weights.items()}
    block = block_of(config.pattern)
    if config.scope == "global":
        return global_masks(weights, config.sparsity, block)
    return {name: magnitude_mask(W, config.sparsity, block) for name, W in weights.items()}


def encoding(layer: Layer, config: Config) -> Sparse:
    """Places and survivors. Under a global ranking a single layer's count is known only once the weights are."""
    return stored(layer, config.pattern, config.sparsity)


def problems(layer: Layer, config: Config) -> list[str]:
    """Why a layer cannot be pruned this way."""
    return column_problems(layer.name, layer.cols, config.pattern)


def streaming_problem(config: Config) -> str | None:
    """Why this cannot be done one weight at a time, as they arrive."""
    return "scope 'global' ranks the weights of all layers together" if config.scope == "global" else None


def encode(W: Float[Tensor, "rows cols"], layer: Layer, config: Config, keep: Tensor | None) -> Encoded:
    """Prune one weight on its own."""
    return _encode(W, keep_masks({"W": W}, config)["W"], keep, config.pattern)


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Prune the chosen layers of a model."""
    chosen = plan_targets(model, "prune.magnitude", config)
    modules = {layer.name: model.get_submodule(layer.name) for layer in chosen}
    masks = keep_masks({name: get_weight(module) for name, module in modules.items()}, config)
    rows = []
    for layer in context.progress.track(chosen, "pruning layers"):
        module = modules[layer.name]
        encoded = _encode(get_weight(module), masks[layer.name], get_keep(module), config.pattern)
        rows.append(put_layer(model, layer, encoded, metrics={"zeros": layer.rows * layer.cols - encoded[0].survivors}))
    zeros, total = sum(row.metrics["zeros"] for row in rows), sum(row.rows * row.cols for row in rows)
    return StageReport(layers=rows, metrics={"sparsity": zeros / total})


def _encode(
    W: Tensor, keep: Bool[Tensor, "rows cols"], earlier: Tensor | None, pattern: str
) -> tuple[Sparse, dict[str, Tensor]]:
    return pack(W, keep if earlier is None else keep & earlier, pattern)
