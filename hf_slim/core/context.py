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
from hf_slim.core.examples import Examples
from hf_slim.core.model import ModelSource
from hf_slim.core.progress import Progress
from hf_slim.core.targets import Targets
from hf_slim.core.vocabulary import trim_tokens


@dataclass
class Context:
    """Everything a method's `apply` may use besides the model and its options.

    Args:
        seed: for whatever is drawn at random.
        tokenizer: the model's, or None.
        windows: loads token windows [samples, length] of a role: "calibration", "train" or "held_out".
        labelled: the classified texts of a role, or its pairs of texts; None where its data have neither.
        load_original: loads the uncompressed model, for teachers and comparisons.
        source: where the uncompressed model is found, for a teacher that is to be loaded in another form.
        progress: progress bars.
        blocks: where the walk keeps finished blocks, so that a killed run goes on from there; None for nowhere.
        work: a folder for a stage's own files (trainer checkpoints), kept until the stage is done; None for a
            temporary one.
        retokenize: makes `windows` anew for a tokenizer that was rewritten; None where there is no text to go back to.
        previous: the model as it was before this stage, where the stage needs it.
        kept: the original's ids of the tokens that are left, in order; empty for all.
        out: folder that exports are written below, over what is there; None in a script, where they go where they are
            told and nothing is written over.
    """

    seed: int = 0
    tokenizer: Any = None
    windows: Callable[[str], Tensor] | None = None
    labelled: Callable[[str], Examples | Targets | None] | None = None
    load_original: Callable[[], PreTrainedModel] | None = None
    source: ModelSource | None = None
    progress: Progress = field(default_factory=Progress)
    blocks: Path | None = None
    work: Path | None = None
    retokenize: Callable[[Any], Callable[[str], Tensor]] | None = None
    out: Path | None = None
    previous: PreTrainedModel | None = None
    kept: list[int] = field(default_factory=list)

    def tokens(self, role: str) -> Tensor:
        """Token windows [samples, length] of a role.

        Raises:
            PlanError: no data was given.
        """
        if self.windows is None:
            raise PlanError(f"{role} data is needed; pass data=texts (or token ids), or give data.{role} in the recipe")
        return self.windows(role)

    def examples(self, role: str) -> Examples | Targets | None:
        """The classified texts of a role, or its pairs of texts; None where its data have neither."""
        found = None if self.labelled is None else self.labelled(role)
        return found.tokenized(self.tokenizer) if found is not None and self.kept else found

    @cached_property
    def original(self) -> PreTrainedModel:
        """The uncompressed model, loaded once, in eval mode.

        Raises:
            PlanError: it is not known where to load it from.
        """
        if self.load_original is None:
            raise PlanError("the original model is needed; pass original=model, or run this stage from a recipe")
        original = self.load_original().eval()
        if self.kept:
            trim_tokens(original, self.kept)
        return original

    def renumber_tokens(self, rewritten: Any, kept: list[int]) -> None:
        """Go on with fewer tokens: the tokenizer becomes this one, in place, and text is cut anew with it.

        The original model is from now on handed out with the same tokens, so that both can be compared.

        Args:
            rewritten: the `tokenizers.Tokenizer`.
            kept: ids of its tokens in the original, ascending.
        """
        self.tokenizer._tokenizer = rewritten
        self.kept = [self.kept[number] for number in kept] if self.kept else list(kept)
        self.release_original()
        self.windows = None if self.retokenize is None else self.retokenize(self.tokenizer)

    def release_original(self) -> None:
        """Drop the original model's memory; it is loaded again when needed."""
        self.__dict__.pop("original", None)
