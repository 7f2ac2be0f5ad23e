"""Checkpoints that other programs quantized: decoded weight by weight as their formats say, and used in recipes."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import runs
import tiny
import torch
from reference import foreign
from safetensors.torch import load_file, save_file
from torch import nn

import hf_slim
from hf_slim.core import imports
from hf_slim.core.errors import ModelError
from hf_slim.core.model import ModelSource
from hf_slim.export import compressed_tensors as ct
from hf_slim.plan import make_plan
from hf_slim.run import run_recipe


def random_layer(rows: int, cols: int, groups: int, bits: int, seed: int = 0, shuffled: bool = False):
    draw = np.random.default_rng(seed)
    codes = draw.integers(0, 2**bits, (rows, cols))
    scales = draw.uniform(0.01, 0.1, (rows, groups)).astype(np.float16)
    zeros = draw.integers(1, 2**bits, (rows, groups))
    group_of = np.arange(cols) // -(-cols // groups)
    return codes, scales, zeros, draw.permutation(group_of) if shuffled else group_of


def tensors(layer: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in layer.items()}


@pytest.mark.parametrize("second_version", [False, True])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_layer(bits, shuffled, second_version):
    layer = random_layer(rows=32, cols=64, groups=4, bits=bits, shuffled=shuffled)
    stored = tensors(foreign.gptq_layer(*layer, bits, second_version))
    found = imports.from_gptq(stored, bits, 0 if second_version else 1)
    torch.testing.assert_close(found, torch.from_numpy(foreign.weight(*layer)).float(), rtol=1e-6, atol=0)


def test_gptq_without_the_order_of_its_columns():
    layer = random_layer(rows=8, cols=64, groups=4, bits=4)
    stored = tensors(foreign.gptq_layer(*layer, 4))
    del stored["g_idx"]
    assert torch.allclose(imports.from_gptq(stored, 4, 1), torch.from_numpy(foreign.weight(*layer)).float())


def test_awq_layer():
    layer = random_layer(rows=16, cols=24, groups=3, bits=4)
    found = imports.from_awq(tensors(foreign.awq_layer(*layer[:3])))
    assert torch.allclose(found, torch.from_numpy(foreign.weight(*layer)).float())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("groups", [1, 3])
def test_compressed_tensors_of_plain_numbers(dtype, groups):
    W = torch.arange(-12, 12).view(2, 12).to(dtype)
    scales = torch.rand(2, groups)
    expected = W.float().view(2, groups, -1) * scales[..., None]
    found = imports.from_compressed_tensors({"weight": W, "weight_scale": scales})
    assert torch.equal(found, expected.view(2, 12))


def test_a_weight_that_was_left_decoded_is_not_scaled_again():
    W = torch.randn(2, 8).to(torch.bfloat16)
    assert torch.equal(imports.from_compressed_tensors({"weight": W, "weight_scale": torch.ones(2, 1) / 9}), W.float())


def quantize_like_gptq(folder: Path, model: nn.Module, bits: int = 4, second_version: bool = False) -> dict:
    """Rewrite a saved model as a GPTQ checkpoint with act-order; the weights that it stands for."""
    state, expected = load_file(folder / "model.safetensors"), {}
    for seed, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            rows, cols = module.weight.shape
            layer = random_layer(rows, cols, 2, bits, seed, shuffled=True)
            del state[f"{name}.weight"]
            parts = tensors(foreign.gptq_layer(*layer, bits, second_version))
            state |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
            expected[f"{name}.weight"] = torch.from_numpy(foreign.weight(*layer)).float()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": 20,
        "desc_act": True,
        "checkpoint_format": "gptq_v2" if second_version else "gptq",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return expected


def aligned_llama() -> nn.Module:
    """Rows and columns in multiples of 32, as GPTQ's words need them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("second_version", [False, True])
def test_gptq_model_loads_dense(tmp_path, second_version):
    model = aligned_llama()
    expected = quantize_like_gptq(Path(tiny.save(model, tmp_path)), model, 4, second_version)
    source = ModelSource(str(tmp_path))
    loaded = source.load()
    state = loaded.state_dict()
    for name, W in expected.items():
        torch.testing.assert_close(state[name], W, rtol=1e-6, atol=0)
    kept = {name: W for name, W in model.state_dict().items() if name not in expected}
    assert all(torch.equal(state[name], W) for name, W in kept.items())
    assert not hasattr(loaded.config, "quantization_config")
    (note,) = source.notes()
    assert "4 bits by gptq" in note
    assert "float32 copy" in note
    assert "is gone" in note


def test_recipe_starts_from_a_gptq_model_and_says_what_was_lost(tmp_path):
    place = runs.Place(tmp_path, aligned_llama())
    quantize_like_gptq(Path(place.model), aligned_llama())
    recipe = place.recipe("quantize.rtn: {bits: 8, group_size: 16, clip: minmax}")
    assert any("by gptq" in note for note in make_plan(recipe).notes)
    report = run_recipe(recipe, place.out)
    assert any("by gptq" in note for note in report.notes)
    assert "by gptq" in (place.out / "README.md").read_text()


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_our_own_export_comes_back_exactly(tmp_path, bits, symmetric):
    model = tiny.llama()
    hf_slim.compress(model, "quantize.rtn", bits=bits, group_size=8, symmetric=symmetric, clip="minmax")
    ct.export(model, tiny.tokenizer(), tmp_path, ct.Config())
    source = ModelSource(str(tmp_path))
    loaded = source.load()
    model.dequantize()
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, W in loaded.state_dict().items():
        assert torch.equal(W, expected[name]), name
    assert "by compressed-tensors" in source.notes()[0]


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_gguf_file_of_integers_says_what_was_lost(tmp_path, kind):
    path, dtype = tmp_path / "model.gguf", gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("norm", np.ones(32, dtype=np.float32))
    writer.add_tensor("weight", gguf.quantize(np.ones((4, 32), dtype=np.float32), dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    notes = ModelSource(str(path)).notes()
    assert [kind in note for note in notes] == ([] if kind == "F16" else [True])


def test_dense_model_has_no_note(tmp_path):
    assert ModelSource(tiny.save(tiny.llama(), tmp_path)).notes() == []


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantized by bitsandbytes, which is not read"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "format 'marlin'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "format 'gemv'"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "nvfp4"),
    ],
)
def test_what_is_not_read_is_refused_before_any_weight(tmp_path, stored, words):
    tiny.save(tiny.llama(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    with pytest.raises(ModelError, match=words):
        ModelSource(str(tmp_path)).skeleton()


def test_every_damaged_layer_is_named(tmp_path):
    model = aligned_llama()
    quantize_like_gptq(Path(tiny.save(model, tmp_path)), model)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.0.mlp.up_proj.qzeros"]
    name = "model.layers.1.self_attn.q_proj.qweight"
    state[name] = state[name][:3].clone()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        ModelSource(str(tmp_path)).load()
    assert len(caught.value.problems) == 2
    assert "layers.0.mlp.up_proj" in str(caught.value)
    assert "layers.1.self_attn.q_proj" in str(caught.value)
