"""Learning rates that start anew with every pruning event (GMP*, Kurtic & Alistarh 2022, arXiv:2210.06384).

    lr(t) = peak (1 - (1 - floor) (t - a) / (b - a))        a <= t < b

where a and b are neighbours among 0, the steps after which masks change, and the last step of training. A large rate
right after weights were dropped lets the others move; it has come down when the next ones are chosen. The rate is a
function of the step alone, so a resumed run needs nothing saved. It replaces the Trainer's own schedule, warmup
included; what the Trainer logs as learning_rate is the rate that is used.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from hf_slim.core.errors import PlanError


def cycles(updates: Sequence[int], total_steps: int, floor: float) -> Callable[[int], float]:
    """The factor to multiply the peak by, as a function of the finished steps.

    Args:
        updates: steps after which masks change.
        total_steps: of the whole training.
        floor: where every cycle ends, as a share of the peak.
    """
    starts = sorted({0, *(step for step in updates if step < total_steps)})

    def factor(step: int) -> float:
        number = bisect_right(starts, step)
        begin, end = starts[number - 1], [*starts, total_steps][number]
        return 1.0 - (1.0 - floor) * min(1.0, (step - begin) / (end - begin))

    return factor


def install(scheduler: Any, factor: Callable[[int], float]) -> None:
    """Make a Trainer's scheduler follow `factor` from its present step on.

    Raises:
        PlanError: a scheduler that is no function of the step.
    """
    if not isinstance(scheduler, LambdaLR):
        raise PlanError(
            f"learning rate cycles replace a schedule that is a function of the step, not {type(scheduler).__name__}; "
            "set lr_scheduler_type to 'linear', or lr_cycles to false"
        )
    scheduler.lr_lambdas = [factor] * len(scheduler.base_lrs)
    rates = [base * factor(scheduler.last_epoch) for base in scheduler.base_lrs]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
