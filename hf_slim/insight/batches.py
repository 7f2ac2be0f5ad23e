"""Token batches to look at a model with, free of padding, from whatever holds text or tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hf_slim.core.capture import BATCH_TOKENS
from hf_slim.core.data import tokens_from
from hf_slim.core.errors import DataError


def token_batches(
    data: Any, tokenizer: Any = None, length: int | None = None, samples: int | None = None, seed: int = 0
) -> list[Int[Tensor, "windows length"]]:
    """Windows of tokens in batches of about 2048 tokens, each of one length.

    Args:
        data: what `hf_slim.compress` takes (texts, lists of ids, a tensor [windows, length], a `datasets.Dataset`), or
            padded sequences: one mapping with `input_ids` and `attention_mask`, as a tokenizer returns it, or an
            iterable of such mappings (a DataLoader, rows of a Dataset). Padding is cut off, so that no padded token is
            ever computed, let alone counted.
        length, samples, seed: see `core.data.tokens_from`; of padded sequences the first `samples`, cut to `length`.

    Raises:
        DataError: unusable data; a mask with holes; no token at all.
    """
    data = list(data) if isinstance(data, Iterator) else data
    masked = _masked(data)
    if masked is None:
        windows = tokens_from(data, tokenizer, length, samples, seed).ids
        return list(windows.split(max(1, BATCH_TOKENS // windows.shape[1])))
    by_length: dict[int, list[Tensor]] = {}
    for number, row in enumerate(chain.from_iterable(map(_unpadded, masked))):
        if number == samples:
            break
        if len(row := row[:length]):
            by_length.setdefault(len(row), []).append(row)
    if not by_length:
        raise DataError("data: the attention masks leave no token; give at least one sequence of text")
    return [
        batch
        for size, rows in sorted(by_length.items())
        for batch in torch.stack(rows).split(max(1, BATCH_TOKENS // size))
    ]


def _masked(data: Any) -> Iterable[Mapping[str, Any]] | None:
    """Mappings with an attention mask, or None for data of another kind."""
    if isinstance(data, Mapping):
        return [data] if "attention_mask" in data else None
    if isinstance(data, (str, Tensor)) or not isinstance(data, Iterable):
        return None
    first = next(iter(data), None)
    return data if isinstance(first, Mapping) and "attention_mask" in first else None


def _unpadded(batch: Mapping[str, Any]) -> Iterator[Int[Tensor, " length"]]:
    ids, mask = (torch.as_tensor(batch[key]).cpu() for key in ("input_ids", "attention_mask"))
    if ids.shape != mask.shape or ids.dim() not in (1, 2):
        raise DataError(
            f"data: input_ids {list(ids.shape)} and attention_mask {list(mask.shape)} must have one shape, "
            "[length] or [windows, length]"
        )
    for row, keep in zip(ids.view(-1, ids.shape[-1]), mask.view(-1, ids.shape[-1]).bool(), strict=True):
        places = keep.nonzero()[:, 0]
        if len(places) and int(places[-1] - places[0]) + 1 != len(places):
            raise DataError(
                "data: an attention mask has holes; mask only the padding at the start or end of a sequence"
            )
        yield row[keep].long()
