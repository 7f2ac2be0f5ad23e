"""How the weight of a loss changes while a model is trained."""

from __future__ import annotations

from math import cos, pi
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def schedule_factor(schedule: Schedule, progress: float) -> float:
    """Factor of a weight when a share `progress` of the steps is done, 0 to 1: constant, or falling from 1 to 0."""
    progress = min(max(progress, 0.0), 1.0)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + cos(pi * progress)) / 2}[schedule]
