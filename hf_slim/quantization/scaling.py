"""What methods that fold scales share (AWQ, SmoothQuant): try them on a block, keep them only where its output gains.

    plain     every layer as it is, encoded
    scaled    the scales divided out at their sources, multiplied into their consumers' columns, then encoded;
              the Hessian of a consumer's inputs becomes H[i, j] / (s_i s_j)
    keep      scaled, where the block's squared output error on calibration tokens is lower than that of plain

Norms are rounded to the dtype they are stored in before the consumers are encoded, which see the scales that were
really divided out (`core/folding.py`): the error is that of what will be saved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from accelerate.utils import reduce
from jaxtyping import Float
from torch import Tensor

from hf_slim.core.folding import Fold, fold, put_weight
from hf_slim.core.layers import Encoded
from hf_slim.core.parallel import processes
from hf_slim.core.swap import encode_layer, get_keep, get_weight, set_module
from hf_slim.core.walk import Block, Solution, Statistics

# What encodes one layer: (name in the model, weight, what is known of its input, pruning mask).
Encode = Callable[[str, Tensor, Statistics | None, Tensor | None], Solution]

JUDGED = 1  # batches of about 2048 tokens that decide about a block


def scaled_hessian(H: Float[Tensor, "cols cols"], scales: Float[Tensor, " cols"]) -> Float[Tensor, "cols cols"]:
    """H of inputs that were divided by the scales."""
    return H / scales[:, None] / scales


def solve_block(
    block: Block,
    known: Mapping[str, Statistics | None],
    scales: Sequence[tuple[Fold, Tensor]],
    encode: Encode,
) -> dict[str, Solution]:
    """Encode a block's layers, with the scales folded in where that lowers the error of the block's output.

    Args:
        known: the layers to encode, by their names in the model.
        scales: scales [channels] of the block's folds.
    """
    modules = {name: block.module.get_submodule(_below(block, name)) for name in known}
    weights = {name: get_weight(module).float() for name, module in modules.items()}
    masks = {name: get_keep(module) for name, module in modules.items()}
    plain = {name: encode(name, W, known[name], masks[name]) for name, W in weights.items()}
    if not scales:
        return _noted(plain, "no scales: no norm or layer was found to fold them into")
    folded = fold(block.module, scales)
    scaled = dict(plain)
    for short, W in folded.weights.items():
        name, statistics = f"{block.name}.{short}", known[f"{block.name}.{short}"]
        if statistics is not None and short in folded.columns:
            hessian = scaled_hessian(statistics.hessian, folded.columns[short])
            statistics = dataclasses.replace(statistics, sums=hessian, guided=None)
        scaled[name] = encode(name, W, statistics, masks[name])
    before, after = judge(block, [(plain, {}), (scaled, folded.dense)])
    if not after < before:
        return _noted(plain, f"scales of this block left out: its output error would be {after:.3g}, not {before:.3g}")
    for short, value in folded.dense.items():
        block.put(short, value)
    for short, W in folded.weights.items():
        put_weight(block.module, short, W)
    return scaled


@torch.no_grad()
def judge(block: Block, trials: Sequence[tuple[Mapping[str, Solution], Mapping[str, Tensor]]]) -> list[float]:
    """Relative squared error of the block's output in each trial, on its first calibration tokens.

    Args:
        trials: solutions of layers, and values of parameters that stay dense by their names below the block.
    """
    sums = torch.zeros(len(trials) + 1, dtype=torch.float64).to(processes().device)
    for i in range(min(JUDGED, len(block))):
        dense = block.run(i)
        sums[-1] += dense.float().square().sum()
        for number, (solutions, parameters) in enumerate(trials):
            with _trying(block, {name: found.encoded for name, found in solutions.items()}):
                sums[number] += (block.run(i, parameters) - dense).float().square().sum()
    *lost, total = reduce(sums, reduction="sum").tolist()  # pyright: ignore
    return [value / max(total, torch.finfo(torch.float64).tiny) for value in lost]


@contextmanager
def _trying(block: Block, encoded: Mapping[str, Encoded]) -> Iterator[None]:
    """Inside, the block's layers are encoded ones."""
    kept = {name: block.module.get_submodule(_below(block, name)) for name in encoded}
    try:
        for name, (encoding, tensors) in encoded.items():
            encode_layer(block.module, _below(block, name), encoding, tensors)
        yield
    finally:
        for name, module in kept.items():
            set_module(block.module, _below(block, name), module)


def _below(block: Block, name: str) -> str:
    return name.removeprefix(f"{block.name}.")


def _noted(solutions: Mapping[str, Solution], note: str) -> dict[str, Solution]:
    """The same, with a note on the block's first layer."""
    first = next(iter(solutions))
    return {
        name: dataclasses.replace(found, notes=(*found.notes, note)) if name == first else found
        for name, found in solutions.items()
    }
