"""Units that leave a model, and what the layer that reads them becomes: what solvers of structured pruning hand back.

A removal can be kept on disk as plain tensors, so that a resumed walk repeats it without solving anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hf_slim.core.layers import relative_error
from hf_slim.core.report import LayerReport
from hf_slim.core.reshape import remove_units
from hf_slim.core.swap import get_weight
from hf_slim.core.units import Units
from hf_slim.encodings.modules import EncodedModule

_PREFIX = "removed:"  # begins the keys of what is kept; no module's name holds a colon


@dataclass(frozen=True)
class Removal:
    """Which units stay, and how the layer that reads them makes up for the rest.

    Args:
        units: all of them.
        keep: True where a unit stays.
        weight: the reader's, for the columns that stay; None leaves them as they are. Only for a dense reader.
        bias: the reader's new bias; None leaves it.
        metrics, notes: for the report.
    """

    units: Units
    keep: Bool[Tensor, " units"]
    weight: Float[Tensor, "rows kept"] | None = None
    bias: Float[Tensor, " rows"] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@torch.no_grad()
def carry_out(model: nn.Module, removal: Removal, dtype: torch.dtype | None = None) -> list[LayerReport]:
    """Make the layers smaller, in place.

    Args:
        dtype: that weights are stored in, where the model is in another for the moment; bytes are counted in it.

    Returns:
        A row for every layer that changed, with its new shape. Its error counts what was removed as zero.
    """
    names = [*removal.units.writers, removal.units.reader]
    before = {name: (get_weight(m).clone(), _nbytes(m, dtype)) for name in names for m in [model.get_submodule(name)]}
    remove_units(model, removal.units, removal.keep)
    reader: Any = model.get_submodule(removal.units.reader)
    if removal.weight is not None:
        get_weight(reader).copy_(removal.weight)
    if removal.bias is not None:
        reader.bias = nn.Parameter(removal.bias.to(reader.bias), requires_grad=reader.bias.requires_grad)
    return [_report(name, model.get_submodule(name), *before[name], removal, dtype) for name in names]


def to_tensors(removals: Sequence[Removal]) -> dict[str, Tensor]:
    """What must be kept of removals to repeat them."""
    kept: dict[str, Tensor] = {}
    for removal in removals:
        for what in ("keep", "weight", "bias"):
            if (value := getattr(removal, what)) is not None:
                kept[f"{_PREFIX}{what}:{removal.units.reader}"] = value.contiguous()
    return kept


def from_tensors(kept: Mapping[str, Tensor], units: Mapping[str, Units]) -> list[Removal]:
    """Removals of these tensors; other keys are ignored.

    Args:
        units: by the name of the layer that reads them, as they were found in the model before the walk.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in kept.items():
        if key.startswith(_PREFIX):
            what, reader = key.removeprefix(_PREFIX).split(":")
            found.setdefault(reader, {})[what] = value
    return [Removal(units[reader], **values) for reader, values in found.items()]  # pyright: ignore


def _report(
    name: str, module: nn.Module, W: Tensor, nbytes: int, removal: Removal, dtype: torch.dtype | None
) -> LayerReport:
    left, reader = get_weight(module), name == removal.units.reader
    stays = torch.ones_like(W, dtype=torch.bool)
    if reader:
        stays[:, removal.units.columns[~removal.keep].flatten()] = False
    else:
        stays[removal.units.writers[name][~removal.keep].flatten()] = False
    return LayerReport(
        name=name,
        rows=left.shape[0],
        cols=left.shape[1],
        encoding=module.encoding.describe() if isinstance(module, EncodedModule) else "dense",
        bytes_before=nbytes,
        bytes=_nbytes(module, dtype),
        error=relative_error(W, torch.zeros_like(W).masked_scatter_(stays, left.to(W.dtype))),
        metrics=removal.metrics if reader else {},
        notes=list(removal.notes) if reader else [],
    )


def _nbytes(module: nn.Module, dtype: torch.dtype | None) -> int:
    if isinstance(module, EncodedModule):
        return module.encoding.nbytes(module.rows, module.cols, dtype or module.compute_dtype)
    W = get_weight(module)
    return W.numel() * (dtype or W.dtype).itemsize
