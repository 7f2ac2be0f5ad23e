"""The command line: tables of 80 columns, JSON, exit codes, overrides, several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import tiny
import torch
from transformers import AutoModelForCausalLM

import hf_slim
from hf_slim import cli
from hf_slim.core.errors import PlanError
from hf_slim.export.artifact import read_report
from hf_slim.methods import addresses
from hf_slim.recipe import Recipe

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
PRUNE = "prune.magnitude: {sparsity: 0.5}"


@pytest.fixture
def place(tmp_path):
    return runs.Place(tmp_path)


@pytest.fixture
def say(capsys, monkeypatch):
    """Runs a command; gives its exit code and what it printed and complained."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words):
        capsys.readouterr()
        code = cli.main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run


def assert_narrow(text):
    assert max(map(len, text.splitlines())) <= 80, [line for line in text.splitlines() if len(line) > 80]


def test_methods(say):
    code, out, _ = say("methods")
    assert code == 0
    assert_narrow(out)
    assert "arXiv:2210.17323" in out
    code, out, _ = say("methods", "--json")
    found = {row["method"]: row for row in json.loads(out)}
    assert list(found) == addresses()
    assert found["quantize.gptq"]["needs"] == "calibration"
    assert all(row["what"] for row in found.values())


def test_inspect(say, place, monkeypatch):
    monkeypatch.chdir(place.folder)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", None)
    code, out, _ = say("inspect", "model", "--layers")
    assert code == 0
    assert_narrow(out)
    assert "lm_head shares the weight of model.embed_tokens" in out
    assert "40 x 72" in out
    code, out, _ = say("inspect", "model", "--json")
    found = json.loads(out)
    assert found["parameters"] == tiny.llama().num_parameters()
    assert found["bytes"] == 4 * found["parameters"]
    assert sum(kind["share"] for kind in found["kinds"]) == pytest.approx(1)


def test_plan(say, place, monkeypatch):
    monkeypatch.chdir(place.folder)
    (place.folder / "model" / "model.safetensors").unlink()  # a plan reads no weights
    place.model = "model"
    recipe = place.file(PRUNE, runs.GPTQ)
    code, out, _ = say("plan", recipe, "--layers")
    assert code == 0
    assert_narrow(out)
    assert "model.layers.1.mlp.down_proj" in out
    code, out, _ = say("plan", recipe, "--json")
    found = json.loads(out)
    assert [len(stage["layers"]) for stage in found["stages"]] == [14, 14]
    assert found["bytes_after"] < found["bytes_before"]
    assert not place.out.exists()


def test_run_then_card_then_eval(say, place, monkeypatch):
    monkeypatch.chdir(place.folder)
    recipe = place.file(runs.GPTQ, "evaluate.perplexity", "evaluate.agreement")
    code, out, complaints = say("run", recipe, "--out", "out")
    assert code == 0
    assert_narrow(out)
    assert "perplexity" in out
    assert "error" not in complaints
    report = read_report(place.out)
    code, out, _ = say("run", recipe, "--out", "out", "--json")
    assert json.loads(out) == json.loads(report.model_dump_json())
    code, out, _ = say("card", "out")
    assert code == 0
    assert out.strip() == (place.out / "README.md").read_text().strip()
    code, out, _ = say("card", "out", "--json")
    assert json.loads(out)["card"].startswith("---")
    data = ["--data", "held_out.txt", "--samples", "4", "--length", "16"]
    code, out, _ = say("eval", "out", "--original", place.model, *data)
    assert code == 0
    assert_narrow(out)
    code, out, _ = say("eval", "out", "--original", place.model, "--json", *data)
    found = json.loads(out)
    assert found["perplexity"] == pytest.approx(report.stages[1].metrics["after"]["perplexity"], rel=1e-5)
    assert found["KL from the original"] == pytest.approx(report.stages[2].metrics["kl"], rel=1e-4)
    assert found["data_fingerprint"] == report.inputs["data.held_out"]


