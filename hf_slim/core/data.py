"""Text and tokens for calibration, training and evaluation.

A `DataSource` names text: the prose that every Python ships ("builtin"), a local txt, jsonl, csv, tsv or parquet file,
a folder of such files, or a Hub data set. Its documents are tokenized without special tokens, joined by the tokenizer's
end-of-sequence token, and cut into windows that do not overlap:

    held_out                 the first `samples` windows, in order
    calibration, train       `samples` windows drawn by the seed, without replacement, from a pool: the first
                             `POOL * samples` windows of the text, so that a huge data set is never read to its end

Calibration and evaluation never share text. The built-in prose is split by topic; for any other text the two roles need
another source, configuration or split, which `DataConfig` checks when it is made.

A source with a `label` holds classified texts: `examples.py` reads those one by one. One with a `target` holds pairs of
texts: `targets.py` does.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from jaxtyping import Int
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from hf_slim.core import texts
from hf_slim.core.errors import DataError

Role = Literal["calibration", "held_out", "train"]
POOL = 16
DEFAULT_LENGTH = 512


class DataSource(BaseModel):
    """Where text comes from and how much of it is used."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(
        default="builtin",
        min_length=1,
        description="'builtin', a txt, jsonl, csv, tsv or parquet file, a folder, a Hub id",
    )
    name: str | None = Field(default=None, description="configuration of a Hub data set, such as wikitext-2-raw-v1")
    split: str | None = Field(default=None, description="split of a folder or Hub data set; train if not given")
    column: str | None = Field(default=None, description="column of the text; text if not given")
    label: str | None = Field(default=None, description="column of the classes 0, 1, ...; none if not given")
    target: str | None = Field(
        default=None, description="train: column of what an encoder-decoder is to write; none if not given"
    )
    samples: int = Field(default=32, ge=1, description="number of windows, or of labelled texts")
    length: int = Field(default=DEFAULT_LENGTH, ge=2, description="tokens in a window; at most, in a labelled text")
    seed: int | None = Field(default=None, ge=0, description="of the choice of windows; the run's seed if not given")

    @model_validator(mode="after")
    def _options_fit_the_source(self) -> DataSource:
        kind = texts.kind_of(self.source)
        unused = [
            key
            for key in ("name", "split", "column", "label", "target")
            if key not in texts.OPTIONS[kind] and getattr(self, key)
        ]
        if unused:
            raise ValueError(f"{self.source!r} is {texts.KIND_NAMES[kind]} and takes no {' or '.join(unused)}")
        if self.label and self.target:
            raise ValueError("label is for classifiers, and target for encoder-decoders; leave one of them out")
        return self

    def identity(self) -> tuple[str | None, ...]:
        """What decides the text: two sources with the same identity hold the same documents."""
        kind = texts.kind_of(self.source)
        where = self.source if kind in ("builtin", "hub") else os.path.realpath(os.path.expanduser(self.source))
        return kind, where, self.name, self.split or "train", self.column or "text"


