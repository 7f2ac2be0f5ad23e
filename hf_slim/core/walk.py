"""The one loop over blocks: it brings calibration statistics to a solver, one block at a time.

For each block: run the calibration windows through it and gather H = 2/n XᵀX of the inputs of the layers that the stage
will replace; let the stage replace them; run the windows again, so that the next block sees what the compressed
blocks put out. Layers outside any block (heads, poolers) come last, through the whole model.

Layers fed by the same tensor (q, k and v; gate and up) share one statistic, computed once. Under `accelerate launch`
each process runs its share of the windows and the sums are reduced over all of them. A finished block can be kept on
disk: a second walk restores it instead of solving it again and goes on with the very same numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from jaxtyping import Float, Int
from torch import Tensor, nn

from hf_slim.core.blocks import BlockStore
from hf_slim.core.context import Context
from hf_slim.core.errors import DataError, ModelError
from hf_slim.core.forward import device_of, evaluating
from hf_slim.core.layers import Encoded, put_layer
from hf_slim.core.report import LayerReport
from hf_slim.core.select import Layer, find_stacks

BATCH_TOKENS = 2048  # tokens that go through a block at once: enough for full speed, little memory

TILE = 384  # columns of a Hessian computed together; a quarter to a half of it need not be computed at all


@dataclass(frozen=True)
class Statistics:
    """What the walk knows about a layer's input.

    Args:
        hessian: H = 2/n sum over tokens of x xᵀ, [cols, cols], float32. One object for all layers with the same input.
        tokens: n, how many tokens it comes from.
    """

    hessian: Float[Tensor, "cols cols"]
    tokens: int


@dataclass(frozen=True)
class Solution:
    """What a solver chose for a layer."""

    encoded: Encoded
    metrics: dict[str, float]
    notes: tuple[str, ...] = ()


Solver = Callable[[Mapping[str, Statistics]], Mapping[str, Solution]]


class StopForward(Exception):
    """Ends a forward pass once the wanted input has been seen. Private: nothing else may catch it."""


@torch.no_grad()
def walk(
    model: nn.Module, layers: Sequence[Layer], windows: Int[Tensor, "samples length"], solve: Solver, context: Context
) -> list[LayerReport]:
    """Replace layers block by block, each solved from the inputs that it will really see.

    Args:
        model: changed in place.
        layers: the layers to replace.
        windows: calibration tokens.
        solve: gets the statistics of the block's layers, returns what replaces them (a layer may be left out).
        context: progress bars, and where finished blocks are kept.

    Raises:
        ModelError: a layer was never reached, or NaN or infinite values turn up: its block is left as it was.
        DataError: no windows.
    """
    if windows.numel() == 0:
        raise DataError("calibration data is empty; give at least one window of tokens")
    batches = _own_share(windows)
    store = BlockStore(context.blocks)
    todo = {layer.name: layer for layer in layers}
    rows: list[LayerReport] = []
    with evaluating(model):
        for stack in find_stacks(model):
            wanted = {b: [n for n in todo if n.startswith(f"{b}.")] for b in stack.blocks}
            if not any(wanted.values()):
                continue
            inputs = _capture(model, stack.blocks, batches)
            for block in context.progress.track(stack.blocks, stack.name):
                names = wanted[block]
                run = _BlockRun(model.get_submodule(block), block, inputs)
                if names:
                    rows += _replace(model, block, names, todo, run.observe, solve, store)
                if block != stack.blocks[-1]:
                    run.advance()
        outside = [name for name, layer in todo.items() if layer.block is None]
        if outside:
            rows += _replace(model, "outside", outside, todo, partial(_run_all, model, batches), solve, store)
    return rows


def _replace(
    model: nn.Module,
    label: str,
    names: Sequence[str],
    layers: Mapping[str, Layer],
    observe: Callable[[_Sums], None],
    solve: Solver,
    store: BlockStore,
) -> list[LayerReport]:
    """Solve one block's layers, or restore them from an earlier walk."""
    rows = store.restore(label, model)
    if rows is not None:
        return rows
    with _gather(model, names) as sums:
        observe(sums)
    missed = [name for name in names if name not in sums.sums]
    if missed:
        raise ModelError(
            [f"{name} was never reached by the calibration data; name it in layers.exclude" for name in missed]
        )
    known = sums.finish()
    bad = [name for name, found in known.items() if not torch.isfinite(found.hessian).all()]
    if bad:
        raise ModelError([f"{name} is fed NaN or infinite values by the calibration data" for name in bad])
    solutions = solve(known)
    rows = [
        put_layer(model, layers[name], found.encoded, metrics=found.metrics, notes=found.notes)
        for name, found in solutions.items()
    ]
    store.save(label, rows, {name: found.encoded for name, found in solutions.items()})
    return rows


