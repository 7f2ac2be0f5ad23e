"""Pairs of texts for encoder-decoders: one that is read, and one that is to be written.

Each text is tokenized by itself, as the tokenizer does it, special tokens included, cut after `length` tokens, and
padded in its batch. `samples` pairs are drawn from the whole source by the seed; where all are asked for, they stay in
order.
A method that wants windows of such a source gets those of both texts, joined.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedModel

from hf_slim.core import texts
from hf_slim.core.data import DataSource, Role, tokens_from
from hf_slim.core.errors import DataError
from hf_slim.core.model import check_tokens

Ids = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Targets(Dataset):
    """Pairs of texts, tokenized; a data set as a Trainer wants it.

    Args:
        documents, targets: what is read, and what is to be written.
        ids, target_ids: their tokens, of any length up to `length`.
        length: tokens that a text is cut after.
        description: for people: which texts, how many.
    """

    documents: tuple[str, ...]
    targets: tuple[str, ...]
    ids: Ids
    target_ids: Ids
    length: int
    description: str

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = list(self.ids[index])
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(self.target_ids[index])}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all tokens, in hexadecimal."""
        return hashlib.sha256(json.dumps([self.ids, self.target_ids]).encode()).hexdigest()

    def tokenized(self, tokenizer: Any) -> Targets:
        """The same texts in the tokens of another tokenizer."""
        ids, target_ids = _tokenize(self.documents, self.targets, tokenizer, self.length)
        return replace(self, ids=ids, target_ids=target_ids)

    def windows(self, tokenizer: Any) -> Tensor:
        """All texts as token windows [windows, length], joined like any other text.

        Raises:
            DataError: they do not fill one.
        """
        both = [text for pair in zip(self.documents, self.targets, strict=True) for text in pair]
        return tokens_from(both, tokenizer, self.length).ids


def load_targets(source: DataSource, role: Role, tokenizer: Any, seed: int = 0) -> Targets:
    """Read, draw and tokenize pairs of texts.

    Args:
        source: one with a `target`.
        role: names the texts in messages.
        tokenizer: any Transformers tokenizer with a padding token.
        seed: of the draw, unless the source has its own.

    Raises:
        DataError: the source is missing, unreadable or too small, its columns are others, or texts are empty.
    """
    name = texts.label(source.source, role, source.name, source.split)
    found = list(texts.read_pairs(source.source, source.target or "target", source.name, source.split, source.column))
    if len(found) < source.samples:
        raise DataError(f"{name}: {len(found)} pairs, but samples is {source.samples}; use more data or fewer samples")
    if tokenizer.pad_token_id is None:
        raise DataError(f"{name}: the tokenizer has no padding token, which batches of texts need; give it one")
    if source.samples < len(found):
        generator = torch.Generator().manual_seed(seed if source.seed is None else source.seed)
        found = [found[i] for i in torch.randperm(len(found), generator=generator)[: source.samples].tolist()]
    documents, targets = zip(*found, strict=True)
    ids, target_ids = _tokenize(documents, targets, tokenizer, source.length)
    if empty := sum(not (read and written) for read, written in zip(ids, target_ids, strict=True)):
        raise DataError(f"{name}: {empty} pairs have an empty text; leave them out")
    description = f"{name}: {len(ids)} pairs of texts, up to {source.length} tokens each"
    return Targets(documents, targets, ids, target_ids, source.length, description)


def check_targets(model: PreTrainedModel, targets: Targets) -> None:
    """Refuse pairs that the model cannot take.

    Raises:
        DataError: tokens that it does not know, more tokens than it has positions.
    """
    problems: list[str] = []
    for ids in (targets.ids, targets.target_ids):
        longest = max(map(len, ids))
        try:
            padded = torch.tensor([[*each, *[each[0]] * (longest - len(each))] for each in ids])
            check_tokens(model, padded, targets.description)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)


def pair_collator(tokenizer: Any) -> DataCollatorForSeq2Seq:
    """Makes batches of pairs, both texts padded to the longest of the batch."""
    return DataCollatorForSeq2Seq(tokenizer)


def _tokenize(documents: Sequence[str], targets: Sequence[str], tokenizer: Any, length: int) -> tuple[Ids, Ids]:
    options = {"truncation": True, "max_length": length}
    read = tokenizer(list(documents), **options)["input_ids"]
    written = tokenizer(text_target=list(targets), **options)["input_ids"]
    tokenizer("")  # a fast tokenizer would keep the limit of the last call, and save it
    return tuple(map(tuple, read)), tuple(map(tuple, written))
