"""Bad input: one clear message, nothing half-written, no weight changed."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import runs
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer

from hf_slim import compress
from hf_slim.cli import main
from hf_slim.core import blocks
from hf_slim.core.errors import ArtifactError, DataError, ModelError, PlanError, RecipeError, SlimError
from hf_slim.core.model import ModelSource
from hf_slim.run import run_recipe

IDS = tiny.ids()
PRUNE = "prune.magnitude: {sparsity: 0.5}"


@pytest.fixture
def place(tmp_path):
    return runs.Place(tmp_path)


def refused(place, kind, *words, stages=(runs.GPTQ,), out=None):
    """The run ends with one error of that kind that has these words, and leaves everything as it was."""
    before = runs.snapshot(place.folder)
    with pytest.raises(SlimError) as caught:
        run_recipe(place.recipe(*stages), out or place.out)
    check(caught.value, kind, *words)
    assert runs.snapshot(place.folder) == before
    assert place.out.exists() == place.out.is_file()


def check(error, kind, *words):
    assert type(error) is kind
    assert len(error.problems) == 1, str(error)
    for word in words:
        assert word in str(error), str(error)


def refused_in_memory(model, kind, *words, method="quantize.gptq", data=IDS, **options):
    """The same for `compress`; the model is bit for bit what it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(SlimError) as caught:
        compress(model, method, data=data, **options)
    check(caught.value, kind, *words)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num())


# recipes


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("quantize.gptq: {bitz: 4}", ["line 7", "bitz", "did you mean 'bits'?"]),
        ("quantize.gtpq: {bits: 4}", ["line 7", "quantize.gtpq", "did you mean 'quantize.gptq'?"]),
        ("quantize.gptq: {bits: 0}", ["line 7", "bits", "0"]),
        ("quantize.gptq: {bits: 9}", ["line 7", "bits", "9"]),
        ("quantize.gptq: {group_size: 0}", ["line 7", "group_size", "0"]),
        ("distill.logits: {during: [quantize.rtn]}", ["line 7", "quantize.rtn cannot happen during training"]),
    ],
)
def test_recipe_with_a_wrong_word_or_number(place, capsys, stage, words):
    assert main(["run", place.file(stage), "--out", str(place.out)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    for word in words:
        assert word in said.err
    assert not place.out.exists()


def test_everything_wrong_is_said_at_once(place):
    with pytest.raises(RecipeError) as caught:
        place.recipe("quantize.gptq: {bits: 9}", "prune.magnitud: {}", "quantize.rtn: {group_size: 0}")
    assert len(caught.value.problems) == 3


def test_missing_recipe(place, capsys):
    assert main(["run", str(place.folder / "nosuch.yaml"), "--out", str(place.out)]) == 1
    assert "nosuch.yaml" in capsys.readouterr().err
    assert not place.out.exists()


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nstages: [*c, *c]\n", "alias"),
        ("stages: !!python/object/apply:os.system ['touch owned']\n", "tag"),
        ("stages: " + "[" * 3000 + "]" * 3000 + "\n", "deep"),
    ],
    ids=["bomb", "python tag", "nesting"],
)
@pytest.mark.parametrize("command", ["plan", "run"])
def test_hostile_yaml(place, capsys, monkeypatch, command, content, word):
    monkeypatch.chdir(place.folder)
    Path("recipe.yaml").write_text(content)
    before = runs.snapshot(place.folder)
    assert main([command, "recipe.yaml", *(["--out", "out"] if command == "run" else [])]) == 1
    assert word in capsys.readouterr().err
    assert runs.snapshot(place.folder) == before


# plans


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (["prune.magnitude: {pattern: '3:7'}"], None),
        (["quantize.gptq: {layers: {include: [q_prj]}}"], ["'q_prj' matches no layer", "did you mean 'q_proj'?"]),
        (["quantize.gptq: {layers: {exclude: ['*']}}"], ["layers.exclude leaves nothing"]),
        (
            ["quantize.rtn", "distill.logits: {steps: 1}"],
            ["stage 2, distill.logits, cannot follow stage 1, quantize.rtn", "put distill.logits before quantize.rtn"],
        ),
    ],
    ids=["n:m", "pattern", "nothing left", "order"],
)
def test_plans_that_cannot_be(place, stages, words):
    if words is None:  # every layer's reason, at once: no row of 40 or 72 columns has groups of 7
        with pytest.raises(PlanError) as caught:
            run_recipe(place.recipe(*stages), place.out)
        assert len(caught.value.problems) == 14
        assert all("40" in problem or "72" in problem for problem in caught.value.problems)
        assert not place.out.exists()
    else:
        refused(place, PlanError, *words, stages=stages)


