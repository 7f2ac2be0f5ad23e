"""compressed-tensors: the bits of the format, what it cannot hold, and that others load it without us."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import runs
import tiny
import torch
from reference import foreign
from safetensors.torch import load_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import hf_slim
from hf_slim.core.errors import ArtifactError, PlanError
from hf_slim.core.select import find_layers
from hf_slim.encodings import Affine
from hf_slim.encodings.modules import EncodedLinear
from hf_slim.export import compressed_tensors as ct

SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, intermediate_size=96, num_key_value_heads=2)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, intermediate_size=96, num_key_value_heads=2)),
    "opt": (OPTForCausalLM, OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=64, pad_token_id=1)),
}
ROW = {"bits": 8, "group_size": None, "symmetric": True}
WAYS = {
    "4 bits": {"bits": 4, "group_size": 32, "symmetric": True},
    "4 bits asymmetric": {"bits": 4, "group_size": 32},
    "3 bits": {"bits": 3, "group_size": 16, "symmetric": True},
    "3 bits asymmetric": {"bits": 3, "group_size": None, "embeddings": {"bits": 8}},
    "8 bits": ROW,
    "8 bits asymmetric": {"bits": 8, "group_size": None},
    "mixed": {"bits": 4, "group_size": 32, "symmetric": True, "layers": {"last": {"bits": 8}}},
    "integer activations": ROW,
}
STOCK = """
import json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_slim":
            raise ImportError("hf_slim is not here")
sys.meta_path.insert(0, Refuse())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder + "/export", output_loading_info=True)
    assert not any(info.values()), info
    ids = load_file(folder + "/ours")["ids"]
    with torch.no_grad():
        save_file({"logits": model(input_ids=ids).logits.contiguous()}, folder + "/theirs")
