"""Sparsity as a function of the training step (Zhu & Gupta 2017, arXiv:1710.01878, eq. 1).

    s(t) = s_i + (s_f - s_i) f((t - t0) / (t1 - t0))        t0 <= t <= t1
    cubic     f(p) = 1 - (1 - p)³    fast at first, when redundant weights abound, and slow at the end
    linear    f(p) = p
    one_shot  f(p) = 1               all at once at t0, then hold: what follows can only make up for it

Before t0 nothing is pruned; s_i is dropped at once at t0; from t1 on the sparsity is s_f exactly, and masks are fixed.
Masks change every `every` steps from t0 on and at t1; in between the sparsity stays as it was.

t counts finished optimizer steps, as `TrainerState.global_step` does. Everything here is a pure function of t, so a
resumed run needs no saved schedule. Where we differ: t1 is given, not the number of updates, so that the last update
falls on t1 even where `every` does not divide t1 - t0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_slim.core.errors import PlanError

Curve = Literal["cubic", "linear", "one_shot"]


@dataclass(frozen=True)
class Schedule:
    """A schedule in optimizer steps; `plan_schedule` makes a checked one."""

    initial: float
    final: float
    begin: int
    end: int
    every: int
    curve: Curve = "cubic"

    def sparsity(self, step: int) -> float:
        """Share of weights that are zero after `step` optimizer steps."""
        if step < self.begin:
            return 0.0
        if step >= self.end or self.curve == "one_shot":
            return self.final
        progress = (step - self.begin) // self.every * self.every / (self.end - self.begin)
        if self.curve == "linear":
            return self.initial + (self.final - self.initial) * progress
        return cubic_sparsity(progress, self.initial, self.final)

    def is_update(self, step: int) -> bool:
        """Whether the masks change after `step` optimizer steps."""
        return step == self.end or (self.begin <= step < self.end and (step - self.begin) % self.every == 0)

    def updates(self) -> list[int]:
        """The steps after which the masks change."""
        return [*range(self.begin, self.end, self.every), self.end]


def cubic_sparsity(progress: float, initial: float, final: float) -> float:
    """Sparsity at `progress` from 0 (`initial`) to 1 (`final`); grows monotonically, ever more slowly."""
    return final + (initial - final) * (1 - progress) ** 3


def plan_schedule(
    total_steps: int,
    *,
    initial: float,
    final: float,
    begin: int | float,
    end: int | float,
    every: int | float,
    curve: Curve = "cubic",
) -> Schedule:
    """The schedule for a training of `total_steps` optimizer steps.

    Args:
        total_steps: optimizer steps of the whole training.
        initial: sparsity at `begin`, 0 <= initial <= final; without meaning for "one_shot".
        final: sparsity from `end` on, below 1.
        begin: first mask update; an int counts steps, a float is a share of the training (1 is one step, 1.0 is all).
        end: last mask update, likewise.
        every: steps between mask updates, likewise; at least one step.
        curve: how sparsity grows in between.

    Raises:
        PlanError: a sparsity out of range, a schedule that ends before it begins or after training; all at once.
    """
    first, last = _steps(begin, total_steps), _steps(end, total_steps)
    problems = [
        f"{name} is a share of weights, at least 0 and below 1, got {value}"
        for name, value in (("initial_sparsity", initial), ("sparsity", final))
        if not 0 <= value < 1
    ]
    if initial > final:
        problems.append(
            f"initial_sparsity {initial} is above the final sparsity {final}; pruned weights do not come back"
        )
    if first < 0 or first >= last:
        problems.append(f"pruning must begin at step 0 or later and before its end, got begin={first} and end={last}")
    if last > total_steps:
        problems.append(
            f"pruning ends at step {last}, but training has only {total_steps}; "
            f"set end to at most {total_steps}, or to a share of the training such as 0.8"
        )
    if every < 0 or (isinstance(every, int) and every == 0):
        problems.append(f"every is the number of steps between mask updates, at least 1, got {every}")
    if problems:
        raise PlanError(problems)
    return Schedule(initial, final, first, last, max(1, _steps(every, total_steps)), curve)


def _steps(value: int | float, total_steps: int) -> int:
    return value if isinstance(value, int) else round(value * total_steps)
