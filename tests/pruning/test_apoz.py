"""Network Trimming: dead neurons go for free, refit and scores earn their keep, bad input is refused."""

from __future__ import annotations

import architectures
import pytest
import tiny
import torch
from pydantic import ValidationError

import hf_slim
from hf_slim.core.context import Context
from hf_slim.core.errors import ModelError, PlanError
from hf_slim.core.forward import run_on
from hf_slim.core.select import find_layers
from hf_slim.core.swap import get_weight
from hf_slim.core.units import find_units
from hf_slim.pruning import apoz
from hf_slim.pruning.refit import RIDGE

IDS = tiny.ids(16, 32)
HELD = tiny.ids(16, 32, seed=1)
SCORES = ("apoz_below", "contribution", "flap", "minitron", "surgeon")


@torch.no_grad()
def logits(model, ids=IDS):
    return run_on(model, ids).logits


def trim(model, ids=IDS, context=None, **options):
    return apoz.apply(model, apoz.Config(**options), context or Context(windows=lambda role: ids))


def change(make, seen=IDS, **options):
    """Relative change of the logits that trimming makes, on these tokens."""
    model = make()
    before = logits(model, seen)
    trim(model, **options)
    return float((logits(model, seen) - before).norm() / before.norm())


def widths(model):
    return {u.reader: len(u) for u in find_units(model, ("neuron",))}


@torch.no_grad()
def with_dead_neurons(make, dead):
    """A model in which some neurons of every MLP never put out anything."""
    model = make()
    for units in find_units(model, ("neuron",)):
        for name, rows in units.writers.items():
            module = model.get_submodule(name)
            get_weight(module)[rows[dead].flatten()] = 0
            if getattr(module, "bias", None) is not None:
                module.bias[rows[dead].flatten()] = 0
    return model


@pytest.mark.parametrize("score", ["apoz", *SCORES])
@pytest.mark.parametrize("make", [tiny.llama, tiny.opt], ids=["llama", "opt"])
def test_dead_neurons_go_first_and_for_free(make, score):
    model = with_dead_neurons(make, [3, 11, 12])
    before, wide = logits(model), widths(model)
    report = trim(model, share=3 / next(iter(wide.values())), score=score)
    assert widths(model) == {name: width - 3 for name, width in wide.items()}
    assert (logits(model) - before).norm() <= 1e-5 * before.norm()
    assert all(row.metrics["output_error"] < 1e-9 for row in report.layers if row.metrics)


def test_the_papers_rule_removes_the_outliers():
    model = with_dead_neurons(tiny.opt, [3, 11, 12])
    before, wide = logits(model), widths(model)
    report = trim(model, score="apoz")
    assert all(width <= wide[name] - 3 for name, width in widths(model).items())
    assert report.metrics["neurons"] == sum(widths(model).values()) < report.metrics["neurons_before"]
    assert (logits(model) - before).norm() < 0.7 * before.norm()


def test_nothing_goes_where_nothing_stands_out():
    model = tiny.llama()  # SwiGLU never puts out zero
    before = logits(model)
    report = trim(model, score="apoz")
    assert report.layers == []
    assert "no neuron was removed" in report.notes[0]
    assert torch.equal(logits(model), before)


