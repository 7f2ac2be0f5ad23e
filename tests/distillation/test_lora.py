"""Adapters beside stored weights: they alone learn, and what is saved computes what the trained model did."""

from __future__ import annotations

import architectures
import pytest
import runs
import tiny
import torch
import training
from transformers import AutoModelForCausalLM

import hf_slim
from hf_slim import DistillationConfig, DistillationTrainer
from hf_slim.core.errors import PlanError, RecipeError
from hf_slim.core.forward import logits_of
from hf_slim.core.select import Layer, find_layers
from hf_slim.core.size import stored_bytes
from hf_slim.core.stage import make_stage
from hf_slim.core.swap import get_weight
from hf_slim.distillation import adapters
from hf_slim.distillation.adapters import Lora, absorb, adapting
from hf_slim.encodings import Affine, LowRank
from hf_slim.evaluation.agreement import agreement
from hf_slim.integration.transformers import mark
from hf_slim.plan import make_plan, order_problems, plan_stage
from hf_slim.run import run_recipe

LORA = {"r": 4, "alpha": 8, "layers": {"*.down_proj": {"r": 3}, "exclude": ["k_proj"]}}
RTN = ("quantize.rtn", {"bits": 4, "group_size": 16})
KINDS = {
    "dense": [],
    "sparse": [("prune.magnitude", {"sparsity": 0.6})],
    "2:4": [("prune.magnitude", {"pattern": "2:4"})],
    "codes": [RTN],
    "codes of pruned weights": [("prune.magnitude", {"sparsity": 0.6}), RTN],
    "centroids": [("share.kmeans", {"bits": 3, "scope": "tensor", "embeddings": {"bits": 4}})],
    "hashed": [("share.hashed", {"compression": 4, "block": 8})],
    "factors": [("share.low_rank", {"rank": 5, "basis": "weight"})],
}
IDS = tiny.ids(4)
MERGED = ("dense", "sparse", "2:4")


def made(kind: str, dtype: torch.dtype = torch.float32, name: str = "llama"):
    model = tiny.CAUSAL[name](dtype)
    for method, options in KINDS[kind]:
        hf_slim.compress(model, method, **options)
    return model


def chosen(model, config: Lora) -> list[Layer]:
    layers = find_layers(model)
    return [layers[name] for name in adapters.plan(layers, config, model)]


@torch.no_grad()
def put_out(model):
    return logits_of(model.eval(), IDS)


