"""Classified texts through whole runs: train on them, prune, distil, measure; and what is refused."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import runs
import tiny
import torch
from transformers import AutoModelForSequenceClassification

from hf_slim import compress
from hf_slim.cli import main
from hf_slim.core.data import DataSource
from hf_slim.core.errors import DataError, ModelError, PlanError, RecipeError, SlimError
from hf_slim.core.examples import load_examples
from hf_slim.core.model import ModelSource
from hf_slim.evaluation.accuracy import accuracy
from hf_slim.export.artifact import read_report
from hf_slim.plan import make_plan
from hf_slim.recipe import Recipe
from hf_slim.run import run_recipe

HEAD = "task: sequence-classification\nnum_labels: 2"
LEARN = "distill.logits: {alpha: 0, steps: 24, batch_size: 8, learning_rate: 0.003}"
GRADUAL = "{prune.gradual: {sparsity: 0.5, begin: 0, end: 0.5, every: 2}}"
PRUNE = (
    "distill.logits: {teacher: previous, alpha: 0.5, steps: 12, batch_size: 8, learning_rate: 0.002, "
    f"checkpoint_every: 4, during: [{GRADUAL}]}}"
)
MEASURE = "evaluate.accuracy"


def sentences(seed: int, count: int = 64) -> list[tuple[str, int]]:
    """Texts of class 1 are about x and y, those of class 0 about a and b."""
    draw = random.Random(seed)
    letters = {0: "ab c", 1: "xy c"}
    labels = [number % 2 for number in range(count)]
    return [("".join(draw.choices(letters[label], k=draw.randint(4, 12))).strip() + ".", label) for label in labels]


class Classified(runs.Place):
    """A masked language model to be made a classifier, and two tsv files."""

    def __init__(self, folder: Path):
        super().__init__(folder, tiny.bert())
        for role, seed in (("train", 1), ("held_out", 2)):
            self.write(role, sentences(seed))

    def write(self, role: str, rows, columns=("sentence", "label")) -> None:
        lines = ["\t".join(columns), *(f"{text}\t{label}" for text, label in rows)]
        (self.folder / f"{role}.tsv").write_text("\n".join(lines) + "\n")

    def yaml(self, *stages: str, head: str = HEAD, train: str = "label: label", held_out: str = "label: label") -> str:
        lines = [f"model: {self.model}", "data:"]
        for role, more in (("train", train), ("held_out", held_out)):
            source = f"source: {self.folder / f'{role}.tsv'}, column: sentence, samples: 64, length: 16"
            lines.append(f"  {role}: {{{source}{', ' if more else ''}{more}}}")
        return "\n".join([*lines, head, "stages:", *(f"  - {stage}" for stage in stages)]) + "\n"


@pytest.fixture
def place(tmp_path):
    return Classified(tmp_path)


def refused(place, recipe: Recipe, kind, *words):
    """The run ends with one error of that kind, a problem for each of the words, and leaves everything as it was."""
    before = runs.snapshot(place.folder)
    with pytest.raises(SlimError) as caught:
        run_recipe(recipe, place.out)
    assert type(caught.value) is kind
    assert len(caught.value.problems) == len(words), str(caught.value)
    for problem, word in zip(caught.value.problems, words, strict=True):
        assert word in problem, str(caught.value)
    assert runs.snapshot(place.folder) == before


def test_train_prune_and_measure(place):
    report = run_recipe(place.recipe(LEARN, MEASURE, PRUNE, MEASURE), place.out)
    learned, dense, pruned, sparse = (stage.metrics for stage in report.stages)
    assert learned["last_loss"] < 0.3 < learned["first_loss"]
    assert learned["texts"] == 24 * 8
    assert "distillation_loss" not in learned
    assert dense["before"] is None, "the head is new, so the original knows nothing"
    assert dense["after"]["accuracy"] > 0.9
    assert sparse["after"]["accuracy"] > 0.9
    assert sparse["after"]["texts"] == 64
    assert pruned["steps"] == 12
    encodings = {layer.encoding for layer in report.stages[2].layers}
    assert encodings
    model = AutoModelForSequenceClassification.from_pretrained(place.out, dtype="auto")
    source = DataSource(source=str(place.folder / "held_out.tsv"), column="sentence", label="label", samples=64)
    examples = load_examples(source, "held_out", tiny.tokenizer())
    assert accuracy(model, examples, tiny.tokenizer()).accuracy == sparse["after"]["accuracy"]
    card = (place.out / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in card
    assert f"{100 * sparse['after']['accuracy']:.1f}" in card
    assert read_report(place.out) == report


def test_killed_between_and_within_stages(place, monkeypatch):
    recipe = place.recipe(LEARN.replace("24", "4"), PRUNE.replace("12", "8"))
    run_recipe(recipe, place.folder / "whole")
    from transformers import Trainer

    save = Trainer._save_checkpoint

    class Killed(BaseException):
        pass

    def dying(self, *arguments, **options):
        save(self, *arguments, **options)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_checkpoint", dying)
        with pytest.raises(Killed):
            run_recipe(recipe, place.out)
    assert (place.out / ".slim" / "stage-2" / "training" / "checkpoint-4").is_dir()
    run_recipe(recipe, place.out)
    assert runs.result(place.out) == runs.result(place.folder / "whole")


def test_new_head_follows_the_seed_and_nothing_else(place):
    source = make_plan(place.recipe(MEASURE)).source
    torch.manual_seed(1)
    first = source.load().classifier.weight
    torch.manual_seed(2)
    assert torch.equal(first, source.load().classifier.weight)
    other = make_plan(place.recipe(MEASURE, head=HEAD + "\nseed: 1")).source
    assert not torch.equal(first, other.load().classifier.weight)
    body = tiny.bert().get_input_embeddings().weight
    assert torch.equal(source.load().get_input_embeddings().weight, body)


@pytest.mark.parametrize("stage", ["prune.gradual: {sparsity: 0.5, training: {steps: 2}}", MEASURE])
def test_missing_labels(place, stage):
    recipe = place.recipe(stage, train="", held_out="")
    role = "held_out" if stage == MEASURE else "train"
    refused(place, recipe, PlanError, f"data.{role} has none; give it label:")


def test_everything_wrong_is_said_at_once(place):
    stages = ("distill.logits: {steps: 2}", MEASURE, "prune.gradual: {sparsity: 0.5, training: {steps: 2}}")
    words = ("stage 1, distill.logits, would learn from the original", "stage 2", "stage 3")
    refused(place, place.recipe(*stages, train="", held_out=""), PlanError, *words)


def test_unknown_columns_and_classes(place):
    place.write("held_out", [*sentences(2)[:-2], ("x", 2), ("y", -1)])
    recipe = place.recipe(LEARN, MEASURE, train="label: lable")
    refused(place, recipe, DataError, "did you mean 'label'?", "labels -1, 2 are not among the model's classes, 0 to 1")
    place.write("train", [*sentences(2)[:-1], ("x", "good")])
    words = ("train.tsv, line 65: label 'good'", "labels -1, 2")
    refused(place, place.recipe(LEARN, MEASURE), DataError, *words)


def test_a_task_that_a_model_cannot_have(place):
    with pytest.raises(RecipeError, match="add task: sequence-classification"):
        place.recipe(MEASURE, head="num_labels: 2")
    refused(place, place.recipe(MEASURE, head=""), PlanError, "label 'label' gives classes", "needs a sequence classif")
    tiny.save(tiny.bert_classifier(), place.folder / "model")
    recipe = place.recipe(MEASURE, head=HEAD.replace("2", "3"))
    refused(place, recipe, ModelError, "has a head for 2 classes, and num_labels is 3")


def test_checkpoint_without_its_body_is_still_refused(place):
    from safetensors.torch import load_file, save_file

    path = place.folder / "model" / "model.safetensors"
    state = load_file(path)
    del state["bert.encoder.layer.1.output.dense.weight"]
    save_file(state, path, {"format": "pt"})
    refused(place, place.recipe(LEARN), ModelError, "1 weights are not in its files")


def test_in_memory(tmp_path):
    rows = [{"text": text, "label": label} for text, label in sentences(1)]
    model = tiny.bert_classifier()
    options = {"tokenizer": tiny.tokenizer(), "data": rows, "length": 16}
    training = {"steps": 30, "batch_size": 8, "learning_rate": 0.005}
    report = compress(model, "prune.gradual", sparsity=0.5, training=training, **options)
    assert report.metrics["last_loss"] < report.metrics["first_loss"]
    measured = compress(model, MEASURE, original=tiny.bert_classifier(), **options).metrics
    assert measured["after"]["accuracy"] > 0.9 > measured["before"]["accuracy"]
    with pytest.raises(PlanError, match="pass data=rows with 'text' and 'label'"):
        compress(model, "prune.gradual", data=tiny.ids(), training=training)


def test_eval_command(place, capsys):
    folder = tiny.save(tiny.bert_classifier(), place.folder / "classifier")
    words = ["--data", str(place.folder / "held_out.tsv"), "--column", "sentence", "--label", "label"]
    assert main(["eval", folder, *words, "--samples", "64", "--length", "16"]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_a_step_sees_the_same_however_the_batch_is_cut(tmp_path):
    """Three texts at once, or two and then one: each weighs a third, whichever part it comes in."""
    rows = [{"text": text, "label": label} for text, label in sentences(3, 3)]
    after = []
    for batch in ({"batch_size": 3}, {"batch_size": 2, "gradient_accumulation": 2}):
        model = tiny.bert_classifier()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        training = {"steps": 3, "warmup": 0.0, "learning_rate": 0.01, **batch}
        compress(model, "quantize.qat", bits=8, training=training, tokenizer=tiny.tokenizer(), data=rows, length=16)
        after.append(model.classifier.weight.detach())
    assert torch.allclose(*after, atol=1e-5)


@pytest.mark.parametrize("make", [tiny.bert, tiny.llama, tiny.gpt2])
def test_any_checkpoint_becomes_a_classifier(tmp_path, make):
    source = ModelSource(tiny.save(make(), tmp_path), task="sequence-classification", num_labels=3, seed=5)
    assert source.has_new_head
    model = source.load()
    assert type(model) is type(source.skeleton())
    assert model.config.num_labels == source.skeleton().config.num_labels == 3
    rows = [{"text": text, "label": label} for text, label in sentences(1, 8)]
    training = {"steps": 2, "batch_size": 4}
    report = compress(model, "prune.gradual", training=training, data=rows, tokenizer=source.load_tokenizer())
    assert report.metrics["sparsity"] == pytest.approx(0.5, abs=1e-3)


def test_trimmed_tokens_and_neurons(place):
    vocabulary = f"  calibration: {{source: {place.folder / 'train.tsv'}, column: sentence, samples: 20, length: 16}}"
    training = "{alpha: 0.5, teacher: previous, steps: 4, batch_size: 8}"
    trim = f"prune.apoz: {{share: 0.25, training: {training}}}"
    text = place.yaml(LEARN, "prune.vocabulary", trim, MEASURE).replace("data:", f"data:\n{vocabulary}", 1)
    report = run_recipe(Recipe.from_yaml(text), place.out)
    assert report.stages[1].metrics["tokens"] < tiny.VOCABULARY
    assert report.stages[2].metrics["rounds"][0]["training"]["texts"] == 32
    assert report.stages[3].metrics["after"]["accuracy"] > 0.9
