"""GGUF files: Transformers reads the same weights, logits and tokens back, and what is not the same is said."""

from __future__ import annotations

from pathlib import Path

import gguf
import gguf_models
import pytest
import runs
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from hf_slim import compress
from hf_slim.core.errors import ArtifactError, PlanError
from hf_slim.core.layers import relative_error
from hf_slim.core.select import Layer, find_layers
from hf_slim.core.swap import get_weight
from hf_slim.encodings import Affine, Codebook, Sparse
from hf_slim.export.gguf import FILE, Config, export, notes, place, problems
from hf_slim.export.gguf_model import FAMILIES, row_order
from hf_slim.run import run_recipe

FOUR_BITS = {"bits": 4, "group_size": 32, "symmetric": True, "clip": "minmax"}
STORED = {
    "f16": {},
    "q4_0": {**FOUR_BITS, "group_size": 64},
    "q8_0": {"bits": 8, "group_size": None, "symmetric": True, "clip": "minmax"},
}


def written(model: PreTrainedModel, folder: Path, kind: str = "llama-bpe", **options) -> list[str]:
    return export(model, gguf_models.tokenizer(kind), folder, Config(**options))


def read(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()


def types(folder: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(folder / FILE).tensors}


def plan(model: PreTrainedModel, **options) -> tuple[list[str], list[str]]:
    found = find_layers(model), Config(**options), model
    return problems(*found), notes(*found)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("family", gguf_models.CONFIGS)
def test_transformers_reads_the_same_model_and_tokenizer(family: str, stored: str, tmp_path):
    model = gguf_models.model(family)
    if STORED[stored]:
        compress(model, "quantize.rtn", **STORED[stored])
    kind = gguf_models.TOKENIZERS[family]
    assert plan(model) == ([], [])
    assert written(model, tmp_path, kind) == []
    again = read(tmp_path)
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=0)
    weights = again.state_dict()
    for name in find_layers(model):
        assert torch.equal(weights[f"{name}.weight"], get_weight(model.get_submodule(name))), name
    assert types(tmp_path)["blk.1.ffn_down.weight"] == stored.upper()
    tokenizer, copy = gguf_models.tokenizer(kind), AutoTokenizer.from_pretrained(tmp_path, gguf_file=FILE)
    for line in gguf_models.LINES:
        ids = tokenizer(line)["input_ids"]
        assert copy(line)["input_ids"] == ids
        assert copy.decode(ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_encoded_embeddings_keep_their_grid_too(family: str, tmp_path):
    model = gguf_models.model(family, dtype=torch.bfloat16)
    rows = {"bits": 8, "group_size": None, "symmetric": True}
    compress(model, "quantize.rtn", **FOUR_BITS, embeddings=rows)
    written(model, tmp_path, gguf_models.TOKENIZERS[family])
    assert types(tmp_path)["token_embd.weight"] == "Q8_0"
    again = read(tmp_path)
    for name in find_layers(model):
        module = model.get_submodule(name)
        if hasattr(module, "decoded"):
            assert torch.equal(again.state_dict()[f"{name}.weight"], module.decoded(torch.float32)), name


def test_asymmetric_four_bits_round_only_the_minimum(tmp_path):
    model = gguf_models.model("llama")
    compress(model, "quantize.rtn", **{**FOUR_BITS, "symmetric": False})
    (planned,) = plan(model)[1]
    assert planned.startswith("14 layers (model.layers.0.self_attn.q_proj, ...) to Q4_1: integers and scales stay")
    said = written(model, tmp_path)
    assert said[0] == planned
    assert said[1].startswith("14 layers (model.layers.0.self_attn.q_proj, ...) changed: relative squared error")
    again, ours = read(tmp_path), logits(model)
    assert 0 < relative_error(ours.flatten(0, 1), logits(again).flatten(0, 1)) < 1e-4
    for name in find_layers(model):
        weight = get_weight(model.get_submodule(name))
        assert relative_error(weight, again.state_dict()[f"{name}.weight"]) < 2**-20


def test_columns_of_the_rotary_halves_become_neighbours():
    config = gguf_models.model("llama").config
    half = config.head_dim // 2
    order = row_order(FAMILIES["llama"], config, "model.layers.0.self_attn.k_proj.weight")
    assert order is not None
    for head in range(config.num_key_value_heads):
        for i in range(half):
            first = head * config.head_dim
            assert order[first + 2 * i : first + 2 * i + 2].tolist() == [first + i, first + half + i]
    assert row_order(FAMILIES["llama"], config, "model.layers.0.self_attn.v_proj.weight") is None
    assert row_order(FAMILIES["qwen2"], config, "model.layers.0.self_attn.k_proj.weight") is None


@pytest.mark.parametrize(
    ("encoding", "cols", "wanted", "expected"),
    [
        (None, 96, "auto", ("f16", "dense")),
        (None, 96, "q8_0", ("q8_0", "rounded")),
        (None, 40, "q8_0", ("f16", "rounded")),
        (Sparse(survivors=5), 96, "auto", ("f16", "dense")),
        (Codebook(bits=4, clusters=16), 96, "auto", ("q8_0", "rounded")),
        (Affine(bits=4, group_size=64, symmetric=True), 96, "auto", ("q4_0", "kept")),
        (Affine(bits=4, group_size=64, symmetric=True), 96, "q8_0", ("q8_0", "kept")),
        (Affine(bits=4, group_size=64, symmetric=True), 96, "f16", ("f16", "rounded")),
        (Affine(bits=4, group_size=64), 96, "auto", ("q4_1", "minimum")),
        (Affine(bits=4, group_size=64), 96, "q8_0", ("q8_0", "kept")),
        (Affine(bits=4, group_size=64), 96, "q4_0", ("q4_0", "rounded")),
        (Affine(bits=3), 96, "auto", ("q4_0", "kept")),
        (Affine(bits=2, symmetric=True, centered=True), 96, "auto", ("q4_0", "kept")),
        (Affine(bits=8, symmetric=True), 96, "auto", ("q8_0", "kept")),
        (Affine(bits=6, symmetric=True), 96, "auto", ("q8_0", "kept")),
        (Affine(bits=8), 96, "auto", ("q8_0", "rounded")),
        (Affine(bits=4, group_size=16, symmetric=True), 96, "auto", ("q8_0", "rounded")),
        (Affine(bits=4, symmetric=True), 40, "auto", ("f16", "rounded")),
    ],
)
def test_every_encoding_has_its_place(encoding, cols: int, wanted: str, expected: tuple[str, str]):
    placed = place(Layer("layer", "linear", 8, cols, torch.float32, encoding=encoding), wanted)
    assert (placed.type, placed.fate) == expected
    assert bool(placed.why) == (placed.fate == "rounded")


def test_what_is_rounded_again_is_counted_and_measured(tmp_path):
    model = gguf_models.model("qwen2")
    compress(model, "share.kmeans", bits=3, scope="tensor", layers={"include": ["mlp.*"]})
    compress(model, "quantize.rtn", **{**FOUR_BITS, "group_size": 16}, layers={"include": ["o_proj"]})
    planned = plan(model)[1]
    assert any("6 layers (model.layers.0.mlp.gate_proj, ...) rounded again, to Q8_0: 8 clusters" in n for n in planned)
    assert any("2 layers" in n and "4-bit g16 sym x 64 columns do not fill blocks of 32" in n for n in planned)
    refused = plan(model, strict=True)[0]
    assert len(refused) == 8
    assert "model.layers.0.self_attn.o_proj would be rounded again" in refused[0]
    before = logits(model)
    said = written(model, tmp_path, "qwen2")
    assert torch.equal(before, logits(model))
    assert said[:-1] == planned
    weights = read(tmp_path).state_dict()
    errors = [
        relative_error(get_weight(model.get_submodule(name)), weights[f"{name}.weight"])
        for name, layer in find_layers(model).items()
        if layer.encoding is not None
    ]
    assert (
        f"8 layers (model.layers.0.self_attn.o_proj, ...) changed: relative squared error {sum(errors) / 8:.2g}"
        in said[-1]
    )
    assert 0 < max(errors) < 1e-4


def test_small_codes_and_zeros_save_nothing_and_that_is_said(tmp_path):
    model = gguf_models.model("mistral")
    compress(model, "prune.magnitude", sparsity=0.7)
    compress(model, "quantize.rtn", bits=2, group_size=32, symmetric=True)
    said = written(model, tmp_path, "sentencepiece")
    assert any("14 layers" in n and "fewer than 4 bits take no less room in the file" in n for n in said)
    assert any("14 layers" in n and "the file stores the zeros too" in n for n in said)
    torch.testing.assert_close(logits(read(tmp_path)), logits(model), atol=1e-5, rtol=0)


def test_the_file_says_what_the_config_says(tmp_path):
    model = gguf_models.model("llama")
    written(model, tmp_path)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / FILE).fields.items()}
    expected = {
        "general.architecture": "llama",
        "general.file_type": 1,
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 384,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
    }
    assert {name: fields[name] for name in expected} == expected
    assert "output.weight" not in types(tmp_path)  # a tied head is the embedding
    assert set(types(tmp_path).values()) == {"F16", "F32"}


