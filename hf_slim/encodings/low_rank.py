"""Low-rank encoding: a weight is the product of two thin factors, alone or added to a weight that is stored otherwise.

W = A B + base,  A [rows, rank], B [rank, cols].  Stored bits a weight: 16 * rank * (rows + cols) / (rows * cols) for
bf16 factors, less than dense below rank rows * cols / (rows + cols). Each factor may itself be encoded (`left`,
`right`); so may the base, which a low-rank residual corrects.

Dense factors are parameters in the model's dtype: gradients reach them and not W, so whatever trainer fine-tunes such
a layer keeps its rank. Products never form W where two thin ones are cheaper: x Wᵀ = (x Bᵀ) Aᵀ + x baseᵀ.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Discriminator, Field, PlainSerializer, Tag
from torch import Tensor
from torch.nn import functional as F

from hf_slim.encodings.affine import Affine
from hf_slim.encodings.base import Encoding, TensorSpec
from hf_slim.encodings.codebook import Codebook
from hf_slim.encodings.hashed import Hashed
from hf_slim.encodings.sparse import Sparse


def _kind(description: Any) -> str | None:
    return description.get("kind") if isinstance(description, dict) else getattr(description, "kind", None)


def _written(encoding: Encoding) -> dict[str, Any]:
    """A description that names its kind, which its class takes for granted."""
    return encoding.model_dump(mode="json", exclude_defaults=True) | {"kind": encoding.kind}


_Plain = Annotated[
    Annotated[Affine, Tag("affine")]
    | Annotated[Codebook, Tag("codebook")]
    | Annotated[Hashed, Tag("hashed")]
    | Annotated[Sparse, Tag("sparse")],
    Discriminator(_kind),
    PlainSerializer(_written),
]


class LowRank(Encoding):
    """Description of a low-rank encoding.

    Args:
        rank: columns of A and rows of B.
        left, right: how A and B are stored; None for dense, in the model's dtype.
        base: how the weight that the product is added to is stored; None for no such weight.

    Tensors of an encoded part carry its name before their own: `left_codes`, `base_scales`.
    """

    kind: Literal["low_rank"] = "low_rank"
    rank: int = Field(ge=1)
    left: _Plain | None = None
    right: _Plain | None = None
    base: _Plain | None = None

    @property
    def trainable(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        names: list[str] = []
        for part, encoding in self._encodings().items():
            if encoding is not None:
                names += [f"{part}_{name}" for name in encoding.trainable]
            elif part != "base":
                names.append(part)
        return tuple(names)

    def layout(self, rows: int, cols: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        specs: dict[str, TensorSpec] = {}
        for part, encoding in self._encodings().items():
            shape = self._shape(part, rows, cols)
            if encoding is not None:
                specs |= {f"{part}_{name}": spec for name, spec in encoding.layout(*shape, dtype).items()}
            elif part != "base":
                specs[part] = TensorSpec(shape, dtype)
        return specs

    def pack(
        self,
        left: Tensor | dict[str, Tensor],
        right: Tensor | dict[str, Tensor],
        base: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Stored tensors of the two factors, and of the base: a matrix, or what an encoding's `pack` made of it."""
        tensors: dict[str, Tensor] = {}
        for part, stored in {"left": left, "right": right, "base": base or {}}.items():
            if isinstance(stored, Tensor):
                tensors[part] = stored.contiguous()
            else:
                tensors |= {f"{part}_{name}": tensor for name, tensor in stored.items()}
        return tensors

    def decode(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Float[Tensor, "rows cols"]:
        W = self.factor("left", tensors, rows, cols).float() @ self.factor("right", tensors, rows, cols).float()
        return W if self.base is None else W + self.factor("base", tensors, rows, cols)

    def take(self, tensors: dict[str, Tensor], ids: Int[Tensor, "n"], rows: int, cols: int) -> Float[Tensor, "n cols"]:
        right = self.factor("right", tensors, rows, cols).float()
        left = tensors["left"][ids] if self.left is None else self.left.take(_of("left", tensors), ids, rows, self.rank)
        W = left.float() @ right
        return W if self.base is None else W + self.base.take(_of("base", tensors), ids, rows, cols)

    def multiplies(self, tokens: int, rows: int, cols: int) -> bool:
        """Two thin products instead of A B and a thick one; a base is decoded either way."""
        thin, thick = self.rank * (rows + cols), rows * cols
        return tokens * thin <= tokens * thick + self.rank * thick

    def multiply(
        self, x: Float[Tensor, "*tokens cols"], tensors: dict[str, Tensor], rows: int, cols: int, bias: Tensor | None
    ) -> Float[Tensor, "*tokens rows"]:
        hidden = F.linear(x, self.factor("right", tensors, rows, cols).to(x.dtype))
        y = F.linear(hidden, self.factor("left", tensors, rows, cols).to(x.dtype), bias)
        return y if self.base is None else y + F.linear(x, self.factor("base", tensors, rows, cols).to(x.dtype))

    def factor(self, part: str, tensors: dict[str, Tensor], rows: int, cols: int) -> Tensor:
        """A, B or the base of a weight [rows, cols], decoded."""
        encoding = self._encodings()[part]
        if encoding is None:
            return tensors[part]
        return encoding.decode(_of(part, tensors), *self._shape(part, rows, cols))

    def describe(self) -> str:
        stored = list(dict.fromkeys(part.describe() for part in (self.left, self.right) if part is not None))
        product = f"rank {self.rank}" + (f" in {' / '.join(stored)}" if stored else "")
        return product if self.base is None else f"{self.base.describe()} + {product}"

    def _encodings(self) -> dict[str, Encoding | None]:
        return {"left": self.left, "right": self.right, "base": self.base}

    def _shape(self, part: str, rows: int, cols: int) -> tuple[int, int]:
        return {"left": (rows, self.rank), "right": (self.rank, cols), "base": (rows, cols)}[part]


def _of(part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stored tensors of one part, under its encoding's own names."""
    prefix = f"{part}_"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
