"""Documents of a text source: Python's own prose, local files, folders and Hub data sets.

A source is told apart by its name alone where that suffices: "builtin"; something that exists here, starts like a path
or ends in a known extension is local; everything else is the id of a data set on the Hub.

The built-in prose is the language reference behind Python's `help()` (`pydoc_data.topics`), about 42,000 words. It
differs between Python versions, so labels name the version. Topics quote each other: a paragraph stays only with the
longest topic that has it, and the topics are then split by a hash of their names. No paragraph is in both halves.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import platform
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from hf_slim.core.errors import DataError, nearest

Kind = Literal["builtin", "text", "jsonl", "csv", "tsv", "parquet", "folder", "hub", "unknown"]
Row = tuple[dict[str, Any], str]  # cells by column, and what messages call the place

EXTENSIONS: dict[str, Kind] = {
    ".txt": "text",
    ".raw": "text",
    ".jsonl": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
KIND_NAMES: dict[Kind, str] = {
    "builtin": "Python's own prose",
    "text": "a text file",
    "jsonl": "a jsonl file",
    "csv": "a csv file",
    "tsv": "a tsv file",
    "parquet": "a parquet file",
    "folder": "a folder",
    "hub": "a Hub data set",
    "unknown": "a local file of an unknown kind",
}
OPTIONS: dict[Kind, tuple[str, ...]] = {
    "builtin": (),
    "text": (),
    "jsonl": ("column", "label", "target"),
    "csv": ("column", "label", "target"),
    "tsv": ("column", "label", "target"),
    "parquet": ("column", "label", "target"),
    "folder": ("split", "column", "label", "target"),
    "hub": ("name", "split", "column", "label", "target"),
    "unknown": ("name", "split", "column", "label", "target"),
}
HELD_OUT_TOPICS = 0.2  # share of the topics; they hold 29 % of the words


def kind_of(source: str) -> Kind:
    """What a source's name refers to."""
    if source == "builtin":
        return "builtin"
    path = Path(source).expanduser()
    if path.is_dir():
        return "folder"
    if path.suffix.lower() in EXTENSIONS:
        return EXTENSIONS[path.suffix.lower()]
    is_path = path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1
    return "unknown" if is_path else "hub"


def label(source: str, role: str, name: str | None = None, split: str | None = None) -> str:
    """What messages and reports call a source."""
    if source == "builtin":
        half = "held-out" if role == "held_out" else "calibration"
        return f"prose of Python {platform.python_version()} ({half} topics)"
    return " ".join(part for part in (source, name, split) if part)


def read(
    source: str, role: str, name: str | None = None, split: str | None = None, column: str | None = None
) -> Iterator[str]:
    """Documents of a source, one by one.

    Args:
        source: "builtin", a local file or folder, or a Hub id.
        role: "held_out" takes one half of the built-in prose, any other role takes the other half.
        name: configuration of a Hub data set.
        split: split of a folder or Hub data set; "train" if None.
        column: column of the text; "text" if None.

    Raises:
        DataError: the source is missing or cannot be read, or has no such column (its columns are named).
    """
    kind = kind_of(source)
    if kind == "builtin":
        return iter(builtin(held_out=role == "held_out"))
    if kind == "text":
        return iter([_read_text(_existing(source))])
    wanted = column or "text"
    return (_text(row, wanted, where) for row, where in _rows(source, name, split, (wanted,)))


def read_labelled(
    source: str, label: str, name: str | None = None, split: str | None = None, column: str | None = None
) -> Iterator[tuple[str, int]]:
    """Documents of a source with a column of classes: the text and its class.

    Args:
        source: a jsonl, csv, tsv or parquet file, a folder, or a Hub id.
        label: column of the classes, whole numbers.
        name, split, column: as in `read`.

    Raises:
        DataError: as in `read`; a class that is no whole number.
    """
    wanted = column or "text"
    for row, where in _rows(source, name, split, (wanted, label)):
        yield labelled_cells(row, wanted, label, where)


def labelled_cells(row: dict[str, Any], column: str, label: str, where: str) -> tuple[str, int]:
    """Text and class of one row.

    Raises:
        DataError: no such columns, no text, no whole number.
    """
    return _text(row, column, where), _whole(row, label, where)


def read_pairs(
    source: str, target: str, name: str | None = None, split: str | None = None, column: str | None = None
) -> Iterator[tuple[str, str]]:
    """Pairs of documents: what is read, and what is to be written.

    Args:
        source: a jsonl, csv, tsv or parquet file, a folder, or a Hub id.
        target: column of what is to be written.
        name, split, column: as in `read`.

    Raises:
        DataError: as in `read`.
    """
    wanted = column or "text"
    for row, where in _rows(source, name, split, (wanted, target)):
        yield _text(row, wanted, where), _text(row, target, where)


