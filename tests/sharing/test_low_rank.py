"""Low rank: what is lost is what was dropped, activations beat weights, and stored bytes are those of the plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from reference import low_rank as reference
from safetensors.torch import load_file
from training import arguments, rows
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

import hf_slim
from hf_slim.core.errors import ModelError, PlanError, RecipeError
from hf_slim.core.select import find_layers
from hf_slim.core.stage import make_stage
from hf_slim.encodings import LowRank
from hf_slim.encodings.modules import EncodedLinear
from hf_slim.plan import order_problems, plan_stage
from hf_slim.sharing.directions import (
    balanced,
    damp,
    follow_drift,
    output_directions,
    output_energies,
    project,
    project_table,
    refit_left,
    table_directions,
)
from hf_slim.sharing.low_rank import Config

TRAINED = Path(__file__).parents[2] / "../shared/models/stories260K"
STORIES = Path(__file__).parents[2] / "../shared/data/tinystories"
DATA = tiny.ids(8, 16)


def problem(rows: int = 12, cols: int = 9, tokens: int = 40, seed: int = 0):
    """A weight, inputs of very unequal columns, and H."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    mix = torch.randn(cols, cols, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, cols)
    X = torch.randn(tokens, cols, generator=generator, dtype=torch.float64) @ mix
    return W, X, X.T @ X


def loss(W: torch.Tensor, M: torch.Tensor, H: torch.Tensor) -> float:
    return reference.loss(W.numpy(), M.numpy(), H.numpy())


# ---- kernels


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (1, 5), (5, 1)])
@pytest.mark.parametrize("tokens", [40, 4])
def test_the_loss_is_the_dropped_energy_also_for_a_singular_h(shape, tokens):
    W, _, H = problem(*shape, tokens)
    U, energies = output_directions(W, H)
    assert torch.allclose(U.T @ U, torch.eye(U.shape[1], dtype=torch.float64))
    for rank in range(1, min(shape) + 1):
        A, B = project(W, U[:, :rank])
        assert loss(W, A @ B, H) == pytest.approx(
            float(energies[rank:].sum()), rel=1e-6, abs=1e-9 * float(energies.sum())
        )
    torch.testing.assert_close(output_energies(W, H), energies)


@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
def test_pca_of_outputs_is_whitened_svd(shape):
    W, _, H = problem(*shape)
    U, _ = output_directions(W, H)
    for rank in (1, 3, 6):
        A, B = project(W, U[:, :rank])
        expected = reference.whitened_svd(W.numpy(), H.numpy(), rank)
        np.testing.assert_allclose((A @ B).numpy(), expected, rtol=1e-6, atol=1e-7)


def test_without_inputs_it_is_the_svd_of_the_weight():
    W, _, _ = problem()
    U, energies = output_directions(W)
    A, B = project(W, U[:, :4])
    left, s, right = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(A @ B, left[:, :4] * s[:4] @ right[:4])
    torch.testing.assert_close(energies, s.square())


def test_factors_are_balanced_and_zero_weights_stay_finite():
    W, _, H = problem()
    A, B = project(W, output_directions(W, H)[0][:, :4])
    torch.testing.assert_close(A.norm(dim=0), B.norm(dim=1))
    A, B = balanced(torch.zeros(3, 2), torch.zeros(2, 4, dtype=torch.float64))
    assert not A.any()
    assert not B.any()
    U, energies = output_directions(torch.zeros(4, 3), torch.eye(3))
    assert not energies.any()
    assert not torch.matmul(*project(torch.zeros(4, 3), U[:, :1])).any()


def test_a_rounded_factor_is_made_up_for_by_the_other():
    W, _, H = problem()
    A, B = project(W, output_directions(W, H)[0][:, :4])
    rough = (B * 4).round() / 4
    refitted = refit_left(W, rough, H)
    assert loss(W, refitted @ rough, H) < 0.9 * loss(W, A @ rough, H)
    slope = (refitted @ rough - W) @ H @ rough.T  # of the loss, zero at its least
    assert slope.abs().max() < 1e-6 * H.abs().max()


