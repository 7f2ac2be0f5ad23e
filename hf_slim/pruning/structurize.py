"""Structurize: units that other pruning has set to zero become smaller shapes; what the model computes stays.

    y = W_reader x + b,    x_c = const for all tokens  ->  W_reader without column c,  b + W_reader[:, c] const

A unit (`core/units.py`), a neuron or a head, goes when the columns of the layer that reads it are all zero, or when it
puts out the same for every token. The second is so where rows that feed it are zero: the up row of a gated neuron, the
value rows of a head, the row of a plain neuron, whose output then is act(bias). Only units with such a row are asked,
and what they put out is measured: a neuron that merely did not fire on these tokens stays. A constant other than zero
goes into the reader's bias; where the reader has none, the unit stays.

The proof is measured: |logits after - logits before| / |logits before| in float32, on the calibration windows if there
are any, else on random tokens; above 1e-5 the stage fails (the precision of the stored biases, where constants went
into rounded ones) and leaves the model as it was.

What cannot go: rows that write to the residual stream, which all blocks share. An expert that is all zero becomes one
neuron wide, but stays, and the report says so: without it a router that may choose it would have to choose another one,
and weight the others anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.errors import ModelError, PlanError
from hf_slim.core.experts import Experts
from hf_slim.core.forward import evaluating, logits_of
from hf_slim.core.method import MethodConfig, Rules
from hf_slim.core.precision import in_dtype
from hf_slim.core.probe import numbers
from hf_slim.core.removal import Removal, carry_out
from hf_slim.core.report import LayerReport, StageReport
from hf_slim.core.reshape import undone_on_error
from hf_slim.core.select import Layer
from hf_slim.core.statistics import watching
from hf_slim.core.swap import get_weight
from hf_slim.core.units import Units, find_units
from hf_slim.encodings import Sparse

RULES = Rules(preserves=("zeros",))

_TOKENS = 2048  # that the proof looks at
_STILL = 1e-5  # how far a unit's output may move and be taken for constant, beside its size
_SAME = 1e-5


class Config(MethodConfig):
    """Options of `prune.structurize`."""

    kinds: tuple[Literal["neuron", "head"], ...] = Field(
        ("neuron", "head"), min_length=1, description="which units may go"
    )
    multiple_of: int = Field(1, ge=1, description="keep so many neurons: a multiple of 8 or 64 multiplies faster")


@dataclass
class Range:
    """What a layer was handed, column by column."""

    low: Float[Tensor, " cols"]
    high: Float[Tensor, " cols"]

    def constant(self) -> Float[Tensor, " cols"]:
        """The value of columns that never changed, NaN for others."""
        still = self.high - self.low <= _STILL * self.high.abs()
        return torch.where(still, (self.low + self.high) / 2, torch.nan)


def needless(
    zero_columns: Bool[Tensor, "units size"],
    zero_rows: Bool[Tensor, "units rows"],
    constant: Float[Tensor, "units size"],
    bias: bool,
) -> tuple[Bool[Tensor, " units"], Bool[Tensor, " units"]]:
    """Units that can go, and among them those whose constant goes into the reader's bias.

    Args:
        zero_columns: columns of the reader that are zero.
        zero_rows: rows that feed the unit and are zero, biases aside.
        constant: what the reader is handed, NaN where that changes from token to token.
        bias: the reader has one.
    """
    unread = zero_columns.all(1)
    still = zero_rows.any(1) & ~constant.isnan().any(1)
    silent = still & (constant == 0).all(1)
    folded = still & ~silent & ~unread if bias else torch.zeros_like(still)
    return unread | silent | folded, folded


def rounded_up(gone: Bool[Tensor, " units"], multiple_of: int) -> Bool[Tensor, " units"]:
    """Which units stay: at least one, and as many as the multiple asks for; the first of those that could go stay."""
    needed = max(1, int((~gone).sum()))
    needed = min(len(gone), -(-needed // multiple_of) * multiple_of)
    keep = ~gone
    spare = gone.nonzero().flatten()[: needed - int(keep.sum())]
    keep[spare] = True
    return keep


def plan(layers: dict[str, Layer], config: Config, model: PreTrainedModel) -> dict[str, Layer]:
    """Which units are zero is known only once there are weights.

    Raises:
        PlanError: layers that are stored as codes.
    """
    coded = [x for x in layers.values() if x.block and x.encoding is not None and not isinstance(x.encoding, Sparse)]
    if coded:
        raise PlanError(
            f"{coded[0].name} and {len(coded) - 1} more layers are stored as integer codes, whose rows and columns "
            "cannot be taken out; structurize before quantizing"
        )
    return {}


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Remove what is zero, and prove that the model computes what it did.

    Raises:
        ModelError: it does not; the model is as it was.
    """
    found = find_units(model, config.kinds)
    ids = _windows(model, context)
    with _exact(model):
        before, ranges = _watched(model, [units.reader for units in found], ids)
    with undone_on_error(model):
        report, tolerance = _remove(model, found, ranges, config, context)
        with _exact(model):
            difference = float((_run(model, ids) - before).norm() / before.norm())
        if not difference <= tolerance:
            raise ModelError(
                f"without its zero units the model computes something else (relative difference {difference:.2g}, at "
                f"most {tolerance:.0e} is rounding), so none was removed; give more calibration text, on which units "
                "show whether they are constant, or leave prune.structurize out"
            )
    return report.model_copy(update={"metrics": {**report.metrics, "difference": difference}})