def test_overrides_may_stand_anywhere(say, place):
    recipe = place.file("quantize.gptq: {bits: 4, group_size: 16}")
    other = tiny.save(tiny.gpt2(), place.folder / "other")
    code, out, _ = say("run", recipe, "seed=3", "--model", other, "--out", place.out, "quantize.gptq.bits=3", "--json")
    assert code == 0
    report = json.loads(out)
    assert (report["model"], report["architecture"]) == (other, "GPT2LMHeadModel")
    assert report["recipe"]["seed"] == 3
    assert report["stages"][0]["options"] == {"bits": 3, "group_size": 16}
    assert Recipe.model_validate(report["recipe"]).stages[0].options.bits == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "RECIPE", "--out", "OUT", "quantize.gptq.bitz=3"], "did you mean 'bits'"),
        (["run", "RECIPE", "--out", "OUT", "--model", "./nosuch"], "nosuch"),
        (["plan", "nosuch.yaml"], "nosuch.yaml"),
        (["inspect", "./nosuch"], "nosuch"),
        (["card", "OUT"], "slim.json"),
        (["eval", "MODEL", "--samples", "0"], "samples"),
        (["eval", "MODEL", "--length", "512"], "128 positions"),
        (["eval", "MODEL", "--data", "./nosuch.txt"], "nosuch.txt"),
        (["eval", "./nosuch"], "nosuch"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_errors_are_one_line_on_stderr(say, place, words, message, as_json):
    names = {"RECIPE": place.file(runs.GPTQ), "OUT": place.out, "MODEL": place.model}
    code, out, complaints = say(*[names.get(word, word) for word in words], *(["--json"] if as_json else []))
    assert code == 1
    assert out == ""
    assert complaints.startswith("error: ")
    assert message in complaints
    assert "Traceback" not in complaints
    assert not place.out.exists()


def test_several_problems_are_a_list(say, place):
    code, _, complaints = say("plan", place.file("quantize.gptq: {bits: 9, group_size: 0}"))
    assert code == 1
    assert complaints.startswith("error: 2 problems:\n  - ")


@pytest.mark.parametrize(
    "words", [[], ["nosuch"], ["run"], ["run", "r.yaml"], ["inspect", "model", "extra"], ["plan", "r.yaml", "--nosuch"]]
)
def test_wrong_command_lines_give_2(capsys, words):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    assert "usage: hf-slim" in capsys.readouterr().err


def test_interrupt(say, place, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_recipe", interrupted)
    code, out, complaints = say("run", place.file(PRUNE), "--out", place.out)
    assert (code, out) == (130, "")
    assert "the same command goes on" in complaints


def test_bugs_keep_their_traceback(say, place, monkeypatch):
    monkeypatch.setattr(cli, "run_recipe", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        say("run", place.file(PRUNE), "--out", place.out)
    monkeypatch.setattr(cli, "run_recipe", lambda *_, **__: (_ for _ in ()).throw(PlanError("no")))
    assert say("run", place.file(PRUNE), "--out", place.out)[::2] == (1, "error: no\n")


def test_as_a_module():
    command = [sys.executable, "-m", "hf_slim", "--version"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, f"hf_slim {hf_slim.__version__}\n")


def test_two_processes_write_what_one_does(say, place):
    """Also with an odd number of windows, so that one process has more of them."""
    recipe = place.file(runs.GPTQ, "evaluate.perplexity")
    options = ["data.calibration.samples=7", "--json"]
    launch = ["accelerate.commands.launch", "--num_processes", "2", "--cpu", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    command = [sys.executable, "-m", *launch, "-m", "hf_slim", "run", recipe, "--out", str(place.out), *options]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads(done.stdout[done.stdout.index("{") :])  # printed once
    code, out, _ = say("run", recipe, "--out", place.folder / "one", *options)
    assert code == 0
    one = json.loads(out)
    assert two["inputs"].keys() == one["inputs"].keys()
    assert two["size"] == one["size"]
    for a, b in zip(two["stages"][0]["layers"], one["stages"][0]["layers"], strict=True):
        assert a["name"] == b["name"]
        assert a["metrics"]["output_error"] == pytest.approx(b["metrics"]["output_error"], rel=1e-4)
    assert runs.snapshot(place.out).keys() == runs.snapshot(place.folder / "one").keys()
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(f)(tiny.ids()).logits for f in (place.out, place.folder / "one")]
    assert (logits[0] - logits[1]).norm() <= 1e-2 * logits[1].norm()