def test_following_the_drift_is_least_squares_on_the_inputs_that_are_fed():
    W, X, _ = problem(tokens=200)
    noise = torch.randn(9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fed = X @ (torch.eye(9, dtype=torch.float64) + 0.2 * noise)
    H, drift = fed.T @ fed, (X - fed).T @ fed
    M = follow_drift(W, drift, H)
    expected = torch.linalg.lstsq(fed, X @ W.T).solution.T
    torch.testing.assert_close(M, expected)

    def answer(found: torch.Tensor) -> float:
        return float((X @ W.T - fed @ found.T).square().sum())

    low, plain = (torch.matmul(*project(T, output_directions(T, H)[0][:, :5])) for T in (M, W))
    assert answer(low) < 0.8 * answer(plain)
    torch.testing.assert_close(follow_drift(W, torch.zeros_like(drift), H), W)
    torch.testing.assert_close(follow_drift(W, drift, H, 0.5), (W + M) / 2)


def test_a_table_keeps_what_its_frequent_tokens_need():
    W, _, H = problem(rows=60)
    frequency = torch.logspace(3, 0, 60)
    H = damp(H, 0.1)
    into, out, energies = table_directions(W, frequency, H)
    torch.testing.assert_close(into @ out, torch.eye(9, dtype=torch.float64))
    M = torch.matmul(*(part.double() for part in project_table(W, into[:, :4], out[:4])))

    def weighted(found: torch.Tensor) -> float:
        return float((frequency[:, None].double() * ((W - found) @ H) * (W - found)).sum())

    assert weighted(M) == pytest.approx(float(energies[4:].sum()), rel=1e-4)
    scaled = frequency.double().sqrt()[:, None]
    expected = reference.whitened_svd((scaled * W).numpy(), H.numpy(), 4)
    np.testing.assert_allclose((scaled * M).numpy(), expected, rtol=1e-4, atol=1e-4)


# ---- models


def foreseen(model, **options) -> dict:
    return plan_stage(find_layers(model), make_stage("share.low_rank", options), model)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {"rank": 4},
        {"ratio": 0.5, "multiple": 2, "embeddings": {"rank": 6}},
        {"ratio": 0.4, "factors": {"bits": 8}},
        {"rank": 6, "basis": "weight", "factors": {"bits": 4, "grid": "codebook"}},
    ],
    ids=["rank", "ratio", "affine", "codebook"],
)
def test_bytes_are_those_of_the_plan_and_of_the_file(architecture, options, tmp_path):
    model = tiny.ALL[architecture]()
    planned = foreseen(model, **options)
    report = hf_slim.compress(model, "share.low_rank", data=DATA, **options)
    assert {row.name: row.bytes for row in report.layers} == {name: layer.nbytes for name, layer in planned.items()}
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name, layer in planned.items():
        own = {k: t for k, t in stored.items() if k.rpartition(".")[0].endswith(name) and not k.endswith("bias")}
        assert sum(tensor.nbytes for tensor in own.values()) == layer.nbytes < layer.rows * layer.cols * 4
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=DATA).logits, model(input_ids=DATA).logits)
    assert loaded.generate(DATA[:1], max_new_tokens=3, do_sample=False).shape == (1, 19)


def test_a_budget_is_kept_and_layers_left_dense_are_named():
    model = tiny.llama()
    before = {name: layer for name, layer in find_layers(model).items() if layer.block}
    report = hf_slim.compress(model, "share.low_rank", data=DATA, budget=0.7)
    after = {name: layer for name, layer in find_layers(model).items() if layer.block}
    share = sum(x.nbytes for x in after.values()) / sum(x.nbytes for x in before.values())
    assert 0.65 < share <= 0.7
    left = [name for name, layer in after.items() if layer.encoding is None]
    assert report.metrics["left_dense"] == len(left) == len(report.notes)
    assert all(name in " ".join(report.notes) for name in left)
    assert all(layer.nbytes < before[name].nbytes for name, layer in after.items() if layer.encoding is not None)


def test_a_layer_that_needs_most_of_its_directions_stays_dense():
    model = tiny.llama()
    report = hf_slim.compress(model, "share.low_rank", data=DATA, energy=1.0)
    assert report.layers == []
    assert report.metrics["left_dense"] == 14
    report = hf_slim.compress(model, "share.low_rank", basis="weight", energy=0.5)
    assert all(row.metrics["dropped_energy"] <= 0.5 for row in report.layers)
    assert len(report.layers) > 0


