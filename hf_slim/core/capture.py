"""What enters a model's blocks: hidden states and the other arguments, caught by a forward pass that stops there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_slim.core.forward import run_on
from hf_slim.core.parallel import processes
from hf_slim.core.statistics import StopForward

BATCH_TOKENS = 2048  # tokens that go through a block at once: enough for full speed, little memory


@dataclass
class BlockInput:
    """What one batch brings to the blocks: the hidden state, and each block's other arguments."""

    hidden: Tensor
    by_keyword: bool
    args: dict[str, tuple[Any, ...]]
    kwargs: dict[str, dict[str, Any]]

    def call(self, name: str, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of block `name` for this hidden state."""
        if self.by_keyword:
            return self.args[name], {"hidden_states": hidden} | self.kwargs[name]
        return (hidden, *self.args[name]), self.kwargs[name]


def capture(model: nn.Module, blocks: Sequence[str], batches: Sequence[Tensor]) -> list[BlockInput]:
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


def own_share(windows: Tensor) -> list[Tensor]:
    """This process's windows, in batches."""
    state = processes()
    own = windows[state.process_index :: state.num_processes]
    return list(own.split(max(1, BATCH_TOKENS // windows.shape[1])))


def _record(model: nn.Module, blocks: Sequence[str], batch: Tensor, last: str) -> dict[str, Any]:
    """Arguments that each of `blocks` is handed, in a pass that ends before block `last`."""
    seen: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(_recorder(seen, name, name == last), with_kwargs=True)
        for name in blocks
    ]
    try:
        with suppress(StopForward):
            run_on(model, batch)
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


def _block_input(seen: Mapping[str, Any], blocks: Sequence[str], same: bool) -> BlockInput:
    first_args, first_kwargs = seen[blocks[0]]
    by_keyword = not first_args
    args, kwargs = {}, {}
    for name in blocks:
        own_args, own_kwargs = seen[blocks[0]] if same else seen[name]
        args[name] = () if by_keyword else own_args[1:]
        kwargs[name] = {key: value for key, value in own_kwargs.items() if not (by_keyword and key == "hidden_states")}
    hidden = first_kwargs["hidden_states"] if by_keyword else first_args[0]
    return BlockInput(hidden, by_keyword, args, kwargs)


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
