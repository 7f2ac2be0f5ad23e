"""A live teacher: what a model predicts for a batch, as a row loss that the student is trained with.

Its logits exist for a few tokens at a time where the model allows it (`fused.py`). A teacher over another vocabulary
is brought to the student's here (`vocabulary.py`); `teacher_cache.py` has one that was asked beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from hf_slim.core.errors import DataError
from hf_slim.core.forward import accepts
from hf_slim.distillation import fused
from hf_slim.distillation.arguments import DistillationConfig
from hf_slim.distillation.divergences import is_infinite
from hf_slim.distillation.features import FeatureLosses
from hf_slim.distillation.losses import RowLoss, against_teacher
from hf_slim.distillation.pairs import task_of, words_of
from hf_slim.distillation.taps import Seen
from hf_slim.distillation.vocabulary import Translator, against_sorted, aligned, over_common


@dataclass(frozen=True)
class Taught:
    """What a teacher has to say about a batch.

    Args:
        loss: of the student's logits, by the number of the position in the batch.
        shape: that the student's logits must have; None where any will do.
        rows: gives the teacher's logits of some positions, [rows, vocab]; None where it is not there to be asked.
        seen: what its inside showed, where features are compared.
        maps: its attention maps, likewise.
    """

    loss: RowLoss
    shape: tuple[int, ...] | None = None
    rows: Callable[[Tensor], Tensor] | None = None
    seen: Seen | None = None
    maps: Any = None


class LiveTeacher:
    """A model that is asked about every batch.

    Args:
        model: the teacher, in eval mode.
        settings: which divergence, at which temperature.
        words: size of the student's vocabulary, which logits are brought to; None to leave them as they are.
        translator: tokenizes batches anew, for a teacher with another tokenizer.
        features: what is compared inside.
        whole: False where its weights are sharded, and its head cannot be called by itself.
        around: makes a context for the forward pass, such as autocast.
    """

    def __init__(
        self,
        model: Any,
        settings: Any = DistillationConfig,
        *,
        words: int | None = None,
        translator: Translator | None = None,
        features: FeatureLosses | None = None,
        whole: bool = True,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        self.model, self.settings, self.words, self.translator = model, settings, words, translator
        self.features, self.around = features, around
        self._accepts = _accepted(model)
        # With a cache, Transformers would not see where the texts of a packed batch begin, and would keep all keys.
        self._cacheless: dict[str, Any] = {"use_cache": False} if accepts(_inside(model), "use_cache") else {}
        self._fused = whole and settings.fused is not False and fused.why_not(model) is None
        self._positions = getattr(model.config, "max_position_embeddings", None)

    def teach(self, batch: Mapping[str, Any]) -> Taught:
        """What it predicts for a batch.

        Raises:
            DataError: the batch is longer than the teacher has positions.
        """
        translated = None if self.translator is None else self.translator(batch)
        inputs = batch if translated is None else translated.inputs
        shape, rows, outputs, seen = self._predict(inputs)
        chosen = self.settings
        if translated is not None:
            places = translated.places

            def counterparts(tokens: Tensor) -> Tensor:
                return rows(places.to(tokens.device)[tokens])

            loss = against_sorted(counterparts, chosen.temperature, translated.has)
            return Taught(loss, None, counterparts)
        words, beta, skew = shape[-1], chosen.beta, chosen.skew
        if self.words is None or self.words == words:
            loss = against_teacher(rows, chosen.temperature, chosen.divergence, beta=beta, skew=skew)
            return Taught(loss, shape, rows, seen, outputs.get("attentions"))
        common = self.words if words > self.words or not is_infinite(chosen.divergence, beta, skew) else words

        def brought(tokens: Tensor) -> Tensor:
            return aligned(rows(tokens), common)

        loss = against_teacher(brought, chosen.temperature, chosen.divergence, beta=beta, skew=skew)
        loss = loss if common == self.words else over_common(loss, common)
        return Taught(loss, (*shape[:-1], self.words), rows, seen, outputs.get("attentions"))

    def _predict(
        self, batch: Mapping[str, Any]
    ) -> tuple[tuple[int, ...], Callable[[Tensor], Tensor], Any, Seen | None]:
        """The shape of the logits, a function that gives rows of them, all outputs, and what the inside showed."""
        inputs = {name: value for name, value in batch.items() if self._accepts is None or name in self._accepts}
        inputs.pop("use_cache", None)
        self._check_length(inputs)
        head = fused.head_of(self.model) if self._fused else None
        swapped = nullcontext() if head is None else fused.replaced(head, lambda hidden: hidden)
        watched = nullcontext() if self.features is None else self.features.watch(self.model, teacher=True)
        with torch.no_grad(), self.around(), swapped, watched as seen:
            outputs = self.model(**inputs, **self._cacheless)
        logits = outputs.logits
        if head is None:
            flat = logits.reshape(-1, logits.shape[-1])
            return tuple(logits.shape), lambda tokens: flat[tokens.to(flat.device)], outputs, seen
        rows = fused.teacher_rows(head, logits, self.around)
        words = rows(torch.zeros(1, dtype=torch.long)).shape[-1]
        return (*logits.shape[:-1], words), rows, outputs, seen

    def _check_length(self, inputs: Mapping[str, Any]) -> None:
        length = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        if self._positions is not None and length > self._positions:
            raise DataError(
                f"a batch of {length} tokens does not fit the teacher's {self._positions} positions; use shorter "
                "texts, or a teacher that reads more"
            )


def make_live(teacher: Any, student: Any, settings: Any, tokenizers: tuple[Any, Any], **options: Any) -> LiveTeacher:
    """The teacher of a student, in the student's words.

    Args:
        teacher, student: models that `pairs.check_pair` has found to fit.
        settings: a `DistillationConfig`, or its class for the defaults.
        tokenizers: of student and teacher, as far as they are known.
        options: `features`, `whole` and `around` of `LiveTeacher`.
    """
    words = words_of(student) if task_of(student) in ("causal", "masked", "seq2seq") else None
    translator = None
    if settings.vocabulary == "universal":
        translator = Translator(*tokenizers, getattr(teacher.config, "max_position_embeddings", None))
    return LiveTeacher(teacher, settings, words=words, translator=translator, **options)


def _inside(model: nn.Module) -> Any:
    """The model itself: DeepSpeed's engine takes anything, and hands it on."""
    return getattr(model, "module", model)


def _accepted(model: nn.Module) -> set[str] | None:
    """Names of inputs that the model's forward takes; None for any."""
    parameters = signature(_inside(model).forward).parameters.values()
    return None if any(p.kind == Parameter.VAR_KEYWORD for p in parameters) else {p.name for p in parameters}