class DataConfig(BaseModel):
    """The text of each role. `train` may be the calibration text; `held_out` may be neither of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    calibration: DataSource = DataSource()
    held_out: DataSource = DataSource(samples=16)
    train: DataSource | None = Field(
        default=None, description="text for training stages; the calibration text if not given"
    )

    def of(self, role: Role) -> DataSource:
        """The source of a role."""
        return getattr(self, role) or self.calibration

    @model_validator(mode="after")
    def _held_out_is_held_out(self) -> DataConfig:
        if self.calibration.target or self.held_out.target:
            raise ValueError("target is for train data: no model is calibrated or measured on what it is to write")
        for role, source in (("calibration", self.calibration), ("train", self.train)):
            if source and source.source != "builtin" and source.identity() == self.held_out.identity():
                raise ValueError(
                    f"held_out and {role} are the same text, {source.source!r}: a measure on text that the model was "
                    "fitted to says nothing; give held_out another file or split"
                )
        return self


@dataclass(frozen=True)
class TokenWindows:
    """Tokens ready for a model, all windows of one length.

    Args:
        ids: token ids, one window a row.
        fingerprint: SHA-256 of shape and ids, in hexadecimal: equal tokens, equal fingerprint.
        description: for people: which text, how much of it.
    """

    ids: Int[Tensor, "samples length"]
    fingerprint: str
    description: str


def fingerprint(ids: Int[Tensor, "samples length"]) -> str:
    """SHA-256 of the shape and the ids as little-endian int64, in hexadecimal."""
    digest = hashlib.sha256(repr(tuple(ids.shape)).encode())
    digest.update(ids.cpu().contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def load_tokens(source: DataSource, role: Role, tokenizer: Any, seed: int = 0) -> TokenWindows:
    """Read, tokenize and cut the text of one role.

    Args:
        source: the text and the number and length of windows.
        role: decides the half of the built-in prose, and whether windows are drawn or taken in order.
        tokenizer: any Transformers tokenizer.
        seed: of the draw, unless the source has its own.

    Raises:
        DataError: the text is missing, unreadable, empty or too short; says how many tokens there are and the fix.
    """
    drawn = role != "held_out"
    wanted = source.samples * source.length
    documents = texts.read(source.source, role, source.name, source.split, source.column)
    flat = _flatten(_tokenize(documents, tokenizer), tokenizer.eos_token_id, wanted * POOL if drawn else wanted)
    label = texts.label(source.source, role, source.name, source.split)
    windows = _cut(flat, source.length, label)
    if len(windows) < source.samples:
        raise DataError(_too_short(label, flat.numel(), source.samples, source.length))
    chosen = _draw(windows, source.samples, seed if source.seed is None else source.seed) if drawn else windows
    return _windows(chosen[: source.samples].clone(), label)


def tokens_from(
    data: Any,
    tokenizer: Any = None,
    length: int | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> TokenWindows:
    """Windows of data that is already in memory.

    Args:
        data: list of texts; list of token id lists; tensor of ids [windows, length]; or a `datasets.Dataset` with a
            column "input_ids" or "text". Texts are joined by the end-of-sequence token, ids as they are; both are cut
            into windows and a rest that fills no window is left out. A tensor's rows are the windows.
        tokenizer: needed for texts.
        length: tokens in a window. If not given: the common length of the id lists, else 512. A tensor is cut to it.
        samples: number of windows, drawn by the seed without replacement. If not given: all, in order.
        seed: of the draw.

    Raises:
        DataError: data of another kind, no tokenizer for texts, too little data.
    """
    if isinstance(data, Tensor):
        windows = _tensor_windows(data, length)
    else:
        flat, common = _in_memory(data, tokenizer)
        windows = _cut(flat, length or common or DEFAULT_LENGTH, "data")
    if samples is not None:
        if len(windows) < samples:
            raise DataError(_too_short("data", windows.numel(), samples, windows.shape[1]))
        windows = _draw(windows, samples, seed)
    return _windows(windows.clone(), "data")


def _windows(ids: Int[Tensor, "samples length"], label: str) -> TokenWindows:
    return TokenWindows(ids, fingerprint(ids), f"{label}: {ids.shape[0]} windows of {ids.shape[1]} tokens")


def _tokenize(documents: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    # verbose=False: a document longer than the model's context is cut into windows, so that warning would mislead.
    return (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in documents)


def _flatten(documents: Iterable[Sequence[int]], separator: int | None, limit: int | None) -> Int[Tensor, " tokens"]:
    """Concatenate until there are `limit` tokens; `separator` goes between documents."""
    flat: list[int] = []
    for document in documents:
        if flat and separator is not None:
            flat.append(separator)
        flat.extend(document)
        if limit is not None and len(flat) >= limit:
            break
    return torch.tensor(flat[:limit], dtype=torch.int64)


def _cut(flat: Int[Tensor, " tokens"], length: int, label: str) -> Int[Tensor, "windows length"]:
    if flat.numel() == 0:
        raise DataError(f"{label}: holds no text; give text of at least {length} tokens")
    if flat.numel() < length:
        raise DataError(_too_short(label, flat.numel(), 1, length))
    return flat[: flat.numel() // length * length].view(-1, length)


def _draw(windows: Int[Tensor, "windows length"], samples: int, seed: int) -> Int[Tensor, "samples length"]:
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:samples]]


def _too_short(label: str, found: int, samples: int, length: int) -> str:
    return (
        f"{label}: {found} tokens, but {samples} windows of {length} tokens need {samples * length}; "
        "use more text, fewer samples or a smaller length"
    )


def _tensor_windows(data: Tensor, length: int | None) -> Int[Tensor, "windows length"]:
    if data.dim() != 2 or data.is_floating_point() or data.dtype == torch.bool or data.is_complex():
        raise DataError(f"data: expected token ids of shape [windows, length], got {data.dtype} {list(data.shape)}")
    if data.numel() == 0 or (length is not None and data.shape[1] < length):
        raise DataError(f"data: windows of {length or 2} tokens need as many columns, got shape {list(data.shape)}")
    return data[:, :length].to("cpu", torch.int64)


def _in_memory(data: Any, tokenizer: Any) -> tuple[Int[Tensor, " tokens"], int | None]:
    """All tokens in one row, and the common length of the documents if they are lists of ids."""
    items = texts.rows_of(data)
    try:
        first = next(items)
    except StopIteration:
        raise DataError("data: is empty; give at least one text or list of token ids") from None
    if isinstance(first, str):
        if tokenizer is None:
            raise DataError("data: got texts, but no tokenizer; pass tokenizer= or token ids")
        documents = _tokenize(_all_of(str, chain([first], items)), tokenizer)
        return _flatten(documents, tokenizer.eos_token_id, None), None
    rows = [_id_list(row) for row in chain([first], items)]
    lengths = {len(row) for row in rows}
    return _flatten(rows, None, None), lengths.pop() if len(lengths) == 1 else None


def _all_of(kind: type, items: Iterable[Any]) -> Iterator[Any]:
    for position, item in enumerate(items):
        if not isinstance(item, kind):
            raise DataError(f"data[{position}]: expected {kind.__name__} as in data[0], got {type(item).__name__}")
        yield item


def _id_list(row: Any) -> list[int]:
    row = row.tolist() if hasattr(row, "tolist") else row
    if not isinstance(row, (list, tuple)) or not all(isinstance(each, int) for each in row):
        raise DataError(f"data: expected texts or lists of token ids, got an item of type {type(row).__name__}")
    return list(row)
