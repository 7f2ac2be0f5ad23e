"""A recipe, carried out: what the artifact holds, that it loads, and that everything foreseen came true."""

from __future__ import annotations

import json
import re

import pytest
import runs
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_slim
from hf_slim import run as running
from hf_slim.core.model import ModelSource
from hf_slim.core.swap import get_weight
from hf_slim.encodings.modules import EncodedModule
from hf_slim.evaluation.perplexity import perplexity
from hf_slim.export.artifact import read_report
from hf_slim.plan import make_plan
from hf_slim.recipe import Recipe
from hf_slim.run import run_recipe

KMEANS = "share.kmeans: {bits: 3}"
PRUNE = "prune.magnitude: {sparsity: 0.5}"
EVERYTHING = "quantize.gptq: {bits: 3, group_size: 16, embeddings: {bits: 8}}"
TRAIN = (
    "distill.logits: {steps: 6, batch_size: 2, learning_rate: 0.001, "
    "during: [{prune.gradual: {sparsity: 0.5, every: 1}}]}"
)


@pytest.fixture
def memory(monkeypatch):
    """The model that the run held in memory at its end."""
    held = []
    original = running.write_artifact

    def watched(plan, stages, model, *others):
        held.append(model)
        return original(plan, stages, model, *others)

    monkeypatch.setattr(running, "write_artifact", watched)
    return held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_artifact_loads_and_computes_what_the_run_did(tmp_path, memory, name, dtype):
    place = runs.Place(tmp_path, tiny.ALL[name](dtype))
    report = run_recipe(place.recipe(PRUNE, EVERYTHING), place.out)
    model = AutoModelForCausalLM.from_pretrained(place.out, dtype="auto")
    assert model.dtype == dtype
    assert torch.equal(tiny.logits(model), tiny.logits(memory[0]))
    assert AutoTokenizer.from_pretrained(place.out)("abc")["input_ids"] == tiny.tokenizer()("abc")["input_ids"]
    assert set(report.files) == set(runs.snapshot(place.out))
    assert {"README.md", "config.json", "model.safetensors", "slim.json", "tokenizer.json"} <= set(report.files)


