"""Low rank: every weight becomes the product of two thin matrices that keep the directions of its output which matter
(Wang et al. 2024, "SVD-LLM", arXiv:2403.07378; its v2, arXiv:2503.12340, for a semidefinite H and ranks by layer).

Minimises the squared error of the layer's output, tr((W - M) H (W - M)ᵀ) with H = 2/n sum x xᵀ, over M of rank r:

    directions   U, s: eigenvectors and roots of the eigenvalues of W H Wᵀ, the second moments of the outputs
    factors      M = A B,  A = U_r,  B = U_rᵀ W;   the loss is exactly the sum of the dropped s_i²  (`directions.py`)
    ranks        given; by a share of the bytes; by a share of the energy; or by a budget of bytes for all layers, for
                 the least sum of squares of each layer's loss as a share of its output  (`ranks.py`)
    refit        W first becomes the weight that answers the inputs which the compressed model really feeds the layer
                 most like W answers the dense model's: M* = W + W D H^-1, D = 2/n sum (x - x^) x^ᵀ  (`drift.py`).
                 We go half way: all the way, every layer works on drift that is beyond repair

`basis: weight` takes H = I, plain SVD, which needs no data; `activations` is PCA of the outputs and whitened SVD both.
`factors` stores A and B on a grid: B is rounded, A refitted to that by least squares, then rounded itself. `residual`
adds A B to a weight that is quantized or pruned already: the same for E = W - W^ in place of W (SLiM,
arXiv:2410.09615).

Shapes: W, M [rows, cols]; H, D [cols, cols]; A [rows, rank]; B [rank, cols]. A layer is smaller below rank
rows * cols / (rows + cols); a budget leaves layers dense where that serves better.

Where we differ: no Cholesky factor or inverse of H, so a rank-deficient H is no special case. The authors refit A alone
to the compressed inputs; M* is the best for any rank, and both factors come from it. Their v2 shares ranks out by a
formula of each matrix type's loss. Squares keep any one layer from losing much, which the others cannot make up for.

Measured on a trained Llama of 260k weights, calibrated with 12k tokens, blocks alone; cross entropy on held-out
stories, 1.40 when dense:

    bytes kept                    0.9      0.8      0.6
    plain SVD, same share                  5.06     6.90
    same share, refit 0                    3.32
    same share, refit 1                    3.26
    same share, refit 0.5         2.58     2.99     3.91
    budget, sum of losses         1.76     3.05     4.23
    budget, sum of squares        1.77     2.78     3.78
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.errors import ModelError, PlanError
from hf_slim.core.experts import unfused
from hf_slim.core.layers import Encoded, check_weights, put_layer, targets
from hf_slim.core.method import Rules
from hf_slim.core.report import LayerReport, StageReport
from hf_slim.core.select import Layer, Select, find_layers
from hf_slim.core.swap import get_weight
from hf_slim.core.walk import Block, Solution, Statistics, walk
from hf_slim.encodings import Affine, Codebook, LowRank, Sparse
from hf_slim.encodings.modules import EncodedModule
from hf_slim.methods import find_method
from hf_slim.quantization.embeddings import head_hessian, joint_hessian
from hf_slim.sharing.directions import (
    damp,
    follow_drift,
    output_directions,
    output_energies,
    project,
    project_table,
    table_directions,
)
from hf_slim.sharing.drift import measure_drift
from hf_slim.sharing.factors import (
    SIZES,
    Sized,
    bytes_of_factors,
    dense_bytes,
    encode_factors,
    rank_within,
    stored_as,
)
from hf_slim.sharing.ranks import cheapest_choices, dropped_energy, losses_of_ranks, rank_of_energy

RULES = Rules(needs=("calibration",), preserves=("zeros", "codes", "tied"), paper="Wang et al. 2024, arXiv:2403.07378")

BUDGET = 0.8  # where no rank is asked for: the setting of the paper that loses little


class Embeddings(Sized):
    """How the input embedding is factorised, and with it a head that shares it; half of its bytes if nothing is said.

    With `basis: activations` a token counts as often as calibration has it, and a shared head's inputs count too.
    """


class Config(Sized):
    """Options of `share.low_rank`."""

    per_layer: ClassVar[tuple[str, ...]] = (*SIZES, "factors")
    one_of: ClassVar[tuple[str, ...]] = (*SIZES, "budget")

    budget: float | None = Field(
        None, gt=0, lt=1, description="share of all chosen layers' bytes; 0.8 if nothing sets the ranks"
    )
    basis: Literal["activations", "weight"] = Field(
        "activations", description="directions of most output energy, or of the weight alone, without data"
    )
    refit: float = Field(
        0.5, ge=0, le=1, description="how far to follow the drift of the inputs; basis activations, without residual"
    )
    damping: float = Field(0.01, gt=0, le=1, description="share of mean(diag H) added to the diagonal")
    residual: bool = Field(False, description="add the product to what quantized or pruned layers store")
    min_tokens: int = Field(32, ge=1, description="an expert that fewer tokens were routed to: basis weight")
    layers: Select = Select()
    embeddings: Embeddings | None = Field(None, description="factorise the input embedding (and a tied head) too")

    @model_validator(mode="after")
    def _residual_fits(self) -> Config:
        if self.residual and all(getattr(self, name) is None for name in self.one_of):
            raise ValueError("residual: say how large it is: rank, ratio, energy or budget")
        if self.residual and self.embeddings is not None:
            raise ValueError("residual corrects linear layers: leave embeddings out")
        return self

    @property
    def share_of_all(self) -> float | None:
        """The budget that holds, if there is one."""
        return BUDGET if all(getattr(self, name) is None for name in self.one_of) else self.budget


def needs(config: Config) -> tuple[str, ...]:
    """The data and models that it needs with these options."""
    return (("calibration",) if config.basis == "activations" else ()) + (("original",) if config.residual else ())


def makes(config: Config) -> tuple[str, ...]:
    """Codes, where the factors are stored as such."""
    if config.factors is None:
        return ()
    return ("centroids",) if config.factors.grid == "codebook" else ("codes",)


def frees(config: Config) -> tuple[str, ...]:
    """A dense residual can be trained beside whatever codes it corrects."""
    return ("codes", "centroids") if config.residual and config.factors is None else ()


def streaming_problem(config: Config) -> str | None:
    """Why weights cannot be factorised one at a time, as they arrive."""
    if config.share_of_all is not None:
        return "a budget is shared out over all layers; give rank or ratio"
    return "some layers may have to stay dense to keep that energy; give rank or ratio" if config.energy else None


def options_of(layer: Layer, config: Config) -> tuple[Sized, float | None]:
    """The options that hold for a layer, and the share of its bytes that they give its factors, where they do."""
    if layer.kind == "embedding" and config.embeddings is not None:
        here: Sized = config.embeddings
        unsized = all(getattr(here, name) is None for name in SIZES)
        return here, 0.5 if unsized else here.ratio
    at = config.at(layer)
    return at, at.ratio if at.share_of_all is None else at.share_of_all


def most_useful_rank(layer: Layer, config: Config) -> int:
    """The largest rank at which the layer takes less than its dense weight; 0 if there is none."""
    here, _ = options_of(layer, config)
    room = dense_bytes(layer) - 1 - (layer.nbytes if config.residual else 0)
    return rank_within(layer, here, room)


def encoding(layer: Layer, config: Config) -> LowRank:
    """How a layer will be stored. Under a budget every layer is foreseen to get the same share; under `energy`, the
    most that could be of use.
    """
    here, share = options_of(layer, config)
    rank = here.rank or most_useful_rank(layer, config)
    if share is not None:
        rank = min(rank, rank_within(layer, here, share * dense_bytes(layer)))
    return stored_as(layer, rank, here, config.residual)


def problems(layer: Layer, config: Config) -> list[str]:
    """Why a layer cannot be stored this way."""
    if found := _storage_problem(layer, config.residual):
        return [f"{layer.name} {found}"]
    here, share = options_of(layer, config)
    most, highest = most_useful_rank(layer, config), min(layer.rows, layer.cols)
    what = f"{layer.name} [{layer.rows}, {layer.cols}]"
    if most == 0:
        return [f"{what}: not even rank {here.multiple} makes it smaller; name it in layers.exclude"]
    if here.rank is not None and here.rank > highest:
        return [f"{what} has rank {highest} at most, got rank {here.rank}; the largest useful one is {most}"]
    if here.rank is not None and here.rank > most:
        return [
            f"{what}: rank {here.rank} would make it larger than the dense weight; the largest useful one is {most}"
        ]
    if share is not None and rank_within(layer, here, share * dense_bytes(layer)) == 0:
        least = bytes_of_factors(layer, here.multiple, here) / dense_bytes(layer)
        return [f"{what}: rank {here.multiple} takes {least:.3f} of its bytes, more than {share:g}; allow as much"]
    return []


def plan(layers: dict[str, Layer], config: Config, model: nn.Module) -> dict[str, Layer]:
    """The layers that will be stored as products, as they will be.

    Raises:
        PlanError: every layer that cannot be.
    """
    chosen = targets(layers, find_method("share.low_rank"), config)
    if found := [problem for layer in chosen for problem in problems(layer, config)]:
        raise PlanError(found)
    return {layer.name: layer.encoded(encoding(layer, config)) for layer in chosen}


def notes(layers: Mapping[str, Layer], config: Config, model: nn.Module) -> list[str]:
    """What the plan cannot know."""
    if config.share_of_all is not None:
        return ["ranks follow from the data: the plan shows every layer at the same share, the total will be the same"]
    return ["ranks follow from the data: the plan shows the most that they can be"] if config.energy else []


def encode(W: Float[Tensor, "rows cols"], layer: Layer, config: Config, keep: Tensor | None) -> Encoded:
    """Plain SVD of one weight."""
    stored = encoding(layer, config)
    U, _ = output_directions(W)
    return stored, encode_factors(W, *project(W, U[:, : stored.rank]), stored, W.dtype)


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Factorise block by block; embeddings first, so that every block sees what they will put out."""
    layers = find_layers(model)
    chosen = [layers[name] for name in plan(layers, config, model)]
    check_weights(model, chosen)
    tables = [layer for layer in chosen if layer.kind == "embedding"]
    linear = {layer.name: layer for layer in chosen if layer.kind != "embedding"}
    originals = _originals(linear, context) if config.residual else {}
    windows = context.tokens("calibration") if config.basis == "activations" else None
    solver = _Solver(model, linear, config, originals)
    solver.share_out(windows, context)
    rows = [row for table in tables for row in solver.table(table, windows)]
    if windows is None:
        for layer in context.progress.track(list(linear.values()), "factorising"):
            if (found := solver.solution(layer, None, None)) is not None:
                rows.append(put_layer(model, layer, found.encoded, metrics=found.metrics))
    else:
        follow = config.refit > 0 and not config.residual
        rows += walk(model, list(linear.values()), windows, solver.solve, context, reference=follow)
    done = {row.name for row in rows}
    left = [
        f"{layer.name} stays as it is: its useful ranks lose too much" for layer in chosen if layer.name not in done
    ]
    own = [f"{row.name}: {note}" for row in rows for note in row.notes]
    return StageReport(layers=rows, metrics={"left_dense": len(left)}, notes=left + own)


