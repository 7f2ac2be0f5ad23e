"""Classified texts for training and measuring classifiers: each a text of its own, with its class.

Unlike windows they are neither joined nor cut to one length: each is tokenized as the tokenizer does it, special tokens
included, cut after `length` tokens, and padded in its batch. `samples` of them are drawn from the whole source, because
data sets often come sorted by class: the train examples by the run's seed, the held-out ones always the same, so that
runs with other seeds are measured on the same texts. Where all are asked for, they stay in order.

A method that wants windows of a labelled source gets those of the same examples, joined.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import DataCollatorWithPadding, PreTrainedModel

from hf_slim.core import texts
from hf_slim.core.data import DEFAULT_LENGTH, DataSource, Role, tokens_from
from hf_slim.core.errors import DataError
from hf_slim.core.model import check_tokens

SHOWN = 5  # problems of one kind that a message names
COLUMNS = ("labels", "label")  # of data in memory


@dataclass(frozen=True)
class Examples(Dataset):
    """Classified texts, tokenized; a data set as a Trainer wants it.

    Args:
        documents: the texts.
        labels: their classes.
        ids: their tokens, of any length up to `length`.
        length: tokens that a text is cut after.
        description: for people: which texts, how many.
    """

    documents: tuple[str, ...]
    labels: tuple[int, ...]
    ids: tuple[tuple[int, ...], ...]
    length: int
    description: str

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = list(self.ids[index])
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": self.labels[index]}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of tokens and classes, in hexadecimal."""
        return hashlib.sha256(json.dumps([self.ids, self.labels]).encode()).hexdigest()

    def tokenized(self, tokenizer: Any) -> Examples:
        """The same texts in the tokens of another tokenizer."""
        return replace(self, ids=_tokenize(self.documents, tokenizer, self.length))

    def windows(self, tokenizer: Any) -> Tensor:
        """The texts as token windows [windows, length], joined like any other text.

        Raises:
            DataError: they do not fill one.
        """
        return tokens_from(list(self.documents), tokenizer, self.length).ids


def load_examples(source: DataSource, role: Role, tokenizer: Any, seed: int = 0) -> Examples:
    """Read, draw and tokenize the classified texts of one role.

    Args:
        source: one with a `label`.
        role: the held-out examples do not depend on the seed.
        tokenizer: any Transformers tokenizer with a padding token.
        seed: of the draw, unless the source has its own.

    Raises:
        DataError: the source is missing, unreadable or too small, its columns are others, its classes no numbers.
    """
    name = texts.label(source.source, role, source.name, source.split)
    rows = texts.read_labelled(source.source, source.label or "label", source.name, source.split, source.column)
    found = list(rows)
    if len(found) < source.samples:
        raise DataError(
            f"{name}: {len(found)} labelled texts, but samples is {source.samples}; use more data or fewer samples"
        )
    own = 0 if role == "held_out" else seed
    chosen = _draw(found, source.samples, own if source.seed is None else source.seed)
    return _examples(chosen, source.length, name, tokenizer)


def examples_from(
    data: Any, tokenizer: Any, length: int | None = None, samples: int | None = None, seed: int = 0
) -> Examples | None:
    """Classified texts of data in memory: rows with "text" and "label" (or "labels"); None if they are no such rows.

    Args:
        data: a list of mappings, or a `datasets.Dataset`.
        tokenizer: with a padding token.
        length: tokens that a text is cut after; 512 if not given.
        samples: number of texts, drawn by the seed; all if not given.

    Raises:
        DataError: rows without text, classes that are no whole numbers, no tokenizer.
    """
    columns = getattr(data, "column_names", None)
    first = data[0] if columns is None and isinstance(data, Sequence) and len(data) else None
    known = columns if columns is not None else list(first) if isinstance(first, Mapping) else []
    label = next((name for name in COLUMNS if name in known), None)
    if label is None or "text" not in known:
        return None
    if tokenizer is None:
        raise DataError("data: got texts, but no tokenizer; pass tokenizer=")
    found = [texts.labelled_cells(row, "text", label, f"data[{i}]") for i, row in enumerate(data)]
    chosen = _draw(found, min(len(found), samples or len(found)), seed)
    return _examples(chosen, length or DEFAULT_LENGTH, "data", tokenizer)


def check_examples(model: PreTrainedModel, examples: Examples) -> None:
    """Refuse examples that the model cannot take.

    Raises:
        DataError: classes or tokens that it does not know, more tokens than it has positions.
    """
    problems = unknown_classes(examples, model.config.num_labels)
    longest = max(map(len, examples.ids))
    padded = torch.tensor([[*ids, *[ids[0]] * (longest - len(ids))] for ids in examples.ids])
    try:
        check_tokens(model, padded, examples.description)
    except DataError as error:
        problems += error.problems
    if problems:
        raise DataError(problems)


def unknown_classes(examples: Examples, num_labels: int) -> list[str]:
    """Classes that a model with `num_labels` of them does not have."""
    unknown = sorted({label for label in examples.labels if not 0 <= label < num_labels})
    if not unknown:
        return []
    shown = ", ".join(map(str, unknown[:SHOWN])) + (", ..." if len(unknown) > SHOWN else "")
    fix = f"set num_labels: {unknown[-1] + 1}" if unknown[0] >= 0 else "leave out texts without a class"
    return [
        f"{examples.description}: labels {shown} are not among the model's classes, 0 to {num_labels - 1}; "
        f"number classes from 0, or {fix}"
    ]


def collator(tokenizer: Any) -> DataCollatorWithPadding:
    """Makes batches of examples, padded to the longest of the batch."""
    return DataCollatorWithPadding(tokenizer)


def _draw(found: list[tuple[str, int]], samples: int, seed: int) -> list[tuple[str, int]]:
    if samples == len(found):
        return found
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return [found[index] for index in order[:samples].tolist()]


def _examples(found: list[tuple[str, int]], length: int, name: str, tokenizer: Any) -> Examples:
    if not found:
        raise DataError(f"{name}: is empty; give at least one text with its class")
    if tokenizer.pad_token_id is None:
        raise DataError(f"{name}: the tokenizer has no padding token, which batches of texts need; give it one")
    documents, labels = zip(*found, strict=True)
    ids = _tokenize(documents, tokenizer, length)
    if empty := [text for text, tokens in zip(documents, ids, strict=True) if not tokens]:
        raise DataError(f"{name}: {len(empty)} texts are empty; leave them out")
    description = f"{name}: {len(ids)} texts of {len(set(labels))} classes, up to {length} tokens"
    return Examples(documents, labels, ids, length, description)


def _tokenize(documents: Iterable[str], tokenizer: Any, length: int) -> tuple[tuple[int, ...], ...]:
    ids = tokenizer(list(documents), truncation=True, max_length=length)["input_ids"]
    tokenizer("")  # a fast tokenizer would keep the limit of the last call, and save it
    return tuple(map(tuple, ids))
