"""Killed at any moment and started again, a run ends with the same bytes; with other inputs it refuses."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs
import tiny
from transformers import PreTrainedModel, Trainer

from hf_slim import run as running
from hf_slim.cli import main
from hf_slim.core import blocks
from hf_slim.core.errors import ArtifactError, DataError, ResumeError
from hf_slim.run import run_recipe

ROOT = Path(__file__).parents[2]
PRUNE = "prune.magnitude: {sparsity: 0.5}"
GPTQ = "quantize.gptq: {bits: 3, group_size: 16, clip: minmax, embeddings: {bits: 8}}"
TRAIN = (
    "distill.logits: {steps: 6, batch_size: 2, learning_rate: 0.001, checkpoint_every: 2, "
    "during: [{prune.gradual: {sparsity: 0.5, every: 1}}]}"
)


class Killed(BaseException):
    """Stands for the end of the process: no handler of ours may catch it."""


class Killer:
    """Ends the run just before its nth effect on the disk; a file that is being written is left half-written."""

    def __init__(self, moment: int, harmless: tuple[str, ...] = ("unlink",)):
        self.moment, self.harmless, self.effects = moment, harmless, []

    def arm(self, monkeypatch) -> None:
        for owner, name in ((os, "replace"), (os, "unlink"), (shutil, "rmtree")):
            monkeypatch.setattr(owner, name, self._dying(name, getattr(owner, name)))
        monkeypatch.setattr(blocks, "save_file", self._dying("block", blocks.save_file, half="{1}"))
        save = PreTrainedModel.save_pretrained
        monkeypatch.setattr(
            PreTrainedModel, "save_pretrained", self._dying("model", save, half="{1}/model.safetensors")
        )

    def _dying(self, name, function, half=None):
        def wrapped(*args, **kwargs):
            if name in self.harmless:
                return function(*args, **kwargs)
            if len(self.effects) == self.moment:
                if half is not None:
                    function(*args, **kwargs)
                    path = Path(half.format(*args))
                    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
                raise Killed
            self.effects.append(name)
            return function(*args, **kwargs)

        return wrapped


def run_killed(monkeypatch, moment, recipe, out, harmless=("unlink",), **options) -> list[str]:
    """Run until the nth effect; the effects that there were, one fewer than asked for if the run has finished."""
    killer = Killer(moment, harmless)
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        killer.arm(patch)
        run_recipe(recipe, out, **options)
        killer.effects.append("finished")
    return killer.effects


@pytest.fixture
def started(tmp_path, monkeypatch):
    """A place whose run was killed in its second stage, after the first block, and its recipe."""
    place = runs.Place(tmp_path)
    recipe = place.recipe(PRUNE, GPTQ)
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "save_file", Killer(1)._dying("block", blocks.save_file))
        with pytest.raises(Killed):
            run_recipe(recipe, place.out)
    assert (place.out / ".slim" / "stage-2" / "blocks" / "model.layers.0.json").exists()
    return place, recipe


def test_killed_before_any_effect_on_the_disk(tmp_path, monkeypatch):
    place = runs.Place(tmp_path)
    recipe = place.recipe(PRUNE, GPTQ)
    run_recipe(recipe, tmp_path / "whole")
    expected = runs.result(tmp_path / "whole")
    assert len(expected) == 2
    seen = set()
    for moment in itertools.count():
        out = tmp_path / f"out-{moment}"
        effects = run_killed(monkeypatch, moment, recipe, out)
        if effects[-1:] == ["finished"]:
            break
        seen.update(effects)
        assert not (out / "slim.json").exists() or runs.result(out) == expected
        run_recipe(recipe, out)
        assert runs.result(out) == expected, f"killed before effect {moment}, after {effects[-1:]}"
        assert runs.snapshot(out).keys() == runs.snapshot(tmp_path / "whole").keys()
    assert moment > 20
    assert {"replace", "rmtree", "block", "model"} <= seen


def test_killed_again_and_again(tmp_path, monkeypatch):
    """Every start does at least one lasting thing, so the run comes to its end."""
    place = runs.Place(tmp_path)
    recipe = place.recipe(PRUNE, GPTQ)
    run_recipe(recipe, tmp_path / "whole")
    for _ in range(12):
        if run_killed(monkeypatch, 12, recipe, place.out)[-1:] == ["finished"]:
            break
    assert runs.result(place.out) == runs.result(tmp_path / "whole")


def test_finished_blocks_and_stages_are_not_done_again(started, monkeypatch):
    place, recipe = started
    solved = []
    original = running.run_stage
    monkeypatch.setattr(
        running, "run_stage", lambda model, stage, c: solved.append(stage.method) or original(model, stage, c)
    )
    saved = []
    save = blocks.save_file
    monkeypatch.setattr(blocks, "save_file", lambda tensors, path: saved.append(path.name) or save(tensors, path))
    report = run_recipe(recipe, place.out)
    assert solved == ["quantize.gptq"]
    assert saved == ["model.layers.1.safetensors"]
    assert [stage.method for stage in report.stages] == ["prune.magnitude", "quantize.gptq"]
    assert len(report.stages[1].layers) == 15, "restored layers are in the report too"


@pytest.mark.parametrize("step", [1, 4, 5])
def test_training_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch, step):
    place = runs.Place(tmp_path)
    recipe = place.recipe(TRAIN, runs.GPTQ)
    run_recipe(recipe, tmp_path / "whole")
    done = []
    original = Trainer.training_step

    def dying(self, *args, **kwargs):
        if len(done) == step:
            raise Killed
        done.append(self.state.global_step)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", dying)
        with pytest.raises(Killed):
            run_recipe(recipe, place.out)
    resumed = []

    def counting(self, *args, **kwargs):
        resumed.append(self.state.global_step)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", counting)
    run_recipe(recipe, place.out)
    assert resumed[0] == step // 2 * 2
    assert runs.result(place.out) == runs.result(tmp_path / "whole")


def test_killed_by_the_system(tmp_path):
    """A real process and a real SIGKILL, in the middle of the blocks."""
    place = runs.Place(tmp_path, tiny.llama(layers=16))
    command = ["run", place.file(PRUNE, GPTQ), "--out", str(place.out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_slim", *command], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 200
    while not list(place.out.glob(".slim/stage-2/blocks/*.json")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    errors = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, errors
    assert not (place.out / "slim.json").exists()
    assert main([*command, "--json"]) == 0
    assert main([*command[:-1], str(tmp_path / "whole"), "--json"]) == 0
    assert runs.result(place.out) == runs.result(tmp_path / "whole")


def change_weights(place):
    tiny.save(tiny.llama(seed=1), place.model)


def change_data(place):
    (place.folder / "calibration.txt").write_text(runs.text(3))


CHANGES = {
    "recipe": lambda place: place.recipe(PRUNE, GPTQ.replace("3", "4")),
    "model": change_weights,
    "data.calibration": change_data,
    "code": lambda place: None,
}


@pytest.mark.parametrize("finished", [False, True], ids=["unfinished", "finished"])
@pytest.mark.parametrize("what", CHANGES)
def test_changed_inputs_are_refused_by_name(started, monkeypatch, what, finished):
    place, recipe = started
    if finished:
        run_recipe(recipe, place.out)
    recipe = CHANGES[what](place) or recipe
    if what == "code":
        monkeypatch.setattr(running, "code_digest", lambda: "another")
    before = runs.snapshot(place.out)
    with pytest.raises(ResumeError, match=rf"{what} changed since this run began \(was .*--overwrite") as caught:
        run_recipe(recipe, place.out)
    assert len(caught.value.problems) == 1
    assert runs.snapshot(place.out) == before
    report = run_recipe(recipe, place.out, overwrite=True)
    assert len(report.stages) == 2
    run_recipe(recipe, place.folder / "anew")
    assert runs.result(place.out) == runs.result(place.folder / "anew")


def test_everything_that_changed_is_named(started):
    place, _ = started
    change_weights(place)
    change_data(place)
    with pytest.raises(ResumeError) as caught:
        run_recipe(CHANGES["recipe"](place), place.out)
    assert [problem.split(": ")[1].split()[0] for problem in caught.value.problems] == [
        "data.calibration",
        "model",
        "recipe",
    ]


def test_changed_teacher_is_refused(tmp_path, monkeypatch):
    place = runs.Place(tmp_path)
    teacher = tiny.save(tiny.llama(layers=3, seed=1), tmp_path / "teacher")
    recipe = place.recipe(TRAIN.replace("steps: 6", f"steps: 2, teacher: {teacher}"))
    run_recipe(recipe, place.out)
    tiny.save(tiny.llama(layers=3, seed=2), tmp_path / "teacher")
    with pytest.raises(ResumeError, match="teacher"):
        run_recipe(recipe, place.out)


def test_overwriting_deletes_only_what_is_ours(tmp_path):
    place = runs.Place(tmp_path)
    run_recipe(place.recipe(PRUNE), place.out)
    stored = json.loads((place.out / "slim.json").read_text())
    stale = place.out / "model-00001-of-00002.safetensors"
    stale.write_bytes(b"a shard of the old artifact")
    stored["files"] += [stale.name, "../model/config.json", str(place.folder / "held_out.txt")]
    (place.out / "slim.json").write_text(json.dumps(stored))
    (place.out / "notes.txt").write_text("mine")
    (place.out / "plots").mkdir()
    (place.out / "plots" / "loss.txt").write_text("mine too")
    report = run_recipe(place.recipe(runs.GPTQ), place.out, overwrite=True)
    assert set(runs.snapshot(place.out)) == {*report.files, "notes.txt", "plots/loss.txt"}
    assert (place.out / "notes.txt").read_text() == "mine"
    assert (place.folder / "held_out.txt").exists(), "files elsewhere are not ours, whatever slim.json says"
    assert (place.folder / "model" / "config.json").exists()


def test_killed_while_overwriting(tmp_path, monkeypatch):
    place = runs.Place(tmp_path)
    old, new = place.recipe(PRUNE), place.recipe("quantize.rtn: {bits: 4}")
    run_recipe(new, tmp_path / "whole")
    run_recipe(old, tmp_path / "old")
    ours = len(runs.snapshot(place.folder / "old"))
    for moment in range(ours + 3):  # the list of files is moved, the files go, then the list; the new run begins
        shutil.rmtree(place.out, ignore_errors=True)
        shutil.copytree(tmp_path / "old", place.out)
        effects = run_killed(monkeypatch, moment, new, place.out, harmless=(), overwrite=True)
        assert effects == ["replace", *["unlink"] * (ours - 1), "unlink", "rmtree", "replace"][:moment]
        assert (place.out / "slim.json").exists() == (moment == 0)
        run_recipe(new, place.out, overwrite=moment % 2 == 0)
        assert runs.snapshot(place.out).keys() == runs.snapshot(tmp_path / "whole").keys()
        assert runs.result(place.out) == runs.result(tmp_path / "whole")


def test_bad_data_does_not_cost_the_old_artifact(tmp_path):
    place = runs.Place(tmp_path)
    run_recipe(place.recipe(PRUNE), place.out)
    before = runs.snapshot(place.out)
    (place.folder / "calibration.txt").write_text("too short")
    with pytest.raises(DataError, match="9 tokens"):
        run_recipe(place.recipe(runs.GPTQ), place.out, overwrite=True)
    assert runs.snapshot(place.out) == before


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 1}', '{"inputs": {}}'])
@pytest.mark.parametrize("name", ["slim.json", ".slim/manifest.json"])
def test_damaged_state_is_named_and_can_be_overwritten(tmp_path, name, content):
    place = runs.Place(tmp_path)
    path = place.out / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises((ArtifactError, ResumeError), match=rf"{name} is damaged"):
        run_recipe(place.recipe(PRUNE), place.out)
    assert path.read_text() == content
    run_recipe(place.recipe(PRUNE), place.out, overwrite=True)
    assert (place.out / "model.safetensors").exists()