def test_quantizing_twice(place):
    with pytest.raises(PlanError) as caught:
        run_recipe(place.recipe("quantize.rtn", runs.GPTQ), place.out)
    assert len(caught.value.problems) == 14
    assert all("already stored as" in problem for problem in caught.value.problems)
    run_recipe(place.recipe("quantize.rtn"), place.folder / "first")
    place.model = str(place.folder / "first")
    with pytest.raises(PlanError, match=r"already stored as .* start from the dense model"):
        run_recipe(place.recipe(runs.GPTQ), place.out)
    assert not place.out.exists()


def test_model_without_linear_layers_in_blocks(tmp_path):
    config = LlamaConfig(
        vocab_size=96, hidden_size=40, intermediate_size=72, num_hidden_layers=0, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).eval()
    place = runs.Place(tmp_path, model)
    refused(place, PlanError, "no linear layers inside repeated blocks")
    refused_in_memory(model, PlanError, "no linear layers inside repeated blocks")


# data


@pytest.mark.parametrize("content", ["", "   \n", "a few words"], ids=["empty", "blank", "short"])
def test_calibration_text_too_short(place, content):
    (place.folder / "calibration.txt").write_text(content)
    refused(place, DataError, "calibration.txt")


def test_missing_calibration_text(place):
    (place.folder / "calibration.txt").unlink()
    refused(place, DataError, "calibration.txt")


@pytest.mark.parametrize("data", [[], [""], IDS[:0], ["short"]], ids=["none", "empty", "no rows", "short"])
def test_data_in_memory_too_short(data):
    refused_in_memory(tiny.llama(), DataError, "data", data=data, tokenizer=tiny.tokenizer())


def test_tokens_that_the_model_cannot_take():
    refused_in_memory(tiny.gpt2(), DataError, "129 tokens", "128 positions", data=tiny.ids(2, 129))
    refused_in_memory(tiny.opt(), DataError, "92 to 185", "0 to 95", data=IDS + 90)


def test_no_data():
    refused_in_memory(tiny.llama(), PlanError, "calibration", "data=", data=None)


# models


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_weights_that_are_not_finite(tmp_path, value):
    model = tiny.llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    words = ["model.layers.1.mlp.up_proj", "NaN or infinite"]
    refused_in_memory(model, ModelError, *words)
    refused_in_memory(model, ModelError, *words, method="prune.magnitude", data=None)
    refused(runs.Place(tmp_path, model), ModelError, *words)


def test_missing_model(place):
    place.model = str(place.folder / "nosuch")
    refused(place, ModelError, "nosuch", "no such folder")