@dataclass
class _Solver:
    """What stays the same from layer to layer. `ranks`: those that a budget set, None for a layer that it leaves."""

    model: nn.Module
    layers: Mapping[str, Layer]
    config: Config
    originals: Mapping[str, Tensor]
    ranks: dict[str, int | None] = field(default_factory=dict)

    def share_out(self, windows: Tensor | None, context: Context) -> None:
        """Set the ranks of the layers under a budget, by the losses that they have in the model as it is."""
        under = [layer for layer in self.layers.values() if self.config.at(layer).share_of_all is not None]
        energies: dict[str, Tensor] = {}

        def measure(statistics: Mapping[str, Statistics], block: Block | None) -> dict[str, Solution]:
            for name, known in statistics.items():
                energies[name] = output_energies(self._target(name), self._metric(self.layers[name], known))
            return {}

        if not under:
            return
        if windows is None:
            energies = {layer.name: output_energies(self._target(layer.name)) for layer in under}
        else:
            walk(self.model, under, windows, measure, dataclasses.replace(context, blocks=None))
        self.ranks = budgeted_ranks(under, [energies[layer.name] for layer in under], self.config)

    def solve(self, statistics: Mapping[str, Statistics], block: Block | None) -> dict[str, Solution]:
        """Factorise the layers that there are statistics of."""
        seen = {name: known for name, known in statistics.items() if not self.layers[name].routed}
        follow = self.config.refit > 0 and not self.config.residual and block is not None
        drift = measure_drift(self.model, block, seen) if follow and block is not None and seen else {}
        found = {n: self.solution(self.layers[n], known, drift.get(n)) for n, known in statistics.items()}
        return {name: solution for name, solution in found.items() if solution is not None}

    def solution(self, layer: Layer, known: Statistics | None, drift: Tensor | None) -> Solution | None:
        """One layer's factors; None where it stays as it is."""
        here, _ = options_of(layer, self.config)
        H = None if known is None else self._metric(layer, known)
        W = self._target(layer.name)
        M = W if H is None or drift is None else follow_drift(W, drift, H, self.config.refit)
        U, energies = output_directions(M, H)
        rank = self.ranks.get(layer.name, encoding(layer, self.config).rank)
        if here.energy is not None:
            rank = rank_of_energy(energies, here.energy, here.multiple)
        if rank is None or rank > most_useful_rank(layer, self.config):
            return None
        stored = stored_as(layer, rank, here, self.config.residual)
        module = self._module(layer.name)
        base = module.tensors() if self.config.residual and isinstance(module, EncodedModule) else None
        tensors = encode_factors(M, *project(M, U[:, :rank]), stored, layer.dtype, H, base)
        metrics = {"rank": float(rank), "dropped_energy": dropped_energy(energies, rank)}
        few = (f"plain SVD: only {known.tokens} tokens were routed to it",) if known and H is None else ()
        return Solution((stored, tensors), metrics, few)

    def table(self, layer: Layer, windows: Tensor | None) -> list[LayerReport]:
        """Factorise an embedding; no report where it stays as it is."""
        here, _ = options_of(layer, self.config)
        W = get_weight(self._module(layer.name))
        frequency = torch.ones(layer.rows, device=W.device)
        H: Tensor = torch.eye(layer.cols, device=W.device)
        if windows is not None:
            frequency += torch.bincount(windows.flatten().to(W.device), minlength=layer.rows)
            joint = head_hessian(self.model, layer, windows)
            H = H if joint is None else joint_hessian(joint)
        into, out, energies = table_directions(W, frequency, H)
        rank = encoding(layer, self.config).rank
        if here.energy is not None:
            rank = rank_of_energy(energies, here.energy, here.multiple)
        if rank > most_useful_rank(layer, self.config):
            return []
        stored = stored_as(layer, rank, here)
        tensors = encode_factors(W, *project_table(W, into[:, :rank], out[:rank]), stored, layer.dtype, H)
        metrics = {"rank": float(rank), "dropped_energy": dropped_energy(energies, rank)}
        return [put_layer(self.model, layer, (stored, tensors), metrics=metrics)]

    def _metric(self, layer: Layer, known: Statistics) -> Tensor | None:
        few = layer.routed and known.tokens < self.config.min_tokens
        return None if few else damp(known.hessian, self.config.damping)

    def _target(self, name: str) -> Tensor:
        """The matrix to factorise: the weight, or what a quantized one lacks."""
        W = get_weight(self._module(name))
        return self.originals[name].to(W.device).double() - W.double() if name in self.originals else W

    def _module(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)


