"""Calibrated codebooks through whole models: better than k-means, zeros stay zero, every kind of layer."""

from __future__ import annotations

from pathlib import Path

import architectures
import pytest
import tiny
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from hf_slim import SlimConfig, compress
from hf_slim.core.errors import ModelError, PlanError, SlimError
from hf_slim.core.progress import Progress
from hf_slim.core.saliency import fisher
from hf_slim.core.select import find_layers
from hf_slim.core.swap import get_weight
from hf_slim.sharing import kmeans

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260K"
IDS = tiny.ids(6, 32, seed=1)
HELD_OUT = tiny.ids(4, 32, seed=2)
QUIET = Progress(show=False)


def output_error(model, original):
    with torch.no_grad():
        expected = original(input_ids=HELD_OUT).logits.double()
        return ((model(input_ids=HELD_OUT).logits - expected).square().sum() / expected.square().sum()).item()


def loss(model, window):
    logits = model(input_ids=window[None]).logits[0]
    return F.cross_entropy(logits[:-1].float(), window[1:])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fisher_is_the_mean_squared_gradient(name):
    model, again = tiny.CAUSAL[name](), tiny.CAUSAL[name]()
    table = next(layer.name for layer in find_layers(model).values() if layer.kind == "embedding")
    inner = next(layer.name for layer in find_layers(model).values() if layer.kind == "linear")
    model.get_parameter(f"{table}.weight").requires_grad_(False)
    found = fisher(model, [table, inner], IDS[:3], QUIET)
    for layer in (table, inner):
        parameter = again.get_parameter(f"{layer}.weight")
        total = sum(torch.autograd.grad(loss(again, window), parameter)[0].square() for window in IDS[:3])
        turned = get_weight(again.get_submodule(layer)).shape != parameter.shape
        torch.testing.assert_close(found[layer], (total.T if turned else total) / 3)
    asking = {n for n, p in model.named_parameters() if p.requires_grad}
    assert asking == {n for n, _ in model.named_parameters()} - {f"{table}.weight"}
    assert all(p.grad is None for p in model.parameters())


def test_fisher_of_a_pruned_layer_lies_on_its_survivors():
    model, dense = tiny.llama(), tiny.llama()
    compress(model, "prune.magnitude", sparsity=0.5)
    name = "model.layers.0.mlp.up_proj"
    W = get_weight(model.get_submodule(name))
    found = fisher(model, [name], IDS[:2], QUIET)[name]
    for layer in find_layers(model).values():
        if layer.survivors is not None:
            dense.get_parameter(f"{layer.name}.weight").data.copy_(get_weight(model.get_submodule(layer.name)))
    parameter = dense.get_parameter(f"{name}.weight")
    total = sum(torch.autograd.grad(loss(dense, window), parameter)[0].square() for window in IDS[:2])
    torch.testing.assert_close(found, (total / 2) * (W != 0))


def test_fisher_sees_experts_and_needs_a_causal_model():
    with pytest.raises(ModelError, match="causal language model"):
        fisher(tiny.bert(), ["bert.encoder.layer.0.output.dense"], IDS[:1], QUIET)
    model = architectures.make("Mixtral")
    report = compress(model, "share.kmeans", data=IDS, bits=3, importance="fisher")
    assert any("experts" in row.name for row in report.layers)


