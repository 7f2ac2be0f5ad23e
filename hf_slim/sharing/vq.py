"""GPTVQ, vectors of weights from a table (van Baalen et al., "GPTVQ", arXiv:2402.15319).

An index stands for `dim` neighbours in a row: indices of 8 bits for 4 weights take 2 bits a weight, as indices of 4
bits for 2 weights do, and reach what no table of single weights can, entries that lie where vectors are. Sub-bit rates
are possible. In the terms of GPTQ (`core/feedback.py`), with runs of `dim` columns in place of columns:

    start     k-means of the rows' runs, each weight's error weighed by R_jj**2, what the loss charges for its column
    feedback  run after run, the nearest entry in the run's metric R_jj R_jj^T; later runs repair the error so far
    tables    least squares of the layer's output given the indices, and `rounds` times more: coordinate descent on the
              indices, and the tables again, as in `lnq.py`

Shapes: W [rows, cols]; H [groups, cols, cols]; x, h [books, n, dim] with n the runs of a book; codes uint8 [rows,
ceil(cols / dim)]; tables [books, 2**bits, dim]. Columns that are missing in the last run weigh next to nothing.

Where we differ from the paper:
- Runs are compared in their full metric, where the authors use the diagonal of the inverse Hessian.
- Runs go in order of their inputs' size, as GPTQ's columns do; their neighbourhood in the row stays.
- Tables serve runs of rows, not blocks of columns, and rows may have scales instead of blocks of weights.
- Tables are refitted exactly, where the authors descend along the gradient; indices are chosen anew afterwards.
- Empty entries are sown again on the vectors that are served worst.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.layers import Encoded
from hf_slim.core.method import Rules
from hf_slim.core.report import StageReport
from hf_slim.core.select import Layer, Select
from hf_slim.encodings import Codebook
from hf_slim.encodings.codebook import CentroidDtype
from hf_slim.sharing import calibrated, kmeans, lnq
from hf_slim.sharing.descent import Curvature, Tables, curvature_of, feed_back, pad

RULES = Rules(
    needs=("calibration",),
    makes=("centroids",),
    preserves=("codes", "tied"),
    paper="van Baalen et al. 2024, arXiv:2402.15319",
)

SAMPLE = 1 << 16  # runs of a book that its first table is made from
CHUNK = 1 << 23  # distances held at a time


class Config(calibrated.Options):
    """Options of `share.vq`; `lnq.Config` compares the two."""

    per_layer: ClassVar[tuple[str, ...]] = ("bits", "dim", "scope", "scales", "centroids")

    bits: int = Field(8, ge=1, le=8, description="bits of an index; it stands for `dim` weights")
    dim: Literal[2, 4] = Field(4, description="neighbours in a row that share an index")
    scope: kmeans.Scope = Field("tensor", description="weights that share a table: 'tensor', 'row' or so many rows")
    scales: Literal["row"] | None = Field("row", description="'row' gives every row a scale beside a shared table")
    centroids: CentroidDtype = Field("float16", description="how tables are stored")
    iterations: int = Field(15, ge=1, description="of k-means, for the first tables")
    rounds: int = Field(2, ge=0, description="times that tables and indices are solved in turn after error feedback")
    cycles: int = Field(2, ge=1, description="times that every run is chosen anew in a round")
    layers: Select = Select()
    embeddings: kmeans.Embeddings | None = None


def quantize(
    W: Float[Tensor, "rows cols"],
    hessians: Float[Tensor, "groups cols cols"],
    bits: int,
    dim: int = 4,
    scope: kmeans.Scope = "tensor",
    scales: Literal["row"] | None = "row",
    centroids: CentroidDtype = "float16",
    iterations: int = 15,
    rounds: int = 2,
    cycles: int = 2,
    damping: float = 0.01,
    known: Curvature | None = None,
) -> tuple[Tables, lnq.Report]:
    """Tables and indices of little loss at the layer's output.

    Args:
        W: finite; the last run is filled up with zeros.
        hessians: H of each run of rows, all rows' where there is one.
        bits: of an index.
        dim: columns that one stands for.
        scope, scales, centroids, rounds, cycles, damping: see `lnq.quantize`.
        iterations: of k-means.
        known: `curvature(hessians, damping, dim)`, where several layers share it.

    Raises:
        SingularHessian: no damping makes an H positive definite.
    """
    W, hessians = F.pad(W.float(), (0, -W.shape[1] % dim)), pad(hessians, dim)
    known = known or curvature_of(hessians, damping, dim)
    store = lnq.rounding(centroids)
    weights = known.importance(len(W))
    sizes = kmeans.row_sizes(W, weights) if scales else None
    x = W if sizes is None else W / sizes[:, None]
    h = weights if sizes is None else weights * sizes[:, None] ** 2
    rows_per_book = kmeans.rows_per_book(scope, len(W))
    per_book = zip(x.split(rows_per_book), h.split(rows_per_book), strict=True)
    parts = [cluster(a.reshape(1, -1, dim), b.reshape(1, -1, dim), 2**bits, iterations) for a, b in per_book]
    tables = torch.cat(parts)
    book = torch.arange(len(W), device=W.device) // rows_per_book
    codes = torch.zeros(len(W), W.shape[1] // dim, dtype=torch.uint8, device=W.device)
    found = feed_back(W, Tables(codes, store(tables), book, sizes), known)
    return lnq.alternate(W, found, known, hessians, store, rounds, cycles)


def cluster(
    x: Float[Tensor, "books n d"], h: Float[Tensor, "books n d"], clusters: int, iterations: int
) -> Float[Tensor, "books clusters d"]:
    """Weighted k-means of vectors: least sum h (x - c)**2 over coordinates, in each book on its own.

    Args:
        x: vectors; of more than `SAMPLE`, evenly spaced ones are looked at.
        h: weight of each coordinate, positive.
        clusters: entries; books with fewer distinct vectors repeat some.
        iterations: of Lloyd's two steps.
    """
    step = -(-x.shape[1] // SAMPLE)
    x, h = x[:, ::step], h[:, ::step]
    c = _seeds(x, h, clusters)
    for _ in range(iterations):
        codes, errors = _nearest(x, h, c)
        mass, moment = (_sums(part, codes, clusters) for part in (h, h * x))
        empty = ~(mass > 0).any(2)
        worst = errors.topk(min(clusters, x.shape[1]), dim=1).indices
        nth = (empty.cumsum(1) - 1).clamp(0, worst.shape[1] - 1)
        sown = x.gather(1, worst.gather(1, nth)[:, :, None].expand(-1, -1, x.shape[2]))
        c = torch.where(empty[:, :, None], sown, moment / mass.clamp(min=torch.finfo(x.dtype).tiny))
    return c


def _seeds(
    x: Float[Tensor, "books n d"], h: Float[Tensor, "books n d"], clusters: int
) -> Float[Tensor, "books clusters d"]:
    """Vectors evenly spaced in order of their distance from the mean (Mahalanobis), as in the paper."""
    total = h.sum(1, keepdim=True)
    mean = (h * x).sum(1, keepdim=True) / total
    variance = (h * (x - mean) ** 2).sum(1, keepdim=True) / total
    distance = ((x - mean) ** 2 / variance.clamp(min=torch.finfo(x.dtype).tiny)).sum(2)
    at = torch.linspace(0, x.shape[1] - 1, clusters, device=x.device).round().long()
    chosen = distance.argsort(dim=1, stable=True)[:, at]
    return x.gather(1, chosen[:, :, None].expand(-1, -1, x.shape[2]))


def _nearest(
    x: Float[Tensor, "books n d"], h: Float[Tensor, "books n d"], c: Float[Tensor, "books clusters d"]
) -> tuple[Int[Tensor, "books n"], Float[Tensor, "books n"]]:
    """Entry of least weighted distance for each vector, and that distance."""
    coefficients = torch.cat([c.square(), -2 * c], 2).mT
    codes, errors = [], []
    for part, weight in zip(*(t.split(max(1, CHUNK // (len(c) * c.shape[1])), 1) for t in (x, h)), strict=True):
        least, code = (torch.cat([weight, weight * part], 2) @ coefficients).min(2)
        codes.append(code)
        errors.append(least + (weight * part.square()).sum(2))
    return torch.cat(codes, 1), torch.cat(errors, 1)


def _sums(
    values: Float[Tensor, "books n d"], codes: Int[Tensor, "books n"], clusters: int
) -> Float[Tensor, "books clusters d"]:
    sums = values.new_zeros(len(values), clusters, values.shape[2])
    return sums.scatter_add_(1, codes[:, :, None].expand_as(values), values)


def makes(config: Config) -> tuple[str, ...]:
    """What weights have after it: tables that learn, or int8 ones that cannot."""
    return ("codes",) if config.centroids == "int8" else RULES.makes


def encoding(layer: Layer, config: Config) -> Codebook:
    """How a layer will be stored; embeddings as `share.kmeans` stores them."""
    if layer.kind == "embedding" and config.embeddings is not None:
        return kmeans.encoding(layer, kmeans.TableConfig(embeddings=config.embeddings))
    here = config.at(layer)
    return Codebook(
        bits=here.bits,
        clusters=2**here.bits,
        rows_per_book=None if here.scope == "tensor" else kmeans.rows_per_book(here.scope, layer.rows),
        dim=here.dim,
        scales=here.scales,
        centroid_dtype=here.centroids,
    )


def problems(layer: Layer, config: Config) -> list[str]:
    """Pruned layers: runs of weights share an index, pruned ones among them."""
    if layer.survivors is None:
        return []
    return [
        f"{layer.name} is pruned, and share.vq gives runs of {config.at(layer).dim} weights one index: use share.lnq, "
        "which keeps pruned weights at zero, or name it in layers.exclude"
    ]


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Share block by block."""

    def solve(W: Tensor, layer: Layer, known: calibrated.Known) -> tuple[Encoded, float]:
        here, stored = config.at(layer), encoding(layer, config)
        if stored.dim == 1:
            return lnq.solve(W, stored, known, config.damping, rounds=0, cycles=1, iterations=2)
        found, report = quantize(
            W, known.hessians, here.bits, here.dim, here.scope, here.scales, here.centroids, here.iterations,
            here.rounds, here.cycles, known=known.curvature(here.damping, here.dim),
        )  # fmt: skip
        return (stored, stored.pack(found.codes, found.tables, scales=found.scales)), report.relative_error

    return calibrated.compress(model, "share.vq", config, config, context, solve)
