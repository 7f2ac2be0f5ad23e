"""SparseGPT (Frantar & Alistarh 2023, arXiv:2301.00774): prune column by column, let later columns repair the error.

Minimises the squared error of the layer's output, tr((W - X) H (W - X)^T), H = 2/n sum x x^T damped, over sparse X:

    factor   H = R R^T, R upper triangular, so that the loss is sum_j ||sum_{i <= j} (W_i - X_i) R_ij||**2: its term j
             holds no column after j (`core/feedback.py`)
    choose   before a run of 128 columns, with w its weights as they would be if none of them went, every error before
             the run repaired: dropping w_rj costs (w_rj R_jj)**2 in term j, so those of least cost go; for "n:m", of
             runs of m columns all but n in each row
    drop     X_j = keep_j * (W_j + sum_{i < j} (W_i - X_i) R_ij / R_jj)
    refit    10 steps of least squares on the survivors, all columns at once (`survivors.py`)

Shapes: W, X, keep [rows, cols]; H, R [cols, cols].

The paper's score is w**2 / [H_F^-1]_jj over the columns F from j on. That inverse's first entry is 1 / R_jj**2: with R
split after its first row, H_F = R_F R_F^T and R_F^-1 is upper triangular, so [H_F^-1]_jj = (R_jj^-1)**2. The paper's
numbers come out (see the tests), with one Cholesky factorisation for its two and an inverse.

With `bits`, survivors are rounded to their integer grid in the same pass (the paper's eq. 7): later columns repair both
errors. The grids are fitted beforehand to all weights, weighted by R_jj**2; fitting them to the likely survivors takes
half a percent off the error at most.

Where we differ from the authors' code: sparsity is exact to one weight a layer, not cut down in every run; the refit,
which `refit: 0` turns off; a column without input keeps its weights as long as others are cheaper, where the authors'
code erases them. Weights that an earlier pruning dropped stay zero, and count. An expert with too few tokens, or a
Hessian that no damping makes positive definite, falls back to Wanda, which the report counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, UInt8
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.feedback import ChooseKeep, Factor, RoundColumn, SingularHessian, error_feedback, factor
from hf_slim.core.layers import only_survivors
from hf_slim.core.method import Rules
from hf_slim.core.report import StageReport
from hf_slim.core.select import Layer
from hf_slim.core.walk import Statistics
from hf_slim.encodings import Affine, Encoding
from hf_slim.pruning import oneshot, wanda
from hf_slim.pruning.masks import magnitude_mask, n_m_mask
from hf_slim.pruning.oneshot import Job, Pruned
from hf_slim.pruning.pattern import pack, parse_pattern
from hf_slim.pruning.survivors import damped, refit
from hf_slim.quantization import rtn
from hf_slim.quantization.gptq import grid_rounder
from hf_slim.quantization.grid import fit_grid

RULES = Rules(
    needs=("calibration",),
    makes=("zeros",),
    preserves=("zeros", "codes", "tied"),
    paper="Frantar & Alistarh 2023, arXiv:2301.00774",
)

Grid = tuple[Float[Tensor, "rows groups"], UInt8[Tensor, "rows groups"]]


class Config(oneshot.SolverConfig):
    """Options of `prune.sparsegpt`."""

    per_layer: ClassVar[tuple[str, ...]] = (*oneshot.Config.per_layer, "bits", "group_size", "symmetric")

    window: int = Field(128, ge=1, description="columns whose survivors are chosen together")
    bits: int | None = Field(None, ge=2, le=8, description="round survivors to integers of so many bits; null does not")
    group_size: int | None = Field(64, ge=1, description="columns that share a scale; null for one scale a row")
    symmetric: bool = Field(False, description="no stored zero points; the scale is signed")

    @model_validator(mode="after")
    def _either_learn_or_round(self) -> Config:
        if self.bits is not None and self.iterations:
            raise ValueError("iterations: rounded survivors do not learn; leave out bits, and add quantize.blockwise")
        return self


def prune(
    W: Float[Tensor, "rows cols"],
    shared: Factor,
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    window: int = 128,
    earlier: Bool[Tensor, "rows cols"] | None = None,
    round_column: RoundColumn | None = None,
) -> tuple[UInt8[Tensor, "rows cols"], Float[Tensor, "rows cols"], Bool[Tensor, "rows cols"]]:
    """SparseGPT's masks and weights.

    Args:
        W: finite weights.
        shared: `factor(H, act_order=False)`.
        sparsity: share of weights to drop, 0 <= sparsity < 1: round(sparsity * rows * cols) in all, and of every
            window's weights the same share to one weight. An n:m pattern sets its own.
        pattern: "unstructured" or "n:m".
        window: columns whose survivors are chosen together; an n:m pattern takes m.
        earlier: False where a weight is pruned already.
        round_column: rounds survivors, see `error_feedback`; None leaves them as they are.

    Returns:
        Codes (zeros without `round_column`), weights, and True where a weight survives.
    """
    keep = torch.ones_like(W, dtype=torch.bool) if earlier is None else earlier.clone()
    n_m = parse_pattern(pattern)
    choose = _chooser(keep, shared.importance().sqrt(), sparsity, n_m)
    codes, X = error_feedback(
        W, shared, round_column or _as_it_is, choose=choose, window=window if n_m is None else n_m[1]
    )
    return codes, X, keep


def _chooser(
    keep: Bool[Tensor, "rows cols"], price: Float[Tensor, " cols"], sparsity: float, n_m: tuple[int, int] | None
) -> ChooseKeep:
    """Chooses by |w| R_jj, and notes the choice in `keep`, whose False weights stay so."""
    rows, seen = len(keep), 0

    def choose(w: Tensor, columns: Tensor) -> Tensor:
        nonlocal seen
        score = w.t() * price[columns] * keep[:, columns]
        before, seen = seen, seen + len(columns)
        if n_m is not None:
            chosen = n_m_mask(score, *n_m)
        else:
            drop = round(sparsity * rows * seen) - round(sparsity * rows * before)
            everything = drop == score.numel()
            chosen = torch.zeros_like(keep[:, columns]) if everything else magnitude_mask(score, drop / score.numel())
        chosen &= keep[:, columns]
        keep[:, columns] = chosen
        return chosen.t()

    return choose


def _as_it_is(w: Tensor, column: int) -> tuple[Tensor, Tensor]:
    return torch.zeros((), dtype=torch.uint8, device=w.device), w


def makes(config: Config) -> tuple[str, ...]:
    """What weights have after it, with these options."""
    return RULES.makes if config.bits is None else (*RULES.makes, "codes")


def encoding(layer: Layer, config: Config) -> Encoding:
    """Mask and survivors, or their codes. A measured budget moves survivors between layers."""
    plain = oneshot.encoding(layer, config)
    own = config.at(layer)
    return plain if own.bits is None else _coded(layer.encoded(plain), own)


def _coded(pruned: Layer, config: Config) -> Affine:
    """How codes are stored, of a layer as it is stored without."""
    assert config.bits is not None
    places = only_survivors(pruned, config.bits)
    return Affine(bits=config.bits, group_size=config.group_size, symmetric=config.symmetric, **places)


def problems(layer: Layer, config: Config) -> list[str]:
    """Why a layer cannot be pruned this way."""
    return oneshot.problems(layer, config)


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Prune block by block."""

    def prepare(known: Statistics) -> _Shared:
        if known.tokens > 0:
            try:
                return _Shared(known, factor(known.hessian, config.damping, act_order=False))
            except SingularHessian as error:
                return _Shared(known, None, str(error))
        return _Shared(known, None, "no input")

    return oneshot.prune_model(model, "prune.sparsegpt", config, context, prepare, _prune_layer, wanda.keep_mask)


