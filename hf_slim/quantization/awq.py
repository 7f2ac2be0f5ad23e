"""AWQ (Lin et al. 2023, arXiv:2306.00978): scale up the columns with large inputs before rounding, so they err less.

For every place where scales can be folded (`core/folding.py`), and for a on an even grid in [0, 1):

    s = x^a            or, "duo", with the weights' sizes       s = x^a / w^(1 - a)
    s <- s / sqrt(max s * min s)
    loss(s) = sum over consumers of tr((W - Q_s) H (W - Q_s)^T),   Q_s = round(W diag(s)) diag(s)^-1

the s of least loss is taken, s = 1 among them. W [rows, cols]; H = 2/n sum x x^T [cols, cols]; s, x, w [cols]. x is the
root mean square of an input column; w is the mean over rows of |W| / (its group's largest |W|), all consumers together.

Differs from the authors' code (mit-han-lab/llm-awq), and why:
- The loss is that of the consumers' own outputs, exact over all calibration tokens and computed from H, where the
  authors run the parent module (the attention, the MLP) on some of them for every a. One product with H costs less than
  a forward pass of the parent, and needs no knowledge of which module that is.
- x is the root of diag H, not a mean of |x|: H is what the walk gathers, and the square is what the loss is made of.
- "duo" is llm-compressor's; with it both kinds are tried, and the lower loss wins. Off by default: on the inputs of two
  blocks of SmolLM2-135M (3 bits, groups of 64) it doubles the work and leaves the loss at 0.907 of that of s = 1,
  where x^a alone gets to 0.902 (the search sees a sample of the rows).
- Columns that share a channel (grouped heads) share the mean of their x and w, where the authors leave such layers out.
- Ranges are clipped by `grid.fit_grid`'s search with a column weighed by diag H, in the search for s too, instead of
  afterwards. That weight alone takes the loss to 0.70 of unweighted clipping's there, and so is part of the rival
  s = 1; min-max ranges in the search for s are three times as fast and end at 0.926.
- A block whose output error did not drop against s = 1 goes back to s = 1, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.feedback import SingularHessian
from hf_slim.core.folding import Fold, find_folds
from hf_slim.core.layers import plan_targets
from hf_slim.core.method import Rules
from hf_slim.core.report import StageReport
from hf_slim.core.select import Layer
from hf_slim.core.swap import get_keep, get_weight
from hf_slim.core.walk import Block, Solution, Statistics, walk
from hf_slim.encodings import Affine
from hf_slim.quantization import gptq, rtn
from hf_slim.quantization.grid import from_grid
from hf_slim.quantization.scaling import solve_block

RULES = Rules(
    needs=("calibration",),
    makes=("codes",),
    preserves=("zeros", "codes"),
    paper="Lin et al. 2023, arXiv:2306.00978",
)

_ROWS = 128  # rows of each consumer that the search looks at; their error stands for that of all rows
_DAMPING = 0.01  # share of mean(diag H) that a column's importance is at least: other text may use it


class Config(rtn.Config):
    """Options of `quantize.awq`."""

    points: int = Field(20, ge=1, description="exponents a that the search tries")
    duo: bool = Field(False, description="try scales that divide by the weights' sizes, too")
    solver: Literal["rtn", "gptq"] = Field("rtn", description="round to nearest, or with GPTQ's error feedback")


# What rounds a weight to its grid: (W [rows, cols], importance [cols]) -> the values it is rounded to.
Round = Callable[[Tensor, Tensor], Tensor]


class Consumer(NamedTuple):
    """A layer that scales are multiplied into, as the search sees it."""

    W: Float[Tensor, "rows cols"]
    group_size: int | None
    round: Round


def importance(H: Float[Tensor, "cols cols"]) -> Float[Tensor, " cols"]:
    """What the loss charges for a column's squared error: diag H, never zero unless all of it is."""
    diagonal = H.diagonal().float()
    return diagonal + _DAMPING * diagonal.mean()


def weight_sizes(consumers: Sequence[Consumer]) -> Float[Tensor, " cols"]:
    """w: mean over rows of |W| / (largest |W| of its group), in [0, 1]."""
    parts = []
    for W, group_size, _ in consumers:
        size = W.abs().float()
        groups = size.split(group_size or size.shape[1], dim=1)
        tiny = torch.finfo(torch.float32).tiny
        parts.append(torch.cat([g / g.amax(1, keepdim=True).clamp(min=tiny) for g in groups], 1))
    return torch.cat(parts).mean(0)


def candidates(
    x: Float[Tensor, " cols"], w: Float[Tensor, " cols"], points: int, duo: bool
) -> Iterator[Float[Tensor, " cols"]]:
    """Scales to try, all > 0; a column without input or weights keeps scale 1. The first are all 1 (a = 0)."""
    alive = (x > 0) & (w > 0)
    x, w = x.where(alive, 1.0), w.where(alive, 1.0)
    for a in torch.arange(points) / points:
        for s in (x**a, x**a / w ** (1 - a)) if duo else (x**a,):
            inside = s[alive] if alive.any() else s
            yield (s / (inside.max() * inside.min()).sqrt()).clamp(1e-4, 1e4).where(alive, 1.0)


