"""Exports in recipes: where they stand, where they write, and what is left when a run is killed."""

from __future__ import annotations

import pytest
import runs
import tiny

from hf_slim.core.errors import PlanError
from hf_slim.export import compressed_tensors as ct
from hf_slim.export.files import written_at
from hf_slim.plan import make_plan
from hf_slim.run import run_recipe

RTN = "quantize.rtn: {bits: 4, group_size: 8, clip: minmax}"
EXPORT = "export.compressed_tensors: {}"
HERE = "exports/compressed_tensors"


@pytest.fixture
def place(tmp_path):
    return runs.Place(tmp_path)


@pytest.fixture
def calls(monkeypatch):
    """Every folder that was written to; a number in `fail` makes that call die half-way."""
    made, export = [], ct.export

    def watched(model, tokenizer, folder, config):
        made.append(folder)
        notes = export(model, tokenizer, folder, config)
        if len(made) in watched.fail:
            raise KeyboardInterrupt
        return notes

    watched.fail = set()
    made_by = type("Calls", (), {"made": made, "fail": watched.fail})
    monkeypatch.setattr(ct, "export", watched)
    return made_by


def test_export_lies_in_the_artifact_and_is_one_of_its_files(place):
    report = run_recipe(place.recipe(RTN, EXPORT), place.out)
    assert set(report.files) == set(runs.snapshot(place.out))
    names = {name for name in report.files if name.startswith(HERE)}
    assert {f"{HERE}/config.json", f"{HERE}/model.safetensors", f"{HERE}/tokenizer.json"} <= names
    stage = report.stages[1]
    assert [f"exports/{name}" for name in stage.files] == sorted(names)
    assert stage.metrics["bytes"] == sum((place.out / name).stat().st_size for name in names)
    alone = run_recipe(place.recipe(RTN), place.folder / "alone")
    assert runs.result(place.out) == runs.result(place.folder / "alone"), "an export changes nothing in the artifact"
    assert set(alone.files) == set(report.files) - names


def test_a_finished_run_exports_once(place, calls):
    recipe = place.recipe(RTN, EXPORT)
    run_recipe(recipe, place.out)
    run_recipe(recipe, place.out)
    assert len(calls.made) == 1


def test_a_killed_export_leaves_nothing_and_is_done_again(place, calls):
    calls.fail.add(1)
    recipe = place.recipe(RTN, EXPORT)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, place.out)
    assert not [name for name in runs.snapshot(place.out) if "exports" in name]
    report = run_recipe(recipe, place.out)
    assert set(report.files) == set(runs.snapshot(place.out))
    run_recipe(recipe, place.folder / "whole")
    for name in ("model.safetensors", "config.json"):
        written = [(folder / HERE / name).read_bytes() for folder in (place.out, place.folder / "whole")]
        assert written[0] == written[1]


def test_a_run_killed_after_its_export_keeps_it(place, calls, monkeypatch):
    from hf_slim import run as running

    recipe, write = place.recipe(RTN, EXPORT), running.write_artifact

    def die(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "write_artifact", die)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, place.out)
    monkeypatch.setattr(running, "write_artifact", write)
    report = run_recipe(recipe, place.out)
    assert len(calls.made) == 1
    assert set(report.files) == set(runs.snapshot(place.out))


def test_overwriting_removes_old_exports_and_nothing_else(place):
    run_recipe(place.recipe(RTN, EXPORT), place.out)
    (place.out / "exports" / "mine.txt").write_text("not ours")
    report = run_recipe(place.recipe(RTN), place.out, overwrite=True)
    assert set(runs.snapshot(place.out)) == {*report.files, "exports/mine.txt"}
    assert not (place.out / HERE).exists()


def test_export_before_a_compressing_stage_is_refused(place):
    with pytest.raises(PlanError) as caught:
        make_plan(place.recipe(RTN, EXPORT, "prune.magnitude: {sparsity: 0.5}"))
    assert any("put export.compressed_tensors after prune.magnitude" in problem for problem in caught.value.problems)
    make_plan(place.recipe(RTN, EXPORT, "evaluate.perplexity"))


@pytest.mark.parametrize("to", ["/elsewhere", "../elsewhere", "a/../../b", "."])
def test_export_stays_in_the_artifact(place, to):
    with pytest.raises(PlanError, match="leads out of the artifact"):
        make_plan(place.recipe(RTN, f"export.compressed_tensors: {{to: {to}}}"))


@pytest.mark.parametrize("to", ["compressed_tensors", "compressed_tensors/more"])
def test_two_exports_do_not_overwrite_each_other(place, to):
    with pytest.raises(PlanError, match="would overwrite what stage 2 writes"):
        make_plan(place.recipe(RTN, EXPORT, f"export.compressed_tensors: {{to: {to}}}"))


def test_plan_says_what_the_format_cannot_hold_before_any_weight(place):
    (place.folder / "model" / "model.safetensors").unlink()
    with pytest.raises(PlanError, match=r"stage 2, export\.compressed_tensors: .* no multiple of group_size 16"):
        make_plan(place.recipe(RTN.replace("8", "16"), EXPORT))
    notes = make_plan(place.recipe(RTN.replace("bits: 4", "bits: 3"), EXPORT)).notes
    assert any(note.startswith("stage 2, export.compressed_tensors: 14 layers of 3 bits") for note in notes)


def test_a_failing_write_leaves_what_was_there(tmp_path):
    target = tmp_path / "deep" / "target"
    with written_at(target) as folder:
        (folder / "file").write_text("old")

    def fail() -> None:
        with written_at(target) as folder:
            (folder / "file").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert runs.snapshot(tmp_path).keys() == {"deep/target/file"}
    assert (target / "file").read_text() == "old"


def test_tiny_tokenizer_comes_along(place):
    from transformers import AutoTokenizer

    run_recipe(place.recipe(RTN, EXPORT), place.out)
    assert AutoTokenizer.from_pretrained(place.out / HERE)("abc")["input_ids"] == tiny.tokenizer()("abc")["input_ids"]
