"""Removing blocks: what it finds by passing over blocks against models that really lack them."""

from __future__ import annotations

import copy

import architectures
import pytest
import tiny
import torch
from torch import Tensor

import hf_slim
from hf_slim.core.errors import PlanError, RecipeError
from hf_slim.core.forward import run_on
from hf_slim.core.select import find_stacks
from hf_slim.core.shapes import keep_blocks
from hf_slim.evaluation.agreement import agreement
from hf_slim.pruning import depth

IDS = tiny.ids(6, 12)


def _logits(model) -> Tensor:
    with torch.no_grad():
        return run_on(model.eval(), IDS).logits


def _without(model, numbers: list[int], stack: int = 0):
    """A copy that really lacks blocks."""
    copied = copy.deepcopy(model)
    found = find_stacks(copied)[stack]
    keep_blocks(copied, found, [i for i in range(len(found.blocks)) if i not in numbers])
    return copied


def _naive(model, count: int) -> tuple[list[int], list[float]]:
    """Greedy removal by building every candidate and comparing whole models."""
    gone: list[int] = []
    losses: list[float] = []
    for _ in range(count):
        left = [i for i in range(len(find_stacks(model)[0].blocks)) if i not in gone]
        found = {i: agreement(_without(model, [*gone, i]), model, IDS).kl for i in left}
        gone.append(min(found, key=found.__getitem__))
        losses.append(found[gone[-1]])
    return gone, losses


def test_greedy_removal_is_that_of_a_naive_search() -> None:
    model = tiny.llama(layers=5)
    gone, losses = _naive(model, 3)
    report = hf_slim.compress(model, "prune.depth", data=IDS, blocks=3)
    assert report.metrics["removed"] == gone
    assert report.metrics["kl"] == pytest.approx(losses, rel=1e-4)
    assert model.config.num_hidden_layers == 2
    assert sum(row.bytes for row in report.layers) == 0


@pytest.mark.parametrize("name", architectures.KINDS)
def test_a_block_passed_over_is_a_block_removed(name: str) -> None:
    model = architectures.make(name)
    for number, stack in enumerate(find_stacks(model)):
        with torch.no_grad():
            passing = depth.Passing(model, stack.blocks, IDS)
            over = passing.without(frozenset(), 1)
            again = passing.whole(frozenset({1}))
        assert torch.equal(over, again)
        assert torch.allclose(over, _logits(_without(model, [1], number)).flatten(0, -2), atol=1e-5)
        assert not torch.allclose(over, passing.original, atol=1e-2)
        assert torch.equal(_logits(model).flatten(0, -2), passing.original)


def test_influence_finds_a_block_that_does_nothing_and_its_removal_changes_nothing() -> None:
    model = tiny.llama(layers=4)
    block = model.model.layers[2]
    with torch.no_grad():
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    before = _logits(model)
    report = hf_slim.compress(model, "prune.depth", data=IDS, blocks=1, criterion="influence")
    assert report.metrics["removed"] == [2]
    assert report.metrics["kl"] == pytest.approx([0.0], abs=1e-6)
    assert torch.allclose(_logits(model), before, atol=1e-5)


def test_influence_is_one_minus_the_cosine() -> None:
    x, y = torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 2.0], [6.0, 8.0]])
    assert depth.influence(x, y).tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


def test_kept_blocks_are_the_ones_named_and_the_cache_still_works() -> None:
    model = tiny.llama(layers=4)
    expected = _without(model, [1, 2])
    report = hf_slim.compress(model, "prune.depth", data=IDS, keep=(0, 3))
    assert sorted(report.metrics["removed"]) == [1, 2]
    assert torch.equal(_logits(model), _logits(expected))
    cached, plain = (model.generate(IDS[:1], max_new_tokens=4, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(cached, plain)


def test_the_plan_says_how_often_the_search_runs_the_model() -> None:
    model, runs = tiny.llama(layers=5), []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *args: runs.append(1))
    _, note = depth.notes({}, depth.Config(blocks=3), model)
    hf_slim.compress(model, "prune.depth", data=IDS, blocks=3)
    assert len(runs) / 5 == depth.passes(5, 3)
    assert f"runs the model {round(depth.passes(5, 3))} times on 8 windows" in note
    assert len(depth.notes({}, depth.Config(keep=(0,)), tiny.llama())) == 1


def test_share_is_rounded_and_at_least_one() -> None:
    for share, left in ((0.1, 3), (0.5, 2), (0.7, 1)):
        model = tiny.llama(layers=4)
        hf_slim.compress(model, "prune.depth", data=IDS, share=share, criterion="influence")
        assert len(model.model.layers) == left


def test_integer_codes_survive(tmp_path) -> None:
    model = tiny.llama(layers=3)
    hf_slim.compress(model, "quantize.rtn", bits=8)
    hf_slim.compress(model, "prune.depth", data=IDS, blocks=1)
    model.save_pretrained(tmp_path)
    assert torch.equal(_logits(type(model).from_pretrained(tmp_path)), _logits(model))


@pytest.mark.parametrize("criterion", ["kl", "influence"])
def test_the_block_with_the_shared_position_bias_stays(criterion: str) -> None:
    model = architectures.make("T5")
    report = hf_slim.compress(model, "prune.depth", data=IDS, stack="decoder.block", criterion=criterion)
    assert report.metrics["removed"] == [1]
    assert (len(model.decoder.block), len(model.encoder.block)) == (1, 2)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("Llama", {"blocks": 2}, "model.layers has 2 blocks: 2 cannot go, 1 can"),
        ("Llama", {"keep": (0, 1)}, "all 2 blocks of model.layers stay"),
        ("Llama", {"keep": (2,)}, "give some of 0 to 1"),
        ("Llama", {"stack": "model.layer"}, "did you mean 'model.layers'"),
        ("T5", {}, "name one in `stack`: encoder.block, decoder.block"),
        ("T5", {"stack": "decoder.block", "keep": (1,)}, "decoder.block"),
        ("T5", {"stack": "decoder.block", "blocks": 2}, "decoder.block has 2 blocks, and 0 holds what the others need"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_changed(name: str, options: dict, says: str) -> None:
    model = architectures.make(name)
    before = _logits(model)
    with pytest.raises(PlanError) as raised:
        hf_slim.compress(model, "prune.depth", data=IDS, **options)
    assert says in str(raised.value)
    assert torch.equal(_logits(model), before)


def test_two_ways_to_say_how_many_are_refused() -> None:
    with pytest.raises(RecipeError, match="one of blocks, share and keep"):
        hf_slim.compress(tiny.llama(), "prune.depth", data=IDS, blocks=1, share=0.5)


def test_the_forward_of_a_block_is_put_back() -> None:
    model = tiny.llama(layers=3)
    own = model.model.layers[0].forward
    model.model.layers[0].forward = own  # as accelerate's hooks do
    with torch.no_grad():
        depth.Passing(model, find_stacks(model)[0].blocks, IDS).without(frozenset(), 1)
    assert model.model.layers[0].forward is own
    assert "forward" not in vars(model.model.layers[1])
