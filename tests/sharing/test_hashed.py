"""Hashed layers start at least squares, are saved, loaded and trained like any parameter; what cannot be is refused."""

from __future__ import annotations

import copy
from typing import ClassVar

import numpy as np
import pytest
import tiny
import torch
from compressed import load, logits
from training import QUIET, arguments
from transformers import Trainer, TrainerCallback

import hf_slim
from hf_slim.core.errors import PlanError, RecipeError
from hf_slim.core.layers import relative_error
from hf_slim.core.select import find_layers
from hf_slim.core.size import stored_bytes
from hf_slim.encodings import Hashed
from hf_slim.encodings.modules import EncodedModule
from hf_slim.sharing.hashed import Config, encoding, least_squares, most_frequent

TABLE = {"compression": 4, "exact": 16, "by": "id"}
OPTIONS = {"compression": 4, "block": 8, "embeddings": TABLE}


def draw(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def places(stored: Hashed, rows: int, cols: int, exact: int) -> np.ndarray:
    """The matrix P of W = P b, for the rows after the exact ones: decoded unit vectors."""
    columns = []
    for k in range(stored.buckets * stored.block):
        buckets = torch.zeros(stored.buckets * stored.block)
        buckets[k] = 1
        tensors = {"buckets": buckets.view(stored.buckets, stored.block)}
        tensors |= {"exact": torch.zeros(exact, cols), "exact_ids": torch.arange(exact, dtype=torch.int32)}
        columns.append(stored.decode(tensors, rows, cols)[exact:].flatten().numpy())
    return np.stack(columns, axis=1)


@pytest.mark.parametrize(("block", "exact"), [(1, 0), (8, 0), (8, 3)])
def test_values_are_the_least_squares_solution(block, exact):
    rows, cols = 9, 20
    stored = Hashed(buckets=16 // block, block=block, exact=exact)
    W = draw(rows, cols)
    tensors = least_squares(W, stored, torch.arange(exact) if exact else None)
    P, w = places(stored, rows, cols, exact), W[exact:].flatten().numpy()
    solution = np.linalg.lstsq(P, w, rcond=None)[0]
    np.testing.assert_allclose(tensors["buckets"].flatten().numpy(), solution, atol=1e-6)
    residual = W - stored.decode(tensors, rows, cols)
    np.testing.assert_allclose(P.T @ residual[exact:].flatten().numpy(), 0, atol=1e-5)
    assert not residual[:exact].any()


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("compression", [1, 4, 16])
def test_random_weights_keep_the_share_of_filled_values(block, compression):
    W = draw(128, 256)
    stored = Hashed(buckets=W.numel() // (compression * block), block=block)
    tensors = least_squares(W, stored)
    filled = (stored.members(128, 256) > 0).sum().item() / W.numel()
    assert filled == pytest.approx((1 - np.exp(-compression)) / compression, rel=0.05)
    assert 1 - relative_error(W, stored.decode(tensors, 128, 256)) == pytest.approx(filled, rel=0.1)
    restored = stored.decode(least_squares(W, stored, restore_norm=True), 128, 256)
    torch.testing.assert_close(restored.norm(), W.norm())
    torch.testing.assert_close(restored / restored.norm(), (W_hat := stored.decode(tensors, 128, 256)) / W_hat.norm())


def test_degenerate_weights_have_a_defined_result():
    stored = Hashed(buckets=50, block=4)
    zero = least_squares(torch.zeros(4, 20), stored, restore_norm=True)
    assert not zero["buckets"].any()
    constant = least_squares(torch.ones(4, 20), stored)
    assert constant["buckets"].isfinite().all()
    assert not constant["buckets"][(stored.members(4, 20) == 0).all(1)].any()


def test_the_most_frequent_tokens_are_kept_and_ties_go_to_the_lower():
    assert most_frequent(torch.tensor([[5, 5, 1, 2], [7, 7, 5, 1]]), 4, 9).tolist() == [1, 2, 5, 7]
    assert most_frequent(torch.tensor([[3]]), 3, 9).tolist() == [0, 1, 3]
    model, before = tiny.llama(), tiny.llama().model.embed_tokens.weight
    ids = tiny.ids(4) % 10 + 30
    hf_slim.compress(model, "share.hashed", data=ids, block=8, embeddings={"compression": 4, "exact": 10})
    after = model.model.embed_tokens.weight
    assert torch.equal(after[30:40], before[30:40])
    assert not torch.equal(after[:10], before[:10])


def test_sizes_and_errors_are_those_of_the_compression():
    model = tiny.llama(torch.bfloat16)
    layers = find_layers(model)
    report = hf_slim.compress(model, "share.hashed", **OPTIONS | {"layers": {"*.down_proj": {"compression": 16}}})
    for row in report.layers:
        wanted, kept = layers[row.name].nbytes / 4, 1 / 4
        if layers[row.name].kind == "embedding":
            wanted, kept = 80 * 40 * 2 / 4 + 16 * 40 * 2 + 16 * 4, (80 / 4 + 16) / 96
        elif "down_proj" in row.name:
            wanted, kept = layers[row.name].nbytes / 16, 1 / 16
        assert wanted - 8 * 2 < row.bytes <= wanted
        assert 1 - row.error == pytest.approx(kept, abs=0.08)
    assert "trained" in report.notes[0]


def test_a_shared_head_multiplies_by_the_hashed_table(tmp_path):
    model = tiny.llama()
    hf_slim.compress(model, "share.hashed", **OPTIONS)
    expected = logits(model)
    dense = copy.deepcopy(model).dequantize()
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    torch.testing.assert_close(logits(dense), expected)
    model.save_pretrained(tmp_path)
    again = load("llama", tmp_path)
    assert torch.equal(logits(again), expected)
    assert stored_bytes(again) == stored_bytes(model)
    assert torch.equal(again.generate(tiny.ids(1), max_new_tokens=4), model.generate(tiny.ids(1), max_new_tokens=4))


def test_a_model_is_hashed_while_it_loads(tmp_path):
    model = tiny.llama()
    folder = tiny.save(model, tmp_path)
    loaded = load("llama", folder, quantization_config=hf_slim.SlimConfig("share.hashed", **OPTIONS))
    hf_slim.compress(model, "share.hashed", **OPTIONS)
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(PlanError, match="calibration"):
        hf_slim.SlimConfig("share.hashed", embeddings={"exact": 4})


class Losses(TrainerCallback):
    """Notes what is logged."""

    found: ClassVar[list[float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.found.extend([logs["loss"]] if "loss" in logs else [])


def fine_tune(model, folder, **options) -> list[float]:
    rows = [{"input_ids": row, "labels": row} for row in tiny.ids(4)]
    losses = Losses()
    losses.found = []
    given = {"optim": "adamw_torch", "learning_rate": 2e-2, "logging_steps": 1, "max_steps": 6} | options
    args = arguments(folder, per_device_train_batch_size=4, **given)
    Trainer(model, args, train_dataset=rows, callbacks=[losses]).train(
        resume_from_checkpoint=options.get("resume_from_checkpoint")
    )
    return losses.found


def stored(model) -> dict[str, torch.Tensor]:
    modules = {name: m for name, m in model.named_modules() if isinstance(m, EncodedModule)}
    return {f"{name}.{key}": t.detach().clone() for name, m in modules.items() for key, t in m.tensors().items()}


@pytest.mark.parametrize("gradient", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_plain_trainer_trains_buckets_and_exact_rows(gradient, dtype, tmp_path):
    model = tiny.llama(dtype)
    hf_slim.compress(model, "share.hashed", gradient=gradient, **OPTIONS)
    before = stored(model)
    losses = fine_tune(model, tmp_path, max_steps=8, save_strategy="steps", save_steps=8)
    assert losses[-1] < 0.8 * losses[0]
    changed = {name for name, tensor in stored(model).items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if not name.endswith("exact_ids")}
    again = load("llama", tmp_path / "checkpoint-8", dtype=dtype)
    assert torch.equal(logits(again), logits(model.eval()))


def test_the_mean_of_the_gradient_is_what_sgd_follows(tmp_path):
    summed, mean = tiny.llama(), tiny.llama()
    for model, gradient in ((summed, "sum"), (mean, "mean")):
        hf_slim.compress(model, "share.hashed", gradient=gradient, compression=4, block=8)
    start, options = stored(mean), {**QUIET, "max_steps": 1}
    for model in (summed, mean):
        fine_tune(model, tmp_path, **options)
    name = "model.layers.0.mlp.up_proj"
    members = summed.get_submodule(name).encoding.members(72, 40)
    step, divided = (stored(m)[f"{name}.buckets"] - start[f"{name}.buckets"] for m in (summed, mean))
    assert step.abs().max() > 0
    torch.testing.assert_close(divided * members, step, rtol=1e-3, atol=1e-6)


def test_distillation_recovers_what_hashing_lost():
    model, teacher = tiny.llama(), tiny.llama()
    hf_slim.compress(model, "share.hashed", compression=4, block=8)
    options = {"steps": 30, "batch_size": 4, "learning_rate": 1e-2}
    before = (logits(model) - logits(teacher)).square().mean()
    report = hf_slim.compress(model, "distill.logits", data=tiny.ids(), original=teacher, **options)
    assert report.metrics["last_loss"] < 0.5 * report.metrics["first_loss"]
    assert (logits(model) - logits(teacher)).square().mean() < 0.7 * before
    assert all(isinstance(x.encoding, Hashed) for x in find_layers(model).values() if x.block)


def test_an_adapter_trains_beside_frozen_buckets(tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra 'peft'")
    base = tiny.llama()
    hf_slim.compress(base, "share.hashed", compression=4, block=8)
    before = stored(base)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    losses = fine_tune(model, tmp_path, learning_rate=5e-2)
    assert losses[-1] < losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in stored(model.unload()).items())


def test_the_plan_says_what_is_not_trained(tmp_path):
    from runs import Place

    from hf_slim.plan import make_plan

    place, hashed = Place(tmp_path), "share.hashed: {compression: 4, block: 8}"
    head = f"  train: {{source: {tmp_path / 'calibration.txt'}, samples: 4, length: 16}}"
    alone = make_plan(place.recipe("distill.logits: {steps: 2}", hashed, head=head))
    trained = make_plan(place.recipe(hashed, "distill.logits: {steps: 2}", head=head))
    assert any("stage 2, share.hashed" in note and "put distill.logits after it" in note for note in alone.notes)
    assert not any("share.hashed" in note for note in trained.notes)
    assert trained.bytes_after < trained.bytes_before
    counted = make_plan(place.recipe("share.hashed: {block: 8, embeddings: {exact: 9}}"))
    assert counted.roles() == ["calibration"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"compression": 0.5}, "at least 1"),
        ({"block": 0}, "at least 1"),
        ({"hash_seed": -1}, "at least 0"),
        ({"gradient": "median"}, "mean"),
        ({"embeddings": {"compression": 0}}, "at least 1"),
        ({"embeddings": {"by": "luck"}}, "frequency"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, says):
    with pytest.raises(RecipeError, match=says):
        hf_slim.compress(tiny.llama(), "share.hashed", **options)


def test_what_cannot_be_hashed_is_named_all_at_once():
    model = tiny.llama()
    hf_slim.compress(model, "prune.magnitude", layers={"include": ["layers.0.mlp.up_proj"]})
    before = logits(model)
    with pytest.raises(PlanError) as caught:
        hf_slim.compress(model, "share.hashed", compression=64, block=32, embeddings={"exact": 96, "by": "id"})
    text = str(caught.value)
    assert "embed_tokens has 96 rows, and 96 are to be kept" in text
    assert "layers.0.mlp.up_proj is pruned" in text
    assert text.count("fewer than one bucket of 32") == 4  # q, k, v and o; 2880 weights of an MLP fill one
    assert torch.equal(logits(model), before)
    hf_slim.compress(hashed := tiny.llama(), "share.hashed", compression=4, block=8)
    with pytest.raises(PlanError, match="already stored as"):
        hf_slim.compress(hashed, "share.hashed", compression=4, block=8)


def test_descriptions_follow_the_shape():
    layers = find_layers(tiny.llama())
    config = Config(compression=4, block=1000)
    assert encoding(layers["model.layers.0.mlp.down_proj"], config).block == 72  # no longer than a row
