"""How pruned weights lie, and how what remains is stored.

    unstructured   anywhere
    n:m            n survivors in every m consecutive columns of a row
    block:b        whole runs of b consecutive columns of a row

A pattern is stored with its survivors (`encodings/sparse.py`) where the mask follows it exactly, because its places
then take less room; where an earlier pruning left fewer survivors in some group, the places are a plain bit mask.
"""

from __future__ import annotations

from typing import Annotated

from jaxtyping import Bool, Float
from pydantic import AfterValidator
from torch import Tensor

from hf_slim.core.errors import SlimError
from hf_slim.core.select import Layer
from hf_slim.encodings import Sparse
from hf_slim.encodings.places import block_of, follows, parse_pattern, storable

__all__ = ["Pattern", "block_of", "column_problems", "pack", "parse_pattern", "stored", "survivors"]


def _checked(pattern: str) -> str:
    try:
        parse_pattern(pattern)
    except SlimError as error:
        raise ValueError(str(error)) from None
    return pattern


Pattern = Annotated[str, AfterValidator(_checked)]
"""Field type of a pattern."""


def survivors(rows: int, cols: int, pattern: str, sparsity: float) -> int:
    """How many of rows x cols weights remain; an n:m pattern sets the sparsity itself."""
    n_m = parse_pattern(pattern)
    if n_m is not None:
        return rows * (cols // n_m[1]) * n_m[0]
    block = block_of(pattern)
    blocks = rows * (cols // block)
    return (blocks - round(sparsity * blocks)) * block


def stored(layer: Layer, pattern: str, sparsity: float) -> Sparse:
    """How a layer will be stored once it is pruned; what an earlier pruning dropped does not come back."""
    left = survivors(layer.rows, layer.cols, pattern, sparsity)
    if layer.survivors is None:
        return Sparse(survivors=left, pattern=storable(pattern))
    earlier = getattr(layer.encoding, "pattern", None)
    return Sparse(
        survivors=min(left, layer.survivors), pattern=storable(pattern) if _refines(pattern, earlier) else None
    )


def pack(
    W: Float[Tensor, "rows cols"], keep: Bool[Tensor, "rows cols"], pattern: str = "unstructured"
) -> tuple[Sparse, dict[str, Tensor]]:
    """The weights that `keep` marks, as they are stored: by the pattern, where the mask follows it exactly."""
    by = storable(pattern)
    encoding = Sparse(survivors=int(keep.sum()), pattern=by if by and follows(keep, by) else None)
    return encoding, encoding.pack(W, keep)


def _refines(pattern: str, earlier: str | None) -> bool:
    """Whether a weight that follows `earlier` can be pruned further so that it follows `pattern` exactly."""
    before = None if earlier is None else parse_pattern(earlier)
    after = parse_pattern(pattern)
    if before is None or after is None:
        return pattern == earlier
    return after[1] == before[1] and after[0] <= before[0]


def column_problems(name: str, cols: int, pattern: str) -> list[str]:
    """Why a layer of `cols` columns cannot take the pattern."""
    n_m = parse_pattern(pattern)
    size = block_of(pattern) if n_m is None else n_m[1]
    if cols % size == 0:
        return []
    return [f"{name} has {cols} columns, no multiple of {size}, so {pattern} does not fit; name it in layers.exclude"]
