"""Tuning of scales: only scales change, what was measured is what is saved, and nothing is made worse."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

import hf_slim
from hf_slim.core.apply import run_stage
from hf_slim.core.context import Context
from hf_slim.core.errors import DataError, PlanError
from hf_slim.core.select import find_layers
from hf_slim.core.stage import make_stage
from hf_slim.distillation.losses import kl_divergence
from hf_slim.encodings import Affine
from hf_slim.encodings.modules import EncodedLinear
from hf_slim.evaluation.agreement import agreement
from hf_slim.plan import plan_stage
from hf_slim.quantization import scales as method
from hf_slim.quantization.fake import grouped

torch.set_num_threads(1)  # matrices are tiny, and threads that wait for a busy core take many times as long
DATA = tiny.ids(36, 24, seed=3)
HELD_OUT = tiny.ids(8, 24, seed=4)
OPTIONS = {"steps": 12, "learning_rate": 1e-2, "batch_size": 4}


def rounded(name="llama", dtype=torch.float32, *, sparsity=None, **options):
    """A model on a coarse grid, pruned first if asked for."""
    model = tiny.ALL[name](dtype)
    if sparsity is not None:
        hf_slim.compress(model, "prune.magnitude", sparsity=sparsity)
    hf_slim.compress(model, "quantize.rtn", **{"bits": 2, "group_size": 16, **options})
    return model


def tune(model, original=None, **options):
    original = tiny.llama() if original is None else original
    return hf_slim.compress(model, "quantize.scales", data=DATA, original=original, **{**OPTIONS, **options})


def spoil(model, factor):
    """Make all scales too large."""
    for module in model.modules():
        if isinstance(module, EncodedLinear):
            module.scales.mul_(factor)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@torch.no_grad()
def logits(model, ids=HELD_OUT):
    return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("cols", [32, 40])
@pytest.mark.parametrize("group_size", [None, 16])
def test_product_and_its_gradients_are_those_of_the_dense_weight(cols, group_size):
    generator = torch.Generator().manual_seed(cols)
    steps = torch.randint(-7, 8, (6, cols), generator=generator).to(torch.int8)
    groups = grouped(steps, group_size).shape[1]
    x = torch.randn(2, 5, cols, generator=generator, dtype=torch.float64)
    scales = torch.randn(6, groups, generator=generator, dtype=torch.float64)
    slope = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    found = []
    for product in (method.scaled_product, dense_product):
        inputs = x.clone().requires_grad_(), scales.clone().requires_grad_()
        y = product(inputs[0], steps, inputs[1], group_size)
        y.backward(slope)
        found.append((y.detach(), inputs[0].grad, inputs[1].grad))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)  # the weight's gradient is summed in float32


def dense_product(x, steps, scales, group_size):
    columns = torch.arange(steps.shape[1]) // (group_size or steps.shape[1])
    return x @ (steps * scales[:, columns]).T


def test_no_float_weight_is_kept_between_the_passes():
    kept = []
    x = torch.randn(3, 64, requires_grad=True)
    steps, scales = torch.ones(32, 64, dtype=torch.int8), torch.ones(32, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        method.scaled_product(x, steps, scales, 16)
    assert sum(tensor.nbytes for tensor in kept) == x.nbytes + steps.nbytes + scales.nbytes


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"symmetric": True, "bits": 3},
        {"bits": 8, "group_size": None},  # asymmetric steps of more than a byte
        {"sparsity": 0.5, "bits": 4},
    ],
    ids=str,
)
def test_only_scales_change(options):
    model = rounded(**options)
    spoil(model, 1.05)  # so that there is something to gain at any number of bits
    before, flags = state(model), {name: p.requires_grad for name, p in model.named_parameters()}
    decoded = model.model.layers[0].mlp.up_proj.weight
    report = tune(model)
    differing = changed(before, state(model))
    assert differing == {name for name in before if name.endswith(".scales")}
    assert ((model.model.layers[0].mlp.up_proj.weight == 0) == (decoded == 0)).all()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert model.is_quantized
    assert all(row.bytes == row.bytes_before and 0 < row.error < 0.05 for row in report.layers)


def test_tuning_improves_what_rounding_left():
    model, original, data = rounded("opt", bits=3), tiny.opt(), tiny.ids(124, 24, seed=3)
    before = agreement(model, original, HELD_OUT).kl
    options = {"steps": 30, "learning_rate": 1e-2, "batch_size": 4}
    report = hf_slim.compress(model, "quantize.scales", data=data, original=original, **options)
    assert agreement(model, original, HELD_OUT).kl < 0.92 * before  # 0.87
    assert report.metrics["best_validation_loss"] < 0.9 * report.metrics["first_validation_loss"]
    assert report.notes == []


@pytest.mark.parametrize("options", [{}, {"bits": 4, "sparsity": 0.5}, {"symmetric": True}], ids=str)
def test_what_was_measured_is_what_is_saved(tmp_path, options):
    model = rounded(**options)
    report = tune(model, temperature=2.0, norms=True)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    ids = DATA[-4:]
    q, p = (logits(m, ids).flatten(0, 1) for m in (loaded, tiny.llama()))
    loss = kl_divergence(q, p, torch.ones(len(p), dtype=torch.bool), 2.0) / len(p)
    assert loss.item() == pytest.approx(report.metrics["best_validation_loss"], rel=1e-4)


def test_centered_grids_are_tuned():
    model = tiny.llama()
    hf_slim.compress(model, "quantize.qat", data=DATA, bits=2, training={"steps": 1, "learning_rate": 1e-6})
    before = state(model)
    report = tune(model)
    assert changed(before, state(model)) == {name for name in before if name.endswith(".scales")}
    q, p = (logits(m, DATA[-4:]).flatten(0, 1) for m in (model, tiny.llama()))
    loss = kl_divergence(q, p, torch.ones(len(p), dtype=torch.bool), 1.0) / len(p)
    assert loss.item() == pytest.approx(report.metrics["best_validation_loss"], rel=1e-4)


def test_norms_learn_on_demand_and_layers_are_chosen():
    model = rounded()
    before = state(model)
    tune(model, norms=True, layers={"include": ["down_proj"]})
    differing = changed(before, state(model))
    assert {name for name in differing if name.endswith(".scales")} == {
        f"model.layers.{i}.mlp.down_proj.scales" for i in range(2)
    }
    assert {name for name in differing if not name.endswith(".scales")} == {n for n in before if "norm" in n}


def test_eight_bit_activations_take_part():
    model = tiny.llama()
    for name in [layer.name for layer in find_layers(model).values() if layer.kind == "linear"]:
        weight = model.get_submodule(name).weight.detach()
        stored = Affine(bits=8, symmetric=True, activations="int8")
        codes, scales = torch.full_like(weight, 129, dtype=torch.uint8), weight.abs().amax(1, keepdim=True)
        tensors = stored.pack(codes, scales, codes[:, :1])
        parent, _, child = name.rpartition(".")
        encoded = EncodedLinear(*weight.shape[::-1], stored, bias=False)
        encoded.put(tensors)
        setattr(model.get_submodule(parent), child, encoded)
    chosen = method.tunable(find_layers(model), method.Config())
    expected = logits(model)
    with method._tuned(model, chosen, norms=False):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_tuning_that_does_harm_is_taken_back():
    model = rounded()
    before = state(model)
    report = tune(model, learning_rate=2.0, steps=4)
    assert changed(before, state(model)) == set()
    assert report.metrics["best_step"] == 0
    assert "nothing was changed" in report.notes[0]


def test_a_killed_run_goes_on_to_the_same_end(tmp_path, monkeypatch):
    stage = make_stage("quantize.scales", {**OPTIONS, "steps": 6, "checkpoint_every": 3})

    def run(folder):
        model = rounded()
        context = Context(windows=lambda role: DATA, load_original=tiny.llama, work=tmp_path / folder)
        return run_stage(model, stage, context), model

    straight, expected = run("a")
    saved = method.KeepBest.on_save

    def killed(self, *args, **kwargs):
        saved(self, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(method.KeepBest, "on_save", killed)
    with pytest.raises(KeyboardInterrupt):
        run("b")
    monkeypatch.undo()
    resumed, model = run("b")
    assert changed(state(expected), state(model)) == set()
    kept = ("first_validation_loss", "best_validation_loss", "best_step")
    assert [resumed.metrics[k] for k in kept] == [straight.metrics[k] for k in kept]


def test_what_cannot_be_tuned_is_refused():
    dense = tiny.llama()
    stage = make_stage("quantize.scales", {})
    with pytest.raises(PlanError, match=r"no layer is stored as integers with scales; put quantize.rtn"):
        plan_stage(find_layers(dense), stage, dense)
    model = rounded()
    before = state(model)
    with pytest.raises(DataError, match=r"4 windows are kept apart .* there are only 4"):
        hf_slim.compress(model, "quantize.scales", data=DATA[:4], original=dense)
    with pytest.raises(PlanError, match="pass original=model"):
        hf_slim.compress(model, "quantize.scales", data=DATA)
    assert changed(before, state(model)) == set()
    assert not any(isinstance(m, nn.Module) and hasattr(m, "tuned") for m in model.modules())
