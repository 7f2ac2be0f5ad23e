"""PruningTrainer: `transformers.Trainer` that prunes while it trains.

Nothing but a `Trainer` with the callback `GradualMagnitudePruning`, for whoever would rather name a class; the callback
alone does the same in any other Trainer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from hf_slim.core.checkpoints import Resumes
from hf_slim.pruning.gradual import Config, GradualMagnitudePruning


class PruningTrainer(Resumes):
    """Trains `model` and prunes it gradually; logs the measured `sparsity` beside the training loss.

    Args:
        model: the model to train and prune.
        args: `TrainingArguments`.
        pruning: options of the pruning, a `Config` or a mapping of its fields; None for its defaults.
        kwargs: everything else that `Trainer` takes.

    Attributes:
        pruning: the callback; `pruning.masks` and `pruning.report()` tell what was pruned.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments | None = None,
        pruning: Config | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.pruning = GradualMagnitudePruning(pruning)
        kwargs["callbacks"] = [*(kwargs.get("callbacks") or []), self.pruning]
        super().__init__(model, args, **kwargs)

    def log(self, logs, start_time=None):
        """As in `Trainer`, with the share of zeros among the weights that are being pruned."""
        if "loss" in logs:
            logs["sparsity"] = self.pruning.sparsity
        super().log(logs, start_time)