def test_options_of_one_layer_take_the_place_of_the_common_one():
    config = Config(ratio=0.5, layers={"*.down_proj": {"rank": 3}})
    layers = find_layers(tiny.llama())
    assert config.at(layers["model.layers.0.mlp.down_proj"]).rank == 3
    assert config.at(layers["model.layers.0.mlp.down_proj"]).ratio is None
    assert config.at(layers["model.layers.0.mlp.up_proj"]).ratio == 0.5
    model = tiny.llama()
    hf_slim.compress(model, "share.low_rank", data=DATA, budget=0.7, layers={"*.down_proj": {"rank": 3}})
    assert model.get_submodule("model.layers.1.mlp.down_proj").encoding == LowRank(rank=3)


def test_a_residual_leaves_the_codes_alone_and_repairs_the_weight():
    original, model = tiny.llama(), tiny.llama()
    hf_slim.compress(model, "quantize.rtn", bits=2, group_size=None)
    coded = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantized = logits(model)
    hf_slim.compress(model, "share.low_rank", data=DATA, original=original, rank=6, residual=True)
    now = model.state_dict()
    for name, tensor in coded.items():
        place, _, own = name.rpartition(".")
        assert torch.equal(now[name] if name in now else now[f"{place}.base_{own}"], tensor)
    assert (logits(model) - logits(original)).norm() < 0.9 * (quantized - logits(original)).norm()
    assert model.get_submodule("model.layers.0.mlp.up_proj").encoding.describe() == "2-bit row + rank 6"


def test_zeros_of_a_pruned_base_cost_nothing_beside_a_residual():
    original, model = tiny.llama(), tiny.llama()
    hf_slim.compress(model, "prune.magnitude", sparsity=0.5)
    with pytest.raises(PlanError, match="its zeros would be filled"):
        hf_slim.compress(model, "share.low_rank", data=DATA, rank=2)
    hf_slim.compress(model, "share.low_rank", original=original, basis="weight", rank=2, residual=True)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.encoding.base.kind == "sparse"
    assert layer.nbytes() < layer.rows * layer.cols * 4


def test_distillation_may_follow_factors_and_residuals_but_not_codes():
    def order(*stages: tuple[str, dict]) -> list[str]:
        return order_problems(tuple(make_stage(*stage) for stage in (*stages, ("distill.logits", {}))))

    coded = ("quantize.rtn", {"bits": 2})
    assert order(("share.low_rank", {"rank": 4})) == []
    assert order(("share.low_rank", {"rank": 4, "factors": {"grid": "codebook"}})) == []
    assert order(coded, ("share.low_rank", {"rank": 4, "residual": True})) == []
    assert len(order(("share.low_rank", {"rank": 4, "factors": {}}))) == 1
    assert len(order(coded, ("share.low_rank", {"rank": 4, "residual": True, "factors": {}}))) == 1


def test_a_residual_learns_from_the_original_while_the_codes_stay():
    original, model = tiny.llama(), tiny.llama()
    hf_slim.compress(model, "quantize.rtn", bits=2, group_size=None)
    hf_slim.compress(model, "share.low_rank", data=DATA, original=original, rank=4, residual=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"steps": 8, "batch_size": 4, "learning_rate": 1e-3}
    report = hf_slim.compress(model, "distill.logits", data=DATA, original=original, **options)
    assert report.metrics["last_loss"] < report.metrics["first_loss"]
    changed = {name.rpartition(".")[2] for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert {"left", "right"} <= changed
    assert not any(name.startswith("base_") for name in changed)


def test_a_plain_trainer_trains_the_factors_and_what_is_saved_is_what_was_trained(tmp_path):
    model = tiny.llama()
    hf_slim.compress(model, "share.low_rank", data=DATA, rank=5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = Trainer(model, arguments(tmp_path, num_train_epochs=1), train_dataset=rows(), data_collator=pad)
    trainer.train()
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert sum(name.endswith((".left", ".right")) for name in moved) == 28
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model.eval()))


