"""The Trainer's hooks of gradual pruning: when its parts (`Pruner`, schedule, learning rate cycles, checkpoint) act."""

from __future__ import annotations

import copy
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_slim.core.errors import PlanError
from hf_slim.core.experts import unfuse
from hf_slim.core.parallel import require_whole_weights
from hf_slim.core.units import Units, find_units
from hf_slim.pruning.adapters import is_plain_lora, unwrap
from hf_slim.pruning.checkpoint import folder_of, load_state, save_state
from hf_slim.pruning.cycles import cycles, install
from hf_slim.pruning.groups import prunable, survivors, unit_size, zero_biases
from hf_slim.pruning.pattern import block_of, column_problems
from hf_slim.pruning.pruner import Memory, Pruner, Rank
from hf_slim.pruning.schedule import Schedule, plan_schedule
from hf_slim.pruning.targets import Target, find_targets, make_dense

if TYPE_CHECKING:
    from hf_slim.pruning.gradual import Config

_ELEMENTWISE = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad)
"""Optimizers that move every weight by its own gradient alone."""

logger = logging.getLogger("hf_slim.pruning.gradual")


class PruningHooks(TrainerCallback, ExportableState):
    """Runs a `Pruner` through a training.

    Args:
        config: checked options.
        rank: makes masks; is handed the options and the groups of units besides.

    Attributes:
        held: layers that only keep the zeros that they have: where units go, those that are part of none.
    """

    def __init__(self, config: Config, rank: Rank):
        self.config, self._rank = config, rank
        self.schedule: Schedule | None = None
        self._groups: list[Units] = []
        self._pruner: Pruner | None = None
        self._checkpoint: str | None = None
        self.held: frozenset[str] = frozenset()

    @property
    def masks(self) -> dict[str, Tensor]:
        """keep, Bool[rows, cols] by layer; empty before training."""
        return {} if self._pruner is None else dict(self._pruner.keep)

    @property
    def targets(self) -> dict[str, Target]:
        """What is pruned, by layer; empty before training."""
        return {} if self._pruner is None else self._pruner.targets

    @property
    def sparsity(self) -> float:
        """Share of zeros among all weights that are being pruned, counted now; 0 before training."""
        pruned = [target for name, target in self.targets.items() if name not in self.held]
        counts = [(_zeros(target), target.weight.numel()) for target in pruned]
        return sum(zeros for zeros, _ in counts) / max(1, sum(total for _, total in counts))

    def report(self) -> dict[str, float]:
        """Share of zeros in each target layer, counted now."""
        return {name: _zeros(target) / target.weight.numel() for name, target in self.targets.items()}

    def finish(self) -> None:
        """Prune to the final sparsity now: for a training that was stopped before its schedule ended."""
        if self._pruner is None:
            raise PlanError("there is nothing to finish: training has not begun")
        self._pruner.update(self.config.final_sparsity, self.schedule.end if self.schedule else 0)
        self._pruner.freeze()
        self._zero_biases()

    def state(self) -> dict:
        """What the Trainer writes into trainer_state.json: the options, and where the rest of the state is."""
        options = self.config.model_dump(mode="json", exclude_unset=True)
        return {"args": {"config": options}, "attributes": {"_checkpoint": self._checkpoint}}

    def on_init_end(self, args, state, control, *, model=None, **kwargs):
        """Make layers that are stored sparse dense ones, before there is an optimizer."""
        if model is not None:
            make_dense(model, self.config.layers)

    def on_train_begin(self, args, state, control, *, model, lr_scheduler=None, **kwargs):
        """Check everything, then prune as far as the schedule is at this step: 0, or where a checkpoint left off."""
        config = self.config
        self.schedule = plan_schedule(
            state.max_steps,
            initial=config.initial_sparsity,
            final=config.final_sparsity,
            begin=config.begin,
            end=config.end,
            every=config.every,
            curve=config.schedule,
        )
        require_whole_weights("gradual pruning")
        targets = find_targets(model, config.layers)
        self._groups = _units(model, targets, config)
        if self._groups:
            members = {name for units in self._groups for name in (units.reader, *units.writers)}
            self.held = frozenset(name for name in targets.keys() - members if _zeros(targets[name]))
            targets = {name: target for name, target in targets.items() if name in members | self.held}
        if problems := _problems(targets, config):
            raise PlanError(problems)
        if config.lr_cycles:
            install(lr_scheduler, cycles(self.schedule.updates(), state.max_steps, config.lr_floor))
        memory = Memory(config.score, config.smoothing, config.decay if config.shadow else None)
        self._pruner = Pruner(targets, partial(self._rank, config=config, groups=self._groups), memory)
        self._begin(args, state)

    def on_pre_optimizer_step(self, args, state, control, *, optimizer=None, **kwargs):
        """Hand the gradients to the scores, and clear those of pruned weights if that makes a difference."""
        if self._pruner is not None:
            cleared = type(_innermost(optimizer)) not in _ELEMENTWISE
            self._pruner.before_step(scored=self._unscaled(args, optimizer), cleared=cleared)

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Set pruned weights back to zero."""
        if self._pruner is not None:
            self._pruner.after_step()

    def on_step_end(self, args, state, control, **kwargs):
        """Prune further when the schedule says so; the Trainer evaluates and saves only after this."""
        self._checkpoint = str(folder_of(args, state.global_step))
        if self.schedule is not None and self.schedule.is_update(state.global_step):
            self._update(state.global_step)

    def on_save(self, args, state, control, **kwargs):
        """Count weights that became zero by themselves as pruned from here on, as after a resume; save the rest."""
        if self._pruner is not None:
            self._pruner.refresh()
            if self._pruner.remembers and args.should_save:
                save_state(folder_of(args, state.global_step), self._pruner.tensors())

    def on_train_end(self, args, state, control, **kwargs):
        """Take the masks of the model that is handed over, and say so if it is less sparse than asked for."""
        if self._pruner is None:
            return
        self._pruner.settle()
        self._zero_biases()
        asked = self._asked()
        if self.sparsity < asked - self._rounding():
            logger.warning(
                "The trained model has sparsity %.4f, not %.4f: training stopped early, or load_best_model_at_end "
                "brought back a checkpoint from before the end of the schedule. The callback's finish() drops the rest "
                "at once.",
                self.sparsity,
                asked,
            )

    @torch.no_grad()
    def _zero_biases(self) -> None:
        """A unit that is gone puts out act(0)."""
        weights = {name: target.weight for name, target in self.targets.items()}
        biases = {name: target.bias for name, target in self.targets.items()}
        zero_biases(self._groups, weights, {name: bias for name, bias in biases.items() if bias is not None})

    def _begin(self, args: Any, state: Any) -> None:
        """Masks for the step at which training begins."""
        pruner, step = self._pruner, state.global_step
        if pruner is None or self.schedule is None:
            return
        name = type(self).__name__
        saved = (state.stateful_callbacks or {}).get(name) or {}
        if state.stateful_callbacks is not None:
            state.stateful_callbacks.setdefault(name, self.state())
        if step >= self.schedule.end:
            pruner.freeze()
        if step == 0 or not pruner.remembers:
            self._update(step)
            return
        noted = saved.get("attributes", {}).get("_checkpoint") if isinstance(saved, dict) else None
        folders = [folder_of(args, step)] if noted is None else [Path(noted), folder_of(args, step)]
        pruner.load(load_state(folders))

    def _update(self, step: int) -> None:
        """Take masks as the schedule has it after `step` steps; nothing moves them any more after its end."""
        if self._pruner is None or self.schedule is None:
            return
        self._pruner.update(self.schedule.sparsity(step), step)
        if step >= self.schedule.end:
            self._pruner.freeze()

    def _unscaled(self, args: Any, optimizer: Any) -> bool:
        """Undo the scaling of float16 training where the Trainer has not; whether gradients are fit to be scored."""
        scaler = getattr(optimizer, "scaler", None)
        if scaler is None or self._pruner is None or not (self._pruner.scores or self._pruner.dense):
            return True
        if not args.max_grad_norm:  # clipping has done it otherwise
            scaler.unscale_(_innermost(optimizer))
        gradients = [target.gradient for target in self.targets.values()]
        return all(bool(torch.isfinite(gradient).all()) for gradient in gradients if gradient is not None)

    def _asked(self) -> float:
        """The share of weights that are zero at the end; some of a layer may belong to no unit, and stay."""
        if not self._groups:
            return self.config.final_sparsity
        shapes = {name: (len(T.weight), T.weight.shape[1]) for name, T in self.targets.items()}
        left = survivors(self._groups, shapes, self.config.sparsity)
        return 1 - sum(left.values()) / sum(rows * cols for name, (rows, cols) in shapes.items() if name in left)

    def _rounding(self) -> float:
        """The share of weights that whole numbers of weights, blocks or units may fall short of the sparsity."""
        weights = {name: target.weight for name, target in self.targets.items() if name not in self.held}
        coarse = sum(unit_size(units, weights) for units in self._groups) or block_of(self.config.pattern) * len(
            weights
        )
        return coarse / sum(W.numel() for W in weights.values())


def _innermost(optimizer: Any) -> Any:
    """The optimizer itself, whatever `accelerate` has put around it."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _units(model: nn.Module, targets: dict[str, Target], config: Config) -> list[Units]:
    """Groups of the units to prune; fused experts, and layers under adapters, are looked at in a copy of the model that
    shares its weights."""
    if config.units == "weight":
        return []
    if any(target.expert is not None or target.adapter is not None for target in targets.values()):
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        model = copy.deepcopy(model, shared)
        unwrap(model)
        unfuse(model)
    together = config.scope == "global"
    return prunable(find_units(model, (config.units,)), targets, config.units, config.sparsity, together=together)


def _problems(targets: dict[str, Target], config: Config) -> list[str]:
    """Why these weights cannot be pruned so."""
    problems = []
    for name, target in targets.items():
        problems += column_problems(name, target.weight.shape[1], config.pattern)
        if target.adapter is not None and not is_plain_lora(target.adapter):
            problems.append(f"{name}: its adapter is more than plain LoRA, so pruned weights could not stay zero")
    untrained = [name for name, target in targets.items() if not target.trained]
    if untrained and (config.score != "magnitude" or config.shadow):
        what = "shadow: true" if config.score == "magnitude" else f"score: {config.score}"
        problems.append(
            f"{len(untrained)} layers get no gradients, such as {untrained[0]}, and {what} needs them; train them, "
            "or use score: magnitude without shadow, as with adapters"
        )
    return problems


def _zeros(target: Target) -> int:
    return int((target.weight == 0).sum())
