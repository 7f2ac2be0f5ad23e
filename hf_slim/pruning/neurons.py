"""Which neurons of an MLP do least, from what they put out, pure functions.

h_tj is what neuron j puts out for token t: the *input* of the MLP's second linear layer, after the activation and its
gate. (The output of the first layer says nothing about dead neurons: before the activation hardly a number is zero.)
W [rows, neurons] is the second layer's weight. Everything is a function of sums over tokens that add up over batches
and processes:

    apoz           P(h_j = 0)                    Hu et al. 2016, arXiv:1607.03250, "average percentage of zeros"
    apoz below     P(|h_j| < threshold)          for SiLU and GELU, which never put out zero; threshold(sums, fraction)
                                                 is a fraction of the rms of the whole layer, from a first pass
    contribution   E|h_j| ||W_:j||               what the neuron adds to the residual
    flap           Var(h_j) ||W_:j||^2           An et al. 2023, arXiv:2312.11983, eq. 6: what a bias cannot replace
    minitron       sqrt(sum over windows of (mean over tokens of |h_j|)^2)    Muralidharan et al. 2024, arXiv:2407.14679
    surgeon        ||W_:j||^2 / [C^-1]_jj        Hassibi & Stork 1993, for whole columns; C = E h h^T: the error that is
                                                 left once the others have taken over what they can of neuron j

Differs from the papers: FLAP's variance is over all tokens with 1/n, not averaged over windows with 1/(n - 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from accelerate.utils import reduce
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class NeuronSums:
    """Sums over tokens, float64; `a + b` are those over the tokens of both, `a - b` those without b's tokens.

    Args:
        tokens, windows: how many there were.
        zeros, small: tokens for which a neuron put out exactly 0, and less than the threshold.
        total, magnitude, power: of h, |h| and h^2.
        peaks: sum over windows of (mean over the window's tokens of |h|)^2.
    """

    tokens: Float[Tensor, ""]
    windows: Float[Tensor, ""]
    zeros: Float[Tensor, " neurons"]
    small: Float[Tensor, " neurons"]
    total: Float[Tensor, " neurons"]
    magnitude: Float[Tensor, " neurons"]
    power: Float[Tensor, " neurons"]
    peaks: Float[Tensor, " neurons"]

    def __add__(self, other: NeuronSums) -> NeuronSums:
        return NeuronSums(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    def __sub__(self, other: NeuronSums) -> NeuronSums:
        return NeuronSums(*(a - b for a, b in zip(_values(self), _values(other), strict=True)))

    @property
    def mean(self) -> Float[Tensor, " neurons"]:
        """E[h]; 0 where there were no tokens."""
        return self.total / self.tokens.clamp(min=1)

    @property
    def variance(self) -> Float[Tensor, " neurons"]:
        """E[h^2] - E[h]^2."""
        return (self.power / self.tokens.clamp(min=1) - self.mean.square()).clamp(min=0)


def no_sums(neurons: int, device: torch.device | str = "cpu") -> NeuronSums:
    """The sums over no tokens."""
    zero = torch.zeros(neurons, dtype=torch.float64, device=device)
    return NeuronSums(zero.sum(), zero.sum(), *[zero] * (len(fields(NeuronSums)) - 2))


def neuron_sums(
    h: Float[Tensor, "... neurons"], threshold: float = 0.0, keep: Bool[Tensor, "..."] | None = None
) -> NeuronSums:
    """Sums over one batch.

    Args:
        h: [windows, length, neurons], or [tokens, neurons], which count as one window.
        threshold: what `small` counts below.
        keep: which tokens count, [windows, length] or [tokens]; None for all (padding must not count).
    """
    if h.dim() == 2:
        h, keep = h[None], None if keep is None else keep[None]
    h = h.detach().float()
    keep = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device) if keep is None else keep
    counted = keep[..., None]
    size = torch.where(counted, h.abs(), 0.0)
    of_window = size.sum(1, dtype=torch.float64)  # [windows, neurons]
    length = keep.sum(1, dtype=torch.float64)
    return NeuronSums(
        tokens=length.sum(),
        windows=(length > 0).sum(dtype=torch.float64),
        zeros=((h == 0) & counted).sum((0, 1), dtype=torch.float64),
        small=((size < threshold) & counted).sum((0, 1), dtype=torch.float64),
        total=torch.where(counted, h, 0.0).sum((0, 1), dtype=torch.float64),
        magnitude=of_window.sum(0),
        power=size.square().sum((0, 1), dtype=torch.float64),
        peaks=(of_window / length.clamp(min=1)[:, None]).square().sum(0),
    )


def over_processes(sums: NeuronSums) -> NeuronSums:
    """The sums over the tokens of all processes of `accelerate launch`."""
    return NeuronSums(*(reduce(value, reduction="sum") for value in _values(sums)))  # pyright: ignore


def threshold(sums: NeuronSums, fraction: float = 0.1) -> float:
    """That fraction of the rms of everything the layer put out; `small` of a second pass counts below it."""
    return fraction * float((sums.power.sum() / (sums.tokens * len(sums.power)).clamp(min=1)).sqrt())


def apoz(sums: NeuronSums) -> Float[Tensor, " neurons"]:
    """Share of tokens for which a neuron puts out exactly zero, 0 to 1; 1 is a dead one."""
    return sums.zeros / sums.tokens.clamp(min=1)


def apoz_below(sums: NeuronSums) -> Float[Tensor, " neurons"]:
    """Share of tokens for which a neuron puts out less than the threshold that its sums were made with, 0 to 1."""
    return sums.small / sums.tokens.clamp(min=1)


def contribution(sums: NeuronSums, W: Float[Tensor, "rows neurons"]) -> Float[Tensor, " neurons"]:
    """E|h_j| ||W_:j||: mean length of what a neuron adds to the output."""
    return sums.magnitude / sums.tokens.clamp(min=1) * _column_norms(W)


def flap(sums: NeuronSums, W: Float[Tensor, "rows neurons"]) -> Float[Tensor, " neurons"]:
    """Var(h_j) ||W_:j||^2: squared error of replacing a neuron by its mean, others apart."""
    return sums.variance * _column_norms(W).square()


def minitron(sums: NeuronSums) -> Float[Tensor, " neurons"]:
    """L2 norm over windows of the mean |h_j| of a window."""
    return sums.peaks.sqrt()


def over_one_std(share: Float[Tensor, " neurons"]) -> Bool[Tensor, " neurons"]:
    """True for neurons whose APoZ is above mean + 1 std of their layer: those that Network Trimming removes."""
    return share > share.mean() + share.std(correction=0)


def surgeon(
    W: Float[Tensor, "rows neurons"],
    C: Float[Tensor, "neurons neurons"],
    count: int = 0,
    step: int = 1,
    ridge: float = 1e-6,
) -> Float[Tensor, " neurons"]:
    """Squared error of the output without neuron j, all others refitted; or the order in which to remove neurons.

    Args:
        C: second moment of h, or its covariance where the layer has a bias.
        count: remove so many greedily, each time the one that costs least with W and C^-1 as the removals before it
            left them; they get 0, 1, ... in that order, and those that stay infinity.
        step: so many are removed between updates.
        ridge: added to the diagonal of C, as a share of its mean.
    """
    W, C = W.double().clone(), C.double()
    mean = C.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    inverse = torch.linalg.inv(C + ridge * mean * torch.eye(len(C), dtype=C.dtype, device=C.device))
    rank = torch.full_like(C[0], torch.inf)
    gone = 0
    while True:
        cost = W.square().sum(0) / inverse.diagonal().clamp(min=torch.finfo(C.dtype).tiny)
        if gone == count:
            return cost if count == 0 else rank
        cost[rank < torch.inf] = torch.inf
        J = cost.argsort(stable=True)[: min(step, count - gone)]
        rank[J] = torch.arange(gone, gone + len(J), dtype=rank.dtype, device=rank.device)
        taken = torch.linalg.solve(inverse[J][:, J], inverse[J])
        W -= W[:, J] @ taken
        inverse -= inverse[:, J] @ taken
        gone += len(J)


def kept_count(neurons: int, share: float, multiple_of: int = 1) -> int:
    """How many neurons stay of so many: all but round(share * neurons), then the nearest multiple."""
    return to_multiple(neurons - round(share * neurons), neurons, multiple_of)


def to_multiple(kept: int, neurons: int, multiple_of: int) -> int:
    """The nearest multiple, the larger of two; at least one, at most `neurons`. A multiple of 1 is `kept` itself."""
    if multiple_of == 1:
        return kept
    return min(neurons, max(1, (kept + multiple_of // 2) // multiple_of) * multiple_of)


def most_important(importance: Float[Tensor, " neurons"], kept: int) -> Bool[Tensor, " neurons"]:
    """True for the `kept` neurons of highest importance; of equals the later ones stay."""
    keep = torch.ones_like(importance, dtype=torch.bool)
    keep[importance.argsort(stable=True)[: len(importance) - kept]] = False
    return keep


def global_counts(importance: Mapping[str, Tensor], remove: int, least: Mapping[str, int]) -> dict[str, int]:
    """How many neurons each layer keeps when the least important of all layers go.

    Importance is compared in standard deviations from the mean of its layer, as FLAP does it.

    Args:
        importance: [neurons] by layer.
        remove: how many go in all, at most as many as `least` leaves to be removed.
        least: how many each layer keeps at least.
    """
    ranked = {}
    for name, values in importance.items():
        z = (values - values.mean()) / values.std(correction=0).clamp(min=torch.finfo(values.dtype).tiny)
        ranked[name] = z.masked_fill(most_important(values, least[name]), torch.inf)
    gone = torch.cat(list(ranked.values())).argsort(stable=True)[:remove].cpu()
    layer = torch.repeat_interleave(torch.arange(len(ranked)), torch.tensor([len(z) for z in ranked.values()]))
    counts = torch.bincount(layer[gone], minlength=len(ranked)).tolist()
    return {name: len(z) - count for (name, z), count in zip(ranked.items(), counts, strict=True)}


def _values(sums: NeuronSums) -> list[Tensor]:
    return [getattr(sums, field.name) for field in fields(sums)]


def _column_norms(W: Float[Tensor, "rows neurons"]) -> Float[Tensor, " neurons"]:
    return W.double().norm(dim=0)
