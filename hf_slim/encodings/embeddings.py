"""Input embeddings beyond the plain one: tables whose rows are scaled, and tables that share an encoded one.

Gemma and BART multiply the rows they look up by a constant; a head tied to such a table multiplies by the table as it
is. T5 has one table and an encoder and a decoder that share it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_slim.encodings.base import Encoding
from hf_slim.encodings.modules import EncodedEmbedding


class EncodedScaledEmbedding(EncodedEmbedding):
    """Rows of an encoded table, times a constant.

    Args:
        stock: the dense class that it stands in for, and must become again when made dense.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        encoding: Encoding,
        padding_idx: int | None,
        scale: float,
        stock: type[nn.Embedding],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        super().__init__(num_embeddings, embedding_dim, encoding, padding_idx, dtype, device)
        self.scale, self.stock = scale, stock

    def forward(self, ids: Tensor) -> Tensor:
        return scaled(super().forward(ids), self.scale)


class TiedEmbedding(nn.Embedding):
    """An embedding whose table is that of an encoded one; it stores nothing."""

    _is_hf_initialized = True

    def __init__(self, embedding: EncodedEmbedding, scale: float, stock: type[nn.Embedding]):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx
        self._source = (embedding,)  # in a tuple, so that it is no submodule: the tensors are stored once
        self.scale, self.stock = scale, stock

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._source[0].weight

    def forward(self, ids: Tensor) -> Tensor:
        return scaled(EncodedEmbedding.forward(self._source[0], ids), self.scale)

    def reset_parameters(self) -> None:
        """Nothing to draw at random: the weight arrives encoded."""

    def extra_repr(self) -> str:
        return f"tied to an encoded {self.num_embeddings} x {self.embedding_dim} embedding"


def scaled(rows: Tensor, scale: float) -> Tensor:
    """Rows times a constant that is first rounded to their dtype, as Gemma does it."""
    return rows if scale == 1.0 else rows * torch.tensor(scale, dtype=rows.dtype, device=rows.device)


def dense_embedding(weight: Tensor, padding_idx: int | None, scale: float, stock: type[nn.Embedding]) -> nn.Embedding:
    """A dense embedding of class `stock` that holds `weight`."""
    rows, cols = weight.shape
    if stock is nn.Embedding:
        made = stock(rows, cols, padding_idx, device="meta")
    else:
        with torch.device("meta"):
            made = stock(rows, cols, padding_idx, embed_scale=scale)  # pyright: ignore[reportCallIssue]
    for name, buffer in made.named_buffers():
        setattr(made, name, torch.full_like(buffer, scale, device=weight.device))
    made.weight = nn.Parameter(weight)
    return made
