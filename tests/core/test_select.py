"""Layers are found by type and position, and patterns that name nothing are answered with the nearest name."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

import hf_slim
from hf_slim.core.errors import PlanError, RecipeError
from hf_slim.core.select import Layer, Select, find_layers, find_stacks, matches, select_layers
from hf_slim.core.size import count_weights, stored_bytes
from hf_slim.core.stage import make_stage
from hf_slim.encodings import Affine

STACKS = {
    "llama": "model.layers",
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
    "bert": "bert.encoder.layer",
    "bert_classifier": "bert.encoder.layer",
}
IN_A_BLOCK = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "gpt2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "bert": {"query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"},
    "bert_classifier": {"query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"},
}
OUTSIDE = {  # linear layers that belong to no block: {name: kind}
    "llama": {"lm_head": "head"},
    "gpt2": {"lm_head": "head"},
    "opt": {"lm_head": "head"},
    "bert": {"cls.predictions.transform.dense": "linear", "cls.predictions.decoder": "head"},
    "bert_classifier": {"bert.pooler.dense": "linear", "classifier": "linear"},
}
EMBEDDINGS = {
    "llama": "model.embed_tokens",
    "gpt2": "transformer.wte",
    "opt": "model.decoder.embed_tokens",
    "bert": "bert.embeddings.word_embeddings",
    "bert_classifier": "bert.embeddings.word_embeddings",
}
each_architecture = pytest.mark.parametrize("architecture", tiny.ALL)


def names(layers: list[Layer]) -> list[str]:
    return [layer.name for layer in layers]


def on_meta(architecture: str) -> nn.Module:
    model = tiny.ALL[architecture]()
    with torch.device("meta"):
        return type(model)(model.config)


@each_architecture
def test_blocks_are_the_children_of_the_outermost_list(architecture):
    (stack,) = find_stacks(tiny.ALL[architecture]())
    assert stack.name == STACKS[architecture]
    assert stack.blocks == (f"{stack.name}.0", f"{stack.name}.1")


def test_lists_inside_blocks_are_no_stacks():
    block = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    model = nn.ModuleDict({"norms": nn.ModuleList([nn.LayerNorm(4)]), "layers": nn.ModuleList([block])})
    assert [stack.name for stack in find_stacks(model)] == ["layers"]
    assert {layer.block for layer in find_layers(model).values()} == {"layers.0"}


def test_encoder_and_decoder_are_two_stacks():
    model = nn.ModuleDict({side: nn.ModuleList([nn.Linear(4, 4)]) for side in ("encoder", "encoder_more")})
    assert [stack.name for stack in find_stacks(model)] == ["encoder", "encoder_more"]


def test_eleven_blocks_are_told_apart():
    layers = find_layers(tiny.llama(layers=12))
    for layer in layers.values():
        if layer.block is not None:
            assert layer.name.startswith(f"{layer.block}.")
    assert sum(layer.block == "model.layers.1" for layer in layers.values()) == 7


@each_architecture
def test_every_layer_is_found_with_its_kind(architecture):
    model = tiny.ALL[architecture]()
    layers = find_layers(model)
    inside = {n: layer for n, layer in layers.items() if layer.block is not None}
    assert set(inside) == {
        name
        for name, _ in model.named_modules()
        if name.startswith(STACKS[architecture]) and any(name.endswith(f".{end}") for end in IN_A_BLOCK[architecture])
    }
    assert {layer.kind for layer in inside.values()} == {"linear"}
    rest = {name: layer.kind for name, layer in layers.items() if layer.block is None}
    assert rest == OUTSIDE[architecture] | {EMBEDDINGS[architecture]: "embedding"}
    order = [name for name, _ in model.named_modules()]
    assert list(layers) == sorted(layers, key=order.index)


@each_architecture
def test_shapes_are_out_features_by_in_features(architecture):
    model = tiny.ALL[architecture]()
    for name, layer in find_layers(model).items():
        weight = model.get_submodule(name).weight
        turned = architecture == "gpt2" and layer.block is not None
        assert (layer.rows, layer.cols) == tuple(weight.shape[::-1] if turned else weight.shape)
        assert layer.dtype == weight.dtype
    if architecture == "gpt2":
        layer = find_layers(model)["transformer.h.0.attn.c_attn"]
        assert (layer.rows, layer.cols) == (144, 48)


@each_architecture
def test_the_meta_device_shows_the_same(architecture):
    assert find_layers(on_meta(architecture)) == find_layers(tiny.ALL[architecture]())
    assert find_stacks(on_meta(architecture)) == find_stacks(tiny.ALL[architecture]())


@each_architecture
def test_default_is_every_linear_layer_inside_blocks(architecture):
    chosen = select_layers(find_layers(tiny.ALL[architecture]()), Select())
    assert len(chosen) == 2 * len(IN_A_BLOCK[architecture])
    assert all(layer.block is not None and layer.kind == "linear" for layer in chosen)


def test_tied_heads_belong_to_their_embedding():
    for model, head, table in (
        (tiny.llama(), "lm_head", "model.embed_tokens"),
        (tiny.gpt2(), "lm_head", "transformer.wte"),
        (tiny.bert(), "cls.predictions.decoder", "bert.embeddings.word_embeddings"),
    ):
        layers = find_layers(model)
        assert layers[head].tied_to == table
        assert layers[head].nbytes == 0
        assert layers[table].tied_to is None
        assert head not in names(select_layers(layers, Select(include=(head, "*"))))
    untied = find_layers(tiny.llama(tied=False))
    assert untied["lm_head"].tied_to is None
    assert names(select_layers(untied, Select(include=("lm_head",)))) == ["lm_head"]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("q_proj", 2),
        ("mlp.up_proj", 2),
        ("layers.0.*", 7),
        ("model.layers.1.self_attn.*", 4),
        ("model.layers.1.self_attn.q_proj", 1),
        ("[qk]_proj", 4),
        ("?_proj", 8),
        ("*_proj", 14),
        ("*", 14),
    ],
)
def test_patterns(pattern, count):
    layers = find_layers(tiny.llama())
    every = names(select_layers(layers, Select()))
    chosen = names(select_layers(layers, Select(include=(pattern,))))
    assert len(chosen) == count
    assert names(select_layers(layers, Select(exclude=(pattern,)))) == [name for name in every if name not in chosen]
    assert chosen == [name for name in every if matches(name, pattern)]


def test_a_pattern_is_no_substring():
    assert matches("model.layers.0.self_attn.q_proj", "q_proj")
    assert not matches("model.layers.0.self_attn.q_proj", "proj")
    assert not matches("model.layers.10.mlp.up_proj", "layers.1.*")
    assert not matches("model.layers.0.mlp.UP_PROJ", "up_proj")


def test_include_then_exclude():
    layers = find_layers(tiny.llama())
    chosen = select_layers(layers, Select(include=("*.self_attn.*",), exclude=("layers.0.*",)))
    assert names(chosen) == [f"model.layers.1.self_attn.{n}_proj" for n in "qkvo"]


def test_layers_outside_blocks_take_part_when_named():
    layers = find_layers(tiny.bert_classifier())
    assert names(select_layers(layers, Select(include=("classifier", "pooler.dense")))) == [
        "bert.pooler.dense",
        "classifier",
    ]


def test_patterns_that_match_nothing_are_all_named():
    with pytest.raises(PlanError) as caught:
        select_layers(find_layers(tiny.llama()), Select(include=("q_proj", "q_porj"), exclude=("downproj", "zzz")))
    assert len(caught.value.problems) == 3
    said = str(caught.value)
    for part in (
        "'q_porj'",
        "did you mean 'q_proj'?",
        "'downproj'",
        "did you mean 'down_proj'?",
        "layers.exclude: 'zzz'",
    ):
        assert part in said


@each_architecture
def test_encoded_models_show_how_they_are_stored(architecture):
    model, dense = tiny.ALL[architecture](), find_layers(tiny.ALL[architecture]())
    hf_slim.compress(model, "quantize.rtn", bits=4, group_size=16, embeddings={"bits": 8})
    layers = find_layers(model)
    assert layers.keys() == dense.keys()
    assert find_stacks(model) == find_stacks(tiny.ALL[architecture]())
    for name, layer in layers.items():
        before = dense[name]
        assert (layer.kind, layer.rows, layer.cols, layer.block, layer.dtype, layer.tied_to) == (
            before.kind,
            before.rows,
            before.cols,
            before.block,
            before.dtype,
            before.tied_to,
        )
        if layer.block is not None:
            assert layer.encoding == Affine(bits=4, group_size=16)
            assert layer.nbytes == layer.encoding.nbytes(layer.rows, layer.cols, layer.dtype) < before.nbytes
    assert layers[EMBEDDINGS[architecture]].encoding == Affine(bits=8)


@each_architecture
def test_counts_of_weights_and_bytes(architecture):
    model = tiny.ALL[architecture]()
    distinct = {id(p): p for p in model.state_dict(keep_vars=True).values()}.values()
    weights, size = sum(p.numel() for p in distinct), sum(p.nbytes for p in distinct)
    assert (count_weights(model), stored_bytes(model)) == (weights, size)
    assert (count_weights(on_meta(architecture)), stored_bytes(on_meta(architecture))) == (weights, size)
    dense = find_layers(model)
    hf_slim.compress(model, "quantize.rtn", bits=3, embeddings={"bits": 8})
    assert count_weights(model) == weights
    saved = sum(dense[name].nbytes - layer.nbytes for name, layer in find_layers(model).items())
    assert stored_bytes(model) == size - saved


def test_pruned_layers_know_their_survivors():
    model = tiny.llama()
    hf_slim.compress(model, "prune.magnitude", sparsity=0.75)
    layer = find_layers(model)["model.layers.0.mlp.up_proj"]
    assert layer.survivors == 72 * 40 // 4
    assert layer.encoded(Affine(bits=4)).survivors is None
    assert layer.encoded(Affine(bits=4, survivors=720)).survivors == 720


def test_options_by_pattern_win_over_first_and_last_and_the_later_over_the_earlier():
    layers = find_layers(tiny.llama(layers=3))
    written = {"first": {"bits": 8}, "last": {"bits": 6}, "mlp.*": {"bits": 3}, "down_proj": {"group_size": 8}}
    config = make_stage("quantize.rtn", {"bits": 4, "group_size": 16, "layers": written}).options

    def options(block: int, name: str) -> tuple[int, int]:
        here = config.at(layers[f"model.layers.{block}.{name}"])
        return here.bits, here.group_size

    assert [options(block, "self_attn.q_proj") for block in range(3)] == [(8, 16), (4, 16), (6, 16)]
    assert [options(block, "mlp.up_proj") for block in range(3)] == [(3, 16)] * 3
    assert options(1, "mlp.down_proj") == (3, 8)
    assert config.at(layers["lm_head"]) is config


def test_options_by_pattern_are_written_as_they_were_read():
    written = {"exclude": ["lm_head"], "first": {"bits": 8}, "*.down_proj": {"bits": 3}}
    stage = make_stage("quantize.gptq", {"layers": written})
    assert stage.options.model_dump(mode="json", exclude_defaults=True) == {"layers": written}
    assert make_stage("quantize.gptq", stage.options.model_dump(mode="json")).options == stage.options


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"down_proj": {"bit": 8}}, "unknown key 'bit'; did you mean 'bits'"),
        ({"down_proj": {"bits": 99}, "first": {"bits": 1}}, "99 is too large"),
        ({"down_proj": {"damping": 0.1}}, "damping cannot differ from layer to layer"),
        ({"exlude": ["down_proj"]}, "did you mean 'exclude'"),
        ({"down_proj": {"layers": {"first": {"bits": 8}}}}, "layers cannot differ"),
    ],
)
def test_wrong_options_by_pattern_are_refused(written, message):
    with pytest.raises(RecipeError, match=message):
        make_stage("quantize.gptq", {"layers": written})


@pytest.mark.parametrize("layers", [{"dwon_proj": {"bits": 8}}, {"exclude": ["down_proj"], "down_proj": {"bits": 8}}])
def test_a_pattern_with_options_that_matches_no_chosen_layer_is_refused(layers):
    with pytest.raises(PlanError, match="matches none of the layers to compress"):
        hf_slim.compress(tiny.llama(), "quantize.rtn", layers=layers, group_size=8)


@pytest.mark.parametrize("method", ["quantize.rtn", "quantize.gptq", "share.kmeans"])
def test_layers_are_stored_with_their_own_bits(method):
    model = tiny.llama()
    data = {} if method != "quantize.gptq" else {"data": tiny.ids()}
    grouped = {} if method == "share.kmeans" else {"group_size": 8}
    hf_slim.compress(model, method, bits=4, layers={"first": {"bits": 6}, "k_proj": {"bits": 3}}, **grouped, **data)
    stored = {name: layer.encoding.bits for name, layer in find_layers(model).items() if layer.encoding}
    for name, bits in stored.items():
        assert bits == (3 if name.endswith("k_proj") else 6 if ".layers.0." in name else 4), name