def draw_up(trained) -> None:
    """Adapters as a training may leave them."""
    draw = torch.Generator().manual_seed(2)
    for adapter in trained.values():
        adapter.lora_B.data.normal_(0, 0.1, generator=draw)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_computes_what_was_trained_and_takes_what_was_planned(kind, tmp_path):
    model, config = made(kind), Lora(**LORA)
    before, zero = tiny.logits(model), {n: get_weight(model.get_submodule(n)) == 0 for n in find_layers(model)}
    stage = make_stage("distill.logits", {"lora": LORA})
    planned, bytes_before, layers = (
        plan_stage(find_layers(model), stage, model),
        stored_bytes(model),
        find_layers(model),
    )
    with adapting(model, chosen(model, config), config, seed=0) as trained:
        assert len(trained) == 12
        assert torch.equal(tiny.logits(model), before), "they begin at zero"
        draw_up(trained)
        found = tiny.logits(model)
    assert training.relative(found, before) > 0.1
    assert torch.equal(tiny.logits(model), before), "gone again"

    rows, counts = absorb(model, [layers[name] for name in trained], trained)
    mark(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (tiny.logits(loaded) - found).abs().max() < 1e-4
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    stored = find_layers(loaded)
    assert {name: stored[name].encoding for name in planned} == {n: layer.encoding for n, layer in planned.items()}
    assert all(stored[n].encoding == layers[n].encoding for n in layers if n not in planned)
    kept = 0 if kind in MERGED else 12
    assert counts == {"merged": 12 - kept, "kept": kept, "kept_bytes": stored_bytes(loaded) - bytes_before}
    ranks = {name: 3 if name.endswith("down_proj") else 4 for name in trained}
    numbers = sum(r * (layers[n].rows + layers[n].cols) for n, r in ranks.items())
    assert counts["kept_bytes"] == (0 if kind in MERGED else 4 * numbers)
    assert {row.name for row in rows} == (set() if kind == "dense" else set(trained))
    if kind in MERGED:
        for name, gone in zero.items():
            assert torch.equal(get_weight(loaded.get_submodule(name)) == 0, gone)


@pytest.mark.parametrize("kind", ["dense", "codes"])
def test_transposed_weights_and_other_dtypes(kind, tmp_path):
    model, config = made(kind, torch.bfloat16, "gpt2"), Lora(r=4, dropout=0.5)
    layers = chosen(model, config)
    with adapting(model, layers, config, seed=0) as trained:
        draw_up(trained)
        found = tiny.logits(model)  # in eval mode nothing is dropped
    absorb(model, layers, trained)
    mark(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    assert training.relative(tiny.logits(loaded).float(), found.float()) < 0.05


def test_it_trains_as_peft_does():
    peft = pytest.importorskip("peft", reason="needs the extra 'peft'")
    ours, config = tiny.llama(), Lora(r=4, alpha=12, layers={"include": ["q_proj", "up_proj"]})
    theirs = peft.get_peft_model(
        tiny.llama(), peft.LoraConfig(r=4, lora_alpha=12, lora_dropout=0.0, target_modules=["q_proj", "up_proj"])
    )
    layers = chosen(ours, config)
    with adapting(ours, layers, config, seed=0) as trained:
        for name, adapter in trained.items():
            A = theirs.get_submodule(f"base_model.model.{name}").lora_A["default"].weight
            assert A.abs().max() <= A.shape[1] ** -0.5 * 1.0001, "drawn within the same limits"
            assert 0.9 < adapter.lora_A.abs().max() * A.shape[1] ** 0.5 <= 1
            adapter.lora_A.data.copy_(A)
        assert [n for n, p in ours.named_parameters() if p.requires_grad] == [
            f"{layer.name}.lora.{factor}" for layer in layers for factor in ("lora_A", "lora_B")
        ]
        for model in (ours, theirs):
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
            for step in range(3):
                model(input_ids=tiny.ids(seed=step), labels=tiny.ids(seed=step)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    absorb(ours, layers, trained)
    merged = theirs.merge_and_unload()
    assert training.relative(tiny.logits(ours), tiny.logits(tiny.llama())) > 0.01
    assert training.relative(tiny.logits(ours), tiny.logits(merged)) < 1e-5


def test_a_stage_recovers_what_rounding_broke_and_moves_nothing_else():
    original, model = tiny.llama(layers=1), tiny.llama(layers=1)
    hf_slim.compress(model, "quantize.rtn", bits=2, group_size=20, embeddings={"bits": 8})
    held_out, before = tiny.ids(8, 32, seed=5), {n: t.clone() for n, t in model.state_dict().items()}
    rounded = agreement(model, original, held_out).kl
    options = {"steps": 20, "batch_size": 8, "learning_rate": 2e-2, "lora": {"r": 8}}
    report = hf_slim.compress(model, "distill.logits", data=tiny.ids(160, 32, seed=6), original=original, **options)
    assert agreement(model, original, held_out).kl < 0.9 * rounded
    assert report.metrics["adapters"] == {
        "merged": 0,
        "kept": 7,
        "kept_bytes": sum(r.bytes - r.bytes_before for r in report.layers),
    }
    after = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in before.items():
        inside = name.replace("_proj.", "_proj.base_")
        assert torch.equal(after[inside if inside in after else name], tensor)
    assert all(p.requires_grad for p in model.parameters())
    assert model.is_quantized
    # what was added learns on without adapters, and takes further ones
    more = {"steps": 1, "warmup": 0, "learning_rate": 1e-2}
    hf_slim.compress(model, "distill.logits", data=tiny.ids(), original=original, **more)
    name = "model.layers.0.mlp.up_proj"
    assert not torch.equal(model.get_submodule(name).left, after[f"{name}.left"])
    assert torch.equal(model.get_submodule(name).base_codes, after[f"{name}.base_codes"])
    hf_slim.compress(model, "distill.logits", data=tiny.ids(), original=original, **more, lora={"r": 2})
    assert model.get_submodule(name).encoding.rank == 10


def test_modules_may_train_in_full_beside_adapters():
    model, before = made("codes"), made("codes").state_dict()
    lora = {"r": 2, "modules_to_save": ["*layernorm"]}
    options = {"steps": 2, "batch_size": 2, "warmup": 0, "learning_rate": 1e-2, "lora": lora}
    hf_slim.compress(model, "distill.logits", data=tiny.ids(4), original=tiny.llama(), **options)
    moved = [
        name for name, tensor in model.state_dict().items() if name in before and not torch.equal(tensor, before[name])
    ]
    assert moved
    assert moved == [name for name in before if "layernorm" in name]


@pytest.mark.parametrize(("name", "part"), [("Mixtral", "experts"), ("T5", "decoder")])
def test_experts_and_encoder_decoders_take_adapters(name, part, tmp_path):
    model, original = architectures.make(name), architectures.make(name)
    hf_slim.compress(model, *RTN[:1], **RTN[1])
    options = {"steps": 2, "batch_size": 2, "warmup": 0, "learning_rate": 1e-2, "lora": {"r": 2}}
    before = put_out(model)
    report = hf_slim.compress(model, "distill.logits", data=IDS, original=original, **options)
    assert any(part in row.name for row in report.layers)
    found = put_out(model)
    assert not torch.equal(found, before)
    model.save_pretrained(tmp_path)
    assert torch.equal(put_out(type(model).from_pretrained(tmp_path, attn_implementation="eager")), found)


def test_recipes_with_adapters_take_what_they_say(tmp_path):
    place, train = runs.Place(tmp_path, tiny.llama(layers=3)), "steps: 2, batch_size: 2, learning_rate: 1.0e-3"
    first = f"distill.logits: {{{train}, student: {{layers: 2}}, lora: {{r: 3}}}}"
    last = f"distill.logits: {{{train}, lora: {{r: 2, layers: {{exclude: [k_proj]}}}}}}"
    recipe = place.recipe(first, "quantize.rtn: {bits: 4, group_size: 8}", last)
    plan, report = make_plan(recipe), run_recipe(recipe, place.out)
    assert report.size.bytes_after == plan.bytes_after
    made = [stage.metrics.get("adapters") for stage in report.stages]
    assert made[0] == {"merged": 14, "kept": 0, "kept_bytes": 0}
    assert (made[2]["merged"], made[2]["kept"]) == (0, 12)
    assert {layer.describe() for layer in _encodings(place.out)} == {"4-bit g8", "4-bit g8 + rank 2"}


def _encodings(folder):
    found = find_layers(AutoModelForCausalLM.from_pretrained(folder)).values()
    return [layer.encoding for layer in found if layer.encoding is not None]


def test_a_resumed_run_equals_a_straight_one(tmp_path):
    found, config = [], Lora(r=4, dropout=0.2)
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model = made("codes")
        with adapting(model, chosen(model, config), config, seed=0 if resume is None else 1) as trained:
            args = training.arguments(
                tmp_path, DistillationConfig, max_steps=4, learning_rate=1e-2, save_strategy="steps", save_steps=2
            )
            options = {"train_dataset": training.rows(), "data_collator": training.Pad()}
            trainer = DistillationTrainer(model, tiny.llama(), args, **options)
            trainer.train(resume_from_checkpoint=resume)
            found.append(torch.cat([adapter.delta().flatten() for adapter in trained.values()]).detach())
    assert found[0].norm() > 0
    assert torch.equal(*found)


# bad input


def test_codes_without_adapters_are_refused_with_both_ways_out():
    train, adapt = make_stage("distill.logits"), make_stage("distill.logits", {"lora": {}})
    rounded = make_stage("quantize.rtn")
    (problem,) = order_problems((rounded, train))
    assert "put distill.logits before quantize.rtn, train adapters beside them (lora: {r: 8}), or tune" in problem
    assert "quantize.scales" in problem
    assert order_problems((rounded, adapt)) == []
    assert order_problems((rounded, adapt, train)) == []
    model = made("codes")
    with pytest.raises(
        PlanError, match=r"14 layers are stored as codes.*\(lora: \{r: 8\}\).*quantize\.scales"
    ) as caught:
        hf_slim.compress(model, "distill.logits", data=tiny.ids(), original=tiny.llama(), steps=1)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "distill.logits.lora.r"),
        ({"rank": 8}, "distill.logits.lora.*unknown key 'rank'"),
        ({"dropout": 1.0}, "distill.logits.lora.dropout"),
        ({"layers": {"q_proj": {"rr": 8}}}, "did you mean 'r'"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        make_stage("distill.logits", {"lora": options})


def test_weights_that_move_rule_adapters_out():
    with pytest.raises(RecipeError, match=r"prune\.gradual changes those: leave lora or during out"):
        make_stage("distill.logits", {"lora": {}, "during": ["prune.gradual"]})


def test_layers_that_take_no_adapter_are_all_named_and_nothing_changes():
    model = tiny.llama(layers=3)
    hf_slim.compress(model, "share.tie", pairs={2: 1})
    before, stage = stored_bytes(model), make_stage("distill.logits", {"lora": {"r": 24}})
    with pytest.raises(PlanError) as caught:
        hf_slim.compress(model, "distill.logits", data=tiny.ids(), original=tiny.llama(layers=3), **{"lora": {"r": 24}})
    problems = caught.value.problems
    assert sum("shares its weight with other layers; name it in lora.layers.exclude" in p for p in problems) == 7
    assert sum("has rank 20 at most, got r: 24; lower r" in p for p in problems) == 4
    assert stored_bytes(model) == before
    with pytest.raises(PlanError, match="include: 'no_such' matches no layer"):
        adapters.plan(find_layers(model), Lora(layers={"include": ["no_such"]}), model)
    with pytest.raises(PlanError, match="modules_to_save: 'no_such' matches no module with parameters"):
        adapters.plan(find_layers(model), Lora(modules_to_save=["norm", "no_such"], layers={"exclude": ["1.*"]}), model)
    codes = Affine(bits=4, group_size=None)
    for stored in (LowRank(rank=2, left=codes, right=codes), codes.model_copy(update={"activations": "int8"})):
        with pytest.raises(PlanError, match="which no adapter can be added to"):
            adapters.stored_with(stored, 2)
    assert stage.options.lora.r == 24


def test_the_plan_says_that_adapters_want_a_larger_learning_rate():
    model = tiny.llama()
    options = [{"lora": {}}, {"lora": {}, "learning_rate": 1e-4}, {}]
    stages = [make_stage("distill.logits", given) for given in options]
    method = hf_slim.distillation.logits
    assert [len(method.notes(find_layers(model), stage.options, model)) for stage in stages] == [1, 0, 0]
