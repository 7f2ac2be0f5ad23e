"""What a stage is handed: seed, tokenizer, data, the original model, progress. Nothing is ambient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_slim.core.errors import PlanError
from hf_slim.core.model import ModelSource
from hf_slim.core.progress import Progress


@dataclass
class Context:
    """Everything a method's `apply` may use besides the model and its options.

    Args:
        seed: for whatever is drawn at random.
        tokenizer: the model's, or None.
        windows: loads token windows [samples, length] of a role: "calibration", "train" or "held_out".
        load_original: loads the uncompressed model, for teachers and comparisons.
        source: where the uncompressed model is found, for a teacher that is to be loaded in another form.
        progress: progress bars.
        blocks: where the walk keeps finished blocks, so that a killed run goes on from there; None for nowhere.
        work: a folder for a stage's own files (trainer checkpoints), kept until the stage is done; None for a
            temporary one.
        out: folder that exports are written below, over what is there; None in a script, where they go where they are
            told and nothing is written over.
    """

    seed: int = 0
    tokenizer: Any = None
    windows: Callable[[str], Tensor] | None = None
    load_original: Callable[[], PreTrainedModel] | None = None
    source: ModelSource | None = None
    progress: Progress = field(default_factory=Progress)
    blocks: Path | None = None
    work: Path | None = None
    out: Path | None = None

    def tokens(self, role: str) -> Tensor:
        """Token windows [samples, length] of a role.

        Raises:
            PlanError: no data was given.
        """
        if self.windows is None:
            raise PlanError(f"{role} data is needed; pass data=texts (or token ids), or give data.{role} in the recipe")
        return self.windows(role)

    @cached_property
    def original(self) -> PreTrainedModel:
        """The uncompressed model, loaded once, in eval mode.

        Raises:
            PlanError: it is not known where to load it from.
        """
        if self.load_original is None:
            raise PlanError("the original model is needed; pass original=model, or run this stage from a recipe")
        return self.load_original().eval()

    def release_original(self) -> None:
        """Drop the original model's memory; it is loaded again when needed."""
        self.__dict__.pop("original", None)
