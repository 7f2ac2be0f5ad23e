"""Teacher and student with other vocabularies: one tokenizer with padded tables, or two tokenizers.

Padded tables: models of one family round the size of their tables up, to 151936 or 152064 rows for the same words. A
table with fewer rows gives the rows it lacks the logit -inf, which is probability zero; with a logit of zero it would
move probability onto words that do not exist. Rows beyond the student's table are cut off, and what is left is a
distribution again. Where the divergence of a word that the teacher cannot predict is infinite (reverse KL), both
models are compared over the words they have in common.

Two tokenizers: universal logit distillation (Boizard et al. 2024, arXiv:2402.12030). Words cannot be matched, so that
sorted probabilities are, the likeliest with the likeliest, the shorter row filled up with zeros:

    L = T Σ_i |p_(i) - q_(i)|        p = softmax(t / T), q = softmax(s / T), each in descending order
    dL/ds = q (g - Σ q g)            g = sign(q - p), at the place that each word of the student has in the order

T keeps the size of the gradient when the temperature changes, as T² does for the other divergences. The text of a row
is tokenized by both; word i of the one is compared with word i of the other, from the start to the end of the shorter.
Special tokens are no words: the teacher reads its own start of text, where it has one, which is compared with the
student's; places that predict another special token, or hold one, have no counterpart. Positions without a counterpart
have no loss, but are counted.

Shapes: logits [rows, vocab], of each model its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from hf_slim.distillation.losses import RowLoss

Vocabulary = Literal["same", "align", "universal"]


def aligned(logits: Float[Tensor, "*rows words"], size: int) -> Float[Tensor, "*rows {size}"]:
    """Logits over `size` words: the first ones, or all of them and then words that are impossible."""
    words = logits.shape[-1]
    return logits[..., :size] if words >= size else pad(logits, (0, size - words), value=-torch.inf)


def over_common(loss: RowLoss, words: int) -> RowLoss:
    """A row loss over the first words of the student's alone, as if it had no others."""

    def row_loss(s: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = loss(s[:, :words], tokens)
        return value, pad(gradient, (0, s.shape[1] - words))

    return row_loss


def against_sorted(
    teacher: Callable[[Tensor], Tensor], temperature: float = 1.0, has: Bool[Tensor, " tokens"] | None = None
) -> RowLoss:
    """Row loss T Σ_i |p_(i) - q_(i)| of sorted probabilities; zero where `has` is False.

    Args:
        teacher: gives the teacher's logits [rows, any] of some of the student's tokens [rows].
        temperature: T > 0, divides both logits.
        has: whether a token has a counterpart at all; all of them if not given.
    """

    def row_loss(s: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        p = (teacher(tokens).to(s.device, s.dtype) / temperature).softmax(-1).sort(-1, descending=True).values
        q = (s / temperature).softmax(-1)
        ordered, places = q.sort(-1, descending=True)
        width = max(p.shape[-1], q.shape[-1])
        difference = pad(ordered, (0, width - q.shape[-1])) - pad(p, (0, width - p.shape[-1]))
        if has is not None:
            difference = difference * has.to(s.device)[tokens].unsqueeze(1)
        sign = torch.zeros_like(q).scatter_(1, places, difference[:, : q.shape[-1]].sign())
        gradient = q * (sign - (q * sign).sum(-1, keepdim=True))
        return difference.abs().sum(-1) * temperature, gradient

    return row_loss


def same_words(first: Any, second: Any) -> bool:
    """Whether two tokenizers number the same words in the same way."""
    return first.get_vocab() == second.get_vocab()


def words_digest(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's words and their numbers, in hexadecimal."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


@dataclass(frozen=True)
class Translated:
    """A batch in the words of another tokenizer.

    Args:
        inputs: input_ids and attention_mask [batch, length], padded on the right.
        places: of each of the batch's own positions, the one to compare it with; 0 where there is none.
        has: whether there is one.
    """

    inputs: dict[str, Tensor]
    places: Int[Tensor, " tokens"]
    has: Bool[Tensor, " tokens"]


class Translator:
    """Tokenizes a student's batches anew, for its teacher.

    Args:
        student: tokenizer that has made the batches.
        teacher: the other one.
        positions: tokens that the teacher can read; None for any number.
    """

    def __init__(self, student: Any, teacher: Any, positions: int | None = None):
        self.student, self.teacher, self.positions = student, teacher, positions
        self._special = torch.tensor(student.all_special_ids, dtype=torch.long)
        made = teacher("")["input_ids"][:1]
        self._start: list[int] = made if made == [teacher.bos_token_id] else []

    def __call__(self, batch: Mapping[str, Tensor]) -> Translated:
        ids = batch["input_ids"]
        real = real_positions(batch)
        plain: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        texts = [self.student.decode(row[kept], **plain) for row, kept in zip(ids, real, strict=True)]
        parts = [self.teacher(text, add_special_tokens=False)["input_ids"] for text in texts]
        rows = [(self._start + part)[: self.positions] for part in parts]
        length = max(1, *map(len, rows))
        padded = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=ids.device)
        sizes = torch.tensor([len(row) for row in rows], device=ids.device).unsqueeze(1)
        special = real & torch.isin(ids, self._special.to(ids.device))
        words = (real & ~special).cumsum(1)
        number = words - 1 + len(self._start)
        ends = pad(special[:, 1:], (0, 1))  # what follows is no word
        has = real & ~ends & (~special | (words == 0)) & (number >= 0) & (number < sizes)
        places = torch.arange(len(rows), device=ids.device).unsqueeze(1) * length + number
        mask = (torch.arange(length, device=ids.device) < sizes).long()
        inputs = {"input_ids": padded, "attention_mask": mask}
        return Translated(inputs, places.masked_fill(~has, 0).flatten(), has.flatten())


def real_positions(batch: Mapping[str, Tensor]) -> Bool[Tensor, "batch length"]:
    """Where a batch holds tokens and no padding."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    return mask != 0 if mask is not None and mask.shape == ids.shape else torch.ones_like(ids, dtype=torch.bool)
