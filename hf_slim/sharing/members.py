"""Weights that share values while they train as if they were free.

A codebook [books, clusters] says which weights are members of which centroid. Around an optimizer's step

    g_i <- mean of g over the members of i's centroid          so that momentum and Adam's moments agree
    c   <- c + mean of the members' steps                      in float32, for small steps to add up
    w_i <- c as it is stored                                   members are equal again

A centroid that is exactly zero stays zero, and so do weights that are: they are pruned.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hf_slim.core.layers import Encoded
from hf_slim.encodings import Codebook, Encoding


class Members:
    """Who shares a value with whom in one weight [rows, cols].

    Args:
        encoding: a codebook.
        tensors: its stored tensors; the centroids are the first values.
    """

    def __init__(self, encoding: Encoding, tensors: dict[str, Tensor], rows: int, cols: int):
        assert isinstance(encoding, Codebook)
        self.encoding, self.tensors, self.shape = encoding, dict(tensors), (rows, cols)
        self.centroids = tensors["centroids"].float()
        self._moves = self.centroids != 0
        self._count = self.total(torch.ones(rows, cols, device=self.centroids.device)).clamp_(min=1)
        self._zero: Tensor | None = None

    def total(self, values: Float[Tensor, "rows cols"]) -> Float[Tensor, "books clusters *dim"]:
        """The sum of the values of every centroid's members."""
        with torch.enable_grad():
            centroids = torch.zeros_like(self.centroids, requires_grad=True)
            W = self.encoding.decode(self.tensors | {"centroids": centroids}, *self.shape)
            return torch.autograd.grad(W, centroids, values.float())[0]

    def mean(self, values: Float[Tensor, "rows cols"]) -> Float[Tensor, "books clusters *dim"]:
        """The mean of the values of every centroid's members; 0 for a centroid at zero."""
        return self.total(values).div_(self._count).mul_(self._moves)

    def spread(self, centroids: Float[Tensor, "books clusters *dim"]) -> Float[Tensor, "rows cols"]:
        """A weight of other centroids."""
        return self.encoding.decode(self.tensors | {"centroids": centroids}, *self.shape)

    def decode(self, zero: Bool[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        """The weight as it will be stored, but for zeros."""
        return self.spread(self.stored).masked_fill(zero, 0.0)

    @property
    def stored(self) -> Float[Tensor, "books clusters *dim"]:
        """Centroids in the dtype that they are stored in."""
        return self.centroids.to(self.tensors["centroids"].dtype)

    def encoded(self) -> Encoded:
        """How the weight is stored now."""
        return self.encoding, self.tensors | {"centroids": self.stored}

    def before_step(self, W: Float[Tensor, "rows cols"], gradient: Float[Tensor, "rows cols"]) -> None:
        """Members share their gradient, in place."""
        self._zero = W == 0
        gradient.copy_(self.spread(self.mean(gradient.masked_fill(self._zero, 0.0))).masked_fill_(self._zero, 0.0))

    def after_step(self, W: Float[Tensor, "rows cols"]) -> None:
        """Members share their step, in place."""
        if self._zero is None:
            return
        moved = (W.float() - self.spread(self.stored)).masked_fill_(self._zero, 0.0)
        self.centroids += self.mean(moved)
        W.copy_(self.decode(self._zero))
        self._zero = None
