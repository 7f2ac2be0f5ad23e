"""How far the inputs of a block's layers have drifted from the dense model's: D = 2/n sum over tokens of (x - x^) x^ᵀ.

x^ is what a layer is fed in the model as compressed so far, x what it is fed at the same token in the dense one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate.utils import reduce
from jaxtyping import Float
from torch import Tensor, nn

from hf_slim.core.walk import Block, Statistics


@torch.no_grad()
def measure_drift(
    model: nn.Module, block: Block, statistics: Mapping[str, Statistics]
) -> dict[str, Float[Tensor, "cols cols"]]:
    """D of the layers that there are statistics of, over all processes; layers with the same input share one.

    Args:
        block: of a walk with `reference=True`; its layers still dense.
        statistics: of layers that see every token, which experts do not.
    """
    first: dict[int, str] = {}
    for name, known in statistics.items():
        first.setdefault(id(known.sums), name)
    sums = {name: torch.zeros_like(statistics[name].hessian) for name in first.values()}
    with _inputs(model, list(sums)) as seen:
        for i in range(len(block)):
            block.run_original(i)
            dense = dict(seen)
            block.run(i)
            for name, D in sums.items():
                D.addmm_((dense[name] - seen[name]).T, seen[name])
    drift = {name: reduce(D, reduction="sum") * (2.0 / statistics[name].tokens) for name, D in sums.items()}  # pyright: ignore
    return {name: drift[first[id(known.sums)]] for name, known in statistics.items()}


@contextmanager
def _inputs(model: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """The last inputs [tokens, cols] of some layers, float32."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args: seen.update({name: args[0].reshape(-1, args[0].shape[-1]).float()})

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
