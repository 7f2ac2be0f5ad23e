"""k-means of vectors by Lloyd's iteration: who belongs to which of a few centroids.

    code_i = argmin_k |x_i - c_k|²,      c_k = mean of its members,

begun at vectors drawn by k-means++ (Arthur and Vassilvitskii, 2007). A cluster that loses its last member goes on
from the vector that is farthest from its centroid. Vectors of at most `clusters` values are reproduced exactly.

Shapes: x [n, d]; codes uint8 [n]; centroids [clusters, d]. An iteration takes O(n d clusters) time;
memory is O(n) beside chunks.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

CHUNK = 1 << 22  # distances worked on at a time
SAMPLE = 1 << 16  # vectors that the first centroids are drawn from


def cluster_vectors(
    x: Float[Tensor, "n d"], clusters: int, iterations: int = 20, dtype: torch.dtype = torch.float16
) -> tuple[UInt8[Tensor, " n"], Float[Tensor, "clusters d"]]:
    """Cluster vectors so that their squared distance from centroids is small.

    Args:
        x: finite vectors, one a row.
        clusters: 1 to 256; where there are fewer distinct vectors, the last centroid is repeated.
        iterations: at most.
        dtype: that centroids are stored in: codes are nearest for the rounded ones.

    Returns:
        Codes, and centroids in `dtype`.
    """
    x = x.float()
    distinct = torch.unique(x, dim=0)
    if len(distinct) <= clusters:
        c = torch.cat([distinct, distinct[-1:].expand(clusters - len(distinct), -1)])
        return _nearest(x, c.to(dtype).float())[0].to(torch.uint8), c.to(dtype)
    c, before = _seeds(x, clusters), None
    for _ in range(iterations):
        codes, distances = _nearest(x, c)
        if before is not None and torch.equal(codes, before):
            break
        before = codes
        count = torch.bincount(codes, minlength=clusters)
        means = torch.zeros_like(c).index_add_(0, codes, x) / count[:, None].clamp(min=1)
        c = torch.where(count[:, None] > 0, means, x[distances.topk(clusters).indices])
    return _nearest(x, c.to(dtype).float())[0].to(torch.uint8), c.to(dtype)


def _seeds(x: Float[Tensor, "n d"], clusters: int) -> Float[Tensor, "clusters d"]:
    """Vectors drawn one after the other, far ones rather than near ones (k-means++), always the same for the same x."""
    x = x[:: -(-len(x) // SAMPLE)]
    draw = torch.Generator(x.device).manual_seed(0)
    chosen = [x[(x - x.mean(0)).square().sum(1).argmin()]]
    distance = (x - chosen[0]).square().sum(1)
    while len(chosen) < clusters:
        likely = distance if distance.any() else torch.ones_like(distance)
        chosen.append(x[int(torch.multinomial(likely, 1, generator=draw))])
        distance = torch.minimum(distance, (x - chosen[-1]).square().sum(1))
    return torch.stack(chosen)


def _nearest(x: Float[Tensor, "n d"], c: Float[Tensor, "k d"]) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """The nearest centroid of each vector, of several the first, and the squared distance."""
    found = [
        (c.square().sum(1) - 2 * part @ c.T + part.square().sum(1, keepdim=True)).min(1)
        for part in x.split(max(1, CHUNK // len(c)))
    ]
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found]).clamp_(min=0)
