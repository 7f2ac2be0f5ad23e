"""Which divergences of two models' predictions are added up, at which temperatures, with which weights.

    distillation loss = Σ_i weight_i · schedule_i(progress) · T_i² D_i(teacher, student)

The temperature may be annealed, T(progress) = 1 + (T - 1) · schedule(progress), so that the student ends with the
distributions that it is used with (annealed distillation; Jafari et al. 2021, arXiv:2104.07163, anneals T so).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from pydantic import BaseModel, Field

from hf_slim.core.explain import read_entries
from hf_slim.core.method import MethodConfig
from hf_slim.distillation.divergences import Divergence, RowKernel, is_infinite, row_kernel
from hf_slim.distillation.schedules import Schedule, schedule_factor

Part: TypeAlias = tuple[float, float, RowKernel]
"""Weight, temperature, kernel."""


class LogitLoss(BaseModel):
    """One of several divergences."""

    model_config = MethodConfig.model_config

    kind: Divergence = Field(description="which divergence")
    weight: float = Field(1.0, gt=0, description="of this divergence beside the others")
    schedule: Schedule = Field("constant", description="of the weight: constant, or falling to 0 as a line or a cosine")
    temperature: float | None = Field(None, gt=0, description="of this divergence; that of all if not given")
    beta: float = Field(0.5, ge=0, le=1, description="of jsd: the teacher's share")
    skew: float = Field(0.1, ge=0, lt=1, description="of skewed divergences: the share mixed in")


def read_divergences(entries: Sequence[LogitLoss | Mapping[str, Any]] | None) -> tuple[LogitLoss, ...]:
    """Divergences from their options.

    Raises:
        PlanError: unknown options or values; all problems at once.
    """
    return read_entries(LogitLoss, entries, "divergences")


class Mixture:
    """The divergences that a configuration names.

    Args:
        settings: a `DistillationConfig`, its class for the defaults, or a stage's options.
    """

    def __init__(self, settings: Any):
        self._losses = read_divergences(settings.divergences) or (
            LogitLoss(kind=settings.divergence, beta=settings.beta, skew=settings.skew),
        )
        self._temperature, self._schedule = settings.temperature, settings.temperature_schedule

    @property
    def infinite(self) -> bool:
        """Whether a word that the teacher deems impossible can make the loss infinite."""
        return any(is_infinite(loss.kind, loss.beta, loss.skew) for loss in self._losses)

    def temperature(self, progress: float) -> float:
        """Of all divergences without one of their own, when a share `progress` of the steps is done."""
        return 1 + (self._temperature - 1) * schedule_factor(self._schedule, progress)

    def parts(self, progress: float) -> list[Part]:
        """The divergences when a share `progress` of the steps is done."""
        common = self.temperature(progress)
        return [
            (
                loss.weight * schedule_factor(loss.schedule, progress),
                loss.temperature or common,
                row_kernel(loss.kind, loss.beta, loss.skew),
            )
            for loss in self._losses
        ]


def uses_labels(settings: Any) -> bool:
    """Whether labels have a share of the loss, now or later."""
    return settings.alpha < 1 or settings.alpha_schedule != "constant"
