"""Where an export goes: written beside its place, moved there when it is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_slim.core.context import Context
from hf_slim.core.errors import ArtifactError
from hf_slim.core.parallel import is_main, wait_for_all
from hf_slim.core.report import StageReport

EXPORTS = "exports"  # folder of an artifact that holds its exports


def write_export(write: Callable[[Path], list[str]], to: str, context: Context) -> StageReport:
    """Let `write` fill a new folder, move it to its place, and report what it holds.

    Args:
        write: is given an empty folder; returns notes for the report.
        to: the stage's option: a name below `context.out`, or below the working directory when that is None.

    Returns:
        A report whose `files` are the files written, as paths below `context.out`.

    Raises:
        ArtifactError: in a script, something is there already.
    """
    target = (context.out or Path()) / to
    if context.out is None:
        refuse_taken(target)
    notes: list[str] = []
    if is_main():
        with written_at(target) as folder:
            notes = write(folder)
    wait_for_all()
    names = sorted(str(file.relative_to(target).as_posix()) for file in target.rglob("*") if file.is_file())
    size = sum((target / name).stat().st_size for name in names)
    return StageReport(metrics={"folder": to, "bytes": size}, files=[f"{to}/{name}" for name in names], notes=notes)


@contextmanager
def written_at(target: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `target` when the block ends, and vanishes when it fails."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_taken(target: Path) -> None:
    """Raises:
    ArtifactError: there is a file, or a folder that is not empty.
    """
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ArtifactError(f"{target} exists; give another name as `to`, or remove it")
