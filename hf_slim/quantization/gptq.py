"""GPTQ (Frantar et al. 2023, arXiv:2210.17323): round column by column, let later columns repair the error so far.

Minimises the squared error of the layer's output, tr((W - Q) H (W - Q)^T) with H = 2/n sum x x^T, over Q on the grid:

    damp     H <- H + damping * mean(diag H) * I
    order    columns by falling diag H ("act order"): those that matter most go first, while many can still repair
    factor   H = R R^T, R upper triangular, so that the loss is sum_j ||sum_{i <= j} (W_i - Q_i) R_ij||**2:
             its term j holds no column after j
    round    Q_j = nearest(W_j + sum_{i < j} (W_i - Q_i) R_ij / R_jj), which makes term j as small as the grid allows

Shapes: W, Q [rows, cols]; H, R [cols, cols]. Rows are independent: layers with the same input can be stacked.

This is the paper's algorithm, with R in place of the Cholesky factor U of H^-1: U = R^-1, and the paper's running error
(w_j - q_j) / U_jj is term j above. One Cholesky factorisation, of H with both axes flipped, gives R, where the paper
needs two and an inverse: cheaper, and nothing is lost where H is nearly singular. The paper delays the sums of columns
beyond a block of 128. We halve the matrix recursively: round the left half, repair the right half with one matrix
product, round that.

Other differences from the authors' code:
- Grids are fixed beforehand, on the unpermuted columns, whatever the order ("static groups"): no index is stored.
- A column whose input was always zero keeps its weights, rounded to nearest, where the authors' code erases them. It is
  decoupled from all others, costs the same bytes, and may be needed by text that calibration did not contain.
- The clipping search (`grid.fit_grid`) weighs a column by R_jj**2, what the loss charges for rounding it. On 16
  matrices of SmolLM2-135M, groups of 64, that takes the held-out output error to 0.75 and 0.93 times that of an
  unweighted search at 2 and 4 bits, and to 0.62 and 0.87 times that of min-max ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.layers import encode_layers, plan_targets
from hf_slim.core.method import Rules
from hf_slim.core.report import StageReport
from hf_slim.core.select import Layer
from hf_slim.core.swap import get_keep, get_weight
from hf_slim.core.walk import Block, Solution, Statistics, walk
from hf_slim.encodings import Affine
from hf_slim.quantization import rtn
from hf_slim.quantization.grid import Clip, fit_grid

# What rounds one column: (weights [rows], column of W) -> (codes [rows], the values they stand for [rows]). The codes
# may be of any type that holds them.
RoundColumn = Callable[[Tensor, int], tuple[Tensor, Tensor]]


RULES = Rules(
    needs=("calibration",),
    makes=("codes",),
    preserves=("zeros", "codes"),
    paper="Frantar et al. 2023, arXiv:2210.17323",
)


class Config(rtn.Config):
    """Options of `quantize.gptq`."""

    damping: float = Field(0.01, gt=0, le=1, description="share of mean(diag H) added to the diagonal")
    act_order: bool = Field(True, description="round the columns with the largest inputs first")
    block: int = Field(32, ge=1, description="columns repaired one by one, not by a matrix product; changes speed only")


class SingularHessian(ArithmeticError):
    """No damping made the Hessian positive definite, as with NaN or infinite inputs."""


class Factor(NamedTuple):
    """What layers with the same input share.

    Attributes:
        root: R [cols, cols], upper triangular, R R^T = damped H with rows and columns in `order`.
        order: column of W that is rounded first, second, ...
        damping: the damping that worked.
    """

    root: Float[Tensor, "cols cols"]
    order: Int[Tensor, " cols"]
    damping: float

    def importance(self) -> Float[Tensor, " cols"]:
        """R_jj**2, what the loss charges for the squared rounding error of a column; in W's order, never zero."""
        return torch.empty_like(self.root[0]).index_copy_(0, self.order, self.root.diagonal().square())


@dataclass(frozen=True)
class Report:
    """Measured on one matrix.

    Attributes:
        damping: the damping that worked.
        relative_error: tr((W - Q) H (W - Q)^T) / tr(W H W^T) with the undamped H; 0 where the output is all zero.
    """

    damping: float
    relative_error: float


