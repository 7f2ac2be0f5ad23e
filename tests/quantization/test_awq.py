"""AWQ against its search written out, against rounding where columns have outliers, and through whole models."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import tiny
import torch
from reference import awq as slow

from hf_slim import compress
from hf_slim.core.context import Context
from hf_slim.core.layers import plan_targets
from hf_slim.core.swap import get_weight
from hf_slim.quantization import awq, rtn, scaling
from hf_slim.quantization.grid import from_grid

IDS = tiny.ids(12, 32, seed=1)
HELD_OUT = tiny.ids(4, 32, seed=2)
output_error = partial(tiny.output_error, tokens=HELD_OUT)
OPTIONS = {"bits": 4, "group_size": 16}


def with_outliers(name, dtype=torch.float32):
    """A few channels of every norm are 20 times larger, as in real models."""
    model = tiny.ALL[name](dtype)
    generator = torch.Generator().manual_seed(5)
    for key, parameter in model.named_parameters():
        if parameter.dim() == 1 and key.endswith("weight"):
            parameter.data[torch.randperm(len(parameter), generator=generator)[:3]] *= 20
    return model


def problem(seed=0, tokens=512, cols=32):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(torch.randn(cols, generator=generator))
    X = torch.randn(tokens, cols, generator=generator) * sizes
    return [torch.randn(rows, cols, generator=generator) for rows in (12, 6)], X, 2 / tokens * X.T @ X


def rounder(bits=3, clip="minmax"):
    def round_weight(W, importance):
        return from_grid(*rtn.quantize(W, bits, 16, False, clip, None, importance), 16)

    return round_weight


@pytest.mark.parametrize("duo", [False, True])
def test_search_is_that_of_the_slow_reference(duo):
    weights, X, H = problem()

    def rounded(W):
        return rounder()(torch.from_numpy(W).float(), None).double().numpy()

    arrays = [W.double().numpy() for W in weights]
    expected, losses = slow.search(arrays, X.double().numpy(), 16, 10, duo, rounded)
    consumers = [awq.Consumer(W, 16, rounder()) for W in weights]
    found = awq.search(consumers, H, points=10, duo=duo)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)
    loss = sum(float(awq.output_loss(c, H, found)) for c in consumers)
    assert loss == pytest.approx(min(losses), rel=1e-3)
    assert loss < 0.8 * losses[0]  # s = 1


def test_a_column_without_input_keeps_its_scale():
    weights, _, H = problem(seed=1)
    H[4], H[:, 4] = 0, 0
    s = awq.search([awq.Consumer(W, 16, rounder()) for W in weights], H)
    assert s[4] == 1
    assert torch.isfinite(s).all()
    assert (s > 0).all()
    assert s.max() > s.min()


@pytest.mark.parametrize(("name", "most"), [("llama", 0.4), ("gpt2", 0.85), ("opt", 0.6)])
def test_outliers_are_kept_better_than_by_rounding(name, most):
    errors = {}
    for method in ("rtn", "awq"):
        model = with_outliers(name)
        compress(model, f"quantize.{method}", data=IDS, **OPTIONS)
        errors[method] = output_error(model, with_outliers(name))
    assert errors["awq"] < most * errors["rtn"]


def test_error_feedback_on_scaled_weights_is_better_still():
    errors = {}
    for solver in ("rtn", "gptq"):
        model = with_outliers("opt")
        compress(model, "quantize.awq", data=IDS, solver=solver, **OPTIONS)
        errors[solver] = output_error(model, with_outliers("opt"))
    assert errors["gptq"] < 0.8 * errors["rtn"]


def test_a_block_that_got_worse_is_reverted(monkeypatch):
    """Scales that ruin a block's output are not used, its norms stay, and the report says so."""
    wild = torch.exp(6 * torch.rand(72, generator=torch.Generator().manual_seed(0)))
    monkeypatch.setattr(awq, "search", lambda consumers, H, *rest: wild[: len(H)].clone())
    model = tiny.llama()
    report = compress(model, "quantize.awq", data=IDS, **OPTIONS)
    assert [note.split(":")[0] for note in report.notes] == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert all("scales of this block left out" in note for note in report.notes)
    monkeypatch.setattr(scaling, "judge", lambda block, trials: [2.0, 1.0])
    ruined = tiny.llama()
    compress(ruined, "quantize.awq", data=IDS, **OPTIONS)
    assert output_error(model, tiny.llama()) < 0.5 * output_error(ruined, tiny.llama())
    for key, parameter in tiny.llama().named_parameters():
        if "norm" in key:
            assert torch.equal(model.get_parameter(key), parameter)
            assert torch.equal(ruined.get_parameter(key), parameter) == (key == "model.norm.weight")


