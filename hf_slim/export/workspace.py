"""The output folder while a run is under way: what is finished, what it was made from, and nothing half-written.

    OUT/.slim/manifest.json    what the run was made from, and the report of every finished stage
    OUT/.slim/model-N/         the model after stage N (the last one only)
    OUT/.slim/exports/         what finished export stages wrote
    OUT/.slim/stage-N/         files of the stage that is running: finished blocks, trainer checkpoints

Every step ends with an atomic replacement of the manifest; what it does not name does not count. When all stages are
done the artifact is written to OUT/.slim/artifact and moved into place, and `.slim` goes away.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from hf_slim.core.errors import ArtifactError, ResumeError, SlimError
from hf_slim.core.files import write_text
from hf_slim.core.parallel import is_main, wait_for_all
from hf_slim.core.report import RunReport, StageReport
from hf_slim.export.artifact import REPORT, read_report
from hf_slim.export.files import EXPORTS

WORK = ".slim"
MANIFEST = "manifest.json"
OLD = "old.json"  # `slim.json` of an artifact that is being thrown away


class Manifest(BaseModel):
    """What an unfinished run was made from and what it has finished.

    Args:
        inputs: fingerprints of everything that decides the result.
        stages: reports of the finished stages.
        model: folder of the model after the last of them; None while it is still the original.
    """

    model_config = ConfigDict(extra="forbid")

    inputs: dict[str, Any]
    stages: list[StageReport]
    model: str | None


class Workspace:
    """The output folder of one run.

    Args:
        out: the folder; it must not exist, be empty, or be ours.
    """

    def __init__(self, out: Path):
        self.out = out
        self.work = out / WORK
        self.reports: list[StageReport] = []
        self.model_folder: str | None = None
        self._inputs: dict[str, Any] = {}
        self._begun: Manifest | None = None

    def check(self) -> None:
        """Refuse a folder that is not ours.

        Raises:
            ArtifactError: it is a file, holds other things, or cannot be written.
        """
        if self.out.is_file():
            raise ArtifactError(f"{self.out} is a file; give a folder")
        if self.out.is_dir() and any(self.out.iterdir()) and not (self.is_finished() or self.work.is_dir()):
            raise ArtifactError(f"{self.out} exists and was not written by hf_slim; give another folder, or empty it")
        parent = next(p for p in [self.out, *self.out.absolute().parents] if p.exists())
        if not os.access(parent, os.W_OK):
            raise ArtifactError(f"{self.out} cannot be written: no permission in {parent}")

    def is_finished(self) -> bool:
        """Whether an earlier run has left its artifact here."""
        return (self.out / REPORT).is_file()

    def open(self, inputs: dict[str, Any]) -> None:
        """Take up what an earlier run with the same inputs left; writes nothing.

        Raises:
            ResumeError: the folder's run was made from other inputs; says which.
        """
        self._inputs = inputs
        self._begun = self._read_manifest()
        if self._begun is not None:
            self.refuse_other_inputs(self._begun.inputs)
            self.reports, self.model_folder = self._begun.stages, self._begun.model

    def begin(self) -> None:
        """Make the folder and note what the run is made from, unless an earlier run did.

        Raises:
            ArtifactError: the folder cannot be made.
        """
        wait_for_all()  # every process has looked before one of them writes
        if self._begun is None and is_main():
            self._start()
        wait_for_all()

    def refuse_other_inputs(self, made_from: dict[str, Any]) -> None:
        """Fail when the folder's content was made from something else.

        Raises:
            ResumeError: names what changed.
        """
        changed = [key for key in sorted(self._inputs | made_from) if self._inputs.get(key) != made_from.get(key)]
        if changed:
            raise ResumeError(
                [
                    f"{self.out}: {key} changed since this run began (was {_short(made_from.get(key))}, "
                    f"is {_short(self._inputs.get(key))}); restore it, or start anew with --overwrite"
                    for key in changed
                ]
            )

    def finished(self, inputs: dict[str, Any]) -> RunReport:
        """The report of the artifact that is here.

        Raises:
            ResumeError: it was made from other inputs; says which.
            ArtifactError: it is damaged.
        """
        report = read_report(self.out)
        self._inputs = inputs
        self.refuse_other_inputs(report.inputs)
        if is_main():
            shutil.rmtree(self.work, ignore_errors=True)  # of a run that was killed after its last step
        return report

    def clear(self) -> None:
        """Throw away what an earlier run of ours left; files that are not ours stay.

        The list of our files is moved away first: a folder with `slim.json` is complete at any moment.
        """
        wait_for_all()  # every process has checked the folder
        if is_main():
            if self.is_finished():
                self.work.mkdir(exist_ok=True)
                os.replace(self.out / REPORT, self.work / OLD)
            self._remove()
        wait_for_all()

    def _remove(self) -> None:
        for name in _own_files(self.work / OLD):
            (self.out / name).unlink(missing_ok=True)
            _remove_emptied(self.out, (self.out / name).parent)
        shutil.rmtree(self.work, ignore_errors=True)

    def stage_folder(self, number: int) -> Path:
        """Where stage `number` keeps its own files while it runs."""
        return self.work / f"stage-{number}"

    @property
    def exports(self) -> Path:
        """Where export stages write until the artifact is published."""
        return self.work / EXPORTS

    def finish_stage(self, number: int, report: StageReport, model: Any = None, tokenizer: Any = None) -> None:
        """Note a finished stage; with a model, keep the model as it is after it, with its tokenizer if that is new."""
        previous = self.model_folder
        self.reports.append(report)
        if is_main():
            if model is not None:
                folder = self.work / f"model-{number}"
                shutil.rmtree(folder, ignore_errors=True)
                model.save_pretrained(folder)
                if tokenizer is not None:
                    tokenizer.save_pretrained(folder)
                self.model_folder = folder.name
            self._write_manifest()
            shutil.rmtree(self.stage_folder(number), ignore_errors=True)
            if previous and previous != self.model_folder:
                shutil.rmtree(self.work / previous, ignore_errors=True)
        elif model is not None:
            self.model_folder = f"model-{number}"
        wait_for_all()

    def publish(self, staged: Path) -> None:
        """Move the staged artifact into place, `slim.json` last: a folder with it is complete."""
        for file in [file for file in self.exports.rglob("*") if file.is_file()]:
            target = self.out / EXPORTS / file.relative_to(self.exports)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
        names = sorted(p.name for p in staged.iterdir())
        for name in [n for n in names if n != REPORT] + [REPORT]:
            os.replace(staged / name, self.out / name)
        shutil.rmtree(self.work, ignore_errors=True)

    def _start(self) -> None:
        self._remove()
        try:
            self.work.mkdir(parents=True)
        except OSError as error:
            if _is_disk_full(error):
                raise
            raise ArtifactError(f"{self.out} cannot be written: {error.strerror}; give another folder") from error
        self._write_manifest()

    def _read_manifest(self) -> Manifest | None:
        path = self.work / MANIFEST
        try:
            return Manifest.model_validate_json(path.read_bytes()) if path.is_file() else None
        except ValidationError as error:
            what = error.errors()[0]["msg"]
            raise ResumeError(f"{path} is damaged ({what}); start anew with --overwrite") from error

    def _write_manifest(self) -> None:
        manifest = Manifest(inputs=self._inputs, stages=self.reports, model=self.model_folder)
        write_text(self.work / MANIFEST, manifest.model_dump_json(indent=1))


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk into a message; what was finished before stays and can be resumed."""
    try:
        yield
    except SlimError:
        raise
    except Exception as error:
        if _is_disk_full(error):
            free = shutil.disk_usage(next(p for p in [folder, *folder.absolute().parents] if p.exists())).free
            raise ArtifactError(
                f"the disk that holds {folder} is full ({free / 2**20:.0f} MiB free); make room and run the same "
                "command again: finished stages are kept"
            ) from error
        raise


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error; libraries wrap it, safetensors keeps only its words."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _own_files(report: Path) -> list[str]:
    """Paths of an artifact's files, as its `slim.json` lists them; none when there is none, or a damaged one."""
    try:
        names = json.loads(report.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [name for name in names if name == os.path.basename(name) or _is_export(name)]


def _is_export(name: str) -> bool:
    path = PurePosixPath(name)
    return path.parts[:1] == (EXPORTS,) and ".." not in path.parts


def _remove_emptied(out: Path, folder: Path) -> None:
    """Remove a folder of exports, and those it lay in, once nothing is left in it."""
    while folder != out and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else text[:21] + '..."'
