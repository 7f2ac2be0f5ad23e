"""Hashed encoding: weights share values at random, by a hash that is computed whenever it is needed and never stored
(Chen et al. 2015, "HashedNets", arXiv:1504.04788, equations 3 and 7).

A row is cut into chunks of `block` weights, the last of which may be shorter. A hash of its place gives each chunk a
bucket and a sign; a bucket holds `block` values:

    W[r, block c + p] = sign(r, c) buckets[bucket(r, c), p]

With blocks of one weight this is the paper's network. Longer ones (as in ROBE, Desai et al. 2022, arXiv:2108.02191) are
read in runs and hashed `block` times less often; where ROBE lets a chunk begin anywhere in one long array, ours fill
whole buckets, so that each stored value belongs to chunks at one phase and least squares is a plain mean.

The hash, on unsigned integers of 32 bits:

    mix(h):  h ^= h >> 16;  h *= 0x85EBCA6B;  h ^= h >> 13;  h *= 0xC2B2AE35;  h ^= h >> 16
    h(r, c) = mix(mix(mix(seed) ^ r) ^ c)
    bucket = h * buckets >> 32          sign = 1 - 2 (h & 1)

`mix` is the finaliser of MurmurHash3 (Appleby 2011), a bijection. The bucket is read from the upper bits, the sign from
the lowest. Products are taken of 16 bits at a time: no int64 overflows, so every device finds the same places. Layers
share one seed, where the paper draws hashes anew for each: descriptions in `config.json` stay few, and so do draws that
could go wrong; values are each layer's own.

Stored bits a weight are those of the dtype times buckets * block / (rows * cols). Some rows of a table of tokens
can be kept exact, beside their ids; their chunks have no place in the buckets then.

The gradient of a stored value is the signed sum over its members (equation 12). Divided by their number ("mean") it is
the gradient of a typical member, and a learning rate for dense weights fits SGD again; Adam and its kin divide any such
factor out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from hf_slim.encodings.affine import row_runs
from hf_slim.encodings.base import Encoding, TensorSpec

Gradient = Literal["sum", "mean"]
WORD = 0xFFFFFFFF


class Hashed(Encoding):
    """Description of a hashed encoding.

    Args:
        buckets: runs of values that are stored.
        block: values in each, and weights in a chunk.
        seed: of the hash.
        exact: rows that are stored as they are.
        gradient: of a stored value: the sum over its members, or their mean.
    """

    kind: Literal["hashed"] = "hashed"
    buckets: int = Field(ge=1, lt=2**31)
    block: int = Field(ge=1)
    seed: int = Field(default=0, ge=0, le=WORD)
    exact: int = Field(default=0, ge=0)
    gradient: Gradient = "sum"
    trainable: ClassVar[tuple[str, ...]] = ("buckets", "exact")

    def chunks(self, cols: int) -> int:
        """Chunks of a row."""
        return -(-cols // self.block)

    def layout(self, rows: int, cols: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        specs = {"buckets": TensorSpec((self.buckets, self.block), dtype)}
        if self.exact:
            specs["exact"] = TensorSpec((self.exact, cols), dtype)
            specs["exact_ids"] = TensorSpec((self.exact,), torch.int32)
        return specs

    def places(self, rows: Int[Tensor, " n"], cols: int) -> tuple[Int[Tensor, "n chunks"], Int[Tensor, "n chunks"]]:
        """Bucket and sign (1 or -1) of every chunk of some rows, int64."""
        h = hash_places(rows, self.chunks(cols), self.seed)
        return h * self.buckets >> 32, 1 - 2 * (h & 1)

    def members(
        self,
        rows: int,
        cols: int,
        exact_ids: Int[Tensor, " exact"] | None = None,
        device: torch.device | str = "cpu",
    ) -> Int[Tensor, "buckets block"]:
        """How many weights each stored value stands for."""
        bucket, _ = self.places(all_but(exact_ids, rows, torch.device(device)), cols)
        whole, last = (torch.bincount(b.flatten(), minlength=self.buckets) for b in (bucket, bucket[:, -1]))
        beyond = torch.arange(self.block, device=device) >= self.block - -cols % self.block
        return whole[:, None] - last[:, None] * beyond

    def decode(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Float[Tensor, "rows cols"]:
        return self.take(tensors, torch.arange(rows, device=tensors["buckets"].device), rows, cols)

    def take(self, tensors: dict[str, Tensor], ids: Int[Tensor, " n"], rows: int, cols: int) -> Float[Tensor, "n cols"]:
        buckets = tensors["buckets"]
        if self.gradient == "mean" and torch.is_grad_enabled() and buckets.requires_grad:
            members = self.members(rows, cols, tensors.get("exact_ids"), buckets.device)
            buckets = _DividedGradient.apply(buckets, members.clamp(min=1))
        bucket, sign = self.places(ids, cols)
        # Its backward pass sums in a fixed order on every device, as those of indexing need not.
        W = (F.embedding(bucket.int(), buckets) * sign[..., None].to(buckets.dtype)).flatten(1)[:, :cols]
        return W if not self.exact else self._with_exact(W, tensors, ids)

    def runs(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Iterator[tuple[slice, Tensor]]:
        for run in row_runs(rows, cols):
            ids = torch.arange(run.start, run.stop, device=tensors["buckets"].device)
            yield run, self.take(tensors, ids, rows, cols)

    def describe(self) -> str:
        exact = f", {self.exact} rows exact" if self.exact else ""
        return f"hashed to {self.buckets * self.block} values{exact}"

    def _with_exact(
        self, W: Float[Tensor, "n cols"], tensors: dict[str, Tensor], ids: Int[Tensor, " n"]
    ) -> Float[Tensor, "n cols"]:
        kept = tensors["exact_ids"]
        at = torch.searchsorted(kept, ids.to(kept.dtype)).clamp(max=self.exact - 1)
        return torch.where((kept[at] == ids)[:, None], F.embedding(at, tensors["exact"]), W)


class _DividedGradient(torch.autograd.Function):
    """The identity; its gradient is divided."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, divisor: Tensor) -> Tensor:
        ctx.save_for_backward(divisor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient / ctx.saved_tensors[0], None


def all_but(ids: Int[Tensor, " exact"] | None, rows: int, device: torch.device) -> Int[Tensor, " n"]:
    """Numbers of the rows that are hashed."""
    hashed = torch.ones(rows, dtype=torch.bool, device=device)
    if ids is not None:
        hashed[ids.long()] = False
    return hashed.nonzero().flatten()


def hash_places(rows: Int[Tensor, " n"], chunks: int, seed: int) -> Int[Tensor, "n chunks"]:
    """h(r, c) of the module's docstring for some rows and all chunks, int64 in [0, 2**32)."""
    c = torch.arange(chunks, device=rows.device)
    start = _mix(torch.tensor(seed, device=rows.device))
    return _mix(_mix(start ^ rows.long())[:, None] ^ c)


def _mix(h: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    h = _times(h ^ h >> 16, 0x85EBCA6B)
    h = _times(h ^ h >> 13, 0xC2B2AE35)
    return h ^ h >> 16


def _times(h: Int[Tensor, "*shape"], factor: int) -> Int[Tensor, "*shape"]:
    """h * factor modulo 2**32, for both below 2**32."""
    low, high = factor & 0xFFFF, factor >> 16
    return h * low + ((h * high & 0xFFFF) << 16) & WORD