def _rows(source: str, name: str | None, split: str | None, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of a source that has columns; these columns at least."""
    kind = kind_of(source)
    if kind == "hub":
        return _data_set(source, name, split or "train")
    path = _existing(source)
    if kind == "folder":
        return _data_set(str(path), None, split or "train")
    if kind == "jsonl":
        return _jsonl(path)
    if kind == "parquet":
        return _parquet(path, columns)
    return _separated(path, "," if kind == "csv" else "\t")


def _existing(source: str) -> Path:
    """The path of a local source that can be read."""
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(f"{source}: no such file; give an existing path, a Hub data set or 'builtin'")
    if kind_of(source) == "unknown":
        raise DataError(f"{source}: cannot read {path.suffix or 'this'} files; known: {', '.join(sorted(EXTENSIONS))}")
    return path


def rows_of(data: Any) -> Iterator[Any]:
    """Texts or token ids of data in memory: an iterable of them, or a data set with such a column.

    Raises:
        DataError: not iterable, or a data set with neither column (its columns are named).
    """
    columns = getattr(data, "column_names", None)
    if columns is not None:
        column = next((each for each in ("input_ids", "text") if each in columns), None)
        if column is None:
            raise DataError(f"data: needs a column 'text' or 'input_ids', got {', '.join(columns) or 'none'}")
        return (row[column] for row in data)
    if isinstance(data, (str, bytes, dict)) or not hasattr(data, "__iter__"):
        raise DataError(f"data: expected a list of texts or of token ids, a tensor or a Dataset, got {_type(data)}")
    return iter(data)


def _type(data: Any) -> str:
    return "one str (put it into a list)" if isinstance(data, str) else type(data).__name__


# ------------------------------------------------------------------------------------------------- local files and Hub


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from None


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f'{path}, line {number}: expected an object such as {{"text": ...}}, got {line[:40]}')
        yield row, f"{path}, line {number}"


def _separated(path: Path, separator: str) -> Iterator[Row]:
    """Rows of a csv file, where quotes enclose cells, or of a tsv file, where they are characters like any other."""
    quoting = csv.QUOTE_MINIMAL if separator == "," else csv.QUOTE_NONE
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), delimiter=separator, quoting=quoting)
    try:
        for row in reader:
            yield row, f"{path}, line {reader.line_num}"
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: cannot be read as {path.suffix[1:]}: {error}") from None


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        for column in columns:
            _require_column(column, file.schema_arrow.names, str(path))
        for batch in file.iter_batches(batch_size=256, columns=list(columns)):
            for row in batch.to_pylist():
                yield row, str(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as parquet: {error}") from None


def _data_set(source: str, name: str | None, split: str) -> Iterator[Row]:
    """Rows of a Hub data set, or of a folder of data files, streamed."""
    import datasets

    where = " ".join(part for part in (source, name, split) if part)
    try:
        for row in datasets.load_dataset(source, name, split=split, streaming=True):
            yield row, where
    except Exception as error:  # load_dataset raises whatever its many back ends raise; every one is told to the user
        raise DataError(
            f"{where}: cannot be loaded as a data set: {type(error).__name__}: {str(error).strip() or 'no message'}. "
            "Check the id, name and split, and the network; local files and 'builtin' need none"
        ) from error


def _require_column(column: str, columns: Sequence[str], where: str, key: str = "column") -> None:
    if column in columns:
        return
    known = [str(each) for each in columns]
    close = nearest(column, known)
    hint = f"; {close}" if close.startswith("did") else ""
    raise DataError(f"{where}: no column {column!r}; columns: {', '.join(known)}; set {key}:{hint}")


def _text(row: dict[str, Any], column: str, where: str) -> str:
    _require_column(column, list(row), where)
    if not isinstance(row[column], str):
        raise DataError(f"{where}: column {column!r} holds {type(row[column]).__name__}, not text; set column:")
    return row[column]


def _whole(row: dict[str, Any], column: str, where: str) -> int:
    """A class: a whole number, in a file of text its digits."""
    _require_column(column, list(row), where, "label")
    value = row[column]
    digits = isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,9}\s*", value)
    if isinstance(value, bool) or not (digits or isinstance(value, int)):
        raise DataError(f"{where}: label {value!r} in column {column!r} is no whole number; number the classes from 0")
    return int(value)


# --------------------------------------------------------------------------------------------------- Python's own prose


def builtin(held_out: bool) -> list[str]:
    """Topics of Python's language reference as plain prose, in a fixed order.

    Args:
        held_out: the held-out topics; else all the others.
    """
    from pydoc_data.topics import topics

    paragraphs = {name: _prose(text) for name, text in topics.items()}
    seen: set[str] = set()
    documents: dict[str, str] = {}
    for name in sorted(paragraphs, key=lambda name: (-sum(map(len, paragraphs[name])), name)):
        own = [each for each in paragraphs[name] if each not in seen]
        seen.update(own)
        if own:
            documents[name] = "\n\n".join(own)
    return [documents[name] for name in sorted(documents) if _is_held_out(name) == held_out]


def _is_held_out(topic: str) -> bool:
    return hashlib.sha256(topic.encode()).digest()[0] < HELD_OUT_TOPICS * 256


def _prose(text: str) -> list[str]:
    """Paragraphs without headings' rules, grammar, code and emphasis marks, each on one line."""
    kept = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.splitlines()]
        lines = [line for line in lines if not re.fullmatch(r"([*=~^+#-])\1*", line)]
        joined = re.sub(r"(?<=[a-z])-\s(?=[a-z])", "-", " ".join(lines)).strip()
        if _is_prose(joined):
            kept.append(re.sub(r"(?<!\*)\*(\w[^*]*?)\*(?!\*)", r"\1", joined))
    return kept


def _is_prose(paragraph: str) -> bool:
    code = ("::=" in paragraph) or paragraph.startswith((">>>", "...", "#", "|", "+--"))
    return not code and paragraph.endswith((".", ":", "!", "?", ")")) and len(re.findall(r"[a-z]{2,}", paragraph)) >= 8