def test_llama3_frequencies_are_written_for_llama_cpp(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = gguf_models.model("llama", rope_parameters={**rope, "original_max_position_embeddings": 64})
    (note,) = plan(model)[1]
    assert "rope_parameters is in the file as llama.cpp expects it, but Transformers' GGUF reader assumes" in note
    written(model, tmp_path)
    (stored,) = [t.data for t in gguf.GGUFReader(tmp_path / FILE).tensors if t.name == "rope_freqs.weight"]
    plain = 1e4 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / torch.tensor(stored), model.model.rotary_emb.inv_freq)
    assert stored.max() > 1.5 > stored.min()


def test_a_window_that_the_file_cannot_state_is_a_note():
    noted = plan(gguf_models.model("mistral", sliding_window=32))[1]
    assert len(noted) == 1
    assert "longer than 32 tokens" in noted[0]


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("llama", {"attention_bias": True}, "attention_bias is True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type is 'dynamic'",
        ),
        ("gemma2", {"attn_logit_softcapping": 20.0}, "attn_logit_softcapping is 20.0"),
        ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar is 64"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "layer_types is"),
    ],
)
def test_options_that_no_reader_would_know_are_refused(family: str, options: dict, words: str):
    assert words in "\n".join(plan(gguf_models.model(family, **options))[0])