def test_fisher_weighs_the_errors_that_are_left():
    model, plain, dense = tiny.llama(), tiny.llama(), tiny.llama()
    importance = fisher(dense, ["model.layers.0.mlp.up_proj"], IDS, QUIET)["model.layers.0.mlp.up_proj"]
    compress(model, "share.kmeans", data=IDS, bits=2, importance="fisher", embeddings={"bits": 6})
    compress(plain, "share.kmeans", bits=2)
    W, *found = (get_weight(m.get_submodule("model.layers.0.mlp.up_proj")) for m in (dense, model, plain))
    weighted, unweighted = ((importance * (W - Q) ** 2).sum() for Q in found)
    assert weighted < 0.9 * unweighted


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_calibrated_codebooks_are_closer_than_plain_ones(name):
    errors = []
    for method, options in (
        ("share.kmeans", {"scope": "row"}),
        ("share.kmeans", {"scope": "row", "feedback": True}),
        ("share.lnq", {"scope": "row"}),
    ):
        model = tiny.CAUSAL[name]()
        compress(model, method, data=IDS, bits=3, **options)
        errors.append(output_error(model, tiny.CAUSAL[name]()))
    assert max(errors[1:]) < 0.95 * errors[0], errors


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("share.kmeans", {"feedback": True, "importance": "fisher", "scales": "row", "scope": "tensor"}),
        ("share.lnq", {"rounds": 1, "cycles": 1, "guided": 2, "scope": 4, "centroids": "int8", "outliers": 0.02}),
        ("share.lnq", {"rounds": 0, "true_sequential": True, "embeddings": {"bits": 5}}),
    ],
)
def test_pruned_weights_stay_zero(method, options):
    model = tiny.llama()
    pruned = compress(model, "prune.magnitude", sparsity=0.5)
    zeros = {row.name: get_weight(model.get_submodule(row.name)) == 0 for row in pruned.layers}
    compress(model, method, data=IDS, bits=3, **options)
    for layer, zero in zeros.items():
        W = get_weight(model.get_submodule(layer))
        assert (W[zero] == 0).all()
        assert W[~zero].count_nonzero() > 0.5 * (~zero).sum()


def test_outliers_are_kept_as_they_are():
    model, dense = tiny.llama(), tiny.llama()
    compress(model, "share.lnq", data=IDS, bits=2, outliers=0.05, rounds=1, cycles=1)
    for name in ("q_proj", "o_proj"):
        W, Q = (get_weight(m.get_submodule(f"model.layers.0.self_attn.{name}")) for m in (dense, model))
        apart = kmeans.heaviest(W, int(0.05 * W.numel()))
        torch.testing.assert_close(Q[apart], W[apart].half().float())
        assert (W.half() != Q).float().mean() > 0.9


def test_rows_of_little_calibration_are_clustered_plainly():
    model = architectures.make("Mixtral")
    report = compress(model, "share.lnq", data=tiny.ids(1, 8), bits=3, rounds=0)
    assert report.metrics["clustered_plainly"] > 0
    assert any("tokens were routed" in note for note in report.notes)


def test_what_cannot_be_done_is_said_before_anything_changes():
    for method, options in (("share.kmeans", {"feedback": True}), ("share.lnq", {}), ("share.vq", {})):
        with pytest.raises(SlimError, match="calibration"):
            compress(tiny.llama(), method, **options)
    with pytest.raises(PlanError, match="calibration"):
        SlimConfig("share.kmeans", importance="fisher")
    model = tiny.llama()
    compress(model, "prune.magnitude", sparsity=0.5)
    with pytest.raises(PlanError, match=r"share\.vq gives runs of 2 weights one index"):
        compress(model, "share.vq", data=IDS, dim=2, bits=4)
    assert sum(layer.survivors is not None for layer in find_layers(model).values()) == 14


def test_trained_weights_in_less_room_than_gptq():
    if not STORIES.exists():
        pytest.skip(f"no trained model at {STORIES}")
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    start = torch.ones(24, 1, dtype=torch.long)
    told = made.generate(start, attention_mask=start, do_sample=True, max_new_tokens=63, min_new_tokens=63)
    lost, bits = {}, {}
    for method, options in (
        ("quantize.gptq", {"bits": 2, "group_size": 64}),
        ("share.lnq", {"bits": 2, "scope": 8, "scales": "row", "rounds": 1}),
    ):
        model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
        report = compress(model, method, data=told[:16], **options)
        bits[method] = sum(row.bytes for row in report.layers)
        with torch.no_grad():
            p, q = (F.log_softmax(m(told[16:]).logits, -1) for m in (made, model))
        lost[method] = (p.exp() * (p - q)).sum(-1).mean().item()
    assert bits["share.lnq"] < 1.05 * bits["quantize.gptq"], bits
    assert lost["share.lnq"] < 0.8 * lost["quantize.gptq"], lost
