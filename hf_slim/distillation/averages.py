"""Running means of the parts of a loss, for the log."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Average:
    """A weighted running mean of named losses, kept on the device so that no step waits for a read-out."""

    def __init__(self):
        self.totals: dict[str, Tensor] = {}
        self.weight = 0.0

    def add(self, parts: dict[str, Tensor], *, weight: float, scale: float) -> None:
        for name, loss in parts.items():
            self.totals[name] = self.totals.get(name, 0.0) + loss.detach() * scale
        self.weight += weight

    def take(self, accelerator: Any) -> dict[str, float]:
        """The means over all processes; starts anew."""
        means = {name: total / self.weight for name, total in self.totals.items()}
        self.totals, self.weight = {}, 0.0
        return {name: accelerator.gather(mean).mean().item() for name, mean in means.items()}
