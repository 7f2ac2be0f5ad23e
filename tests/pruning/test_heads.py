"""Removing attention heads: equal to setting them to zero, in the order that brute force finds."""

from __future__ import annotations

import copy
from itertools import combinations

import architectures
import pytest
import tiny
import torch
from torch import Tensor

import hf_slim
from hf_slim.core.errors import PlanError, RecipeError
from hf_slim.core.forward import run_on
from hf_slim.core.reshape import zero_units
from hf_slim.core.select import find_layers
from hf_slim.core.units import find_units
from hf_slim.pruning import heads

IDS = tiny.ids(4, 12)
COLUMNS = torch.arange(12).view(4, 3)


def _logits(model) -> Tensor:
    with torch.no_grad():
        return run_on(model.eval(), IDS).logits


def _projection(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [200, 12] that are correlated across heads, a weight [5, 12], and the second moment."""
    torch.manual_seed(seed)
    x = torch.randn(200, 12) @ torch.randn(12, 12)
    return x, torch.randn(5, 12), x.T @ x


def _error(x: Tensor, W: Tensor, gone: list[int], refit: bool) -> float:
    """Squared error of the output without some heads, from the samples, relative to the output."""
    stays = [c for u in range(4) if u not in gone for c in COLUMNS[u].tolist()]
    x, y = x.double(), x.double() @ W.double().T
    left = torch.linalg.lstsq(x[:, stays], y).solution if refit else W.double()[:, stays].T
    return float((y - x[:, stays] @ left).square().sum() / y.square().sum())


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_the_order_is_that_of_a_greedy_search_on_the_samples(seed: int, refit: bool) -> None:
    x, W, C = _projection(seed)
    order = heads.order_by_output(W, C, COLUMNS, refit)
    gone: list[int] = []
    for unit, loss in zip(order.units.tolist()[:3], order.losses.tolist()[:3], strict=True):
        errors = {u: _error(x, W, [*gone, u], refit) for u in range(4) if u not in gone}
        assert unit == min(errors, key=errors.__getitem__)
        assert loss == pytest.approx(errors[unit], rel=1e-3)
        gone.append(unit)
    assert float(order.losses[-1]) == pytest.approx(1.0, rel=1e-3)


def test_activation_is_the_papers() -> None:
    h = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(0))
    expected = [
        sum((sum(float(h[w, t, J].norm()) for t in range(5)) / 5) ** 2 for w in range(3)) for J in COLUMNS.tolist()
    ]
    assert heads.activation(h, COLUMNS).tolist() == pytest.approx(expected, rel=1e-5)
    assert heads.order_by_importance(heads.activation(h, COLUMNS)).losses[-1] == pytest.approx(1.0)


def test_global_counts_take_the_cheapest_and_leave_one_a_layer() -> None:
    costs = {"a": [0.01, 0.02, 0.9], "b": [0.1, 0.2, 0.3], "c": [0.0, 0.0, 0.0]}
    orders = {k: heads.Order(torch.arange(3), torch.tensor(v, dtype=torch.float64)) for k, v in costs.items()}
    for remove in range(7):
        counts = heads.global_counts(orders, remove)
        options = [(a, b, c) for a, b, c in combinations([*range(3)] * 3, 3) if a + b + c == remove]
        least = min(sum(([0.0, *costs[k]])[n] for k, n in zip("abc", o, strict=True)) for o in options)
        assert sum(([0.0, *costs[k]])[n] for k, n in counts.items()) == pytest.approx(least)
        assert sum(counts.values()) == remove
    with pytest.raises(PlanError, match="7 heads cannot go, 6 can"):
        heads.global_counts(orders, 7)


@pytest.mark.parametrize(
    ("name", "score"),
    [("Llama", "activation"), *((n, "output") for n in ("Llama", "GPT-2", "Falcon", "Phi-3", "Gemma 3", "BERT"))],
)
def test_without_refit_removal_is_setting_to_zero(name: str, score: str) -> None:
    model = architectures.make(name)
    zeroed, units = copy.deepcopy(model), find_units(model, ("head",))
    report = hf_slim.compress(model, "prune.heads", data=IDS, share=0.5, refit=False, score=score)
    assert report.metrics["heads"] == report.metrics["heads_before"] // 2
    errors = []
    for found in units:
        layer = next(row for row in report.layers if row.name == found.reader)
        masks = [torch.tensor([i in kept for i in range(len(found))]) for kept in _halves(len(found))]
        assert layer.metrics["heads"] == len(found) // 2
        errors.append((found, masks))
    assert _some_choice_agrees(zeroed, model, errors)


def _halves(count: int) -> list[tuple[int, ...]]:
    return list(combinations(range(count), count // 2))


def _some_choice_agrees(zeroed, pruned, choices) -> bool:
    """Whether the pruned model puts out what the other does with one choice of heads set to zero in each block."""
    wanted = _logits(pruned)
    if not choices:
        return torch.allclose(_logits(zeroed), wanted, atol=1e-4 * float(wanted.abs().max()))
    (units, masks), rest = choices[0], choices[1:]
    for mask in masks:
        tried = copy.deepcopy(zeroed)
        zero_units(tried, units, mask)
        if _some_choice_agrees(tried, pruned, rest):
            return True
    return False


def test_heads_that_do_nothing_go_first_and_change_nothing() -> None:
    model = architectures.make("GPT-2")
    for units in find_units(model, ("head",)):
        zero_units(model, units, torch.tensor([True, False, True, False]))
    before = _logits(model)
    for score in ("output", "activation"):
        pruned = copy.deepcopy(model)
        report = hf_slim.compress(pruned, "prune.heads", data=IDS, share=0.5, score=score)
        assert torch.allclose(_logits(pruned), before, atol=1e-4)
        assert all(row.metrics["output_error"] < 1e-6 for row in report.layers if row.metrics)


def test_refit_beats_no_refit() -> None:
    errors = {}
    for refit in (True, False):
        model = tiny.gpt2()
        report = hf_slim.compress(model, "prune.heads", data=tiny.ids(16, 16), share=0.5, refit=refit)
        errors[refit] = sum(row.metrics["output_error"] for row in report.layers if row.metrics)
    assert errors[True] < 0.9 * errors[False]


def test_refit_to_few_tokens_does_no_harm_on_others(monkeypatch) -> None:
    """24 tokens for 48 columns: a refit at a small ridge fits them exactly, and is worse than none for all others."""
    model, others, errors = tiny.gpt2(), tiny.ids(8, 12, seed=77), {}
    for how in ("chosen", "none", "small"):
        if how == "small":
            monkeypatch.setattr(heads, "choose_ridge", lambda *_: 1e-6)
        pruned = copy.deepcopy(model)
        hf_slim.compress(pruned, "prune.heads", data=tiny.ids(2, 12, seed=5), share=0.5, refit=how != "none")
        with torch.no_grad():
            wanted = run_on(model, others).logits
            errors[how] = float((run_on(pruned.eval(), others).logits - wanted).norm() / wanted.norm())
    assert errors["small"] > 1.2 * errors["none"]
    assert errors["chosen"] < 1.05 * errors["none"]


def test_a_global_ranking_keeps_the_total_and_a_head_everywhere() -> None:
    model = tiny.gpt2()
    with torch.no_grad():
        model.transformer.h[0].attn.c_proj.weight[12:].zero_()  # of the first block, only head 0 does anything
    report = hf_slim.compress(model, "prune.heads", data=IDS, share=0.5, scope="global")
    kept = {row.name: row.metrics["heads"] for row in report.layers if row.metrics}
    assert kept["transformer.h.0.attn.c_proj"] == 1
    assert report.metrics == {"heads_before": 8, "heads": 4}


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Falcon"])
def test_the_plan_foresees_every_shape(name: str) -> None:
    model = architectures.make(name)
    layers = find_layers(model)
    planned = layers | heads.plan(layers, heads.Config(share=0.5), model)
    hf_slim.compress(model, "prune.heads", data=IDS, share=0.5)
    assert {n: (x.rows, x.cols) for n, x in find_layers(model).items()} == {
        n: (x.rows, x.cols) for n, x in planned.items()
    }


def test_a_killed_run_goes_on_with_the_very_same_numbers(tmp_path) -> None:
    from hf_slim.core.context import Context

    results = []
    for _ in range(2):
        model = tiny.llama()
        heads.apply(model, heads.Config(share=0.5), Context(windows=lambda role: IDS, blocks=tmp_path))
        results.append(_logits(model))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("Llama", {"share": 0.8}, "share 0.8 of 2 heads (or groups) leaves none; at least one stays"),
        ("Llama", {"share": 0.1}, "removes none; ask for 0.5 or more"),
        ("Llama", {"layers": {"include": ["down_proj"]}}, "matches no layer"),
        ("Llama", {"layers": {"exclude": ["o_proj"]}}, "layers.exclude leaves none"),
        ("T5", {}, "a position bias that all blocks share"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_changed(name: str, options: dict, says: str) -> None:
    model = architectures.make(name)
    before = _logits(model)
    with pytest.raises(PlanError) as raised:
        hf_slim.compress(model, "prune.heads", data=IDS, **options)
    assert says in str(raised.value)
    assert torch.equal(_logits(model), before)


def test_layers_stored_as_codes_are_named_all_at_once() -> None:
    model = tiny.llama()
    hf_slim.compress(model, "quantize.rtn", bits=8)
    with pytest.raises(PlanError) as raised:
        hf_slim.compress(model, "prune.heads", data=IDS, share=0.5)
    assert len(raised.value.problems) == 8
    assert "no heads can be cut out; prune the dense model" in str(raised.value)


def test_a_global_ranking_takes_no_share_of_a_layer() -> None:
    with pytest.raises(RecipeError, match="ranks all layers together"):
        hf_slim.compress(tiny.llama(), "prune.heads", data=IDS, scope="global", layers={"first": {"share": 0.5}})