def test_an_adapter_trains_beside_the_factors(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny.llama()
    hf_slim.compress(model, "share.low_rank", data=DATA, rank=5)
    expected = logits(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    torch.testing.assert_close(logits(adapted), expected)
    Trainer(adapted, arguments(tmp_path, num_train_epochs=1), train_dataset=rows(), data_collator=pad).train()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in trained)
    assert (logits(adapted.eval()) - expected).abs().max() > 1e-4


def test_loading_factorises_weights_as_they_arrive(tmp_path):
    folder = tiny.save(tiny.llama(), tmp_path)
    config = hf_slim.SlimConfig("share.low_rank", basis="weight", ratio=0.5)
    streamed = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    model = AutoModelForCausalLM.from_pretrained(folder)
    hf_slim.compress(model, "share.low_rank", basis="weight", ratio=0.5)
    assert isinstance(streamed.model.layers[0].mlp.up_proj, EncodedLinear)
    assert torch.equal(logits(streamed), logits(model))
    for options, says in (({"ratio": 0.5}, "calibration"), ({"basis": "weight"}, "rank or ratio")):
        with pytest.raises(PlanError, match=says):
            hf_slim.SlimConfig("share.low_rank", **options)


# ---- what cannot be done


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 20}, r"q_proj \[40, 40\]: rank 20 would make it larger.*the largest useful one is 19"),
        ({"rank": 41}, r"has rank 40 at most, got rank 41; the largest useful one is 19"),
        ({"rank": 24, "multiple": 8}, "largest useful one is 16"),
        ({"ratio": 0.01}, "allow as much"),
        ({"budget": 0.01}, "allow as much"),
        ({"multiple": 64}, "not even rank 64 makes it smaller"),
        ({"rank": 2, "residual": True}, "is dense and lacks nothing"),
    ],
)
def test_the_plan_refuses_with_the_way_out(options, says):
    model = tiny.llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(PlanError, match=says):
        hf_slim.compress(model, "share.low_rank", data=DATA, original=tiny.llama(), **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 4, "ratio": 0.5}, "rank and ratio each set the rank"),
        ({"rank": 5, "multiple": 2}, "not a multiple of 2"),
        ({"residual": True}, "say how large it is"),
        ({"rank": 0}, "at least 1"),
        ({"layers": {"*.up_proj": {"basis": "weight"}}}, "cannot differ from layer to layer"),
        ({"embeddings": {"rank": 3, "energy": 0.5}}, "each set the rank"),
    ],
)
def test_options_that_cannot_be(options, says):
    with pytest.raises(RecipeError, match=says):
        make_stage("share.low_rank", options)


def test_weights_that_are_not_finite_are_named():
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        hf_slim.compress(model, "share.low_rank", data=DATA)


# ---- rivals


@pytest.mark.skipif(not TRAINED.exists() or not STORIES.exists(), reason="needs the trained model in ../shared")
def test_on_a_trained_model_activations_beat_the_svd_of_weights_by_far():
    tokenizer = AutoTokenizer.from_pretrained(TRAINED)
    calibration, held_out = (stories(tokenizer, name) for name in ("train.txt", "valid.txt"))

    def cost(**options) -> float:
        model = AutoModelForCausalLM.from_pretrained(TRAINED, dtype=torch.float32)
        hf_slim.compress(model, "share.low_rank", data=calibration, layers=SOME, **options)
        with torch.no_grad():
            return float(model(input_ids=held_out, labels=held_out).loss)

    plain, ours = cost(ratio=0.7, basis="weight"), cost(ratio=0.7, refit=0)
    assert ours < plain - 0.2
    assert cost(ratio=0.7) < ours
    assert cost(budget=0.7, refit=0) < ours


SOME = {"include": ["layers.[1-3].*"]}


def stories(tokenizer, name: str) -> torch.Tensor:
    text = (STORIES / name).read_text(encoding="utf-8")[:16_000]
    return torch.tensor(tokenizer(text).input_ids[:4096]).view(-1, 256)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=DATA).logits


def pad(samples):
    length = min(len(sample["input_ids"]) for sample in samples)
    return {key: torch.stack([sample[key][:length] for sample in samples]) for key in ("input_ids", "labels")}


def test_codes_for_factors_are_asked_for_where_they_are_made():
    model = tiny.llama()
    hf_slim.compress(model, "share.low_rank", data=DATA, ratio=0.5)
    with pytest.raises(PlanError, match=r"factors: \{bits: 8\} in share\.low_rank"):
        hf_slim.compress(model, "quantize.rtn", bits=8)
