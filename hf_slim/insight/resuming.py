"""Running a model again from one of its blocks on: what ran before it is not computed twice.

What every block puts out for a batch is kept. A later run in which only block b and its successors changed hands the
kept outputs on in place of computing the blocks before b; all around them (embeddings, masks, norms, the head) runs as
always, so no architecture needs to be known. A model in which that does not give the same logits (blocks that run
twice, or that share state beside their outputs) is run from its beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hf_slim.core.forward import logits_of
from hf_slim.core.probe import FAILURES


class Resumable:
    """A model that has run on one batch, and can run on it again from any block.

    Args:
        model: as it is now; must be in evaluation mode, without gradients.
        blocks: names of the blocks of all stacks.
        ids: the batch.

    Attributes:
        logits: of the model as it was.
        order: blocks in the order in which they ran; empty when the model can only run from its beginning.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], ids: Int[Tensor, "windows length"]):
        self._model, self._ids = model, ids
        self._outputs: dict[str, Any] = {}
        self.order: list[str] = []
        self.logits = self._record(blocks)
        if len(set(self.order)) < len(self.order) or (self.order and not self._gives_the_same()):
            self.order, self._outputs = [], {}

    def run(self, changed: Sequence[str | None]) -> Float[Tensor, "*shape classes"]:
        """Logits of the model as it is now.

        Args:
            changed: blocks outside of which nothing has; None stands for a change outside of blocks.
        """
        first = min(self.order.index(block) if block in self.order else 0 for block in changed)
        known = self.order[:first]
        with self._skipping(known):
            return logits_of(self._model, self._ids)

    def _record(self, blocks: Sequence[str]) -> Tensor:
        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                self.order.append(name)
                self._outputs[name] = output

            return hook

        handles = [self._model.get_submodule(name).register_forward_hook(keep(name)) for name in blocks]
        try:
            return logits_of(self._model, self._ids)
        finally:
            for handle in handles:
                handle.remove()

    def _gives_the_same(self) -> bool:
        try:
            again = self.run(self.order[-1:])
        except FAILURES:
            return False
        return again.shape == self.logits.shape and torch.allclose(again, self.logits, rtol=1e-3, atol=1e-4)

    @contextmanager
    def _skipping(self, names: Sequence[str]) -> Iterator[None]:
        """Inside, those blocks put out what they put out before, whatever they are handed."""
        skipped = [(self._model.get_submodule(name), self._outputs[name]) for name in names]
        before = [module.__dict__.get("forward") for module, _ in skipped]
        try:
            for module, output in skipped:
                module.__dict__["forward"] = _constant(output)
            yield
        finally:
            for (module, _), forward in zip(skipped, before, strict=True):
                if forward is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = forward


def _constant(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output