def test_the_report_speaks_of_the_scaled_weight():
    """The error of a layer is that of its rounding, not of the scales it took up."""
    model = with_outliers("llama")
    report = compress(model, "quantize.awq", data=IDS, **OPTIONS)
    assert max(row.error for row in report.layers) < 0.05
    assert all(0 < row.metrics["output_error"] < 0.05 for row in report.layers)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_pruned_weights_stay_zero(name):
    model = with_outliers(name)
    pruned = compress(model, "prune.magnitude", sparsity=0.5)
    zeros = {row.name: get_weight(model.get_submodule(row.name)) == 0 for row in pruned.layers}
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    compress(model, "quantize.awq", data=IDS, **OPTIONS)
    assert any("norm" in k or "ln_" in k for k, t in model.state_dict().items() if not torch.equal(t, before.get(k, t)))
    for layer, zero in zeros.items():
        W = get_weight(model.get_submodule(layer))
        assert (W[zero] == 0).all()
        assert W[~zero].count_nonzero() > 0.5 * (~zero).sum()


def walked(model, folder):
    config = awq.Config(**OPTIONS)
    return awq.apply(model, config, Context(windows=lambda role: IDS, blocks=folder)).layers


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_kept_walk_is_restored_with_its_norms(tmp_path, monkeypatch, name):
    first, second = with_outliers(name, torch.bfloat16), with_outliers(name, torch.bfloat16)
    rows = walked(first, tmp_path)
    monkeypatch.setattr(awq, "encode", None)
    assert walked(second, tmp_path) == rows
    original = with_outliers(name, torch.bfloat16)
    changed = 0
    for key, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[key]), key
        changed += key in original.state_dict() and not torch.equal(tensor, original.state_dict()[key])
    assert changed >= 2


def test_half_precision_norms_are_judged_as_they_are_stored(tmp_path):
    """What was computed in float32 meanwhile is what the saved model computes."""
    model = with_outliers("llama", torch.bfloat16)
    report = compress(model, "quantize.awq", data=IDS, **OPTIONS)
    assert not report.notes
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    original = with_outliers("llama", torch.bfloat16).float()
    rounded = with_outliers("llama", torch.bfloat16)
    compress(rounded, "quantize.rtn", **OPTIONS)
    assert output_error(again, original) < 0.5 * output_error(rounded, original)


def test_layers_may_have_bits_of_their_own():
    model = with_outliers("llama")
    report = compress(model, "quantize.awq", data=IDS, layers={"*.down_proj": {"bits": 8}}, **OPTIONS)
    assert {row.encoding for row in report.layers if "down_proj" in row.name} == {"8-bit g16"}
    assert {row.encoding for row in report.layers if "down_proj" not in row.name} == {"4-bit g16"}


def test_without_folds_it_is_rounding_and_says_so():
    model = tiny.bert()
    config = awq.Config(**OPTIONS, layers={"include": ["intermediate.dense"]})
    assert len(plan_targets(model, "quantize.awq", config)) == 2
    report = awq.apply(model, config, Context(windows=lambda role: IDS))
    assert [note.split(": ")[1] for note in report.notes] == ["no scales"] * 2