def damage(name, change):
    def apply(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return apply


def drop_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(**changes):
    return damage("config.json", lambda old: json.dumps(json.loads(old) | changes).encode())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (damage("model.safetensors", lambda old: old[: len(old) // 2]), ["damaged"]),
        (damage("model.safetensors", lambda old: old[:5]), ["damaged"]),
        (damage("model.safetensors", lambda old: b"\xff" * 8 + old[8:]), ["damaged"]),
        (damage("model.safetensors", lambda old: old[:9] + b"#" + old[10:]), ["damaged"]),
        (damage("config.json", lambda old: old[: len(old) // 2]), ["config"]),
        (damage("config.json", lambda old: b"[]"), ["config"]),
        (damage("config.json", lambda old: b"\xff\xfe\x00"), ["config"]),
        (lambda folder: (folder / "model.safetensors").unlink(), ["cannot load"]),
        (lambda folder: (folder / "config.json").unlink(), ["config"]),
        (drop_weights, ["1 weights are not in its files", "model.layers.1.mlp.up_proj.weight"]),
        (edit_config(hidden_size=44), ["cannot load"]),
        (edit_config(hidden_size="many"), ["config", "hidden_size"]),
        (edit_config(quantization_config={"quant_method": "bitsandbytes"}), ["bitsandbytes", "dense original"]),
        (edit_config(quantization_config={"quant_method": "gptq", "bits": 4}), ["gptq", "no layer is stored so"]),
        (edit_config(architectures=["TheirModel"]), ["TheirModel", "code of their own"]),
        (
            edit_config(model_type="theirs", auto_map={"AutoConfig": "theirs.Config"}, architectures=["TheirModel"]),
            ["config"],
        ),
    ],
    ids=[
        "truncated weights",
        "stub of weights",
        "header length",
        "header",
        "truncated config",
        "config a list",
        "config binary",
        "no weights",
        "no config",
        "weight missing",
        "shapes",
        "config type",
        "other quantizer",
        "falsely called quantized",
        "unknown class",
        "remote code",
    ],
)
def test_damaged_or_foreign_model(place, spoil, words):
    spoil(Path(place.model))
    refused(place, ModelError, place.model, *words)


def test_model_without_tokenizer(place):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (Path(place.model) / name).unlink()
    refused(place, ModelError, "tokenizer", stages=[PRUNE])


def test_teacher_with_another_vocabulary(place):
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    teacher = tiny.save(LlamaForCausalLM(config), place.folder / "teacher")
    stage = f"distill.logits: {{steps: 1, teacher: {teacher}}}"
    with pytest.raises(SlimError) as caught:
        run_recipe(place.recipe(stage), place.out)
    assert "50" in str(caught.value)
    assert "96" in str(caught.value)
    assert not (place.out / "slim.json").exists()
    student = tiny.llama()
    words = ["50", "96"]
    refused_in_memory(
        student, type(caught.value), *words, method="distill.logits", steps=1, original=LlamaForCausalLM(config)
    )


# output folders and disks


def test_folder_that_is_not_ours(place):
    place.out.mkdir()
    (place.out / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ArtifactError, match="not written by hf_slim"):
            run_recipe(place.recipe(PRUNE), place.out, overwrite=overwrite)
    assert runs.snapshot(place.out).keys() == {"notes.txt"}


def test_folder_of_the_model_itself(place):
    run_recipe(place.recipe(PRUNE), place.out)
    place.model = str(place.out)
    before = runs.snapshot(place.out)
    with pytest.raises(ArtifactError, match="holds the model itself"):
        run_recipe(place.recipe("quantize.rtn"), place.out, overwrite=True)
    assert runs.snapshot(place.out) == before


def test_output_is_a_file(place):
    place.out.write_text("mine")
    refused(place, ArtifactError, "is a file")
    refused(place, ArtifactError, "cannot be written", out=place.out / "below")


def test_output_without_permission(place, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    refused(place, ArtifactError, "cannot be written", "no permission")


def test_output_that_cannot_be_made(place):
    refused(place, ArtifactError, "cannot be written", out=Path("/proc/hf_slim"))


class FullDisk:
    """A disk that is full from the nth large file on."""

    def __init__(self, files: int):
        self.left = files

    def fit(self, monkeypatch):
        monkeypatch.setattr(blocks, "save_file", self.write(blocks.save_file))
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", self.write(PreTrainedModel.save_pretrained))

    def write(self, function):
        def wrapped(*args, **kwargs):
            if self.left == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.left -= 1
            return function(*args, **kwargs)

        return wrapped


@pytest.mark.parametrize("files", range(6))
def test_full_disk(place, monkeypatch, files):
    """The model after stage 1, two blocks, the model after stage 2 and the artifact: five files fit, or fewer."""
    recipe = place.recipe(PRUNE, runs.GPTQ)
    with monkeypatch.context() as patch:
        FullDisk(files).fit(patch)
        if files == 5:
            run_recipe(recipe, place.out)
        else:
            with pytest.raises(ArtifactError, match=r"is full .*make room and run the same command again"):
                run_recipe(recipe, place.out)
    assert (place.out / "slim.json").exists() == (files == 5)
    done = []
    save = PreTrainedModel.save_pretrained
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", lambda self, to: done.append(to) or save(self, to))
        run_recipe(recipe, place.out)
    assert len(done) == {0: 3, 1: 2, 2: 2, 3: 2, 4: 1, 5: 0}[files], "finished stages are kept"
    assert ModelSource(str(place.out)).load()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["quota", "safetensors"],
)
def test_full_disk_as_libraries_say_it(place, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Trainer, "_save_checkpoint", fail)
    with pytest.raises(ArtifactError, match="is full"):
        run_recipe(place.recipe("prune.gradual: {training: {steps: 2, checkpoint_every: 1}}"), place.out)


def test_full_disk_from_the_start(place, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", fail)
    refused(place, ArtifactError, "is full")


def test_other_errors_keep_their_traceback(place, monkeypatch):
    """A bug is no full disk."""

    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(ZeroDivisionError):
        run_recipe(place.recipe(PRUNE), place.out)


def test_what_is_wrong_with_every_block_is_said_once():
    model = tiny.llama()
    with pytest.raises(PlanError) as caught:
        compress(model, "prune.magnitude", pattern="5:7")
    names = [name for name, _ in model.named_modules() if name.endswith("_proj")]
    assert len(caught.value.problems) == len(names)
    lines = str(caught.value).splitlines()
    assert lines[0] == "7 problems:"
    assert len(lines) == 8
    assert "layers.0.self_attn.q_proj" in lines[1]
    assert lines[1].endswith(f"(and {len(names) // 7 - 1} more like it, in other blocks)")
