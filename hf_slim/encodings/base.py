"""An encoding: how the weight of a layer is stored.

A closed, frozen description (it goes into `config.json`, one a layer) and pure functions of tensors. What it says about
names, shapes and dtypes (`layout`) is the layout on disk, the state dict of `EncodedLinear`, and the count of bytes:
one statement, so they cannot drift apart. No tensor is ever called `weight`: an installation without hf_slim then
reports missing weights instead of computing garbage from integer codes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional as F

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class TensorSpec(NamedTuple):
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


class Encoding(BaseModel, ABC):
    """How a weight [rows, cols] is stored. Subclasses are frozen descriptions; tensors are passed in and out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    lossless: ClassVar[bool] = False
    trainable: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def layout(self, rows: int, cols: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        """Every stored tensor of a weight [rows, cols] whose dense form has `dtype`."""

    @abstractmethod
    def decode(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Float[Tensor, "rows cols"]:
        """The weight that the stored tensors stand for."""

    def take(self, tensors: dict[str, Tensor], ids: Int[Tensor, "n"], rows: int, cols: int) -> Tensor:
        """Rows `ids` of the weight, [n, cols]. Encodings whose rows are stored apart read just these."""
        return self.decode(tensors, rows, cols)[ids]

    def runs(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Iterator[tuple[slice, Tensor]]:
        """The weight in runs of rows, each with its place: all at once where rows are not stored apart."""
        yield slice(0, rows), self.decode(tensors, rows, cols)

    def multiplies(self, tokens: int, rows: int, cols: int) -> bool:
        """Whether `multiply` is cheaper for so many tokens than to decode the weight."""
        return False

    def multiply(
        self, x: Float[Tensor, "*tokens cols"], tensors: dict[str, Tensor], rows: int, cols: int, bias: Tensor | None
    ) -> Float[Tensor, "*tokens rows"]:
        """x Wᵀ + b in the dtype of x, from the stored tensors."""
        return F.linear(x, self.decode(tensors, rows, cols).to(x.dtype), bias)

    def nbytes(self, rows: int, cols: int, dtype: torch.dtype) -> int:
        """Bytes stored for a weight [rows, cols], everything counted."""
        return sum(spec.nbytes for spec in self.layout(rows, cols, dtype).values())

    @abstractmethod
    def describe(self) -> str:
        """Short words for tables, such as "4-bit g64"."""