def _remove(
    model: PreTrainedModel, found: Sequence[Units], ranges: Mapping[str, Range], config: Config, context: Context
) -> tuple[StageReport, float]:
    """Make layers smaller; what was done, and how far the model may be from what it was."""
    rows: list[LayerReport] = []
    notes: list[str] = []
    removed = {f"removed_{kind}s": 0 for kind in ("neuron", "head") if kind in config.kinds}
    tolerance = _SAME
    for units in context.progress.track(found, "removing zero units"):
        removal, stuck = _removal(model, units, ranges.get(units.reader), config)
        if stuck:
            notes.append(f"{units.reader} has no bias: {stuck} {units.kind}s that put out a constant stay")
        if removal is not None:
            rows += carry_out(model, removal)
            removed[f"removed_{units.kind}s"] += int((~removal.keep).sum())
            if removal.bias is not None:
                tolerance = max(tolerance, torch.finfo(removal.bias.dtype).eps)
    notes += _silent_experts(model)
    if not rows:
        notes.append("no unit is all zero: nothing was removed")
    return StageReport(layers=rows, metrics=removed, notes=notes), tolerance


def _silent_experts(model: nn.Module) -> list[str]:
    """One sentence for every router that has experts to choose whose weights are all zero."""
    notes = []
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            count = module.layout.experts
            silent = [n for n in range(count) if _is_zero(module.expert(n), module.layout.matrices)]
            if silent:
                notes.append(
                    f"{name}: {len(silent)} of {count} experts are all zero ({', '.join(map(str, silent))}); they are "
                    "as narrow as can be and stay, as without them the router would choose others"
                )
    return notes


def _is_zero(expert: nn.Module, matrices: Sequence[str]) -> bool:
    """Whether one of its matrices is zero throughout, so that it puts out nothing, or the same for all tokens."""
    return any(not get_weight(expert.get_submodule(name)).any() for name in matrices)


def _removal(model: nn.Module, units: Units, seen: Range | None, config: Config) -> tuple[Removal | None, int]:
    """What goes of these units, and how many constant ones have to stay."""
    reader: Any = model.get_submodule(units.reader)
    W = get_weight(reader)
    columns = units.columns.to(W.device)
    zero_columns = (W == 0).all(0)[columns]
    zero_rows = torch.cat([_zero_rows(model, name)[rows.to(W.device)] for name, rows in units.writers.items()], dim=1)
    constant = torch.full(columns.shape, torch.nan, device=W.device)
    if seen is not None:
        constant = seen.constant()[columns]
    bias = getattr(reader, "bias", None)
    gone, folded = needless(zero_columns, zero_rows, constant, bias is not None)
    stuck = int(needless(zero_columns, zero_rows, constant, True)[0].sum() - gone.sum())
    keep = rounded_up(gone, config.multiple_of if units.kind == "neuron" else 1)
    if keep.all():
        return None, stuck
    folded &= ~keep
    new = None
    if folded.any() and bias is not None:
        c = columns[folded].flatten()
        new = (bias.detach().float() + W[:, c].float() @ constant[folded].flatten()).to(bias.dtype)
    return Removal(units, keep.cpu(), bias=new), stuck


def _zero_rows(model: nn.Module, name: str) -> Bool[Tensor, " rows"]:
    return (get_weight(model.get_submodule(name)) == 0).all(1)


def _windows(model: PreTrainedModel, context: Context) -> Int[Tensor, "windows length"]:
    """Calibration windows if there are any, else random tokens."""
    try:
        windows = context.tokens("calibration")
    except (PlanError, LookupError):  # none given, or a recipe whose stages need none
        table: Any = model.get_input_embeddings()
        length = min(64, getattr(model.config, "max_position_embeddings", None) or 64)
        draw = torch.Generator().manual_seed(context.seed)
        return torch.randint(table.weight.shape[0], (4, length), generator=draw)
    return windows[: max(1, _TOKENS // windows.shape[1])]


@contextmanager
def _exact(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, in float32."""
    with in_dtype(model, torch.float32), evaluating(model):
        yield


def _run(model: PreTrainedModel, ids: Int[Tensor, "windows length"]) -> Float[Tensor, "windows *shape classes"]:
    """The model's logits; every expert is run too, as the router may choose it for other tokens."""
    out = torch.cat([logits_of(model, window[None]).float() for window in ids])
    for module in model.modules():
        if isinstance(module, Experts):
            for number in range(module.layout.experts):
                expert = module.expert(number)
                weight = get_weight(getattr(expert, module.layout.up))
                module._run(expert, numbers(32, weight.shape[1]).to(weight))
    return out


def _watched(model: PreTrainedModel, names: Sequence[str], ids: Tensor) -> tuple[Tensor, dict[str, Range]]:
    """The model's logits, and what these layers were handed for them."""
    ranges: dict[str, Range] = {}

    def note(name: str, x: Tensor) -> None:
        flat = x.detach().float().flatten(0, -2)
        if len(flat) == 0:
            return
        low, high = flat.amin(0), flat.amax(0)
        seen = ranges.get(name)
        ranges[name] = Range(low, high) if seen is None else Range(low.minimum(seen.low), high.maximum(seen.high))

    with watching(model, names, note):
        return _run(model, ids), ranges