def test_other_architectures_are_refused_by_name():
    for model, name in ((tiny.gpt2(), "gpt2"), (tiny.opt(), "opt"), (tiny.bert(), "bert")):
        found, noted = plan(model)
        assert found == [
            f"GGUF export does not know the architecture '{name}'; it writes {', '.join(sorted(FAMILIES))}"
        ]
        assert noted == []
    gemma = GemmaForCausalLM(GemmaConfig(**gguf_models.SHAPE, vocab_size=96, head_dim=16))
    assert "'gemma'" in plan(gemma)[0][0]
    classifier = LlamaForSequenceClassification(gguf_models.model("llama").config)
    assert plan(classifier)[0] == ["score has no place in a GGUF file of the architecture 'llama'"]


def test_weights_beyond_float16_are_refused(tmp_path):
    model = gguf_models.model("llama", dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(ArtifactError, match="up_proj: values beyond float16"):
        written(model, tmp_path)


def test_a_recipe_ends_with_the_file_or_without_a_trace(tmp_path):
    model = gguf_models.model("llama")
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    gguf_models.tokenizer("llama-bpe").save_pretrained(folder)
    place_ = runs.Place(tmp_path / "good", model)
    gguf_models.tokenizer("llama-bpe").save_pretrained(place_.model)
    stages = ("quantize.rtn: {bits: 4, group_size: 32, symmetric: true}", "export.gguf: {to: small}")
    report = run_recipe(place_.recipe(*stages), place_.out)
    path = place_.out / "exports" / "small" / FILE
    assert report.stages[-1].metrics["bytes"] == path.stat().st_size
    ours = AutoModelForCausalLM.from_pretrained(place_.out, dtype=torch.float32)
    assert torch.equal(logits(read(path.parent)), logits(ours))

    tiny.tokenizer().save_pretrained(place_.model)  # a word-level one, which no GGUF file holds
    with pytest.raises(ArtifactError, match="WordLevel"):
        run_recipe(place_.recipe(*stages), tmp_path / "bad")
    assert not list((tmp_path / "bad").rglob("*.gguf"))


def test_a_strict_plan_refuses_before_anything_runs(tmp_path):
    place_ = runs.Place(tmp_path)
    with pytest.raises(PlanError, match="would be rounded again"):
        run_recipe(place_.recipe("quantize.rtn: {group_size: 16}", "export.gguf: {strict: true}"), place_.out)
    assert not place_.out.exists()
