from __future__ import annotations

import copy

import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import hf_slim
from hf_slim.core.context import Context
from hf_slim.core.errors import PlanError, RecipeError, SlimError
from hf_slim.core.model import ModelSource
from hf_slim.core.select import find_layers, find_stacks
from hf_slim.core.size import stored_bytes
from hf_slim.core.ties import find_ties
from hf_slim.core.training import Windows
from hf_slim.plan import make_plan
from hf_slim.recipe import Recipe
from hf_slim.sharing import tie

torch.set_num_threads(1)
IDS = tiny.ids(2, 12)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def made(**options):
    model = tiny.llama(layers=4)
    report = hf_slim.compress(model, "share.tie", data=IDS, **options)
    return model, report


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def weights(model, number):
    return [p for name, p in model.model.layers[number].named_parameters() if p.dim() == 2]


def same(model, a, b):
    return all(x.data_ptr() == y.data_ptr() for x, y in zip(weights(model, a), weights(model, b), strict=True))


def saved(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


@pytest.mark.parametrize(
    ("count", "groups", "expected"),
    [(4, 2, {0: [0, 1], 2: [2, 3]}), (5, 2, {0: [0, 1, 2], 3: [3, 4]}), (3, 1, {0: [0, 1, 2]})],
)
def test_neighbours_share(count, groups, expected):
    assert tie.neighbours(count, groups) == expected


def test_least_squares_is_where_the_gradient_vanishes():
    torch.manual_seed(0)
    weights = [torch.randn(3, 6, dtype=torch.float64) for _ in range(3)]
    inputs = [torch.randn(40, 6, dtype=torch.float64) * (i + 1) for i in range(3)]
    hessians = [x.T @ x for x in inputs]
    damping = tie.DAMPING * sum(float(H.diagonal().mean()) for H in hessians) / 3
    W = tie.least_squares(weights, hessians).requires_grad_()
    pairs = list(zip(weights, inputs, strict=True))
    loss = sum(((W - V) @ x.T).square().sum() + damping * (W - V).square().sum() for V, x in pairs)
    assert torch.autograd.grad(loss, W)[0].abs().max() < 1e-9 * loss.item()
    mean = sum(((torch.stack(weights).mean(0) - V) @ x.T).square().sum() for V, x in pairs)
    assert sum(((W - V) @ x.T).square().sum() for V, x in pairs) < 0.9 * mean


def test_without_data_least_squares_is_the_mean():
    weights = [torch.tensor([[1.0, 5.0]]), torch.tensor([[3.0, 1.0]])]
    H = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert torch.allclose(tie.least_squares(weights, [H, 0 * H]).float()[:, 1], torch.tensor([3.0]))
    assert torch.allclose(tie.least_squares(weights, [0 * H, 0 * H]).float(), torch.tensor([[2.0, 3.0]]))


def test_saved_once_and_loaded_tied(tmp_path):
    model, report = made(groups=2)
    assert report.metrics["groups"] == [[0, 1], [2, 3]]
    assert same(model, 0, 1)
    assert same(model, 2, 3)
    assert not same(model, 1, 2)
    dense, layer = stored_bytes(tiny.llama(layers=4)), sum(p.nbytes for p in weights(model, 0))
    assert stored_bytes(model) == dense - 2 * layer
    loaded = saved(model, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < stored_bytes(model) + 8192
    assert find_ties(loaded) == find_ties(model)
    assert same(loaded, 0, 1)
    assert same(loaded, 2, 3)
    assert torch.equal(logits(loaded), logits(model))
    assert len(list(loaded.parameters())) == len(list(model.parameters()))


def test_the_inner_model_loads_and_saves_tied(tmp_path):
    model, _ = made(groups=2)
    model.save_pretrained(tmp_path / "whole")
    inner = type(model.model).from_pretrained(tmp_path / "whole")
    assert len(find_ties(inner)) == 2 * len(PROJECTIONS)
    again = saved(inner, tmp_path / "inner")
    with torch.no_grad():
        assert torch.equal(again(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    assert len(find_ties(again)) == 2 * len(PROJECTIONS)


def test_what_the_plan_predicts_is_what_is_stored(tmp_path):
    folder = tiny.save(tiny.llama(layers=4), tmp_path / "dense")
    recipe = Recipe.model_validate(
        {"model": folder, "stages": [{"share.tie": {"groups": 2}}, {"quantize.rtn": {"bits": 4}}]}
    )
    plan = make_plan(recipe)
    model, _ = made(groups=2)
    hf_slim.compress(model, "quantize.rtn", bits=4)
    assert plan.bytes_after == stored_bytes(model)
    tied = saved(model, tmp_path / "tied")
    skeleton = ModelSource(str(tmp_path / "tied")).skeleton()
    assert find_ties(skeleton) == find_ties(tied)
    assert stored_bytes(skeleton) == stored_bytes(model)
    assert any("train" in note for note in plan.notes)


def test_only_what_was_asked_for_is_shared():
    model, report = made(pairs={3: 1}, layers={"include": ["*.mlp.*"], "exclude": ["down_proj"]})
    shared = {
        f"model.layers.3.mlp.{name}.weight": f"model.layers.1.mlp.{name}.weight" for name in ("gate_proj", "up_proj")
    }
    assert find_ties(model) == shared
    assert {row.name for row in report.layers if row.bytes == 0} == {n.removesuffix(".weight") for n in shared}
    with_norms, _ = made(pairs={1: 0}, norms=True)
    assert with_norms.model.layers[1].input_layernorm.weight is with_norms.model.layers[0].input_layernorm.weight


def test_the_first_block_owns_what_a_later_one_gave():
    before = tiny.llama(layers=4).model.layers[2].mlp.up_proj.weight
    model, report = made(pairs={0: 2, 3: 2})
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    assert find_ties(model)["model.layers.3.mlp.up_proj.weight"] == "model.layers.0.mlp.up_proj.weight"
    errors = {row.name: row.error for row in report.layers}
    assert errors["model.layers.2.mlp.up_proj"] == 0 < errors["model.layers.3.mlp.up_proj"]


def test_the_mean_is_shared():
    before = [layer.mlp.up_proj.weight.detach().clone() for layer in tiny.llama(layers=4).model.layers]
    model, _ = made(groups=1, initial="mean")
    assert torch.allclose(model.model.layers[3].mlp.up_proj.weight, sum(before) / 4, atol=1e-6)


def test_least_squares_comes_closer_to_what_blocks_put_out():
    dense = tiny.llama(layers=2)
    found = {}
    for initial in ("mean", "least_squares"):
        model = tiny.llama(layers=2)
        hf_slim.compress(
            model, "share.tie", data=tiny.ids(16, 32), groups=1, initial=initial, layers={"include": ["up_proj"]}
        )
        inputs = torch.cat([_inputs(dense, i, tiny.ids(16, 32)) for i in range(2)])
        parts = inputs.split(len(inputs) // 2)
        W = model.model.layers[0].mlp.up_proj.weight
        own = [layer.mlp.up_proj.weight for layer in dense.model.layers]
        found[initial] = sum(float(((W - V) @ x.T).square().sum()) for V, x in zip(own, parts, strict=True))
    assert found["least_squares"] < 0.95 * found["mean"]


def _inputs(model, number, ids):
    seen = []
    handle = model.model.layers[number].mlp.up_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return seen[0].flatten(0, -2)


@pytest.mark.parametrize("by", ["kl", "outputs"])
def test_planted_duplicates_are_found(by):
    model = tiny.llama(layers=4)
    model.model.layers[3].load_state_dict(model.model.layers[1].state_dict())
    before = logits(model)
    report = hf_slim.compress(model, "share.tie", data=IDS, blocks=1, by=by)
    assert report.metrics["groups"] == [[1, 3]]
    assert report.metrics["kl"] == pytest.approx([0], abs=1e-6)
    assert torch.equal(logits(model), before)


def test_every_tie_is_measured_with_those_before_it():
    model, report = made(share=0.5)
    assert sum(len(group) - 1 for group in report.metrics["groups"]) == 2
    p, q = logits(tiny.llama(layers=4)).log_softmax(-1).double(), logits(model).log_softmax(-1).double()
    assert report.metrics["kl"][-1] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_one_step_trains_both(tmp_path):
    model, _ = made(groups=2)
    before = weights(model, 0)[0].detach().clone()
    loaded = saved(model, tmp_path / "tied")
    how = {"save_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
    args = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, **how
    )
    trainer = Trainer(loaded, args, train_dataset=Windows(IDS, labels=True))
    trainer.train()
    assert same(loaded, 0, 1)
    assert not torch.equal(weights(loaded, 1)[0], before)
    again = saved(loaded, tmp_path / "trained")
    assert torch.equal(logits(again), logits(loaded))

    resumed = type(model).from_pretrained(tmp_path / "tied")
    second = Trainer(resumed, args, train_dataset=Windows(IDS, labels=True))
    second.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert same(resumed, 0, 1)
    assert torch.equal(logits(resumed), logits(loaded))


def test_distillation_keeps_the_tie_and_helps(tmp_path):
    model, _ = made(groups=2)
    report = hf_slim.compress(
        model, "distill.logits", data=IDS, original=tiny.llama(layers=4), steps=20, learning_rate=3e-3, batch_size=2
    )
    assert report.metrics["last_loss"] < 0.7 * report.metrics["first_loss"]
    assert same(model, 0, 1)
    assert torch.equal(logits(saved(model, tmp_path)), logits(model))


def test_copies_moves_and_dtypes_keep_the_tie():
    model, _ = made(groups=2)
    copied = copy.deepcopy(model)
    assert same(copied, 0, 1)
    assert weights(copied, 0)[0].data_ptr() != weights(model, 0)[0].data_ptr()
    assert same(copied.to(torch.bfloat16), 0, 1)
    model.tie_weights()
    assert same(model, 0, 1)
    model.resize_token_embeddings(tiny.VOCABULARY + 8)
    assert same(model, 0, 1)


AFTER = {
    "quantize.rtn": {"bits": 4, "group_size": 16},
    "quantize.hqq": {"bits": 4, "group_size": 16, "iterations": 2},
    "quantize.gptq": {"bits": 4, "group_size": 16},
    "quantize.autoround": {"bits": 4, "group_size": 16, "iterations": 2},
    "quantize.blockwise": {"bits": 4, "group_size": 16, "iterations": 2},
    "quantize.qat": {"bits": 4, "group_size": 16, "training": {"steps": 2, "batch_size": 2}},
    "share.kmeans": {"bits": 3, "scope": "tensor"},
    "share.hashed": {"compression": 4, "block": 8},
    "prune.magnitude": {"sparsity": 0.5},
    "prune.wanda": {"sparsity": 0.5},
    "prune.sparsegpt": {"sparsity": 0.5, "tokens_per_column": 0, "iterations": 2},
    "prune.gradual": {"sparsity": 0.5, "training": {"steps": 2, "batch_size": 2}},
    "prune.vocabulary": {},
}


@pytest.mark.parametrize("method", AFTER)
def test_what_comes_after_works_once_on_each_weight(method, tmp_path):
    model, _ = made(groups=2)
    ties, before = find_ties(model), stored_bytes(model)
    report = hf_slim.compress(model, method, data=IDS, tokenizer=tiny.tokenizer(), **AFTER[method])
    assert find_ties(model) == ties
    assert stored_bytes(model) < before
    assert not {row.name for row in report.layers} & {target.removesuffix(".weight") for target in ties}
    loaded = saved(model, tmp_path)
    assert find_ties(loaded) == ties
    assert stored_bytes(loaded) == stored_bytes(model)
    ids = IDS % model.config.vocab_size
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_encoded_layers_pass_on_their_weight_and_become_dense_tied():
    model, _ = made(groups=2)
    hf_slim.compress(model, "quantize.rtn", bits=8, group_size=None)
    names = find_layers(model)
    assert names["model.layers.1.mlp.up_proj"].tied_to == "model.layers.0.mlp.up_proj"
    before = logits(model)
    copied = copy.deepcopy(model)
    assert copied.model.layers[1].mlp.up_proj._source[0] is copied.model.layers[0].mlp.up_proj
    model.dequantize()
    assert same(model, 0, 1)
    assert torch.allclose(logits(model), before, atol=1e-5)


def test_taking_out_the_owner_leaves_the_weight_to_the_next(tmp_path):
    model, _ = made(groups=2)
    hf_slim.compress(model, "prune.depth", data=IDS, keep=(1, 2, 3))
    assert same(model, 1, 2)
    assert not same(model, 0, 1)
    assert torch.equal(logits(saved(model, tmp_path)), logits(model))


def test_lora_trains_beside_tied_weights():
    peft = pytest.importorskip("peft")
    model, _ = made(groups=2)
    before = weights(model, 1)[0].detach().clone()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    adapted(IDS, labels=IDS).loss.backward()
    grads = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
    assert len(grads) == 4
    assert all(g is not None and g.abs().sum() > 0 for g in grads)
    assert torch.equal(model.model.layers[1].self_attn.q_proj.base_layer.weight, before)


def uneven():
    """Blocks 0 and 2 of another width than 1 and 3."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=96, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    )
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(16, 32, bias=False)
    return model


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pairs": {7: 0}}, "no block 7; give numbers from 0 to 3"),
        ({"pairs": {1: 1}}, "cannot be tied to itself"),
        ({"pairs": {2: 1, 1: 0}}, "gives up its own weights"),
        ({"groups": 4}, "4 groups of 4 blocks share nothing; give 1 to 3"),
        ({"groups": 9}, "9 groups of 4 blocks"),
        ({"blocks": 4}, "4 cannot give up their weights, 3 can"),
        ({"groups": 2, "stack": "model.layer"}, "did you mean 'model.layers'?"),
        ({"groups": 2, "layers": {"include": ["q_pro"]}}, "did you mean 'q_proj'?"),
        ({"groups": 2, "layers": {"include": ["lm_head"]}}, "none of them lies in a block"),
    ],
)
def test_bad_options_are_refused_before_anything_changes(options, says):
    model = tiny.llama(layers=4, tied=False)
    with pytest.raises(PlanError) as raised:
        hf_slim.compress(model, "share.tie", data=IDS, **options)
    assert says in str(raised.value)
    assert find_ties(model) == {}


def test_one_way_of_saying_which():
    with pytest.raises(RecipeError, match="give one of groups, pairs, blocks and share, not groups and share"):
        hf_slim.compress(tiny.llama(), "share.tie", data=IDS, groups=1, share=0.5)


def test_all_problems_with_pairs_are_said_at_once():
    with pytest.raises(PlanError) as raised:
        made(pairs={7: 0, 1: 1})
    assert len(raised.value.problems) == 2


def test_blocks_of_other_shapes_are_named():
    with pytest.raises(
        PlanError, match=r"layers\.1\.mlp\.up_proj has shape 32 x 16, model\.layers\.0\.mlp\.up_proj 24 x 16"
    ):
        hf_slim.compress(uneven(), "share.tie", data=IDS, groups=1)


def test_encoded_blocks_are_refused():
    model = tiny.llama()
    hf_slim.compress(model, "quantize.rtn", bits=8)
    with pytest.raises(PlanError, match="tie the dense model's blocks"):
        hf_slim.compress(model, "share.tie", data=IDS, groups=1)


@pytest.mark.parametrize("method", ["quantize.awq", "prune.heads"])
def test_what_would_untie_is_refused(method, tmp_path):
    model, _ = made(groups=2)
    with pytest.raises(SlimError, match="its blocks share weights, and each would need its own"):
        hf_slim.compress(model, method, data=IDS)
    folder = tiny.save(tiny.llama(), tmp_path)
    recipe = Recipe.model_validate({"model": folder, "stages": [{"share.tie": {"groups": 1}}, method]})
    with pytest.raises(PlanError, match=f"put {method} before share.tie"):
        make_plan(recipe)


def test_exports_of_tied_blocks_are_refused(tmp_path):
    model, _ = made(groups=2)
    with pytest.raises(SlimError, match="share weights"):
        hf_slim.compress(model, "export.compressed_tensors", to=str(tmp_path / "out"))


def test_apply_wants_calibration_only_where_it_measures():
    assert tie.needs(tie.Config(groups=2)) == ()
    assert tie.needs(tie.Config(groups=2, initial="least_squares")) == tie.needs(tie.Config()) == ("calibration",)
    model = tiny.llama()
    tie.apply(model, tie.Config(groups=1), Context())
    assert len(find_ties(model)) == len(PROJECTIONS) == len(find_stacks(model)[0].blocks) * 7 // 2
