"""What the methods that tune rounded weights share: they make a block put out what the dense block did.

The loop is that of `core/tuning.py`; W(θ) are here the block's weights on their grids, differentiable straight through
the rounding (`soft.py`). Methods differ in the optimizer that moves the weights; the scales learn by Adam on their
logarithms, and with them the block's norms and biases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.optim import Adam, Optimizer
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.layers import plan_targets
from hf_slim.core.report import StageReport
from hf_slim.core.select import Layer
from hf_slim.core.swap import densify, get_keep, get_weight
from hf_slim.core.tuning import BETAS, Dense, dense_parts, tune
from hf_slim.core.walk import Block, Solution, Statistics, walk
from hf_slim.encodings import Affine
from hf_slim.encodings.modules import EncodedModule
from hf_slim.quantization import gptq, rtn
from hf_slim.quantization.soft import Soft, Start, begin


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
        dense = dense_parts(block, self.stored) if self.config.dense_rate else {}
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

    def _end(self, solution: Solution, start: Start, part: Soft, measured: dict[str, float]) -> Solution:
        encoding = solution.encoded[0]
        assert isinstance(encoding, Affine)
        tensors = encoding.pack(*part.chosen(), None if encoding.survivors is None else start.keep)
        return Solution((encoding, tensors), solution.metrics | measured, solution.notes)


def _noted(solution: Solution, note: str) -> Solution:
    return replace(solution, notes=(*solution.notes, note))
