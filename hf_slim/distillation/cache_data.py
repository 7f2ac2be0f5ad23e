"""The data that a teacher cache is made of: what tells them from others, and whether a teacher can read them."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_slim.core.errors import DataError
from hf_slim.distillation.pairs import Model
from hf_slim.distillation.teachers import readable_positions
from hf_slim.distillation.vocabulary import real_positions


@dataclass(frozen=True)
class Scan:
    """What a look at every row of a data set has found.

    Args:
        fingerprint: SHA-256 of all tokens and where rows end, in hexadecimal.
        checks: check sum of each row's tokens.
        longest: tokens of the longest row.
        lowest: the smallest token id.
        highest: the largest one.
    """

    fingerprint: str
    checks: list[int]
    longest: int
    lowest: int
    highest: int


def scan(data: Any) -> Scan:
    """Look at every row.

    Raises:
        DataError: it has no length, is empty, or its rows have no token ids.
    """
    require_rows(data)
    digest, checks, longest, lowest, highest = hashlib.sha256(), [], 0, 0, 0
    for number in range(len(data)):
        tokens = tokens_of(data[number], number)
        checks.append(check_sum(tokens))
        digest.update(len(tokens).to_bytes(8, "little") + checks[-1].to_bytes(4, "little"))
        digest.update(tokens.numpy().astype("<i8").tobytes())
        longest = max(longest, len(tokens))
        lowest, highest = min(lowest, int(tokens.min())), max(highest, int(tokens.max()))
    return Scan(digest.hexdigest(), checks, longest, lowest, highest)


def require_rows(data: Any) -> None:
    """Raises DataError unless data has rows that can be addressed by their number."""
    if data is None or not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise DataError(
            f"a teacher cache addresses rows by their number, and {type(data).__name__} has none; give a data set "
            "with a length, not a stream"
        )
    check_not_empty(data)


def check_not_empty(data: Any) -> None:
    """Raises DataError if data is known to have no rows."""
    if hasattr(data, "__len__") and len(data) == 0:
        raise DataError("the data set is empty; give at least one row")


def check_readable(teacher: Model, found: Scan) -> None:
    """Refuse data that a teacher cannot read.

    Raises:
        DataError: rows longer than it has positions, ids that its embedding does not have; all problems at once.
    """
    problems = []
    positions, words = readable_positions(teacher), getattr(teacher.config, "vocab_size", None)
    if positions is not None and found.longest > positions:
        problems.append(
            f"a row of {found.longest} tokens does not fit the teacher's {positions} positions; use shorter rows, or a "
            "teacher that reads more"
        )
    if words is not None and not 0 <= found.lowest <= found.highest < words:
        problems.append(
            f"token ids run from {found.lowest} to {found.highest}, but the teacher knows 0 to {words - 1}; tokenize "
            "the data with its own tokenizer"
        )
    if problems:
        raise DataError(problems)


def check_sum(tokens: Tensor) -> int:
    """Of a row's tokens, below 2**32."""
    return zlib.crc32(tokens.cpu().contiguous().numpy().astype("<i8").tobytes())


def tokens_of(item: Any, number: int) -> Tensor:
    """The real tokens of an item of a data set."""
    ids = item.get("input_ids") if isinstance(item, Mapping) else None
    if ids is None or len(ids) == 0:
        raise DataError(f"row {number} of the data set has no input_ids; tokenize the data first")
    row = {name: torch.as_tensor(item[name]).unsqueeze(0) for name in ("input_ids", "attention_mask") if name in item}
    return row["input_ids"][real_positions(row)]
