"""The loop of the methods that tune a block: rounded weights learn to make it put out what the dense block did.

    minimise over θ   L(θ) = Σ_x |f(x; W_q(θ)) - y(x)|² / Σ_x |y(x)|²

f is the block, x [windows, length, width] what reaches it through the compressed blocks before it, y what the dense
model has there, W_q(θ) the block's weights on their grids, differentiable straight through the rounding (`soft.py`).
An iteration takes one batch, in an order drawn anew, by the seed, for every pass over the data; learning rates fall
linearly to zero. Methods differ in the optimizer that moves the weights; the scales learn by Adam on their logarithms,
and with them the block's norms and biases.

The iterate that is kept is the best of three: before, halfway and at the end, L is measured on a fixed eighth of the
batches (four at most). If nothing beats the start, the block stays as it was, and says so.

Under `accelerate launch` every process draws batches from its own windows, and gradients are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_slim.core.context import Context
from hf_slim.core.layers import plan_targets
from hf_slim.core.report import StageReport
from hf_slim.core.select import Layer
from hf_slim.core.swap import densify, get_keep, get_weight
from hf_slim.core.walk import Block, Solution, Statistics, walk
from hf_slim.encodings import Affine
from hf_slim.encodings.modules import EncodedModule
from hf_slim.quantization import gptq, rtn
from hf_slim.quantization.soft import Dense, Soft, Start, begin

# Of Adam's averages: memories as short as the training. One pass in block 7 of SmolLM2-135M at 3 bits takes the
# held-out error of the block's output to 0.266 with these, to 0.280 with PyTorch's defaults.
BETAS = (0.3, 0.9)
_JUDGES = 4


class TuningConfig(gptq.Config):
    """Options that methods which tune blocks share."""

    start: Literal["gptq", "rtn"] = Field("gptq", description="what is tuned: GPTQ's codes, or those of rounding")
    iterations: int = Field(32, ge=0, description="steps a block")
    batch_tokens: int = Field(1024, ge=1, description="tokens in a step, whole windows")
    scale_rate: float = Field(0.005, ge=0, le=1, description="relative learning rate of the scales")
    dense_rate: float = Field(
        0.005, ge=0, le=1, description="relative learning rate of the block's norms and biases; 0 leaves them alone"
    )

    @model_validator(mode="after")
    def _whole_blocks(self) -> TuningConfig:
        if self.true_sequential:
            raise ValueError("true_sequential: a block is tuned as a whole; leave it out")
        if self.guided is not None:
            raise ValueError("guided: tuning follows the block's output, not the loss; leave it out")
        return self


@dataclass(frozen=True)
class Tuned:
    """L on the judged batches, before and after; equal if the start was kept."""

    before: float
    after: float


def tune(
    block: Block,
    parts: Mapping[str, nn.Module],
    optimizers: Sequence[Optimizer],
    iterations: int,
    seed: int,
) -> Tuned:
    """Train parts of a block, and leave them at the best iterate judged.

    Args:
        block: with targets.
        parts: {parameter's name below the block: what gives its value}.
        optimizers: of the parts' parameters.
        iterations: steps.
        seed: of the order of the batches.
    """
    learning = [p for part in parts.values() for p in part.parameters()]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    judged = range(0, len(block), max(1, -(-len(block) // min(_JUDGES, -(-len(block) // 8)))))
    before = best = _loss(block, parts, judged)
    kept = [p.detach().clone() for p in learning]
    batches = _order(len(block), seed)
    for t in range(iterations):
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * (1 - t / iterations)
        _step(block, parts, next(batches), learning)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            for part in parts.values():
                if isinstance(part, Soft):
                    part.confine()
        if t + 1 in (iterations // 2, iterations):
            loss = _loss(block, parts, judged)
            if loss < best:
                best, kept = loss, [p.detach().clone() for p in learning]
    with torch.no_grad():
        for parameter, value in zip(learning, kept, strict=True):
            parameter.copy_(value)
    return Tuned(before, best)


def _order(count: int, seed: int) -> Iterator[int]:
    """Numbers of batches, every pass in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _computed(block: Block, parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """What the block computes with, in the dtype that it computes in."""
    values = {}
    for name, part in parts.items():
        own = block.module.get_submodule(name.rpartition(".")[0])
        value = part().to(block.module.get_parameter(name).dtype)
        values[name] = value.T if isinstance(own, Conv1D) and value.dim() == 2 else value
    return values


def _squared(out: Tensor, target: Tensor) -> Tensor:
    return (out.float() - target.float()).square().sum()


@torch.no_grad()
def _loss(block: Block, parts: Mapping[str, nn.Module], judged: Sequence[int]) -> float:
    """L on the judged batches of all processes."""
    values = _computed(block, parts)
    lost = sum(_squared(block.run(i, values), block.target(i)) for i in judged)
    power = sum(block.target(i).float().square().sum() for i in judged)
    lost, power = reduce(torch.stack([lost, power]), reduction="sum").tolist()  # pyright: ignore
    return lost / power if power > 0 else lost


@torch.enable_grad()
def _step(block: Block, parts: Mapping[str, nn.Module], i: int, learning: Sequence[nn.Parameter]) -> None:
    """Gradients of one batch's loss, averaged over all processes; none for experts that no token was routed to."""
    loss = _squared(block.run(i, _computed(block, parts)), block.target(i))
    slopes = torch.autograd.grad(loss, learning, allow_unused=True)
    several = PartialState().num_processes > 1
    for p, slope in zip(learning, slopes, strict=True):
        if several:
            slope = reduce(torch.zeros_like(p) if slope is None else slope, reduction="mean")
        p.grad = slope  # pyright: ignore


Optimize = Callable[[list[nn.Parameter]], Optimizer]


def tune_blocks(
    model: PreTrainedModel, method: str, config: TuningConfig, context: Context, optimize: Optimize
) -> StageReport:
    """Find a start for every layer, then tune block by block. Layers outside of blocks stay at their start.

    Args:
        method: its address.
        optimize: makes what moves the weights' positions `Soft.u`.
    """
    chosen = plan_targets(model, method, config)
    windows = context.tokens("calibration")
    stored = {name: parameter.dtype for name, parameter in model.named_parameters()}
    layers = {layer.name: layer for layer in chosen if layer.kind != "embedding"}
    tables = [layer for layer in chosen if layer.kind == "embedding"]
    rows = gptq.encode_tables(model, tables, config, windows, context.progress)
    tuner = _Tuner(model, layers, config, context.seed, stored, optimize)
    rows += walk(
        model, list(layers.values()), windows, tuner.solve, context, hessians=config.start == "gptq",
        reference=True, batch_tokens=config.batch_tokens,
    )  # fmt: skip
    return StageReport(layers=rows, notes=[f"{row.name}: {note}" for row in rows for note in row.notes])


@dataclass(frozen=True)
class _Tuner:
    """What stays the same from block to block. `stored`: dtypes that parameters are stored in."""

    model: nn.Module
    layers: Mapping[str, Layer]
    config: TuningConfig
    seed: int
    stored: Mapping[str, torch.dtype]
    optimize: Optimize

    def solve(self, statistics: Mapping[str, Statistics], block: Block | None) -> dict[str, Solution]:
        if block is None:
            found = self._start(statistics, list(statistics))
            return {name: _noted(solution, "outside of blocks: not tuned") for name, solution in found.items()}
        found = self._start(statistics, [n for n in self.layers if n.startswith(f"{block.name}.")])
        starts = {name: self._begin(name, solution) for name, solution in found.items()}
        soft = {f"{name.removeprefix(block.name + '.')}.weight": Soft(s) for name, s in starts.items()}
        dense = self._dense(block)
        optimizers = self._optimizers([*soft.values()], [*dense.values()])
        tuned = tune(block, soft | dense, optimizers, self.config.iterations, self.seed)
        if not tuned.after < tuned.before:
            return {name: _noted(solution, "tuning found nothing better") for name, solution in found.items()}
        for name, part in dense.items():
            block.put(name, part().detach().to(part.dtype))
        measured = {"block_error_before": tuned.before, "block_error": tuned.after}
        return {
            name: self._end(solution, starts[name], part, measured)
            for (name, solution), part in zip(found.items(), soft.values(), strict=True)
        }

    def _start(self, statistics: Mapping[str, Statistics], names: list[str]) -> dict[str, Solution]:
        if self.config.start == "gptq":
            return gptq.solve(self.model, self.layers, statistics, self.config)
        found = {}
        for name in names:
            module = self.model.get_submodule(name)
            encoded = rtn.encode(get_weight(module), self.layers[name], self.config, get_keep(module))
            found[name] = Solution(encoded, {})
        return found

    def _begin(self, name: str, solution: Solution) -> Start:
        module = self.model.get_submodule(name)
        start = begin(solution, get_weight(module), get_keep(module))
        if isinstance(module, EncodedModule):
            densify(self.model, name)
        return start

    def _optimizers(self, soft: list[Soft], dense: list[Dense]) -> list[Optimizer]:
        groups = [{"params": [part.scales.stretch for part in soft], "lr": self.config.scale_rate}]
        groups += [{"params": [part.shift for part in dense], "lr": self.config.dense_rate}] if dense else []
        return [self.optimize([part.u for part in soft]), Adam(groups, betas=BETAS, fused=True)]

    def _dense(self, block: Block) -> dict[str, Dense]:
        if self.config.dense_rate == 0:
            return {}
        learning = {name: p for name, p in block.module.named_parameters() if p.dim() == 1}
        return {name: Dense(p.data, self.stored[f"{block.name}.{name}"]) for name, p in learning.items()}

    def _end(self, solution: Solution, start: Start, part: Soft, measured: dict[str, float]) -> Solution:
        encoding = solution.encoded[0]
        assert isinstance(encoding, Affine)
        tensors = encoding.pack(*part.chosen(), None if encoding.survivors is None else start.keep)
        return Solution((encoding, tensors), solution.metrics | measured, solution.notes)


def _noted(solution: Solution, note: str) -> Solution:
    return replace(solution, notes=(*solution.notes, note))