class _Sums:
    """Running sums of x xᵀ for the layers of one block."""

    def __init__(self, names: Sequence[str]) -> None:
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        self._names = frozenset(names)
        self._pending: set[str] = set()
        self._last: tuple[Tensor, Tensor] | None = None  # input seen last, and the sum it went into

    def begin(self) -> None:
        """A new batch starts."""
        self._pending = set(self._names)

    def add(self, name: str, x: Tensor) -> None:
        """Add the tokens of one batch. Layers that are handed the same tensor share one sum.

        Raises:
            StopForward: this was the last input that the batch was wanted for.
        """
        flat = x.detach().reshape(-1, x.shape[-1])
        self.tokens[name] = self.tokens.get(name, 0) + len(flat)
        shared = self._last is not None and self._last[0] is x
        if name not in self.sums:
            fresh = torch.zeros(flat.shape[1], flat.shape[1], device=flat.device)
            self.sums[name] = self._last[1] if shared and self._last is not None else fresh
        if not shared:
            add_upper(self.sums[name], flat.float())
        self._last = (x, self.sums[name])
        self._pending.discard(name)
        if not self._pending:
            raise StopForward

    def finish(self) -> dict[str, Statistics]:
        """H = 2/n times the sums, over all processes."""
        counts = torch.tensor([self.tokens[name] for name in self.sums]).to(PartialState().device)
        counts = reduce(counts, reduction="sum").tolist()  # pyright: ignore
        hessians: dict[int, Tensor] = {}
        found = {}
        for (name, total), count in zip(self.sums.items(), counts, strict=True):
            if id(total) not in hessians:
                full = torch.triu(total) + torch.triu(total, 1).T
                hessians[id(total)] = reduce(full, reduction="sum") * (2.0 / count)  # pyright: ignore
            found[name] = Statistics(hessians[id(total)], int(count))
        return found


def add_upper(H: Float[Tensor, "cols cols"], x: Float[Tensor, "tokens cols"]) -> None:
    """H += xᵀ x, above the diagonal (and in some tiles below it): the rest is a mirror image, not worth computing."""
    tiles = range(0, H.shape[0], TILE)
    for i in tiles:
        H[i : i + TILE, i:].addmm_(x[:, i : i + TILE].T, x[:, i:])