def budgeted_ranks(layers: list[Layer], energies: list[Tensor], config: Config) -> dict[str, int | None]:
    """The rank of every layer under the budget, for the least sum of squared losses; None for one that stays dense."""
    losses, costs, ranks = [], [], []
    share = 0.0
    for layer, energy in zip(layers, energies, strict=True):
        here, share_of_layer = options_of(layer, config)
        share = share_of_layer or share
        useful = range(here.multiple, most_useful_rank(layer, config) + 1, here.multiple)
        loss = [share_lost**2 for share_lost in losses_of_ranks(energy, useful)]
        cost = [bytes_of_factors(layer, rank, here) for rank in useful]
        if not config.residual:
            loss, cost = [*loss, 0.0], [*cost, dense_bytes(layer)]
        losses.append(loss)
        costs.append(cost)
        ranks.append([*useful, None])
    chosen = cheapest_choices(losses, costs, share * sum(map(dense_bytes, layers)))
    return {layer.name: own[choice] for layer, own, choice in zip(layers, ranks, chosen, strict=True)}


def _originals(layers: Mapping[str, Layer], context: Context) -> dict[str, Tensor]:
    """The uncompressed weights.

    Raises:
        ModelError: the original has other layers than the model.
    """
    with unfused(context.original):
        known = find_layers(context.original)
        wrong = [n for n, x in layers.items() if n not in known or (known[n].rows, known[n].cols) != (x.rows, x.cols)]
        if wrong:
            raise ModelError(
                [
                    f"{name}: the original has no such layer of the same shape; put residual before that"
                    for name in wrong
                ]
            )
        return {name: get_weight(context.original.get_submodule(name)).clone() for name in layers}


def _storage_problem(layer: Layer, residual: bool) -> str | None:
    stored = layer.encoding
    if not residual and stored is not None:
        undone = "its zeros would be filled" if isinstance(stored, Sparse) else "factorising that would add error"
        return f"is already stored as {stored.describe()}: {undone}; residual: true adds to it what it lacks"
    if residual and stored is None:
        return "is dense and lacks nothing: put share.low_rank after what quantizes or prunes it, or leave residual out"
    if residual and (not isinstance(stored, Affine | Codebook | Sparse) or getattr(stored, "activations", None)):
        return f"is stored as {stored.describe()}, which no residual can be added to"  # pyright: ignore
    return None
