"""What a set of weights looks like, from parts of it read one after the other: pure functions.

A set may be far larger than memory (all `down_proj` of a model), so it is read twice in parts and never held:

    first reading    count, mean, M2 = sum (w - mean)^2, extremes, zeros, and how many |w| lie in each of 2^15 bins
    second reading   now that sigma^2 = M2 / n and the bins are known: exact quantiles of |w|, counts of |w| < t sigma,
                     a histogram of w / sigma, the excess kurtosis

The bins are the upper 16 bits of |w| as float32, whose bit patterns order non-negative floats as integers do. A wanted
order statistic lies in one bin; the second reading tells the numbers of that bin apart by their lower 16 bits, which
gives it exactly. Counts of parts are merged with Chan, Golub & LeVeque (1983): a running sum of squares would cancel.

    excess kurtosis = (1/n sum (w - mean)^4) / sigma^4 - 3         0 for a normal distribution; outliers raise it
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

HALF = 16
HALF_BINS = 2**HALF
REACH = 8.05  # sigmas that the histogram shows on either side
BINS = 161  # 0.1 sigma wide; an odd number, so that zero lies in the middle of one


@dataclass(frozen=True)
class FirstReading:
    """What the first reading knows; `a + b` knows the weights of both.

    Args:
        squares: M2, the sum of (w - mean)^2.
        counts: of |w| whose upper 16 bits are 0, 1, ...
    """

    count: int
    mean: float
    squares: float
    largest: float
    zeros: int
    counts: Int[Tensor, " bins"]

    def __add__(self, other: FirstReading) -> FirstReading:
        count = self.count + other.count
        apart = other.mean - self.mean
        return FirstReading(
            count,
            self.mean + apart * other.count / count,
            self.squares + other.squares + apart**2 * self.count * other.count / count,
            max(self.largest, other.largest),
            self.zeros + other.zeros,
            self.counts + other.counts,
        )

    @property
    def sigma(self) -> float:
        """Standard deviation, 1/n."""
        return (self.squares / self.count) ** 0.5


@dataclass(frozen=True)
class SecondReading:
    """What the second reading counts; `a + b` counts the weights of both.

    Args:
        fourths: sum of (w - mean)^4.
        under: how many |w| < t sigma, for each threshold t.
        beyond: how many |w| > 3 sigma.
        histogram: of w / sigma from -REACH to REACH; what lies beyond is in the outermost bins.
        lower: for each bin of wanted order statistics, how many of its |w| have the lower 16 bits 0, 1, ...
    """

    fourths: float
    under: Int[Tensor, " thresholds"]
    beyond: int
    histogram: Int[Tensor, " bins"]
    lower: Int[Tensor, "wanted half"]

    def __add__(self, other: SecondReading) -> SecondReading:
        return SecondReading(
            self.fourths + other.fourths,
            self.under + other.under,
            self.beyond + other.beyond,
            self.histogram + other.histogram,
            self.lower + other.lower,
        )


def first_reading(w: Float[Tensor, "..."]) -> FirstReading:
    """Read one part, of any float dtype and at least one weight, finite."""
    w = w.detach().reshape(-1).float()
    deviation = w.double() - w.double().mean()
    counts = torch.bincount(_bits(w) >> HALF, minlength=HALF_BINS // 2)
    return FirstReading(
        w.numel(),
        float(w.double().mean()),
        float(deviation.square().sum()),
        float(w.abs().max()),
        int((w == 0).sum()),
        counts.cpu(),
    )


def second_reading(
    w: Float[Tensor, "..."], first: FirstReading, thresholds: Sequence[float], quantiles: Sequence[float]
) -> SecondReading:
    """Read one part again.

    Args:
        first: of all parts together.
        thresholds: t, in sigmas.
        quantiles: those wanted of |w|, 0 to 1.
    """
    w = w.detach().reshape(-1).float()
    size, sigma = w.abs(), first.sigma
    bits = _bits(w)
    lower = [
        torch.bincount(bits[(bits >> HALF) == bin_] & (HALF_BINS - 1), minlength=HALF_BINS).cpu()
        for bin_, _ in _places(first, quantiles)
    ]
    return SecondReading(
        float((w.double() - first.mean).pow(4).sum()),
        torch.tensor([int((size.double() < t * sigma).sum()) for t in thresholds]),
        int((size.double() > 3 * sigma).sum()),
        _histogram(w, sigma).cpu(),
        torch.stack(lower) if lower else torch.zeros(0, HALF_BINS, dtype=torch.int64),
    )


def exact_quantiles(first: FirstReading, second: SecondReading, quantiles: Sequence[float]) -> list[float]:
    """Of |w|: for q the ceil(q n)-th smallest (the smallest for q = 0), a number that occurs among the weights.

    Args:
        first, second: readings of all parts, the second made with the same quantiles.
    """
    found = []
    for (bin_, rank), lower in zip(_places(first, quantiles), second.lower, strict=True):
        low = int(torch.searchsorted(lower.cumsum(0), rank))
        pattern = torch.tensor((bin_ << HALF) | low, dtype=torch.int32)
        found.append(float(pattern.view(torch.float32)))
    return found


def excess_kurtosis(first: FirstReading, second: SecondReading) -> float:
    """0 for normal weights, -1.2 for uniform ones; 0 also where all weights are equal."""
    variance = first.squares / first.count
    return second.fourths / first.count / variance**2 - 3 if variance else 0.0


def _places(first: FirstReading, quantiles: Sequence[float]) -> list[tuple[int, int]]:
    """For each quantile the bin that holds it, and its rank in that bin, from 1."""
    cumulative = first.counts.cumsum(0)
    places = []
    for q in quantiles:
        rank = max(1, math.ceil(round(q * first.count, 6)))  # 0.07 * 100 is a little more than 7 in floating point
        bin_ = int(torch.searchsorted(cumulative, rank))
        places.append((bin_, rank - (int(cumulative[bin_ - 1]) if bin_ else 0)))
    return places


def _histogram(w: Float[Tensor, " n"], sigma: float) -> Int[Tensor, " bins"]:
    scaled = w / sigma if sigma else w
    place = ((scaled + REACH) * (BINS / (2 * REACH))).floor().clamp(0, BINS - 1)
    return torch.bincount(place.long(), minlength=BINS)


def _bits(w: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    return w.abs().view(torch.int32)
