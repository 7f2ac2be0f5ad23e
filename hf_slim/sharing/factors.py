"""The two factors of a low-rank weight: how large they are, and how they are stored."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from hf_slim.core.method import MethodConfig
from hf_slim.core.select import Layer
from hf_slim.encodings import Affine, Codebook, Encoding, LowRank
from hf_slim.quantization import rtn
from hf_slim.sharing import kmeans
from hf_slim.sharing.directions import refit_left
from hf_slim.sharing.ranks import largest_rank

SIZES = ("rank", "ratio", "energy")


class Factors(MethodConfig):
    """How the factors are stored, where not dense: then they cannot be trained, but for the tables of a codebook."""

    grid: Literal["affine", "codebook"] = Field("affine", description="an even grid, or a table of centroids a factor")
    bits: int = Field(8, ge=2, le=8, description="bits a code takes")
    group_size: int | None = Field(None, ge=1, description="columns that share a scale; null for one scale a row")

    def encoding(self) -> Affine | Codebook:
        if self.grid == "codebook":
            return Codebook(bits=self.bits, clusters=2**self.bits)
        return Affine(bits=self.bits, group_size=self.group_size)


class Sized(MethodConfig):
    """How large the factors are: at most one of `rank`, `ratio` and `energy`."""

    one_of: ClassVar[tuple[str, ...]] = SIZES

    rank: int | None = Field(None, ge=1, description="directions that are kept")
    ratio: float | None = Field(None, gt=0, lt=1, description="share of the dense weight's bytes that factors take")
    energy: float | None = Field(None, gt=0, le=1, description="share of the output's energy that is kept")
    multiple: int = Field(1, ge=1, description="ranks are multiples of it")
    factors: Factors | None = Field(None, description="store the factors as codes; null for dense ones, which train")

    @model_validator(mode="after")
    def _one_size(self) -> Sized:
        given = [name for name in self.one_of if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} each set the rank: keep one of them")
        if self.rank is not None and self.rank % self.multiple:
            raise ValueError(f"rank: {self.rank} is not a multiple of {self.multiple}; change rank or multiple")
        return self


def stored_as(layer: Layer, rank: int, here: Sized, residual: bool = False) -> LowRank:
    """The encoding of a layer with a rank."""
    part = None if here.factors is None else here.factors.encoding()
    base: Any = layer.encoding if residual else None
    return LowRank(rank=rank, left=part, right=part, base=base)


def bytes_of_factors(layer: Layer, rank: int, here: Sized) -> int:
    """Bytes that the factors of a rank take."""
    return stored_as(layer, rank, here).nbytes(layer.rows, layer.cols, layer.dtype)


def dense_bytes(layer: Layer) -> int:
    """Bytes of a layer's weight, were it dense."""
    return layer.rows * layer.cols * layer.dtype.itemsize


def rank_within(layer: Layer, here: Sized, room: float) -> int:
    """The largest rank whose factors take no more bytes than there is room for; 0 if there is none."""
    return largest_rank(
        lambda rank: bytes_of_factors(layer, rank, here), min(layer.rows, layer.cols), room, here.multiple
    )


def encode_factors(
    W: Float[Tensor, "rows cols"],
    A: Float[Tensor, "rows rank"],
    B: Float[Tensor, "rank cols"],
    stored: LowRank,
    dtype: torch.dtype,
    H: Float[Tensor, "cols cols"] | None = None,
    base: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Stored tensors of A B; where B is rounded to a grid, A is refitted to W first."""
    if stored.left is None or stored.right is None:
        return stored.pack(A.to(dtype), B.to(dtype), base)
    right = _round(B, stored.right)
    A = refit_left(W, stored.right.decode(right, *B.shape), H)
    return stored.pack(_round(A, stored.left), right, base)


def _round(X: Tensor, stored: Encoding) -> dict[str, Tensor]:
    if isinstance(stored, Codebook):
        return stored.pack(*kmeans.quantize(X.float(), stored.bits, "tensor"))
    assert isinstance(stored, Affine)
    return stored.pack(*rtn.quantize(X, stored.bits, stored.group_size))