@dataclass(frozen=True)
class _Shared:
    """What layers with the same input share; no root, and why, where H cannot be factorised."""

    known: Statistics
    root: Factor | None
    why: str = ""


def _prune_layer(W: Tensor, shared: _Shared, job: Job) -> Pruned:
    config: Config = job.config
    known = shared.known
    few = job.layer.routed and known.tokens < config.min_tokens
    if few or shared.root is None:
        why = f"only {known.tokens} tokens were routed to it" if few else shared.why
        pruned = wanda.instead(W, known, job, why)
        if config.bits is None:
            return pruned
        codes, *grid = rtn.quantize(W, config.bits, config.group_size, config.symmetric, keep=pruned.keep)
        return _pruned_codes(W, job, codes, (grid[0], grid[1]), pruned.keep, pruned.notes)
    how = (job.sparsity, config.pattern, config.window, job.earlier)
    notes = (f"damping raised to {shared.root.damping:g}",) if shared.root.damping > config.damping else ()
    if config.bits is not None:
        return _prune_and_round(W, shared.root, job, notes)
    _, X, keep = prune(W, shared.root, *how)
    if config.refit:
        X = refit(W, damped(known.hessian, shared.root.damping), X, keep, config.refit)
    return Pruned(X, keep, notes=notes)


def _prune_and_round(W: Tensor, root: Factor, job: Job, notes: tuple[str, ...]) -> Pruned:
    """Both in one pass."""
    config: Config = job.config
    assert config.bits is not None
    shape = (config.bits, config.group_size)
    scales, zeros = fit_grid(W, *shape, config.symmetric, importance=root.importance())
    rounder = grid_rounder(scales, zeros, *shape)
    codes, _, keep = prune(W, root, job.sparsity, config.pattern, config.window, job.earlier, rounder)
    return _pruned_codes(W, job, codes, (scales, zeros), keep, notes)


def _pruned_codes(W: Tensor, job: Job, codes: Tensor, grid: Grid, keep: Tensor, notes: tuple[str, ...]) -> Pruned:
    plain, _ = pack(W, keep, job.config.pattern)
    stored = _coded(job.layer.encoded(plain), job.config)
    tensors = stored.pack(codes, *grid, None if stored.survivors is None else keep)
    return Pruned(stored.decode(tensors, *codes.shape), keep, (stored, tensors), notes)