def output_loss(consumer: Consumer, H: Float[Tensor, "cols cols"], s: Float[Tensor, " cols"]) -> Float[Tensor, ""]:
    """tr((W - Q_s) H (W - Q_s)^T) of one consumer."""
    E = consumer.round(consumer.W * s, importance(H) / s.square()) / s - consumer.W
    return ((E @ H) * E).sum()


def search(
    consumers: Sequence[Consumer],
    H: Float[Tensor, "cols cols"],
    share: Callable[[Tensor], Tensor] = lambda values: values,
    points: int = 20,
    duo: bool = False,
) -> Float[Tensor, " cols"]:
    """The scales of least loss.

    Args:
        consumers: the layers that these scales go into.
        H: of their common input.
        share: makes columns equal that must have the same scale.
    """
    x, w = share(H.diagonal().sqrt()), share(weight_sizes(consumers))
    best, lowest = torch.ones_like(x), torch.inf
    for s in candidates(x, w, points, duo):
        loss = float(sum(output_loss(consumer, H, s) for consumer in consumers))
        if loss < lowest:
            best, lowest = s, loss
    return best


def encoding(layer: Layer, config: Config) -> Affine:
    """How a layer will be stored: as rounding stores it."""
    return rtn.encoding(layer, config)


def encode(
    W: Float[Tensor, "rows cols"], layer: Layer, config: Config, known: Statistics | None, keep: Tensor | None
) -> Solution:
    """Quantize one weight, scaled or not."""
    here, stored = config.at(layer), encoding(layer, config)
    if known is None or known.tokens == 0:
        return Solution(rtn.encode(W, layer, config, keep), {}, (f"{gptq.FALLBACK}: no token reached it",))
    grid = here.bits, here.group_size, here.symmetric, here.clip
    notes: tuple[str, ...] = ()
    codes, scales, zeros = rtn.quantize(W, *grid, keep, importance(known.hessian))
    if config.solver == "gptq":
        try:
            codes, scales, zeros, _ = gptq.quantize(W, known.hessian, *grid, keep=keep)
        except SingularHessian as error:
            notes = (f"{gptq.FALLBACK}: {error}",)
    lost = gptq.relative_error(W, from_grid(codes, scales, zeros, here.group_size), known.hessian)
    tensors = stored.pack(codes, scales, zeros, None if stored.survivors is None else keep)
    return Solution((stored, tensors), {"output_error": lost}, notes)


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Quantize block by block. Embeddings are rounded first, so that every block sees what they will put out."""
    chosen = plan_targets(model, "quantize.awq", config)
    windows = context.tokens("calibration")
    layers = {layer.name: layer for layer in chosen if layer.kind != "embedding"}
    folds = find_folds(model, list(layers.values()), windows)
    tables = [layer for layer in chosen if layer.kind == "embedding"]
    rows = gptq.encode_tables(model, tables, config, windows, context.progress)

    def solve_one(name: str, W: Tensor, known: Statistics | None, keep: Tensor | None) -> Solution:
        return encode(W, layers[name], config, known, keep)

    def solve(statistics: Mapping[str, Statistics], block: Block | None) -> dict[str, Solution]:
        if block is not None:
            scales = [(fold, _scales(block, fold, layers, statistics, config)) for fold in folds[block.name]]
            return solve_block(block, statistics, scales, solve_one)
        modules = {name: model.get_submodule(name) for name in statistics}
        return {n: solve_one(n, get_weight(m).float(), statistics[n], get_keep(m)) for n, m in modules.items()}

    rows += walk(model, list(layers.values()), windows, solve, context)
    return StageReport(layers=rows, notes=[f"{row.name}: {note}" for row in rows for note in row.notes])


def _scales(
    block: Block, fold: Fold, layers: Mapping[str, Layer], statistics: Mapping[str, Statistics], config: Config
) -> Float[Tensor, " channels"]:
    """Search one fold's scales."""
    H = statistics[f"{block.name}.{fold.consumers[0]}"].hessian
    consumers = []
    for short in fold.consumers:
        module, here = block.module.get_submodule(short), config.at(layers[f"{block.name}.{short}"])
        W, keep = get_weight(module), get_keep(module)
        step = -(-len(W) // _ROWS)
        consumers.append(Consumer(W[::step].float(), here.group_size, _rounder(here, keep, step)))
    found = search(consumers, H, lambda x: fold.spread(fold.shared(x, "mean")), config.points, config.duo)
    return fold.shared(found, "mean")


def _rounder(config: Config, keep: Tensor | None, step: int) -> Round:
    sampled = None if keep is None else keep[::step]

    def round_weight(W: Tensor, weight: Tensor) -> Tensor:
        grid = config.bits, config.group_size, config.symmetric, config.clip
        return from_grid(*rtn.quantize(W, *grid, sampled, weight), config.group_size)

    return round_weight
