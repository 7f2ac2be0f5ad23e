"""A teacher cache on disk: which teacher said it about which text, and shards of what it said.

    FOLDER/cache.json                 the key: everything that decides the content
    FOLDER/shard-00000.safetensors    a run of rows of the data set; tensors as in `cache_records.py`
    FOLDER/shard-00000.json           SHA-256 and size of that file, written after it

A shard without its note, or with another one, is not there. A row is addressed by its number in the data set, and holds
a check sum of its tokens, so that rows of other data are noticed however they come.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_slim.core.errors import ArtifactError, ResumeError
from hf_slim.core.files import write_text
from hf_slim.core.model import sha256
from hf_slim.distillation.cache_records import ids_bytes, renormalized, unpack_draws, unpack_ids, words_of

KEY = "cache.json"
_NAMES = {
    "teacher": "the teacher",
    "tokenizer": "the tokenizer",
    "data": "the tokens of the data set",
    "rows": "the number of rows",
    "task": "what is predicted",
    "kind": "the kind of targets",
    "words": "k or draws",
}


class CacheKey(BaseModel):
    """Everything that decides what a cache holds.

    Args:
        teacher: fingerprint of the teacher: hash of its files or weights, or a Hub id with its commit.
        tokenizer: hash of the tokenizer's words; None if it is not known.
        data: SHA-256 of all rows' tokens, in order.
        rows: of the data set.
        task: what the logits predict, see `pairs.task_of`.
        vocabulary: words, or classes, that are numbered.
        kind: "top_k" or "sampled".
        words: k, or draws, of each token.
        precision: dtype of stored log-probabilities.
        temperature: that the teacher's logits were divided by.
        seed: of the draws.
        rows_a_shard: rows of a shard; the last may have fewer.
        version: of the format.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    teacher: str
    tokenizer: str | None
    data: str
    rows: int
    task: str
    vocabulary: int
    kind: Literal["top_k", "sampled"]
    words: int
    precision: Literal["float16", "float32"]
    temperature: float
    seed: int
    rows_a_shard: int
    version: Literal[1] = 1

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.rows_a_shard)

    def rows_of(self, shard: int) -> range:
        """The rows of a shard."""
        return range(shard * self.rows_a_shard, min(self.rows, (shard + 1) * self.rows_a_shard))

    def differences(self, wanted: Mapping[str, Any]) -> list[str]:
        """What differs from these values, for people."""
        own = self.model_dump()
        return [
            f"{_NAMES.get(name, name)}: the cache has {_shown(own[name])}, here it is {_shown(value)}"
            for name, value in wanted.items()
            if value is not None and own[name] is not None and own[name] != value
        ]


@dataclass(frozen=True)
class Targets:
    """What a cache holds about some rows, their tokens one after the other.

    Args:
        ids: words [tokens, u].
        values: their log-probabilities (top k), or shares of the draws.
        lengths: positions of each row.
        checks: check sum of each row's tokens.
    """

    ids: Int[Tensor, "tokens u"]
    values: Float[Tensor, "tokens u"]
    lengths: list[int]
    checks: list[int]


