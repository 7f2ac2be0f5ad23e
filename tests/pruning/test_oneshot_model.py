"""One-shot pruning through whole models: counts, earlier zeros, storage, tuning, experts and bad input."""

from __future__ import annotations

from functools import partial

import architectures
import jobs
import pytest
import tiny
import torch
from processes import together

from hf_slim import compress
from hf_slim.core import blocks
from hf_slim.core.context import Context
from hf_slim.core.errors import DataError, PlanError
from hf_slim.core.size import stored_bytes
from hf_slim.core.stage import make_stage
from hf_slim.core.swap import get_keep, get_weight
from hf_slim.encodings import Affine, Sparse
from hf_slim.methods import find_method
from hf_slim.plan import order_problems

METHODS = ["prune.wanda", "prune.sparsegpt", "prune.alps"]
SOLVERS = METHODS[1:]
IDS = tiny.ids(16, 32, seed=1)
HELD_OUT = tiny.ids(4, 32, seed=2)
logits, output_error = partial(tiny.logits, tokens=HELD_OUT), partial(tiny.output_error, tokens=HELD_OUT)


def weights(model, report):
    return {row.name: get_weight(model.get_submodule(row.name)) for row in report.layers}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_sparsity_is_exact_in_every_layer(method, name):
    model = tiny.ALL[name]()
    report = compress(model, method, data=IDS, sparsity=0.45)
    for row in report.layers:
        keep = get_keep(model.get_submodule(row.name))
        assert (~keep).sum() == round(0.45 * row.rows * row.cols) == row.metrics["zeros"]
        assert (get_weight(model.get_submodule(row.name))[~keep] == 0).all()
        assert isinstance(model.get_submodule(row.name).encoding, Sparse)
    assert report.metrics["sparsity"] == pytest.approx(0.45, abs=1e-3)
    assert report.metrics["fallbacks"] == 0


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_outputs_are_closer_than_those_of_the_simpler_method(pattern):
    errors = []
    for method in ("prune.magnitude", "prune.wanda", "prune.sparsegpt"):
        model = tiny.llama()
        options = {} if method == "prune.magnitude" else {"data": IDS}
        compress(model, method, pattern=pattern, **options)
        errors.append(output_error(model, tiny.llama()))
    assert errors[2] < 0.9 * min(errors[:2]), errors


@pytest.mark.parametrize("method", METHODS)
def test_earlier_zeros_stay(method):
    model = tiny.llama()
    first = compress(model, "prune.magnitude", sparsity=0.3)
    zero = {name: W == 0 for name, W in weights(model, first).items()}
    second = compress(model, method, data=IDS, sparsity=0.5)
    for name, W in weights(model, second).items():
        assert (W[zero[name]] == 0).all()
        extra = (W == 0).sum() - W.numel() // 2
        assert 0 <= extra <= (0.01 * W.numel() if method == "prune.wanda" else 0)  # a row may have lost more than half


@pytest.mark.parametrize("method", METHODS)
def test_layers_may_differ(method):
    model = tiny.llama()
    options = {"down_proj": {"sparsity": 0.25}, "q_proj": {"pattern": "2:4"}}
    report = compress(model, method, data=IDS, sparsity=0.5, layers=options)
    for name, W in weights(model, report).items():
        share = 0.25 if name.endswith("down_proj") else 0.5
        assert (W == 0).sum() == round(share * W.numel())
        if name.endswith("q_proj"):
            assert (W.reshape(-1, 4).count_nonzero(1) <= 2).all()


@pytest.mark.parametrize("method", SOLVERS)
def test_refitting_brings_outputs_of_layers_closer(method):
    errors = []
    for refit in (1, 20):
        report = compress(tiny.gpt2(), method, data=IDS, sparsity=0.6, refit=refit)
        errors.append(report.layers[0].metrics["output_error"])
    assert errors[1] < errors[0]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", SOLVERS)
def test_tuned_survivors_do_better_and_the_pruned_stay_zero(method, name):
    data = tiny.ids(64, 32, seed=1)
    found = {}
    for iterations in (0, 48):
        model = tiny.ALL[name]()
        report = compress(model, method, data=data, sparsity=0.6, iterations=iterations, batch_tokens=256)
        found[iterations] = output_error(model, tiny.ALL[name]())
        for row in report.layers:
            assert (get_weight(model.get_submodule(row.name)) == 0).sum() == row.metrics["zeros"]
    tuned = [row for row in report.layers if "block_error" in row.metrics]
    assert len(tuned) == len(report.layers)
    assert all(row.metrics["block_error"] < row.metrics["block_error_before"] for row in tuned)
    assert found[48] < found[0], found


