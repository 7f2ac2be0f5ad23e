"""SmoothQuant (Xiao et al. 2022, arXiv:2211.10438): 8-bit weights times 8-bit activations, outliers moved to weights.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)                      for every input column j
    Y   = (X diag(s)^-1) (W diag(s))^T

The division is folded into the norm or layer before (`core/folding.py`). Then weights are rounded to 8-bit integers,
symmetric, one scale a row, and activations while the model runs, one scale a token (`encodings/activations.py`): a
column with large inputs would take all the levels of every token. X [tokens, cols] over all calibration tokens;
W [rows, cols], max|W_j| over the rows of all consumers; s [cols].

Differs from the authors' code:
- Scales are folded wherever that is proved to work, v to o and up to down included, not only into norms.
- Columns that share a channel (grouped heads) share the largest of their maxima.
- A block whose output error did not drop against plain rounding goes without, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from accelerate.utils import gather
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.errors import ModelError
from hf_slim.core.folding import Fold, find_folds
from hf_slim.core.layers import plan_targets
from hf_slim.core.method import MethodConfig, Rules
from hf_slim.core.report import StageReport
from hf_slim.core.select import Layer, Select
from hf_slim.core.swap import get_keep, get_weight
from hf_slim.core.walk import Block, Solution, Statistics, walk
from hf_slim.encodings import Affine
from hf_slim.quantization import rtn
from hf_slim.quantization.grid import Clip
from hf_slim.quantization.scaling import solve_block

RULES = Rules(
    needs=("calibration",),
    makes=("codes",),
    preserves=("zeros", "codes"),
    paper="Xiao et al. 2022, arXiv:2211.10438",
)


class Config(MethodConfig):
    """Options of `quantize.smoothquant`."""

    per_layer: ClassVar[tuple[str, ...]] = ("clip",)

    alpha: float = Field(0.5, ge=0, le=1, description="how much of the difficulty moves from activations to weights")
    clip: Clip = Field("mse", description="'mse' searches the range of least squared error, 'minmax' keeps all of it")
    layers: Select = Select()


def smoothing(
    x_max: Float[Tensor, " cols"], w_max: Float[Tensor, " cols"], alpha: float = 0.5
) -> Float[Tensor, " cols"]:
    """s = x_max^alpha / w_max^(1 - alpha), all > 0; a column without input or weights keeps scale 1.

    Args:
        x_max: largest absolute input of every column.
        w_max: largest absolute weight of every column.
    """
    alive = (x_max > 0) & (w_max > 0)
    s = x_max.where(alive, 1.0) ** alpha / w_max.where(alive, 1.0) ** (1 - alpha)
    return s.clamp(1e-5, 1e5)


def encoding(layer: Layer, config: Config) -> Affine:
    """How a layer will be stored."""
    return Affine(bits=8, group_size=None, symmetric=True, activations="int8")


def encode(W: Float[Tensor, "rows cols"], layer: Layer, config: Config, keep: Tensor | None) -> Solution:
    """Round one weight."""
    stored = encoding(layer, config)
    codes, scales, zeros = rtn.quantize(W, 8, None, True, config.at(layer).clip, keep)
    return Solution((stored, stored.pack(codes, scales, zeros)), {})


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Smooth and quantize block by block."""
    layers = {layer.name: layer for layer in plan_targets(model, "quantize.smoothquant", config)}
    windows = context.tokens("calibration")
    folds = find_folds(model, list(layers.values()), windows)

    def solve_one(name: str, W: Tensor, known: Statistics | None, keep: Tensor | None) -> Solution:
        return encode(W, layers[name], config, keep)

    def solve(statistics: Mapping[str, Statistics], block: Block | None) -> dict[str, Solution]:
        if block is not None:
            own = dict.fromkeys(name for name, layer in layers.items() if layer.block == block.name)
            return solve_block(block, own, _scales(block, own, folds[block.name], config.alpha), solve_one)
        modules = {name: model.get_submodule(name) for name in statistics}
        return {n: solve_one(n, get_weight(m).float(), None, get_keep(m)) for n, m in modules.items()}

    rows = walk(model, list(layers.values()), windows, solve, context, hessians=False)
    return StageReport(layers=rows, notes=[f"{row.name}: {note}" for row in rows for note in row.notes])


def _scales(block: Block, layers: Iterable[str], folds: Sequence[Fold], alpha: float) -> list[tuple[Fold, Tensor]]:
    """Scales of a block's folds, from one more run of the block, in which no layer may be fed NaN."""
    maxima = _input_maxima(block, [name.removeprefix(f"{block.name}.") for name in layers])
    scales = []
    for fold in folds:
        weights = [get_weight(block.module.get_submodule(name)).float() for name in fold.consumers]
        x_max, w_max = fold.shared(maxima[fold.consumers[0]], "amax"), torch.cat(weights).abs().amax(0)
        w_max = fold.shared(w_max, "amax")
        scales.append((fold, smoothing(x_max, w_max, alpha)))
    return scales


def _input_maxima(block: Block, names: Sequence[str]) -> dict[str, Tensor]:
    """Largest absolute input of every column [cols] over all calibration tokens of all processes."""
    maxima = {name: torch.zeros(get_weight(block.module.get_submodule(name)).shape[1]) for name in names}
    with _watching(block, maxima):
        for i in range(len(block)):
            block.run(i)
    found: dict[str, Tensor] = {name: gather(largest[None]).amax(0) for name, largest in maxima.items()}  # pyright: ignore
    broken = [f"{block.name}.{name}" for name, largest in found.items() if not torch.isfinite(largest).all()]
    if broken:
        raise ModelError([f"{name} is fed NaN or infinite values by the calibration data" for name in broken])
    return found


@contextmanager
def _watching(block: Block, maxima: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the maxima grow with what the layers are handed."""

    def hook(name: str) -> Callable[..., None]:
        def note(module: Any, args: tuple[Any, ...]) -> None:
            here = args[0].detach().abs().flatten(0, -2).amax(0).float()
            maxima[name] = torch.maximum(maxima[name].to(here.device), here)

        return note

    handles = [block.module.get_submodule(name).register_forward_pre_hook(hook(name)) for name in maxima]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
