"""`hf-slim inspect` with flags: tables of 80 columns, JSON, pictures, and clear refusals."""

from __future__ import annotations

import json

import pytest
import runs
import tiny

from hf_slim import cli

ALL = ("--weights", "--activations", "--sensitivity")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return runs.Place(tmp_path, tiny.llama(layers=3))


def data(place):
    return ["--data", str(place.folder / "held_out.txt"), "--samples", "2", "--length", "16"]


def test_all_three_at_once_print_narrow_tables_and_write_pictures(place, capsys):
    assert cli.main(["inspect", "model", *ALL, *data(place), "--plots", "plots"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80, [line for line in lines if len(line) > 80]
    assert "APoZ" in out
    assert "1 less sensitive ones not shown" in " ".join(out.split())  # 21 layers, 20 shown
    assert sorted(path.name for path in (place.folder / "plots").iterdir()) == [
        "activations.png",
        "sensitivity.png",
        "weights.png",
    ]


def test_json_holds_what_the_python_calls_return(place, capsys):
    assert cli.main(["inspect", "model", *ALL, "--by-kind", "--layers", "--json", *data(place)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["architecture"] == "LlamaForCausalLM"
    assert len(found["weights"]["rows"]) == 1 + 3 * 7
    assert [len(row["apoz"]) for row in found["activations"]["rows"]] == [72] * 3
    assert next(row["kind"] for row in found["sensitivity"]["rows"]) == "q_proj"
    assert len(found["sensitivity"]["rows"]) == 7


def test_without_flags_nothing_is_loaded_or_added(place, capsys, monkeypatch):
    monkeypatch.setattr(cli, "look_into", None)
    assert cli.main(["inspect", "model", "--json"]) == 0
    assert not {"weights", "activations", "sensitivity", "plots"} & set(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plots", "plots"], "give at least one of them"),
        (["--activations", "--data", "nowhere.txt"], "nowhere.txt"),
        (["--sensitivity", "--samples", "0"], "samples"),
        (["--activations", "--fraction", "0"], "fraction"),
        (["--weights", "--plots", "model/config.json/plots"], "cannot make the folder"),
    ],
)
def test_what_cannot_work_is_said_in_one_message(place, capsys, words, message):
    assert cli.main(["inspect", "model", *words]) == 1
    complaint = capsys.readouterr().err
    assert complaint.startswith("error: ")
    assert message in complaint
