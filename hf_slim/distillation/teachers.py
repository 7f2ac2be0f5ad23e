"""A live teacher: what a model predicts for a batch, as a row loss that the student is trained with.

Its logits exist for a few tokens at a time where the model allows it (`fused.py`). A teacher over another vocabulary
is brought to the student's here (`vocabulary.py`); `teacher_cache.py` has one that was asked beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_slim.core.errors import DataError, ModelError
from hf_slim.core.forward import inputs_of
from hf_slim.distillation import fused
from hf_slim.distillation.arguments import DistillationConfig
from hf_slim.distillation.features import FeatureLosses
from hf_slim.distillation.losses import RowLoss, against_mixture, chunks
from hf_slim.distillation.mixture import Mixture
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
        settings: which divergences, at which temperatures.
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
        self.model, self.words, self.translator = model, words, translator
        self.mixture = Mixture(settings)
        self.features, self.around = features, around
        self.reads, self._takes_others = inputs_of(model)
        # With a cache, Transformers would not see where the texts of a packed batch begin, and would keep all keys.
        self._cacheless: dict[str, Any] = {"use_cache": False} if "use_cache" in self.reads else {}
        self._fused = whole and settings.fused is not False and fused.why_not(model) is None
        self._positions = readable_positions(model)

    def teach(self, batch: Mapping[str, Any], progress: float = 0.0) -> Taught:
        """What it predicts for a batch, when a share `progress` of the steps is done.

        Raises:
            DataError: the batch is longer than the teacher has positions.
        """
        translated = None if self.translator is None else self.translator(batch)
        inputs = batch if translated is None else translated.inputs
        shape, rows, outputs, seen = self._predict(inputs)
        if translated is not None:
            places = translated.places

            def counterparts(tokens: Tensor) -> Tensor:
                return rows(places.to(tokens.device)[tokens])

            loss = against_sorted(counterparts, self.mixture.temperature(progress), translated.has)
            return Taught(loss, None, counterparts)
        words, parts = shape[-1], self.mixture.parts(progress)
        if self.words is None or self.words == words:
            loss = against_mixture(rows, parts)
            return Taught(loss, shape, rows, seen, outputs.get("attentions"))
        common = self.words if words > self.words or not self.mixture.infinite else words

        def brought(tokens: Tensor) -> Tensor:
            return aligned(rows(tokens), common)

        loss = against_mixture(brought, parts)
        loss = loss if common == self.words else over_common(loss, common)
        return Taught(loss, (*shape[:-1], self.words), rows, seen, outputs.get("attentions"))

    def _predict(
        self, batch: Mapping[str, Any]
    ) -> tuple[tuple[int, ...], Callable[[Tensor], Tensor], Any, Seen | None]:
        """The shape of the logits, a function that gives rows of them, all outputs, and what the inside showed."""
        inputs = {name: value for name, value in batch.items() if self._takes_others or name in self.reads}
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
        given = [inputs[name].shape[1] for name in ("input_ids", "decoder_input_ids") if name in inputs]
        length = max(given, default=0)
        if self._positions is not None and length > self._positions:
            raise DataError(
                f"a batch of {length} tokens does not fit the teacher's {self._positions} positions; use shorter "
                "texts, or a teacher that reads more"
            )


def readable_positions(model: Any) -> int | None:
    """Tokens that a model can read; None for any number. RoBERTa's tables begin behind the padding token's number."""
    positions = getattr(model.config, "max_position_embeddings", None)
    tables = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
    skipped = max((m.padding_idx + 1 for m in tables if getattr(m, "padding_idx", None) is not None), default=0)
    return None if positions is None else positions - skipped


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
        translator = Translator(*tokenizers, readable_positions(teacher))
    return LiveTeacher(teacher, settings, words=words, translator=translator, **options)


def check_shapes(student: tuple[int, ...], taught: Taught | None) -> None:
    """Refuse a teacher that saw other tokens or predicts over another vocabulary."""
    if taught is not None and taught.shape is not None and student != taught.shape:
        raise ModelError(
            f"the teacher's logits have shape {list(taught.shape)}, the student's {list(student)}; "
            "both must see the same tokens and predict over the same vocabulary (or classes)"
        )


def check_finite(loss: Tensor, taught: Taught, keep: Tensor, words: int, where: tuple[int, int]) -> None:
    """Refuse a teacher that predicts NaN or infinity; a student that diverges is the Trainer's business.

    Args:
        loss: of the whole batch; nothing else is looked at if it is finite.
        keep: Bool [tokens], of the positions that count.
        words: size of the student's vocabulary.
        where: number of the step, and of the rows of the batch.

    Raises:
        ModelError: names the step and the rows.
    """
    if torch.isfinite(loss) or taught.rows is None:
        return
    wrong, (step, rows) = [], where
    for tokens in chunks(keep, words):
        logits = taught.rows(tokens)
        # -inf is a probability of zero, and legal unless the whole row is
        bad = (logits.isnan() | (logits == torch.inf)).any(-1) | (logits == -torch.inf).all(-1)
        wrong.append(tokens[bad.to(tokens.device)])
    found = sorted({token // (len(keep) // rows) for token in torch.cat(wrong).tolist()})
    if found:
        raise ModelError(
            f"the teacher's logits hold NaN or infinite values at step {step}, rows {found} of the batch; load the "
            "teacher in bfloat16 or float32, or check that its weights are finite"
        )