def test_rounded_survivors_are_stored_as_codes():
    sizes = {}
    for bits in (None, 4):
        model = tiny.llama()
        report = compress(model, "prune.sparsegpt", data=IDS, sparsity=0.5, bits=bits, group_size=16)
        sizes[bits] = stored_bytes(model)
        assert all((W == 0).sum() >= W.numel() // 2 for W in weights(model, report).values())
    for row in report.layers:
        encoding = model.get_submodule(row.name).encoding
        assert isinstance(encoding, Affine)
        assert encoding.survivors == row.rows * row.cols // 2
    assert sizes[4] < 0.6 * sizes[None]
    assert output_error(model, tiny.llama()) < 1


@pytest.mark.parametrize("bits", [None, 4])
def test_experts_with_few_tokens_fall_back_and_are_counted(bits):
    model = architectures.make("Mixtral")
    report = compress(model, "prune.sparsegpt", data=IDS[:4], sparsity=0.5, min_tokens=10_000, bits=bits, group_size=16)
    experts = [row for row in report.layers if ".experts." in row.name]
    assert len(experts) == report.metrics["fallbacks"] > 0
    assert all(row.notes[0].startswith("pruned by wanda: only") for row in experts)
    assert all((W == 0).sum() >= W.numel() // 2 for W in weights(model, report).values())


@pytest.mark.parametrize("method", SOLVERS)
def test_short_calibration_is_refused_before_anything_changes(method):
    model = tiny.llama()
    with pytest.raises(DataError) as raised:
        compress(model, method, data=tiny.ids(2, 16))
    assert len(raised.value.problems) == 2
    assert "have 40 columns, but calibration has 32 tokens" in str(raised.value)
    assert "have 72 columns, but calibration has 32 tokens" in str(raised.value)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny.llama().parameters(), strict=True))
    compress(model, method, data=tiny.ids(2, 16), tokens_per_column=0)


@pytest.mark.parametrize("method", METHODS)
def test_columns_that_do_not_fit_the_pattern_are_named_at_once(method):
    model = tiny.llama()
    with pytest.raises(PlanError) as raised:
        compress(model, method, data=IDS, pattern="3:7")
    assert len(raised.value.problems) == 14
    assert "model.layers.0.self_attn.q_proj has 40 columns, no multiple of 7" in str(raised.value)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny.llama().parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_artifact_computes_the_same_after_reload(tmp_path, method, dtype):
    model = tiny.llama(dtype)
    compress(model, method, data=IDS, pattern="2:4")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=dtype).eval()
    assert torch.equal(logits(again), logits(model))
    assert stored_bytes(again) == stored_bytes(model)


def test_bytes_are_those_of_the_models_dtype_whatever_it_was_computed_in():
    model = tiny.llama().to(torch.bfloat16)
    report = compress(model, "prune.sparsegpt", data=IDS)
    for row in report.layers:
        stored = model.get_submodule(row.name).tensors().values()
        assert row.bytes == sum(tensor.nbytes for tensor in stored)
        assert row.bytes_before == row.rows * row.cols * 2


def test_rounded_survivors_are_codes_for_the_stages_that_follow():
    train = make_stage("distill.logits")
    assert order_problems((make_stage("prune.sparsegpt"), train)) == []
    (problem,) = order_problems((make_stage("prune.sparsegpt", {"bits": 4}), train))
    assert "distill.logits, cannot follow stage 1, prune.sparsegpt" in problem


def test_two_processes_with_the_same_windows_do_what_one_does():
    options = {method: {"sparsity": 0.6} for method in METHODS}
    one = jobs.compress_alike(options)
    for states in together(jobs.compress_alike, options):
        for method, state in one.items():
            assert all(torch.equal(states[method][name], tensor) for name, tensor in state.items()), method


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on_with_the_very_same_numbers(method, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    saved = []

    def dying(tensors, path):
        if saved:
            raise Killed
        saved.append(path)
        save(tensors, path)

    def run(folder):
        model, solver = tiny.llama(), find_method(method)
        context = Context(windows=lambda role: IDS, blocks=folder)
        return model, solver.apply(model, solver.Config(sparsity=0.6), context)

    save, (straight, expected) = blocks.save_file, run(None)
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "save_file", dying)
        with pytest.raises(Killed):
            run(tmp_path)
    resumed, report = run(tmp_path)
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in straight.state_dict().items())
    assert report == expected