class TeacherCache:
    """A finished cache, for reading by any number of processes.

    Args:
        folder: that `teacher_cache.write_cache` has written.

    Raises:
        ArtifactError: there is no cache, or the pass that was to write it has not finished.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.key = read_key(self.folder) or _no_cache(self.folder)
        self._notes = [read_note(self.folder, shard) for shard in range(self.key.shards)]
        missing = [shard for shard, note in enumerate(self._notes) if note is None]
        if missing:
            raise ArtifactError(
                f"teacher cache {self.folder}: {len(missing)} of {self.key.shards} shards are missing, such as number "
                f"{missing[0]}; run the pass that writes it again, it goes on where it stopped"
            )
        self._starts: dict[int, tuple[list[int], list[int]]] = {}

    @property
    def tokens(self) -> int:
        """Positions that it holds targets of."""
        return sum(note["tokens"] for note in self._notes if note)

    @property
    def bytes_a_token(self) -> float:
        """Size of the shards by the positions in them."""
        return sum(note["bytes"] for note in self._notes if note) / self.tokens

    def read(self, rows: Sequence[int]) -> Targets:
        """The targets of some rows, in this order.

        Raises:
            ArtifactError: a shard has been changed since it was written.
        """
        parts = [self._row(row) for row in rows]
        widest = max(ids.shape[1] for ids, _, _ in parts)
        ids, values = (
            torch.cat([torch.nn.functional.pad(part[i], (0, widest - part[i].shape[1])) for part in parts])
            for i in (0, 1)
        )
        return Targets(ids, values, [len(part[0]) for part in parts], [part[2] for part in parts])

    def _row(self, row: int) -> tuple[Tensor, Tensor, int]:
        """Words, values and check sum of one row."""
        key, (shard, number) = self.key, divmod(row, self.key.rows_a_shard)
        token_starts, byte_starts = self._starts.get(shard) or self._open(shard)
        tokens = slice(token_starts[number], token_starts[number + 1])
        with safe_open(shard_path(self.folder, shard), "pt") as file:
            check = int(file.get_slice("checks")[number : number + 1])
            if key.kind == "top_k":
                words = min(key.words, key.vocabulary)
                ids = unpack_ids(file.get_slice("ids")[tokens], key.vocabulary, words)
                log_p, tail = file.get_slice("log_p")[tokens], file.get_slice("tail")[tokens]
                return ids, renormalized(log_p, tail), check
            packed = file.get_slice("ids")[byte_starts[number] : byte_starts[number + 1]]
            return *unpack_draws(file.get_slice("begins")[tokens], packed, key.vocabulary, key.words), check

    def _open(self, shard: int) -> tuple[list[int], list[int]]:
        """Where each row of a shard begins, in tokens and in bytes of packed draws; checks the file first."""
        path = shard_path(self.folder, shard)
        if not is_whole(self.folder, shard):
            raise ArtifactError(
                f"teacher cache: {path} is not as it was written; delete it and run the pass again, "
                "which writes what is missing"
            )
        with safe_open(path, "pt") as file:
            lengths, sizes = file.get_tensor("lengths"), [0]
            if self.key.kind == "sampled":
                words = words_of(file.get_tensor("begins"), self.key.words).split(lengths.tolist())
                sizes = [ids_bytes(int(row.sum()), self.key.vocabulary) for row in words]
        self._starts[shard] = _starts(lengths.tolist()), _starts(sizes)
        return self._starts[shard]


def read_key(folder: Path) -> CacheKey | None:
    """The key of a cache, finished or not; None if there is none.

    Raises:
        ArtifactError: it cannot be read.
    """
    path = folder / KEY
    if not path.is_file():
        return None
    try:
        return CacheKey.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError):
        raise ArtifactError(f"{path} is not the key of a teacher cache of this version; delete the folder") from None


def claim(folder: Path, key: CacheKey, *, create: bool) -> None:
    """Take a folder for a cache with this key: a new one, or one that was begun with it.

    Args:
        create: whether to begin one; of several processes only one does.

    Raises:
        ResumeError: it holds a cache of something else; says what differs.
        ArtifactError: it holds other things.
    """
    found = read_key(folder)
    if found is None and create:
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise ArtifactError(f"{folder} exists and is no teacher cache; give another folder, or empty it")
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / KEY, key.model_dump_json(indent=2) + "\n")
    if found is not None and (differences := found.differences(key.model_dump())):
        raise ResumeError(
            [f"{folder}: {difference}; delete the folder, or give another one" for difference in differences]
        )


def write_shard(folder: Path, shard: int, tensors: dict[str, Tensor]) -> None:
    """Write a shard in one step, and then the note that makes it count."""
    path = shard_path(folder, shard)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary)
    os.replace(temporary, path)
    note = {"sha256": sha256(path), "bytes": path.stat().st_size, "tokens": int(tensors["lengths"].sum())}
    write_text(_note_path(folder, shard), json.dumps(note) + "\n")


def is_whole(folder: Path, shard: int) -> bool:
    """Whether a shard is there, exactly as it was written."""
    note, path = read_note(folder, shard), shard_path(folder, shard)
    return (
        note is not None and path.is_file() and path.stat().st_size == note["bytes"] and sha256(path) == note["sha256"]
    )


def read_note(folder: Path, shard: int) -> dict[str, Any] | None:
    """What was noted about a shard; None where nothing was, or only half of it."""
    try:
        note = json.loads(_note_path(folder, shard).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return note if isinstance(note, dict) and {"sha256", "bytes", "tokens"} <= note.keys() else None


def shard_path(folder: Path, shard: int) -> Path:
    """Where a shard is."""
    return folder / f"shard-{shard:05d}.safetensors"


def _note_path(folder: Path, shard: int) -> Path:
    return shard_path(folder, shard).with_suffix(".json")


def _starts(sizes: list[int]) -> list[int]:
    return [0, *torch.tensor(sizes).cumsum(0).tolist()]


def _shown(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else str(value)


def _no_cache(folder: Path) -> CacheKey:
    raise ArtifactError(
        f"{folder} holds no teacher cache; write one with hf_slim.distillation.teacher_cache.write_cache"
    )