def factor(H: Float[Tensor, "cols cols"], damping: float = 0.01, act_order: bool = True) -> Factor:
    """Order the columns, damp H and factorise it, with ten times the damping (up to 1) after every failure.

    Columns whose diagonal is zero get the mean of the others there.

    Raises:
        SingularHessian: even damping 1 failed.
    """
    diagonal = H.diagonal().float()
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if not dead.all() else torch.ones_like(diagonal[0])
    diagonal = torch.where(dead, mean, diagonal)
    order = torch.arange(len(H), device=H.device)
    if act_order:
        order = diagonal.argsort(descending=True, stable=True)
    backwards = order.flip(0)
    flipped, diagonal = H.float()[backwards][:, backwards], diagonal[backwards]
    while True:
        flipped.diagonal().copy_(diagonal + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(flipped)
        if not failed:
            return Factor(lower.flip(0, 1), order, damping)
        if damping >= 1:
            raise SingularHessian(f"not positive definite with damping {damping:g}")
        damping = min(1.0, 10 * damping)


def error_feedback(
    W: Float[Tensor, "rows cols"],
    shared: Factor,
    round_column: RoundColumn,
    block: int = 32,
    keep: Bool[Tensor, "rows cols"] | None = None,
) -> tuple[UInt8[Tensor, "rows cols"], Float[Tensor, "rows cols"]]:
    """Round with error feedback on any grid whose entries are chosen one at a time.

    Args:
        W: weights; those pruned need not be zero: their removal is an error that the other columns repair.
        shared: from `factor`.
        round_column: called once for every column, in `shared.order`; gets weights that carry the feedback.
        block: longest run of columns in which every column is repaired by itself.
        keep: False where a weight is pruned: its value becomes exactly 0, its code that of 0.

    Returns:
        Codes, and the float32 values they stand for.
    """
    order = shared.order
    feedback = shared.root / shared.root.diagonal()
    # One row of memory for each column of W, in rounding order. `moving` holds the weights with feedback and then their
    # rounded values, `error` the original weights and then W - Q.
    error = W.float().t()[order]
    moving = error.clone()
    kept = None if keep is None else keep.t()[order].to(moving.dtype)
    codes = torch.empty(moving.shape, dtype=torch.uint8, device=W.device)
    columns = list(zip(order.tolist(), moving, error, codes, strict=True))

    def sweep(start: int, stop: int) -> None:
        if stop - start > block:
            middle = (start + stop) // 2
            sweep(start, middle)
            moving[middle:stop].addmm_(feedback[start:middle, middle:stop].t(), error[start:middle])
            return sweep(middle, stop)
        for j in range(start, stop):
            column, w, lost, code = columns[j]
            found, value = round_column(w if kept is None else w * kept[j], column)
            code.copy_(found)
            w.copy_(value if kept is None else value * kept[j])
            lost.sub_(w)
            if j + 1 < stop:
                moving[j + 1 : stop].addr_(feedback[j, j + 1 : stop], lost)

    sweep(0, len(order))
    inverse = order.argsort()
    return codes[inverse].t().contiguous(), moving[inverse].t().contiguous()


def grid_rounder(
    scales: Float[Tensor, "rows groups"], zeros: UInt8[Tensor, "rows groups"], bits: int, group_size: int | None
) -> RoundColumn:
    """`error_feedback`'s rounding to the affine grid."""
    grids = list(zip(scales.float().t().contiguous(), zeros.float().t().contiguous(), strict=True))
    top = 2**bits - 1

    def round_column(w: Tensor, column: int) -> tuple[Tensor, Tensor]:
        scale, zero = grids[column // group_size if group_size else 0]
        codes = (w / scale).round_().add_(zero).clamp_(0, top)
        return codes, (codes - zero).mul_(scale)

    return round_column


def relative_error(
    W: Float[Tensor, "rows cols"], W_hat: Float[Tensor, "rows cols"], H: Float[Tensor, "cols cols"]
) -> float:
    """Squared error of the layer's output over its squared output: tr((W - W_hat) H (W - W_hat)^T) / tr(W H W^T)."""
    W, H = W.float(), H.float()
    lost, total = (((A @ H) * A).sum(dtype=torch.float64).item() for A in (W - W_hat, W))
    return lost / total if total > 0 else 0.0


def quantize(
    W: Float[Tensor, "rows cols"],
    H: Float[Tensor, "cols cols"],
    bits: int = 4,
    group_size: int | None = 64,
    symmetric: bool = False,
    clip: Clip = "mse",
    damping: float = 0.01,
    act_order: bool = True,
    block: int = 32,
    keep: Bool[Tensor, "rows cols"] | None = None,
    shared: Factor | None = None,
    scale_dtype: torch.dtype = torch.float16,
) -> tuple[UInt8[Tensor, "rows cols"], Float[Tensor, "rows groups"], UInt8[Tensor, "rows groups"], Report]:
    """GPTQ on the affine grid.

    Args:
        W: finite weights; layers with the same input may be stacked along the rows.
        H: 2/n sum x x^T over the layer's inputs (any scale).
        bits, group_size, symmetric, clip, scale_dtype: see `grid.fit_grid`.
        damping, act_order: see `factor`; unused with `shared`.
        block, keep: see `error_feedback`.
        shared: `factor`'s result, where several layers share H.

    Returns:
        Codes, scales and zero points of `grid.from_grid`, and what was measured.

    Raises:
        SingularHessian: see `factor`.
    """
    shared = shared or factor(H, damping, act_order)
    scales, zeros = fit_grid(W, bits, group_size, symmetric, clip, scale_dtype, shared.importance(), keep)
    codes, W_hat = error_feedback(W, shared, grid_rounder(scales, zeros, bits, group_size), block, keep)
    return codes, scales, zeros, Report(shared.damping, relative_error(W, W_hat, H))


def encoding(layer: Layer, config: Config) -> Affine:
    """How a layer will be stored: as rounding stores it."""
    return rtn.encoding(layer, config)


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Quantize block by block. Embeddings are rounded first, so that every block sees what they will put out."""
    chosen = plan_targets(model, "quantize.gptq", config)
    windows = context.tokens("calibration")
    tables = [layer for layer in chosen if layer.kind == "embedding"]
    layers = {layer.name: layer for layer in chosen if layer.kind != "embedding"}
    rows = encode_layers(model, tables, rtn, config, context.progress)

    def solve(statistics: Mapping[str, Statistics], block: Block | None) -> dict[str, Solution]:
        found: dict[str, Solution] = {}
        for names in _solved_together(statistics, layers, config):
            H = statistics[names[0]].hessian
            found |= _solve(model, [layers[name] for name in names], H, config)
        return found

    rows += walk(model, list(layers.values()), windows, solve, context)
    return StageReport(layers=rows, notes=[f"{row.name}: {note}" for row in rows for note in row.notes])


def _solved_together(
    statistics: Mapping[str, Statistics], layers: Mapping[str, Layer], config: Config
) -> list[list[str]]:
    """Names of layers with the same input and the same options, together."""
    groups: dict[str, list[str]] = {}
    for name, known in statistics.items():
        groups.setdefault(f"{id(known.hessian)} {config.at(layers[name])!r}", []).append(name)
    return list(groups.values())


def _solve(model: nn.Module, layers: list[Layer], H: Tensor, config: Config) -> dict[str, Solution]:
    """Solve layers with the same input and options in one go, stacked along their rows; their error is a common one."""
    modules = [model.get_submodule(layer.name) for layer in layers]
    weights, masks = [get_weight(m) for m in modules], [get_keep(m) for m in modules]
    try:
        shared = factor(H, config.damping, config.act_order)
    except SingularHessian as error:
        notes = (f"rounded to nearest: {error}",)
        return {
            layer.name: Solution(rtn.encode(W, layer, config, keep), {}, notes)
            for layer, W, keep in zip(layers, weights, masks, strict=True)
        }
    keep = None
    if any(mask is not None for mask in masks):
        full = [torch.ones_like(W, dtype=torch.bool) for W in weights]
        keep = torch.cat([f if mask is None else mask for mask, f in zip(masks, full, strict=True)])
    W = torch.cat(weights).float()
    here = config.at(layers[0])
    grid = (here.bits, here.group_size, here.symmetric, here.clip)
    codes, scales, zeros, measured = quantize(W, H, *grid, block=config.block, keep=keep, shared=shared)
    found, start = {}, 0
    notes = (f"damping raised to {shared.damping:g}",) if shared.damping > config.damping else ()
    for layer, mask in zip(layers, masks, strict=True):
        own, start = slice(start, start + layer.rows), start + layer.rows
        stored = encoding(layer, config)
        tensors = stored.pack(codes[own], scales[own], zeros[own], None if stored.survivors is None else mask)
        found[layer.name] = Solution((stored, tensors), {"output_error": measured.relative_error}, notes)
    return found
