"""What is measured of the neurons that a layer reads while its block runs, and of either half of the tokens.

Two halves tell how far a least-squares refit can be trusted (`refit.choose_ridge`). H of the walk covers all tokens;
the first half of every batch is summed here, and the second is the difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate.utils import reduce
from jaxtyping import Float
from torch import Tensor, nn

from hf_slim.core.statistics import watching
from hf_slim.core.walk import Block, Statistics
from hf_slim.pruning.neurons import NeuronSums, neuron_sums, no_sums, over_processes


@dataclass(frozen=True)
class Measured:
    """What is known of a layer's neurons.

    Args:
        sums: of the calibration tokens.
        C: their second moment E h h^T.
        halves: the same of either half of the tokens, to see how far a refit can be trusted.
    """

    sums: NeuronSums
    C: Float[Tensor, "neurons neurons"]
    halves: tuple[Measured, Measured] | None = None

    def moment(self, affine: bool) -> Float[Tensor, "neurons neurons"]:
        """C, or the covariance, which is what counts where the layer has a bias; float64."""
        mean = self.sums.mean
        return self.C.double() - torch.outer(mean, mean) if affine else self.C.double()


def measure(
    model: nn.Module, statistics: Mapping[str, Statistics], block: Block, fraction: float
) -> dict[str, Measured]:
    """Run the block once more: the rms of its neurons, and with it the threshold, is known from the first time.

    Args:
        statistics: H of the layers that read the neurons.
        fraction: of a layer's rms, below which an output counts as small.
    """
    sums = {name: no_sums(len(known.hessian), known.hessian.device) for name, known in statistics.items()}
    first = dict(sums)
    products = {name: torch.zeros_like(known.hessian) for name, known in statistics.items()}

    thresholds = {
        name: fraction * float((known.hessian.diagonal().mean() / 2).sqrt()) for name, known in statistics.items()
    }

    def note(name: str, h: Tensor) -> None:
        half = h.flatten(0, -2)[: h[..., 0].numel() // 2].float()
        sums[name] += neuron_sums(h, thresholds[name])
        first[name] += neuron_sums(half, thresholds[name])
        products[name].addmm_(half.T, half)

    with watching(model, statistics, note):
        for i in range(len(block)):
            block.run(i)
    return {
        name: _measured(
            over_processes(sums[name]),
            known.hessian / 2,
            over_processes(first[name]),
            reduce(products[name], reduction="sum"),  # pyright: ignore
        )
        for name, known in statistics.items()
    }


def _measured(sums: NeuronSums, C: Tensor, first: NeuronSums, products: Tensor) -> Measured:
    """All tokens, and either half of them; products = sum of h h^T over the first half."""
    second = sums - first
    halves = (
        Measured(first, products / first.tokens.clamp(min=1)),
        Measured(second, (C * sums.tokens - products) / second.tokens.clamp(min=1)),
    )
    return Measured(sums, C, halves)
