from __future__ import annotations

import copy

import pytest
import tiny
import torch

import hf_slim
from hf_slim.core.errors import PlanError, SlimError
from hf_slim.core.model import ModelSource
from hf_slim.core.select import find_layers
from hf_slim.core.size import stored_bytes
from hf_slim.core.ties import find_ties
from hf_slim.plan import make_plan
from hf_slim.recipe import Recipe
from hf_slim.sharing import basis

torch.set_num_threads(1)
IDS = tiny.ids(8, 24)


def made(depth=2, **options):
    model = tiny.llama(layers=depth)
    return model, hf_slim.compress(model, "share.basis", data=IDS, **options)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def saved(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def inputs(model, name):
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, -2)))
    logits(model)
    handle.remove()
    return seen[0].double()


def test_the_basis_is_the_best_for_both_blocks():
    dense = tiny.llama()
    model, _ = made(rank=12, layers={"include": ["up_proj"]}, damping=1e-9)
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    own = torch.cat([dense.get_submodule(name).weight.detach().double() for name in names])
    kept = torch.cat([model.get_submodule(name).weight.double() for name in names])
    X = torch.cat([inputs(dense, name) for name in names])
    loss = ((own - kept) @ X.T).square().sum()
    singular = torch.linalg.svdvals(own @ X.T)
    assert loss.item() == pytest.approx(singular[12:].square().sum().item(), rel=1e-4)


def test_one_basis_is_stored_and_loaded_tied(tmp_path):
    model, report = made(depth=4, ratio=0.6)
    first, second, third = (model.model.layers[i].self_attn.q_proj for i in range(3))
    assert first.right is second.right
    assert first.right is not third.right
    assert stored_bytes(model) < stored_bytes(tiny.llama(layers=4))
    assert sum(row.bytes for row in report.layers) == sum(x.nbytes for x in find_layers(model).values() if x.block)
    loaded = saved(model, tmp_path)
    assert loaded.model.layers[1].mlp.up_proj.right is loaded.model.layers[0].mlp.up_proj.right
    assert stored_bytes(loaded) == stored_bytes(model)
    assert (tmp_path / "model.safetensors").stat().st_size < stored_bytes(model) + 8192
    assert torch.equal(logits(loaded), logits(model))
    copied = copy.deepcopy(model).to(torch.bfloat16)
    assert copied.model.layers[1].self_attn.q_proj.right is copied.model.layers[0].self_attn.q_proj.right


def test_what_the_plan_predicts_is_what_is_stored(tmp_path):
    folder = tiny.save(tiny.llama(layers=3), tmp_path / "dense")
    plan = make_plan(Recipe.model_validate({"model": folder, "stages": [{"share.basis": {"ratio": 0.6}}]}))
    model, _ = made(depth=3, ratio=0.6)
    assert plan.bytes_after == stored_bytes(model)
    saved(model, tmp_path / "slim")
    skeleton = ModelSource(str(tmp_path / "slim")).skeleton()
    assert stored_bytes(skeleton) == stored_bytes(model)
    assert sum(x.nbytes for x in find_layers(skeleton).values()) == sum(x.nbytes for x in find_layers(model).values())


def test_training_keeps_one_basis_and_helps(tmp_path):
    model, _ = made(ratio=0.5)
    report = hf_slim.compress(
        model, "distill.logits", data=IDS, original=tiny.llama(), steps=8, learning_rate=5e-3, batch_size=4
    )
    assert report.metrics["last_loss"] < 0.8 * report.metrics["first_loss"]
    assert model.model.layers[1].mlp.up_proj.right is model.model.layers[0].mlp.up_proj.right
    assert torch.equal(logits(saved(model, tmp_path)), logits(model))


def test_dense_again_it_computes_the_same():
    model, _ = made(ratio=0.6)
    before = logits(model)
    model.dequantize()
    assert find_ties(model) == {}
    assert torch.allclose(logits(model), before, atol=1e-4)


@pytest.mark.parametrize(("rows", "rank"), [([8, 8], 3), ([8, 4, 4], 5)])
def test_room(rows, rank):
    dense, stored = sum(r * 6 for r in rows), sum(r * rank for r in rows) + rank * 6
    assert basis.room(sum(rows), 6, rank) == pytest.approx(stored / dense)


def test_layers_that_read_the_same_input_share_their_basis(tmp_path):
    dense = tiny.llama()
    model, report = made(across="inputs", rank=18, damping=1e-9)
    block = model.model.layers[0]
    assert block.self_attn.q_proj.right is block.self_attn.k_proj.right is block.self_attn.v_proj.right
    assert block.mlp.gate_proj.right is block.mlp.up_proj.right
    alone = [block.self_attn.q_proj, block.self_attn.o_proj, block.mlp.gate_proj, block.mlp.down_proj]
    assert len({id(module.right) for module in alone}) == 4
    assert sum(row.bytes for row in report.layers) == sum(x.nbytes for x in find_layers(model).values() if x.block)
    names = [f"model.layers.0.self_attn.{kind}_proj" for kind in "qkv"]
    own = torch.cat([dense.get_submodule(name).weight.detach().double() for name in names])
    kept = torch.cat([model.get_submodule(name).weight.double() for name in names])
    X = inputs(dense, names[0])
    best = torch.linalg.svdvals(own @ X.T)[18:].square().sum()
    assert ((own - kept) @ X.T).square().sum().item() == pytest.approx(best.item(), rel=1e-4)
    assert torch.equal(logits(saved(model, tmp_path)), logits(model))


def test_a_plan_across_inputs_holds(tmp_path):
    folder = tiny.save(tiny.llama(layers=3), tmp_path / "dense")
    plan = make_plan(Recipe.model_validate({"model": folder, "stages": [{"share.basis": {"across": "inputs"}}]}))
    model, _ = made(depth=3, across="inputs")
    assert plan.bytes_after == stored_bytes(model)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 30}, "the largest useful one has 26"),
        ({"across": "inputs", "blocks": 3}, "leave blocks out"),
        ({"across": "inputs", "rank": 40}, "the largest useful one has"),
        ({"ratio": 0.01}, "a basis of one vector takes more than ratio 0.01"),
        ({"layers": {"include": ["lm_head"]}}, "lies in no block"),
    ],
)
def test_bad_options_are_refused_before_anything_changes(options, says):
    model = tiny.llama(tied=False)
    with pytest.raises(SlimError) as raised:
        hf_slim.compress(model, "share.basis", data=IDS, **options)
    assert says in str(raised.value)
    assert all(layer.encoding is None for layer in find_layers(model).values())


def test_other_shapes_and_encoded_layers_are_named():
    model = tiny.llama()
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(40, 80, bias=False)
    with pytest.raises(PlanError, match=r"layers\.1\.mlp\.up_proj has shape 80 x 40"):
        hf_slim.compress(model, "share.basis", data=IDS)
    model = tiny.llama()
    hf_slim.compress(model, "quantize.rtn", bits=8)
    with pytest.raises(PlanError, match="start from the dense model"):
        hf_slim.compress(model, "share.basis", data=IDS)