@torch.no_grad()
def with_twins(make):
    """A model in which every neuron of an MLP has one that does nearly the same, as neurons of trained models have."""
    model, generator = make(), torch.Generator().manual_seed(0)
    for units in find_units(model, ("neuron",)):
        for name, rows in units.writers.items():
            first, second = rows[: len(units) // 2].flatten(), rows[len(units) // 2 :].flatten()
            W = get_weight(model.get_submodule(name))
            W[second] = W[first] + 0.3 * W.std() * torch.randn(W[first].shape, generator=generator)
    return model


@pytest.mark.parametrize("make", [tiny.llama, tiny.opt], ids=["llama", "opt"])
def test_refit_beats_none_on_unseen_tokens(make):
    refitted, cut = (
        change(lambda: with_twins(make), seen=HELD, share=0.3, score="contribution", refit=refit)
        for refit in (True, False)
    )
    assert refitted < 0.8 * cut


def test_a_refit_to_few_tokens_does_little_harm_and_would_if_it_were_trusted(monkeypatch):
    options = {"seen": HELD, "ids": IDS[:1], "share": 0.3, "score": "contribution"}
    cut, refitted = (change(tiny.llama, **options, refit=refit) for refit in (False, True))
    assert refitted < 1.05 * cut
    monkeypatch.setattr(apoz, "choose_ridge", lambda W, halves, keep: RIDGE)
    assert change(tiny.llama, **options) > 1.1 * refitted


def test_a_bias_makes_up_for_the_means():
    def shifted():
        model = tiny.opt()
        with torch.no_grad():
            for layer in model.model.decoder.layers:
                layer.fc1.bias += 1.0
        return model

    compensated = change(shifted, share=0.3, score="flap", refit=False)
    model = shifted()
    before = logits(model)
    biases = [layer.fc2.bias.clone() for layer in model.model.decoder.layers]
    trim(model, share=0.3, score="flap", refit=False)
    for layer, bias in zip(model.model.decoder.layers, biases, strict=True):
        layer.fc2.bias.data = bias
    assert compensated < 0.9 * float((logits(model) - before).norm() / before.norm())


def test_scores_beat_the_reverse_choice_and_surgeon_beats_scores_that_foresee_no_refit(monkeypatch):
    found = {score: change(tiny.llama, share=0.3, score=score) for score in SCORES}
    chosen = apoz.most_important
    monkeypatch.setattr(apoz, "most_important", lambda importance, kept: chosen(-importance, kept))
    worst = change(tiny.llama, share=0.3, score="contribution")
    assert found["contribution"] < 0.9 * worst
    assert found["surgeon"] == min(found.values())


@pytest.mark.parametrize("rounds", [1, 3])
def test_shares_are_exact_to_a_neuron(rounds):
    model = tiny.llama()
    trim(model, share=0.37, rounds=rounds, score="contribution")
    assert set(widths(model).values()) == {72 - round(0.37 * 72)}


def test_a_global_share_is_exact_and_layers_keep_their_floor():
    model = tiny.llama()
    with torch.no_grad():
        get_weight(model.get_submodule("model.layers.0.mlp.down_proj"))[:, :60] *= 1e-4
    trim(model, share=0.5, scope="global", floor=0.25, score="contribution")
    first, second = widths(model).values()
    assert first + second == 72
    assert 18 <= first < second


def test_multiples_and_options_of_single_layers():
    model = tiny.llama()
    trim(model, share=0.5, multiple_of=8, layers={"layers.1.mlp.down_proj": {"share": 0.2}})
    assert list(widths(model).values()) == [40, 56]


def test_sparse_layers_stay_sparse():
    model = tiny.llama()
    hf_slim.compress(model, "prune.magnitude", sparsity=0.5)
    trim(model, share=0.25)
    layers = find_layers(model)
    assert set(widths(model).values()) == {54}
    for name in ("gate_proj", "up_proj", "down_proj"):
        layer = layers[f"model.layers.0.mlp.{name}"]
        assert layer.survivors is not None
        assert 0.3 < layer.survivors / (layer.rows * layer.cols) < 0.7


def test_a_resumed_walk_ends_where_a_straight_one_does(tmp_path, monkeypatch):
    straight, killed, resumed = tiny.opt(), tiny.opt(), tiny.opt()
    rows = trim(straight, share=0.3).layers
    context = Context(windows=lambda role: IDS, blocks=tmp_path)
    make_up, calls = apoz.make_up, []

    def dies(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return make_up(*args)

    monkeypatch.setattr(apoz, "make_up", dies)
    with pytest.raises(KeyboardInterrupt):
        trim(killed, context=context, share=0.3)
    again = trim(resumed, context=context, share=0.3).layers
    assert len(calls) == 3  # the first block was not solved again
    assert again == rows
    assert torch.equal(logits(resumed), logits(straight))


def test_experts_that_saw_few_tokens_are_judged_by_their_weights():
    model = architectures.make("Mixtral")
    report = hf_slim.compress(model, "prune.apoz", data=IDS[:1, :8], share=0.25)
    assert any(apoz.FALLBACK in note for note in report.notes)
    assert report.metrics["neurons"] == 0.75 * report.metrics["neurons_before"]


@pytest.mark.parametrize("name", ["Llama", "Phi-3", "Mixtral", "T5", "GPT-2"])
def test_the_plan_foresees_the_shapes(name):
    model = architectures.make(name)
    skeleton = architectures.make(name).to("meta")
    config = apoz.Config(share=0.25)
    with hf_slim.core.experts.unfused(skeleton):
        planned = apoz.plan(find_layers(skeleton), config, skeleton)
    with hf_slim.core.experts.unfused(model):
        trim(model, share=0.25)
        found = {n: (x.rows, x.cols) for n, x in find_layers(model).items() if n in planned}
    assert planned
    assert {n: (x.rows, x.cols) for n, x in planned.items()} == found


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"share": 1.0}, "less than 1"),
        ({"share": 0.0}, "greater than 0"),
        ({"score": "flap"}, "give share"),
        ({"scope": "global", "share": 0.9}, "at most 1 - floor = 0.8"),
        (
            {"scope": "global", "share": 0.5, "layers": {"first": {"share": 0.1}}},
            "no layer can have a share of its own",
        ),
        ({"layers": {"first": {"rounds": 2}}}, "cannot differ from layer to layer"),
    ],
)
def test_options_that_make_no_sense(options, says):
    with pytest.raises(ValidationError, match=says):
        apoz.Config(**options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"share": 0.999}, "would remove all of its 72 neurons"),
        ({"share": 0.5, "multiple_of": 128}, "fewer than multiple_of 128"),
        ({"layers": {"include": ["q_proj"]}}, "matches no layer"),
        ({"layers": {"exclude": ["down_proj"]}}, "leaves nothing"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_changes(options, says):
    model = tiny.llama()
    before = logits(model)
    with pytest.raises(PlanError, match=says):
        trim(model, **options)
    assert torch.equal(logits(model), before)


def test_every_problem_is_named_at_once():
    model = tiny.llama()
    with pytest.raises(PlanError) as raised:
        trim(model, share=0.999)
    assert len(raised.value.problems) == 2


def test_training_between_rounds_is_asked_for_and_done():
    options = {"share": 0.25, "rounds": 2, "score": "contribution", "training": {"steps": 2, "batch_size": 2}}
    with pytest.raises(PlanError, match="the uncompressed model"):
        hf_slim.compress(tiny.llama(), "prune.apoz", data=IDS, **options)
    model = tiny.llama()
    report = hf_slim.compress(model, "prune.apoz", data=IDS, original=tiny.llama(), **options)
    assert [entry["neurons"] for entry in report.metrics["rounds"]] == [126, 108]
    assert all(entry["training"]["steps"] == 2 for entry in report.metrics["rounds"])
    assert {row.bytes_before for row in report.layers} == {72 * 40 * 4}


def test_bytes_are_those_of_the_models_dtype_whatever_it_was_computed_in():
    model = tiny.llama().to(torch.bfloat16)
    for row in trim(model, share=0.25).layers:
        assert row.bytes == model.get_submodule(row.name).weight.nbytes
        assert row.bytes_before == 72 * 40 * 2


def test_codes_cannot_be_trimmed():
    model = tiny.llama()
    hf_slim.compress(model, "quantize.rtn", bits=8)
    with pytest.raises(PlanError, match="trim neurons before"):
        trim(model, share=0.25)


def test_weights_that_are_not_finite_are_refused():
    model = tiny.llama()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match="NaN"):
        trim(model, share=0.25)
