"""Quantization-aware training: gradients against an oracle, what is stored is what was trained, zeros stay zero."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import training
from reference import qat as oracle
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

import hf_slim
from hf_slim import FakeQuantize, GradualMagnitudePruning
from hf_slim.core.data import DataSource, load_tokens
from hf_slim.core.errors import ModelError, PlanError, RecipeError
from hf_slim.core.select import find_layers
from hf_slim.core.stage import make_stage
from hf_slim.core.swap import get_weight
from hf_slim.distillation.trainer import DistillationConfig, DistillationTrainer
from hf_slim.encodings.modules import EncodedLinear
from hf_slim.evaluation.agreement import agreement
from hf_slim.evaluation.perplexity import perplexity
from hf_slim.plan import plan_stage
from hf_slim.quantization.fake import FakeWeight, Grid, LearnedScales, fake_quantize, fit_scales
from hf_slim.quantization.qat import Config

SHARED = Path(__file__).parents[3] / "shared"
ADAM = {"optim": "adamw_torch", "learning_rate": 3e-3, "lr_scheduler_type": "linear"}
GRIDS = {
    "1 bit": {"bits": 1, "group_size": 16},
    "2 bits": {"bits": 2, "group_size": 16},
    "ternary": {"bits": 2, "levels": "ternary", "group_size": None},
    "3 bits": {"bits": 3, "group_size": 16},
    "4 bits asymmetric": {"bits": 4, "group_size": 12, "symmetric": False},
}
each_grid = pytest.mark.parametrize("options", GRIDS.values(), ids=GRIDS.keys())


def drawn(options: dict) -> tuple[Grid, oracle.Case]:
    """Random weights, some far outside of the grid, some pruned, and a random gradient."""
    grid = Config(**options).grid
    draw = np.random.default_rng(7)
    W = draw.standard_normal((5, 40)) * 1.5
    W[draw.random(W.shape) < 0.1] = 0
    count = -(-40 // (grid.group_size or 40))
    scales = draw.uniform(0.2, 0.9, (5, count)) * draw.choice([-1, 1], (5, count))
    zero = {"ternary": 2.0, "centered": grid.highest / 2, "integer": 2.0 ** (grid.bits - 1)}[grid.levels]
    zeros = np.full((5, count), zero)
    if not grid.symmetric:
        zeros = draw.integers(0, grid.highest + 1, (5, count)).astype(float)
    slope = draw.standard_normal(W.shape)
    return grid, oracle.Case(W, scales, zeros, slope, grid.lowest, grid.highest, grid.group_size, grid.margin)


def run_kernel(case: oracle.Case):
    """Rounded weights and both gradients."""
    W, scales = (torch.tensor(array, requires_grad=True) for array in (case.W, case.scales))
    out = fake_quantize(W, scales, torch.tensor(case.zeros), case.lowest, case.highest, case.group_size, case.margin)
    out.backward(torch.tensor(case.slope))
    return out.detach().numpy(), W.grad.numpy(), scales.grad.numpy()


def make(folder, callbacks, model=None, cls=Trainer, **options):
    """A trainer of either kind; distillation has a random teacher of the same shape."""
    teacher = {} if cls is Trainer else {"teacher": tiny.llama(seed=1)}
    return cls(
        model=tiny.llama() if model is None else model,
        args=training.arguments(folder, DistillationConfig, **{"max_steps": 4, **ADAM, **options}),
        train_dataset=training.rows(samples=32),
        eval_dataset=training.rows(samples=4),
        data_collator=training.Pad(),
        callbacks=list(callbacks),
        **teacher,
    )


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=tiny.ids()).logits.double()


@each_grid
def test_weights_and_gradients_agree_with_the_oracle(options):
    _, case = drawn(options)
    rounded, d_W, d_scales = run_kernel(case)
    np.testing.assert_allclose(rounded, oracle.rounded(case), rtol=0, atol=1e-12)
    expected_W, expected_scales = oracle.gradients(case)
    np.testing.assert_allclose(d_W, expected_W, rtol=1e-12)
    np.testing.assert_allclose(d_scales, expected_scales, rtol=1e-9, atol=1e-12)
    assert (expected_W == 0).sum() > 20  # some were clipped


@pytest.mark.parametrize(
    ("options", "levels"),
    [
        ({"bits": 1}, [-0.5, 0.5]),
        ({"bits": 2}, [-1.5, -0.5, 0.5, 1.5]),
        ({"bits": 2, "levels": "ternary"}, [-1, 0, 1]),
        ({"bits": 2, "levels": "integer"}, [-2, -1, 0, 1]),
        ({"bits": 3}, [-4, -3, -2, -1, 0, 1, 2, 3]),
    ],
)
def test_levels(options, levels):
    grid = Config(**options).grid
    W = torch.linspace(-6, 6, 4001)[None] + 1e-4
    fake = FakeWeight(W, Grid(grid.bits, None, True, grid.levels), rate=1.0)
    fake.scales.initial.fill_(1.0)
    assert fake(W).unique().tolist() == levels


@each_grid
def test_first_scales_are_as_good_as_a_fine_search(options):
    generator = torch.Generator().manual_seed(3)
    W = torch.randn(6, 48, generator=generator) * torch.rand(6, 1, generator=generator)
    W[:, 5] *= 6  # outliers
    grid = Config(**options).grid
    fake = FakeWeight(W, grid, rate=1.0)
    error = (fake(W) - W).square().sum(1)
    reach = W.abs().amax(1) / grid.highest
    best = torch.full_like(error, torch.inf)
    for share in torch.linspace(0.02, 2.2, 300):
        scales = (reach * share)[:, None].expand_as(fake.zeros).contiguous()
        tried = fake_quantize(W, scales, fake.zeros, grid.lowest, grid.highest, grid.group_size)
        best = torch.minimum(best, (tried - W).square().sum(1))
    assert (error <= 1.02 * best).all()


def test_one_bit_has_the_mean_magnitude():
    W = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    scales = fit_scales(W, 0.5, 0, 1, None)
    torch.testing.assert_close(scales.float()[:, 0] / 2, W.abs().mean(1), rtol=1e-3, atol=0)


def test_scales_are_used_as_stored_and_learn_straight_through():
    scales = LearnedScales(torch.tensor([[0.1, -0.03]], dtype=torch.float16), rate=5.0)
    with torch.no_grad():
        scales.stretch.copy_(torch.tensor([[0.0123, -0.4]]))
    used = scales()
    assert torch.equal(used.half().float(), used)
    used.sum().backward()
    torch.testing.assert_close(scales.stretch.grad, 5.0 * used.detach(), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("llama", options) for options in GRIDS.values()),
        ("gpt2", GRIDS["4 bits asymmetric"]),
        ("opt", GRIDS["2 bits"]),
    ],
    ids=str,
)
def test_what_is_stored_is_what_was_trained(tmp_path, name, options):
    model, quantization = tiny.CAUSAL[name](), FakeQuantize(options)
    before = logits(model)
    make(tmp_path, [quantization], model, max_steps=1, max_grad_norm=1.0).train()
    trained = logits(model)
    reports = quantization.store(model)
    assert len(reports) == len([m for m in model.modules() if isinstance(m, EncodedLinear)]) >= 8
    assert (logits(model) - trained).abs().max() < 1e-4
    assert (trained - before).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "stored")
    loaded = type(model).from_pretrained(tmp_path / "stored")
    assert (logits(loaded) - trained).abs().max() < 1e-4
    assert not any("fake" in key for key in model.state_dict())


@pytest.mark.parametrize("rate", [1e-3, 2e-2])
def test_scales_have_a_relative_learning_rate_of_their_own(tmp_path, rate):
    model, quantization = tiny.llama(), FakeQuantize(bits=3, scale_learning_rate=rate)
    make(tmp_path, [quantization], model, max_steps=1, lr_scheduler_type="constant").train()
    moved = [
        (m.fake.scales.rate * m.fake.scales.stretch).exp().sub(1).abs() for m in model.modules() if hasattr(m, "fake")
    ]
    assert torch.cat([m.flatten() for m in moved]).median().item() == pytest.approx(rate, rel=0.03)


def test_accumulating_micro_batches_is_one_large_batch(tmp_path):
    trained = []
    for options in (
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    ):
        recorded = training.Gradients()
        make(tmp_path, [FakeQuantize(bits=2), recorded], cls=DistillationTrainer, max_steps=1, **options).train()
        trained.append(recorded.steps[0])
    assert training.relative(trained[1], trained[0]) < 1e-5


@pytest.mark.parametrize("cls", [Trainer, DistillationTrainer])
def test_a_resumed_run_is_the_straight_run(tmp_path, cls):
    options = {"cls": cls, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = make(tmp_path / "a", [FakeQuantize(bits=2, group_size=16)], **options)
    straight.train()
    resumed = make(tmp_path / "b", [FakeQuantize(bits=2, group_size=16)], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(training.weights(resumed.model), training.weights(straight.model))
    assert torch.equal(logits(resumed.model), logits(straight.model))
    floats = tiny.llama().from_pretrained(tmp_path / "a" / "checkpoint-4")
    for name, parameter in floats.named_parameters():
        assert torch.equal(parameter, straight.model.get_parameter(name))


@pytest.mark.parametrize(
    "options", [{"bits": 4, "group_size": 16}, {"bits": 2}, {"bits": 2, "levels": "ternary"}], ids=str
)
def test_zeros_of_gradual_pruning_stay_in_the_same_training(tmp_path, options):
    model = tiny.llama()
    callbacks = [GradualMagnitudePruning(sparsity=0.6, every=1), FakeQuantize(options)]
    make(tmp_path, callbacks, model, DistillationTrainer, max_steps=5, weight_decay=0.1).train()
    pruned = {name: ~keep for name, keep in callbacks[0].masks.items()}
    trained = logits(model)
    callbacks[1].store(model)
    assert (logits(model) - trained).abs().max() < 1e-4
    for name, gone in pruned.items():
        W = get_weight(model.get_submodule(name))
        assert gone.sum() == round(0.6 * W.numel())
        assert (W[gone] == 0).all()
        if options == {"bits": 2}:
            assert (W[~gone] != 0).all()  # a centered grid has no level at zero


@pytest.mark.parametrize("bits", [2, 4])
def test_pruning_and_quantization_during_a_distillation_stage(bits):
    during = [{"prune.gradual": {"sparsity": 0.5, "every": 1}}, {"quantize.qat": {"bits": bits, "group_size": 16}}]
    options = {"steps": 4, "learning_rate": 1e-3, "during": during}
    model = tiny.llama(torch.bfloat16)
    planned = plan_stage(find_layers(model), make_stage("distill.logits", options), model)
    hf_slim.compress(model, "distill.logits", data=tiny.ids(16, 24), original=tiny.llama(torch.bfloat16), **options)
    stored = find_layers(model)
    for name, layer in planned.items():
        assert stored[name].encoding == layer.encoding
        assert stored[name].nbytes == layer.nbytes
        assert int((get_weight(model.get_submodule(name)) == 0).sum()) >= layer.rows * layer.cols // 2
    assert len(planned) == 14


def test_zeros_of_an_earlier_stage_stay():
    model = tiny.llama()
    hf_slim.compress(model, "prune.magnitude", sparsity=0.5)
    names = [name for name, m in model.named_modules() if isinstance(m, EncodedLinear)]
    gone = {name: get_weight(model.get_submodule(name)) == 0 for name in names}
    before = {name: get_weight(model.get_submodule(name)) for name in names}
    options = {"steps": 3, "learning_rate": 3e-3, "weight_decay": 0.1}
    report = hf_slim.compress(model, "quantize.qat", data=tiny.ids(16, 24), bits=4, group_size=None, training=options)
    assert [row.name for row in report.layers] == names
    for name in names:
        W = get_weight(model.get_submodule(name))
        assert (W[gone[name]] == 0).all()
        assert training.relative(W, before[name]) > 0.01


def test_layers_may_have_bits_of_their_own():
    model = tiny.llama()
    layers = {"*.down_proj": {"bits": 8}, "last": {"bits": 3}, "exclude": ["q_proj"]}
    hf_slim.compress(model, "quantize.qat", data=tiny.ids(8, 24), training={"steps": 1}, layers=layers)
    bits = {name: m.encoding.bits for name, m in model.named_modules() if isinstance(m, EncodedLinear)}
    assert bits["model.layers.0.mlp.down_proj"] == bits["model.layers.1.mlp.down_proj"] == 8
    assert (bits["model.layers.0.mlp.up_proj"], bits["model.layers.1.mlp.up_proj"]) == (4, 3)
    assert not any("q_proj" in name for name in bits)


def test_training_beats_rounding_at_two_bits():
    original, held_out = tiny.llama(), tiny.ids(8, 32, seed=5)
    divergence = {}
    for name, method, options in (
        ("rounded", "quantize.rtn", {"bits": 2, "group_size": 16, "symmetric": True}),
        ("trained", "distill.logits", {
            "steps": 40, "batch_size": 8, "learning_rate": 5e-3,
            "during": [{"quantize.qat": {"bits": 2, "group_size": 16, "scale_learning_rate": 5e-3}}],
        }),
    ):  # fmt: skip
        model = copy.deepcopy(original)
        hf_slim.compress(model, method, data=tiny.ids(320, 32, seed=6), original=original, **options)
        divergence[name] = agreement(model, original, held_out).kl
    assert divergence["trained"] < 0.75 * divergence["rounded"]  # 0.67


def test_trained_model_survives_two_bits():
    folder, text = SHARED / "models" / "stories260K", SHARED / "data" / "tinystories"
    if not (folder.is_dir() and text.is_dir()):
        pytest.skip("the trained test model and its text lie beside the repository, in ../shared")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    data = load_tokens(DataSource(source=str(text / "train.txt"), samples=120, length=128), "train", tokenizer).ids
    held_out = load_tokens(DataSource(source=str(text / "valid.txt"), samples=8, length=128), "held_out", tokenizer).ids
    rounded, trained = copy.deepcopy(original), copy.deepcopy(original)
    hf_slim.compress(rounded, "quantize.rtn", bits=2, group_size=64)
    during = [{"quantize.qat": {"bits": 2, "group_size": 64}}]
    options = {"steps": 30, "batch_size": 4, "learning_rate": 1e-3, "during": during}
    hf_slim.compress(trained, "distill.logits", data=data, original=original, **options)
    assert perplexity(trained, held_out).perplexity < 0.5 * perplexity(rounded, held_out).perplexity


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "quantize.qat.bits"),
        ({"bit": 4}, "did you mean 'bits'"),
        ({"bits": 3, "levels": "centered"}, "'centered' is for 1 and 2 bits, got bits: 3"),
        ({"bits": 3, "levels": "ternary"}, "'ternary' takes 2 bits a code, got bits: 3"),
        ({"bits": 2, "levels": "ternary", "symmetric": False}, "'ternary' is symmetric"),
        ({"bits": 2, "levels": "ternary", "layers": {"first": {"bits": 8}}}, "takes 2 bits a code, got bits: 8"),
    ],
)  # fmt: skip
def test_impossible_options_are_refused(options, message):
    with pytest.raises(PlanError, match=message):
        FakeQuantize(options)


def test_pruning_after_quantization_is_refused():
    with pytest.raises(RecipeError, match=r"put prune\.gradual before quantize\.qat"):
        make_stage("distill.logits", {"during": [{"quantize.qat": {}}, {"prune.gradual": {}}]})


def test_what_cannot_be_trained_is_refused(tmp_path):
    rounded = tiny.llama()
    hf_slim.compress(rounded, "quantize.rtn")
    rounded.is_quantized = False
    with pytest.raises(PlanError, match="q_proj is already stored as 4-bit g64"):
        make(tmp_path, [FakeQuantize()], rounded)
    late = make(tmp_path, [])
    late.add_callback(FakeQuantize())
    with pytest.raises(PlanError, match="add_callback and model_init are too late"):
        late.train()
    twice = make(tmp_path, [FakeQuantize()]).model
    with pytest.raises(PlanError, match="a FakeQuantize is at work in model"):
        make(tmp_path, [FakeQuantize()], twice)


def test_a_model_that_diverged_is_named(tmp_path):
    model = tiny.llama()
    trainer = make(tmp_path, [FakeQuantize(bits=2)], model, max_steps=1)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError) as caught:
        trainer.train()
    named = "model.layers.1.mlp.up_proj holds NaN or infinite values"
    assert any(problem.startswith(named) for problem in caught.value.problems)
