"""How well one block of a model stands in for another: compared by what it puts out, and by what the model predicts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hf_slim.core.capture import capture
from hf_slim.core.forward import logits_of
from hf_slim.core.parallel import sum_over_processes
from hf_slim.core.select import Stack
from hf_slim.core.ties import Ties, tied
from hf_slim.core.walk import Block
from hf_slim.evaluation.agreement import divergence


def closest(distances: Float[Tensor, "blocks blocks"], chosen: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """All ties that are possible besides those chosen, the closest first."""
    gone = {block for block, _ in chosen}
    left = [i for i in range(len(distances)) if i not in gone]
    pairs = [(i, j) for i in left for j in left if i != j and distances[i, j].isfinite()]
    return sorted(pairs, key=lambda pair: float(distances[pair]))


def output_distances(
    model: nn.Module, stack: Stack, names: Sequence[str], batches: Sequence[Tensor]
) -> Float[Tensor, "blocks blocks"]:
    """d(i, j) of all pairs of blocks, infinite on the diagonal.

    Args:
        names: the tensors of a block that are to be shared, below the block.
        batches: token windows; this process's share of them.
    """
    count = len(stack.blocks)
    lost, whole = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    own = [{name: model.get_parameter(f"{block}.{name}") for name in names} for block in stack.blocks]
    inputs = capture(model, stack.blocks, batches)
    for i, name in enumerate(stack.blocks):
        block = Block(name, model.get_submodule(name), inputs)
        for k, batch in enumerate(inputs):
            x, y = batch.hidden, block.run(k)
            whole[i] += (y - x).double().square().sum().cpu()
            for j in range(count):
                if j != i:
                    lost[i, j] += (block.run(k, own[j]) - y).double().square().sum().cpu()
            batch.hidden = y
    lost, whole = sum_over_processes(lost), sum_over_processes(whole)
    return (lost / whole[:, None].clamp(min=1e-30)).fill_diagonal_(torch.inf)


def tie_losses(model: nn.Module, ties: Sequence[Ties], batches: Sequence[Tensor]) -> Float[Tensor, " candidates"]:
    """KL in nats a token between the model as it is and, in turn, with each of these ties."""
    sums = torch.zeros(len(ties) + 1, dtype=torch.float64)
    for batch in batches:
        original = logits_of(model, batch).flatten(0, -2)
        for i, candidate in enumerate(ties):
            with tied(model, candidate):
                sums[i] += divergence(logits_of(model, batch).flatten(0, -2), original)[0].double().sum().cpu()
        sums[-1] += len(original)
    sums = sum_over_processes(sums)
    return sums[:-1] / sums[-1]