def test_report_holds_what_was_asked_foreseen_and_measured(tmp_path):
    place = runs.Place(tmp_path)
    recipe = place.recipe(PRUNE, runs.GPTQ, "evaluate.perplexity", head="seed: 7")
    report = run_recipe(recipe, place.out)
    stored = json.loads((place.out / "slim.json").read_text())
    assert read_report(place.out) == report
    assert Recipe.model_validate(stored["recipe"]) == recipe
    assert stored["recipe"]["seed"] == 7
    assert stored["plan"] == json.loads(json.dumps(make_plan(recipe).to_dict()))
    assert stored["versions"]["torch"] == torch.__version__
    assert stored["versions"]["hf_slim"] == hf_slim.__version__
    assert stored["inputs"].keys() == {"recipe", "model", "code", "data.calibration", "data.held_out"}
    assert stored["inputs"]["model"] == ModelSource(place.model).fingerprint()
    pruned, quantized, evaluated = report.stages
    assert [stage.method for stage in report.stages] == ["prune.magnitude", "quantize.gptq", "evaluate.perplexity"]
    assert quantized.options == {"group_size": 16}
    assert all(stage.seconds > 0 for stage in report.stages)
    assert all(stage.peak_memory > 50 << 20 for stage in report.stages)
    assert pruned.metrics["sparsity"] == pytest.approx(0.5)
    assert len(pruned.layers) == len(quantized.layers) == 14
    windows = running._read(recipe, "held_out", tiny.tokenizer()).ids
    for when, folder in (("before", place.model), ("after", place.out)):
        expected = perplexity(ModelSource(str(folder)).load(), windows).perplexity
        assert evaluated.metrics[when]["perplexity"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", tiny.CAUSAL)
@pytest.mark.parametrize(
    "stages",
    [[PRUNE], ["prune.magnitude: {pattern: '2:4'}"], [EVERYTHING], [KMEANS], [PRUNE, KMEANS], [PRUNE, EVERYTHING]],
    ids=lambda stages: "+".join(stage.split(":")[0] for stage in stages),
)
def test_predicted_bytes_are_measured_bytes(tmp_path, name, stages):
    place = runs.Place(tmp_path, tiny.ALL[name](torch.bfloat16))
    recipe = place.recipe(*stages)
    plan, report = make_plan(recipe), run_recipe(recipe, place.out)
    assert report.size.bytes_before == plan.bytes_before
    assert report.size.bytes_after == plan.bytes_after < plan.bytes_before
    size = (place.out / "model.safetensors").stat().st_size
    header = int.from_bytes((place.out / "model.safetensors").read_bytes()[:8], "little")
    assert report.size.file_bytes == size == plan.bytes_after + header + 8
    foreseen = {layer["name"]: layer for layer in plan.to_dict()["stages"][-1]["layers"]}
    for row in report.stages[-1].layers:
        assert foreseen[row.name]["bytes"] == row.bytes
        assert foreseen[row.name]["encoding"] == row.encoding


def test_card_holds_table_and_recipe(tmp_path):
    place = runs.Place(tmp_path)
    recipe = place.recipe(runs.GPTQ, "evaluate.perplexity")
    report = run_recipe(recipe, place.out)
    card = (place.out / "README.md").read_text()
    assert Recipe.from_yaml(re.search(r"```yaml\n(.*?)```", card, re.S)[1]) == recipe
    values = report.stages[-1].metrics
    shown = [f"{values[when]['perplexity']:.2f}" for when in ("before", "after")]
    assert f"| perplexity, held-out text | {shown[0]} | {shown[1]} |" in card
    assert f"| bits per weight | {report.size.bits_before:.2f} | {report.size.bits_after:.2f} |" in card
    assert card.startswith("---\n")
    assert "base_model" not in card, "a local folder is no model of the Hub"


def test_second_run_returns_the_report_without_work(tmp_path, monkeypatch):
    place = runs.Place(tmp_path)
    recipe = place.recipe(runs.GPTQ)
    report = run_recipe(recipe, place.out)
    before = runs.snapshot(place.out)
    monkeypatch.setattr(running, "run_stage", None)
    monkeypatch.setattr(ModelSource, "load", None)
    assert run_recipe(recipe, place.out) == report
    assert runs.snapshot(place.out) == before


def test_same_recipe_in_another_folder_gives_the_same_bytes(tmp_path):
    place = runs.Place(tmp_path)
    recipe = place.recipe(TRAIN, runs.GPTQ)
    run_recipe(recipe, place.out)
    run_recipe(recipe, tmp_path / "again")
    assert runs.result(place.out) == runs.result(tmp_path / "again")
    assert len(runs.result(place.out)) == 2


@pytest.mark.parametrize("last", [EVERYTHING, KMEANS], ids=["gptq", "kmeans"])
def test_zeros_made_while_distilling_survive_to_the_artifact(tmp_path, memory, last):
    place = runs.Place(tmp_path)
    recipe = place.recipe(TRAIN, last, "evaluate.agreement", "evaluate.perplexity")
    plan, report = make_plan(recipe), run_recipe(recipe, place.out)
    model = AutoModelForCausalLM.from_pretrained(place.out)
    encoded = {n: m for n, m in model.named_modules() if isinstance(m, EncodedModule) and "layers" in n}
    assert len(encoded) == 14
    for module in encoded.values():
        zero = get_weight(module) == 0
        assert module.encoding.survivors == (module.rows * module.cols) // 2
        assert zero.sum() >= zero.numel() // 2
    assert report.size.bytes_after == plan.bytes_after
    distilled, _, agreement, _ = report.stages
    assert distilled.metrics["steps"] == 6
    assert agreement.metrics["kl"] > 0
    assert torch.equal(tiny.logits(model), tiny.logits(memory[0]))


def test_nothing_is_left_beside_the_artifact(tmp_path):
    place = runs.Place(tmp_path)
    before = set(tmp_path.iterdir())
    run_recipe(place.recipe(TRAIN), place.out)
    assert set(tmp_path.iterdir()) - before == {place.out}
    assert not [name for name in runs.snapshot(place.out) if name.startswith(".")]
    assert not (place.out / ".slim").exists()