@contextmanager
def _gather(model: nn.Module, names: Sequence[str]) -> Iterator[_Sums]:
    sums = _Sums(names)

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args: sums.add(name, args[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _BlockInput:
    """What one batch brings to the blocks: the hidden state, and each block's other arguments."""

    hidden: Tensor
    by_keyword: bool
    args: dict[str, tuple[Any, ...]]
    kwargs: dict[str, dict[str, Any]]


class _BlockRun:
    """Runs all batches through one block."""

    def __init__(self, block: nn.Module, name: str, inputs: Sequence[_BlockInput]):
        self.block, self.name, self.inputs = block, name, inputs

    def observe(self, sums: _Sums) -> None:
        """Run the block for what its layers are fed."""
        for batch in self.inputs:
            sums.begin()
            with suppress(StopForward):
                self._run(batch)

    def advance(self) -> None:
        """Run the block; its outputs become the inputs of the next one."""
        for number, batch in enumerate(self.inputs):
            out = self._run(batch)
            batch.hidden = out[0] if isinstance(out, tuple) else out
            if not torch.isfinite(batch.hidden).all():
                raise ModelError(f"{self.name} puts out NaN or infinite values for calibration batch {number}")

    def _run(self, batch: _BlockInput) -> Any:
        args, kwargs = batch.args[self.name], batch.kwargs[self.name]
        if batch.by_keyword:
            return self.block(*args, hidden_states=batch.hidden, **kwargs)
        return self.block(batch.hidden, *args, **kwargs)


def _capture(model: nn.Module, blocks: Sequence[str], batches: Sequence[Tensor]) -> list[_BlockInput]:
    """What enters the first block, and every block's other arguments, batch by batch.

    A few tokens run through all blocks first. When all are handed the same arguments, the batches stop at the first
    block; when not (sliding windows on some layers, position biases), they run through as well.
    """
    probe = _record(model, blocks, batches[0][:1, :8], blocks[-1])
    same = _all_same(probe, blocks)
    inputs = []
    for batch in batches:
        seen = _record(model, blocks[:1] if same else blocks, batch, blocks[0] if same else blocks[-1])
        inputs.append(_block_input(seen, blocks, same))
    return inputs


def _record(model: nn.Module, blocks: Sequence[str], batch: Tensor, last: str) -> dict[str, Any]:
    """Arguments that each of `blocks` is handed, in a pass that ends before block `last`."""
    seen: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(_recorder(seen, name, name == last), with_kwargs=True)
        for name in blocks
    ]
    try:
        with suppress(StopForward):
            _forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _recorder(seen: dict[str, Any], name: str, stop: bool) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[name] = (args, kwargs)
        if stop:
            raise StopForward

    return hook


def _block_input(seen: Mapping[str, Any], blocks: Sequence[str], same: bool) -> _BlockInput:
    first_args, first_kwargs = seen[blocks[0]]
    by_keyword = not first_args
    args, kwargs = {}, {}
    for name in blocks:
        own_args, own_kwargs = seen[blocks[0]] if same else seen[name]
        args[name] = () if by_keyword else own_args[1:]
        kwargs[name] = {key: value for key, value in own_kwargs.items() if not (by_keyword and key == "hidden_states")}
    hidden = first_kwargs["hidden_states"] if by_keyword else first_args[0]
    return _BlockInput(hidden, by_keyword, args, kwargs)


def _all_same(seen: Mapping[str, Any], blocks: Sequence[str]) -> bool:
    """Whether every block was handed the very same objects as the first, its hidden state apart."""

    def others(name: str) -> list[Any]:
        args, kwargs = seen[name]
        return [*args[1:], *(value for key, value in sorted(kwargs.items()) if key != "hidden_states")]

    first = others(blocks[0])
    return all(
        len(others(name)) == len(first) and all(a is b for a, b in zip(others(name), first, strict=True))
        for name in blocks
    )


def _own_share(windows: Tensor) -> list[Tensor]:
    """This process's windows, in batches."""
    state = PartialState()
    own = windows[state.process_index :: state.num_processes]
    return list(own.split(max(1, BATCH_TOKENS // windows.shape[1])))


def _run_all(model: nn.Module, batches: Sequence[Tensor], sums: _Sums) -> None:
    for batch in batches:
        sums.begin()
        with suppress(StopForward):
            _forward(model, batch)


def _forward(model: nn.Module, ids: Tensor) -> None:
    """One pass without a cache (blocks run again and again) and, where possible, without computing all logits."""
    accepted = inspect.signature(model.forward).parameters
    options = {"use_cache": False} if "use_cache" in accepted else {}
    model(input_ids=ids.to(device_of(model)), **options)