assert "hf_slim" not in sys.modules
"""


def model_of(name: str, dtype: torch.dtype = torch.float32):
    cls, config = MODELS[name]
    return tiny._make(cls, config, dtype, seed=0)


def quantized(name: str, way: str, dtype: torch.dtype = torch.float32):
    model = model_of(name, dtype)
    hf_slim.compress(model, "quantize.rtn", clip="minmax", **WAYS[way])
    if way == "integer activations":
        for module in model.modules():
            if isinstance(module, EncodedLinear):
                module.encoding = module.encoding.model_copy(update={"activations": "int8"})
    return model


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / a.float().norm()).item()


@pytest.fixture(scope="module")
def loaded_by_others(tmp_path_factory):
    """{(model, way, dtype): (our logits, those of stock Transformers)}; one process loads them all."""
    pytest.importorskip("compressed_tensors", reason="needs the extra `export`, which Python 3.10 does not have")
    from safetensors.torch import save_file

    cases = [(name, way, torch.float32) for name in MODELS for way in WAYS] + [("llama", "4 bits", torch.bfloat16)]
    folders = []
    for case in cases:
        folder = tmp_path_factory.mktemp("case")
        model = quantized(*case)
        save_file({"ids": tiny.ids(), "logits": tiny.logits(model)}, folder / "ours")
        (folder / "export").mkdir()
        ct.export(model, tiny.tokenizer(), folder / "export", ct.Config())
        folders.append(folder)
    done = subprocess.run([sys.executable, "-c", STOCK, *map(str, folders)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = zip(cases, folders, strict=True)
    return {case: [load_file(folder / who)["logits"] for who in ("ours", "theirs")] for case, folder in found}


@pytest.mark.parametrize("way", [way for way in WAYS if way != "integer activations"])
@pytest.mark.parametrize("name", MODELS)
def test_stock_transformers_computes_our_logits(loaded_by_others, name, way):
    ours, theirs = loaded_by_others[name, way, torch.float32]
    assert distance(ours, theirs) < 1e-5


def test_stock_transformers_in_bfloat16(loaded_by_others):
    ours, theirs = loaded_by_others["llama", "4 bits", torch.bfloat16]
    assert theirs.dtype == torch.bfloat16
    # scales are rounded to bfloat16: 0.7 % in a trained model of 260,000 weights; random weights magnify it
    assert 0 < distance(ours, theirs) < 4e-2


@pytest.mark.parametrize("name", MODELS)
def test_stock_transformers_multiplies_the_same_integers(loaded_by_others, name):
    """But for values within float32's rounding of the middle between two integers. OPT hands its MLP all tokens of a
    batch as rows of one matrix, for which compressed-tensors 0.20 takes one scale instead of one a token."""
    ours, theirs = loaded_by_others[name, "integer activations", torch.float32]
    assert distance(ours, theirs) < (4e-2 if name == "opt" else 1e-2)


def random_codes(rows: int, cols: int, encoding: Affine):
    draw = torch.Generator().manual_seed(0)
    top, groups = 2**encoding.bits, encoding.groups(cols)
    codes = torch.randint(0, top, (rows, cols), generator=draw, dtype=torch.uint8)
    zeros = torch.randint(0, top, (rows, groups), generator=draw, dtype=torch.uint8)
    return codes, torch.rand(rows, groups, generator=draw) - 0.5, zeros


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [None, 10])
def test_words_hold_the_same_weights(bits, symmetric, group_size):
    rows, cols = 7, 30
    encoding = Affine(bits=bits, group_size=group_size, symmetric=symmetric)
    codes, scales, zeros = random_codes(rows, cols, encoding)
    tensors = encoding.pack(codes, scales, zeros)
    stored = ct.repack(tensors, encoding, rows, cols, torch.float32)
    wide = 4 if bits <= 4 else 8
    shift = 2 ** (wide - 1) - 2 ** (bits - 1) if symmetric else 0
    expected = [foreign.put_bits([int(c) + shift for c in row], wide) for row in codes]
    assert stored["weight_packed"].tolist() == expected
    assert stored["weight_shape"].tolist() == [rows, cols]
    assert torch.equal(stored["weight_scale"], scales.half().float())
    if not symmetric:
        down = [foreign.put_bits([int(z) for z in column], wide) for column in zeros.T]
        assert stored["weight_zero_point"].T.tolist() == down
    else:
        assert "weight_zero_point" not in stored


@pytest.mark.parametrize("bits", [1, 2])
def test_centered_grid_becomes_odd_steps(bits):
    encoding = Affine(bits=bits, symmetric=True, centered=True)
    codes, scales, zeros = random_codes(4, 16, encoding)
    tensors = encoding.pack(codes, scales, zeros)
    wide, halves = ct.widen(codes, tensors["scales"].float(), encoding)
    assert torch.equal((wide.float() - 8) * halves, encoding.decode(tensors, 4, 16))


def test_integers_for_integer_activations():
    encoding = Affine(**ROW, activations="int8")
    codes, scales, zeros = random_codes(4, 16, encoding)
    stored = ct.repack(encoding.pack(codes, scales, zeros), encoding, 4, 16, torch.float32)
    assert stored["weight"].tolist() == (codes.int() - 128).tolist()
    assert stored.keys() == {"weight", "weight_scale"}


def test_agrees_with_the_packages_own_packing():
    pytest.importorskip("compressed_tensors", reason="needs the extra `export`, which Python 3.10 does not have")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    from hf_slim.encodings.words import pack_words, unpack_words

    for bits in range(1, 9):
        codes = torch.randint(0, 2**bits, (5, 45), dtype=torch.uint8)
        signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
        assert torch.equal(pack_words(codes, bits), pack_to_int32(signed, bits))
        assert torch.equal(unpack_words(pack_words(codes, bits), bits, 45), codes)


def test_bfloat16_model_can_keep_its_scales(tmp_path):
    model = quantized("llama", "4 bits", torch.bfloat16)
    layers = find_layers(model)
    assert any("scales are rounded to bfloat16" in note for note in ct.notes(layers, ct.Config(), model))
    notes = ct.export(model, None, tmp_path, ct.Config(dtype="float16"))
    assert not any("scales" in note for note in notes)
    name = "model.layers.0.mlp.up_proj"
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored[f"{name}.weight_scale"], model.get_submodule(name).scales)
    assert stored["model.norm.weight"].dtype == torch.float16
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"


def test_what_the_format_cannot_hold_is_named_all_at_once():
    model = tiny.llama()
    hf_slim.compress(model, "share.kmeans", bits=3, layers={"include": ["q_proj"]})
    hf_slim.compress(model, "prune.magnitude", sparsity=0.5, layers={"include": ["up_proj"]})
    hf_slim.compress(model, "quantize.rtn", bits=4, group_size=16, layers={"include": ["o_proj"]})
    with pytest.raises(PlanError) as caught:
        hf_slim.compress(model, "export.compressed_tensors")
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    for words in ("self_attn.q_proj and 1 more: stored as 8 clusters", "mlp.up_proj and 1 more: stored as sparse"):
        assert words in text
    assert "40 columns are no multiple of group_size 16" in text


def test_other_layers_and_dense_models_are_refused():
    model = tiny.gpt2()
    with pytest.raises(PlanError, match="quantize first"):
        hf_slim.compress(model, "export.compressed_tensors")
    hf_slim.compress(model, "quantize.rtn", bits=4, group_size=16, clip="minmax")
    with pytest.raises(PlanError, match="Conv1D"):
        hf_slim.compress(model, "export.compressed_tensors")


def test_experts_are_refused():
    config = MixtralConfig(**SIZES, intermediate_size=96, num_key_value_heads=2, num_local_experts=2)
    model = tiny._make(MixtralForCausalLM, config, torch.float32, seed=0)
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    hf_slim.compress(model, "quantize.rtn", **WAYS["4 bits"], clip="minmax", layers={"include": attention})
    with pytest.raises(PlanError, match="fused experts"):
        hf_slim.compress(model, "export.compressed_tensors")


def test_asymmetric_layers_of_several_kinds_are_refused():
    model = model_of("llama")
    hf_slim.compress(model, "quantize.rtn", bits=4, group_size=32, clip="minmax", layers={"last": {"bits": 8}})
    with pytest.raises(PlanError, match="asymmetric grids only where all layers"):
        hf_slim.compress(model, "export.compressed_tensors")


def test_plan_says_what_vllm_cannot_join():
    model = model_of("llama")
    hf_slim.compress(model, "quantize.rtn", **WAYS["4 bits"], layers={"v_proj": {"bits": 8}, "exclude": ["up_proj"]})
    notes = ct.notes(find_layers(model), ct.Config(), model)
    joined = [note for note in notes if "joins" in note]
    assert len(joined) == 2
    assert "q_proj 4-bit g32 sym, k_proj 4-bit g32 sym, v_proj 8-bit g32 sym" in joined[0]
    assert "gate_proj 4-bit g32 sym, up_proj dense" in joined[1]
    same = quantized("llama", "4 bits")
    assert ct.notes(find_layers(same), ct.Config(), same) == []


def test_values_that_the_dtype_cannot_hold_are_refused(tmp_path):
    model = quantized("llama", "4 bits")
    with torch.no_grad():
        model.model.norm.weight[0] = 1e6
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight: holds values that float16 cannot"):
        ct.export(model, None, tmp_path, ct.Config(dtype="float16"))
    assert list(tmp_path.iterdir()) == []


def test_script_writes_where_it_is_told_and_over_nothing(tmp_path):
    model = quantized("llama", "4 bits")
    before = tiny.logits(model)
    report = hf_slim.compress(model, "export.compressed_tensors", to=str(tmp_path / "new"))
    assert report.metrics["bytes"] == sum(file.stat().st_size for file in (tmp_path / "new").iterdir())
    assert torch.equal(tiny.logits(model), before)
    kept = runs.snapshot(tmp_path)
    with pytest.raises(ArtifactError, match="exists; give another name"):
        hf_slim.compress(model, "export.compressed_tensors", to=str(tmp_path / "new"))
    assert runs.snapshot(tmp_path) == kept
