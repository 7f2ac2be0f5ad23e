"""What pruning does to weights around an optimizer's step, whoever makes the step. `gradual.py` says when.

    before_step   scores see the gradients; pruned weights lose theirs, where the optimizer would let others feel them
                  (or get their dense values back, `shadow.py`)
    after_step    pruned weights are zero again, whatever momentum and decay did to them
    update        masks are taken anew from weights and scores

The state that weights do not hold themselves (scores, dense shadows, masks over frozen layers) is one flat mapping of
tensors, to be saved beside a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_slim.core.errors import ModelError
from hf_slim.encodings.packing import pack_mask, unpack_mask
from hf_slim.pruning.adapters import mask_adapters
from hf_slim.pruning.masks import drop
from hf_slim.pruning.scores import Score, add_movement, blend_taylor
from hf_slim.pruning.shadow import add_decay, mask_into
from hf_slim.pruning.targets import Target

Rank = Callable[..., dict[str, Tensor]]
"""rank(weights, sparsity, scores=...): masks of weights [rows, cols]; scores of their shapes, None for magnitudes."""


@dataclass(frozen=True)
class Memory:
    """What is remembered from step to step.

    Args:
        score: what ranks weights.
        smoothing: share of a Taylor score that a step leaves.
        decay: of pruned weights in the shadow; None for no shadow: pruned weights are gone.
    """

    score: Score = "magnitude"
    smoothing: float = 0.9
    decay: float | None = None


class Pruner:
    """Masks, scores and shadows of some matrices.

    Args:
        targets: what to prune, by name.
        rank: makes masks.
        memory: what is remembered.

    Attributes:
        keep: Bool[rows, cols] by name; empty before the first update.
        scores: float32 [rows, cols] by name; empty for magnitudes.
        dense: shadows [rows, cols] by name; empty without.
    """

    def __init__(self, targets: Mapping[str, Target], rank: Rank, memory: Memory):
        self.targets, self.rank, self.memory = dict(targets), rank, memory
        self.keep: dict[str, Tensor] = {}
        self.scores: dict[str, Tensor] = {}
        self.dense: dict[str, Tensor] = {}
        self._alive: dict[str, Tensor] = {}
        self._steps = 0  # whose gradients the scores have seen
        if memory.score != "magnitude":
            self.scores = {n: torch.zeros_like(t.weight, dtype=torch.float32) for n, t in self.targets.items()}
        if memory.decay is not None:
            self.dense = {name: target.weight.clone() for name, target in self.targets.items()}

    @property
    def remembers(self) -> bool:
        """Whether there is state beside the weights."""
        return bool(self.scores or self.dense or any(target.adapter is not None for target in self.targets.values()))

    @torch.no_grad()
    def update(self, sparsity: float, step: int) -> None:
        """Take masks from weights and scores, and apply them.

        Raises:
            ModelError: weights or scores that are not finite; says where and at which step.
        """
        weights = {name: self.dense.get(name, target.effective) for name, target in self.targets.items()}
        for what, tensors in (("", weights), ("'s score", self.scores)):
            if bad := [name for name, T in tensors.items() if not _is_finite(T)]:
                raise ModelError(
                    [f"{name}{what} holds NaN or infinite values at step {step}; training diverged" for name in bad]
                )
        scores = self.scores if self.scores and self._steps else None
        self._put(self.rank(weights, sparsity, scores=scores))
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Count weights that became zero by themselves as pruned, as a resumed run will."""
        self._alive = {}
        for name, keep in self.keep.items():
            alive = self.dense.get(name, self.targets[name].weight) != 0
            if not alive.any():  # it has yet to be trained
                continue
            keep.logical_and_(alive)
            if name in self.dense and not alive.all():
                self._alive[name] = alive

    @torch.no_grad()
    def before_step(self, *, scored: bool = True, cleared: bool = True) -> None:
        """With the gradients that the optimizer is about to use.

        Args:
            scored: they are fit to be scored.
            cleared: take those of pruned weights away. An optimizer that treats every weight by itself need not be
                spared them: after its step those weights are zero whatever it did.
        """
        if scored:
            self._score()
        for name, keep in self.keep.items():
            target = self.targets[name]
            gradient = target.gradient
            if name in self.dense:
                self._uncover(name, gradient)
            elif gradient is not None and cleared:
                drop(gradient, keep)

    def _uncover(self, name: str, gradient: Tensor | None) -> None:
        """Let the optimizer see the dense weights, and gradients with the decay of those that are masked."""
        target, D = self.targets[name], self.dense[name]
        if gradient is not None:
            if self.memory.decay:
                add_decay(gradient, target.weight, D, self.memory.decay)
            if (alive := self._alive.get(name)) is not None:
                drop(gradient, alive)
        self.dense[name] = target.exchange(D)

    @torch.no_grad()
    def after_step(self) -> None:
        """With the weights that the optimizer has moved."""
        for name, keep in self.keep.items():
            target = self.targets[name]
            if name in self.dense:
                if (alive := self._alive.get(name)) is not None:
                    drop(target.weight, alive)
                W = self.dense[name]
                mask_into(W, target.weight, keep)
                self.dense[name] = target.exchange(W)
            elif target.trained:
                drop(target.weight, keep)

    @torch.no_grad()
    def settle(self) -> None:
        """The masks of the weights as they are, whoever has put them there."""
        for name, target in self.targets.items():
            if target.adapter is None:
                self.keep[name] = target.weight != 0

    def freeze(self) -> None:
        """Masks will not change any more: forget scores and shadows."""
        self.scores, self.dense, self._alive = {}, {}, {}

    def tensors(self) -> dict[str, Tensor]:
        """The state, by names of its own."""
        kinds = {"score": self.scores, "dense": self.dense}
        named = {f"{kind}.{name}": T.contiguous() for kind, some in kinds.items() for name, T in some.items()}
        return named | {f"keep.{name}": pack_mask(keep.contiguous()) for name, keep in self.keep.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a state.

        Raises:
            ModelError: it is another model's, or was saved with other options.
        """
        own = {f"{kind}.{name}" for kind in self._kinds() for name in self.targets}
        if own - tensors.keys():
            raise ModelError(
                f"the checkpoint's pruning state lacks {len(own - tensors.keys())} of {len(own)} tensors, such as "
                f"{min(own - tensors.keys())}: it was saved with other layers, another score, or without shadow"
            )
        self._steps = 1
        for name, S in self.scores.items():
            S.copy_(tensors[f"score.{name}"])
        for name, D in self.dense.items():
            D.copy_(tensors[f"dense.{name}"])
        stored = {name: tensors[f"keep.{name}"] for name in self.targets}
        self._put({n: unpack_mask(packed, self.targets[n].weight.shape[1]) for n, packed in stored.items()})
        self.refresh()

    def _kinds(self) -> list[str]:
        return ["keep", *(["score"] if self.scores else []), *(["dense"] if self.dense else [])]

    def _put(self, masks: Mapping[str, Tensor]) -> None:
        for name, keep in masks.items():
            target = self.targets[name]
            # the strides of the weight: multiplying a transposed by a plain matrix would take several times as long
            self.keep[name] = torch.empty_like(target.weight, dtype=torch.bool).copy_(keep)
            if name in self.dense:
                target.weight.copy_(self.dense[name])
            drop(target.weight, self.keep[name])
            if target.adapter is not None:
                mask_adapters(target.adapter, self.keep[name])

    def _score(self) -> None:
        seen = False
        for name, S in self.scores.items():
            target = self.targets[name]
            if (gradient := target.gradient) is None:
                continue
            seen, W = True, self.dense.get(name, target.weight)
            if self.memory.score == "movement":
                add_movement(S, W, gradient)
            else:
                blend_taylor(S, W, gradient, self.memory.smoothing)
        self._steps += seen


def _is_finite(T: Tensor) -> bool:
    """Whether there is neither NaN nor infinity: a sum that is finite says so at a tenth of the time."""
    return bool(torch.isfinite(T.sum(dtype=torch.float32))) or bool(torch.isfinite(T).all())
