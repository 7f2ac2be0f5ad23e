"""The one loop over blocks: it brings calibration statistics to a solver, one block at a time.

For each block: run the calibration windows through it and gather H = 2/n XᵀX of the inputs of the layers that the stage
will replace; let the stage replace them; run the windows again, so that the next block sees what the compressed
blocks put out. Layers outside any block (heads, poolers) come last, through the whole model.

A solver may ask for more than H: `Block` lets it run the block and compare with what the dense model's block puts out.
Under `accelerate launch` each process runs its share of the windows and the sums are reduced over all of them. A
finished block can be kept on disk: a second walk restores it instead of solving it again, with the very same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from hf_slim.core.blocks import BlockStore
from hf_slim.core.capture import BlockInput, capture, own_share
from hf_slim.core.context import Context
from hf_slim.core.errors import DataError, ModelError
from hf_slim.core.forward import evaluating, run_on
from hf_slim.core.layers import Encoded, put_layer
from hf_slim.core.removal import Removal, carry_out
from hf_slim.core.report import LayerReport
from hf_slim.core.select import Layer, find_stacks
from hf_slim.core.statistics import Statistics, StopForward, Sums, gather
from hf_slim.core.units import Units
from hf_slim.encodings.modules import cache_decoded

__all__ = ["Block", "Removal", "Solution", "Solver", "Statistics", "walk"]


@dataclass(frozen=True)
class Solution:
    """What a solver chose for a layer."""

    encoded: Encoded
    metrics: dict[str, float]
    notes: tuple[str, ...] = ()


class Block:
    """The block in hand, for solvers that judge its output. Batches hold about 2048 tokens each; `len` counts them.

    Attributes:
        name: of the block in the model.
        module: the block itself.
    """

    def __init__(self, name: str, module: nn.Module, batches: Sequence[BlockInput]):
        self.name, self.module = name, module
        self._batches = batches
        self._targets: list[Tensor] = []
        self._originals: list[Tensor] = []
        self.written: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self._batches)

    def inputs(self, i: int) -> Float[Tensor, "windows length width"]:
        """What enters the block in the model as compressed so far."""
        return self._batches[i].hidden

    def target(self, i: int) -> Float[Tensor, "windows length width"]:
        """What the dense model's block puts out for the dense model's own input; needs `reference=True`."""
        return self._targets[i]

    def run(self, i: int, parameters: Mapping[str, Tensor] | None = None) -> Float[Tensor, "windows length width"]:
        """What the block puts out now for `inputs(i)`; differentiable under `torch.enable_grad()`.

        Args:
            parameters: {name below the block: tensor} to compute with in place of the module's own.
        """
        return self._run(i, self.inputs(i), parameters)

    def run_original(self, i: int) -> Float[Tensor, "windows length width"]:
        """What the block puts out now for what enters it in the dense model; needs `reference=True`."""
        return self._run(i, self._originals[i])

    def put(self, name: str, value: Tensor) -> None:
        """Change a parameter that stays dense (a norm's weight, a bias); a resumed walk changes it too.

        Args:
            name: below the block.
        """
        self.module.get_parameter(name).data.copy_(value)
        self.written[f"{self.name}.{name}"] = value

    def _run(self, i: int, hidden: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        args, kwargs = self._batches[i].call(self.name, hidden)
        if parameters is None:
            out = self.module(*args, **kwargs)
        else:
            out = functional_call(self.module, dict(parameters), args, kwargs)
        return out[0] if isinstance(out, tuple) else out

    def _follow(self, dense: list[Tensor]) -> list[Tensor]:
        """Run the dense model's hidden states on, while the block is still dense."""
        self._originals, self._targets = dense, [self._run(i, hidden) for i, hidden in enumerate(dense)]
        return self._targets

    def _observe(self, sums: Sums) -> None:
        """Run the block for what its layers are fed."""
        for i in range(len(self)):
            sums.begin()
            with suppress(StopForward):
                self.run(i)

    def _advance(self) -> None:
        """Run the block; its outputs become the inputs of the next one."""
        cache_decoded(self.module)
        try:
            for i, batch in enumerate(self._batches):
                batch.hidden = self.run(i)
                if not torch.isfinite(batch.hidden).all():
                    raise ModelError(f"{self.name} puts out NaN or infinite values for calibration batch {i}")
        finally:
            cache_decoded(self.module, False)


Solver = Callable[[Mapping[str, Statistics], Block | None], Mapping[str, Solution | Removal]]


@torch.no_grad()
def walk(
    model: nn.Module,
    layers: Sequence[Layer],
    windows: Int[Tensor, "samples length"],
    solve: Solver,
    context: Context,
    *,
    hessians: bool = True,
    squares: bool = False,
    reference: bool = False,
    sequential: bool = False,
    weights: Mapping[str, Sequence[Tensor]] | None = None,
    batch_tokens: int | None = None,
    units: Sequence[Units] = (),
) -> list[LayerReport]:
    """Replace layers block by block, each solved from the inputs that it will really see.

    Args:
        model: changed in place.
        layers: the layers to replace.
        windows: calibration tokens.
        solve: gets the statistics of the block's layers, and the block (None for layers outside any); returns what
            replaces them (a layer may be left out), or which of the units that they read go.
        context: progress bars, and where finished blocks are kept.
        hessians: gather H; without it `solve` is handed no statistics for blocks.
        squares: of H, gather the diagonal alone, which costs next to nothing.
        reference: run the dense model's hidden states along, for `Block.target`.
        sequential: solve a block's layers one after the other in the order in which they run, those with the same input
            together, each from inputs that passed the compressed layers before it ("true sequential").
        weights: weights of the tokens, see `statistics.Sums`; batches are those of `capture.own_share`.
        batch_tokens: smaller batches than those; not together with `weights`.
        units: those that `solve` may remove, so that a resumed walk removes them again.

    Raises:
        ModelError: a layer was never reached, or NaN or infinite values turn up: its block is left as it was.
        DataError: no windows.
    """
    if windows.numel() == 0:
        raise DataError("calibration data is empty; give at least one window of tokens")
    batches = own_share(windows)
    if batch_tokens is not None:
        size = max(1, batch_tokens // windows.shape[1])
        batches = [part for batch in batches for part in batch.split(size)]
    readers = {found.reader: found for found in units}
    replacing = _Replacing(
        model, {layer.name: layer for layer in layers}, solve, BlockStore(context.blocks), weights, squares, readers
    )
    with evaluating(model):
        for stack in find_stacks(model):
            wanted = {b: [n for n in replacing.layers if n.startswith(f"{b}.")] for b in stack.blocks}
            if not any(wanted.values()):
                continue
            inputs = capture(model, stack.blocks, batches)
            dense = [batch.hidden for batch in inputs]
            for name in context.progress.track(stack.blocks, stack.name):
                block = Block(name, model.get_submodule(name), inputs)
                if reference:
                    dense = block._follow(dense)
                if wanted[name]:
                    replacing.block(block, wanted[name], hessians, sequential)
                if name != stack.blocks[-1]:
                    block._advance()
        replacing.outside([name for name, layer in replacing.layers.items() if layer.block is None], batches)
    return replacing.rows


@dataclass
class _Replacing:
    """What stays the same while one block after the other is replaced, and what was reported so far."""

    model: nn.Module
    layers: dict[str, Layer]
    solve: Solver
    store: BlockStore
    weights: Mapping[str, Sequence[Tensor]] | None
    squares: bool
    units: Mapping[str, Units]
    rows: list[LayerReport] = field(default_factory=list)

    def block(self, block: Block, names: list[str], hessians: bool, sequential: bool) -> None:
        """Solve one block's layers, or restore them from an earlier walk."""
        rows = self.store.restore(block.name, self.model, self.units)
        if rows is None:
            groups = _in_order(self.model, block, names) if sequential else [names]
            encoded: dict[str, Encoded] = {}
            removals: list[Removal] = []
            rows = []
            for group in groups:
                known = self._observe(group, block._observe) if hessians else {}
                rows += self._put(self.solve(known, block), encoded, removals)
            self.store.save(block.name, rows, encoded, block.written, removals)
        self.rows += rows

    def outside(self, names: list[str], batches: Sequence[Tensor]) -> None:
        """Solve the layers that lie in no block, through the whole model."""
        if not names:
            return
        rows = self.store.restore("outside", self.model)
        if rows is None:
            encoded: dict[str, Encoded] = {}
            known = self._observe(names, partial(_run_all, self.model, batches), guided=False)
            rows = self._put(self.solve(known, None), encoded, [])
            self.store.save("outside", rows, encoded, {})
        self.rows += rows

    def _observe(self, names: list[str], run: Callable[[Sums], None], guided: bool = True) -> dict[str, Statistics]:
        with gather(self.model, names, self.weights if guided else None, self.squares) as sums:
            run(sums)
        missed = [name for name in names if name not in sums.sums and not self.layers[name].routed]
        if missed:
            raise ModelError(
                [f"{name} was never reached by the calibration data; name it in layers.exclude" for name in missed]
            )
        if sums.broken:
            raise ModelError(
                [f"{name} is fed NaN or infinite values by calibration batch {i}" for name, i in sums.broken.items()]
            )
        return sums.finish({name: self.layers[name].cols for name in names})

    def _put(
        self,
        solutions: Mapping[str, Solution | Removal],
        encoded: dict[str, Encoded],
        removals: list[Removal],
    ) -> list[LayerReport]:
        rows = []
        for name, found in solutions.items():
            if isinstance(found, Removal):
                removals.append(found)
                rows += carry_out(self.model, found, self.layers[name].dtype)
                continue
            encoded[name] = found.encoded
            layer = self.layers[name]
            rows.append(put_layer(self.model, layer, found.encoded, metrics=found.metrics, notes=found.notes))
        return rows


def _in_order(model: nn.Module, block: Block, names: list[str]) -> list[list[str]]:
    """Names in the order in which the layers run, those that are handed the same tensor together."""
    seen: dict[int, list[str]] = {}
    kept: list[Any] = []  # so that no tensor's memory, and with it its id, is used again

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            kept.append(args[0])
            seen.setdefault(id(args[0]), []).append(name)

        return note

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        block.run(0)
    finally:
        for handle in handles:
            handle.remove()
    reached = {name for group in seen.values() for name in group}
    rest = [name for name in names if name not in reached]
    return [*seen.values(), *([rest] if rest else [])]


def _run_all(model: nn.Module, batches: Sequence[Tensor], sums: Sums) -> None:
    for batch in batches:
        sums.begin()
        with suppress(StopForward):
            run_on(model, batch)
