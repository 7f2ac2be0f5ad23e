"""Models of other shapes: what their config can say is a plain checkpoint, the rest is stored and loads the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import architectures
import cells
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_slim
from hf_slim.core.errors import ModelError, PlanError
from hf_slim.core.experts import unfused
from hf_slim.core.reshape import remove_units
from hf_slim.core.select import find_layers, find_stacks
from hf_slim.core.shapes import keep_blocks, shape_problems
from hf_slim.core.units import find_units
from hf_slim.integration.transformers import mark

torch.set_num_threads(1)


def trimmed(name: str, kind: str, count) -> PreTrainedModel:
    """A model without the first `count(i)` units of its i-th group of units."""
    model = architectures.make(name)
    with unfused(model):
        groups = find_units(model, (kind,))
        assert groups
        for number, units in enumerate(groups):
            remove_units(model, units, torch.arange(len(units)) >= count(number))
    mark(model)
    return model


def stored(model: PreTrainedModel) -> dict:
    found = getattr(model.config, "quantization_config", None)
    return {} if found is None else found.to_dict()


def same_when_loaded(model: PreTrainedModel, folder: Path) -> None:
    """As `cells` has it, but for the order of sums: widths that are no multiple of 8 start at odd addresses."""
    model.save_pretrained(folder)
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not any(info.values())
    assert {name: p.shape for name, p in loaded.state_dict().items()} == {
        name: p.shape for name, p in model.state_dict().items()
    }
    torch.testing.assert_close(cells.logits(loaded), cells.logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", architectures.KINDS)
def test_the_same_width_everywhere_is_a_plain_checkpoint(name, tmp_path):
    model = trimmed(name, "neuron", lambda number: 8)
    assert stored(model) == {}
    cells._same_when_loaded(model, tmp_path)


@pytest.mark.parametrize("name", architectures.KINDS)
def test_different_widths_are_stored(name, tmp_path):
    model = trimmed(name, "neuron", lambda number: 5 + 3 * (number % 3))
    assert stored(model)["shapes"]
    same_when_loaded(model, tmp_path)
    hf_slim.compress(model, "quantize.rtn", bits=8, group_size=None, symmetric=True)
    same_when_loaded(model, tmp_path / "encoded")
    shapes = stored(model)["shapes"]
    model.dequantize()
    assert stored(model)["shapes"] == shapes
    same_when_loaded(model, tmp_path / "dense")


@pytest.mark.parametrize("name", architectures.KINDS)
def test_fewer_blocks_are_a_plain_checkpoint(name, tmp_path):
    model = architectures.make(name)
    for stack in find_stacks(model):
        keep_blocks(model, stack, [0] if name == "T5" else [1])
    mark(model)
    assert stored(model) == {}
    cells._same_when_loaded(model, tmp_path)


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Phi-3", "GPT-2", "BERT", "Falcon"])
@pytest.mark.parametrize("count", [lambda number: 1, lambda number: number], ids=["even", "uneven"])
def test_fewer_heads_load(name, count, tmp_path):
    model = trimmed(name, "head", count)
    plain = name in ("Llama", "Qwen2", "Phi-3") and count(0) == count(1)
    assert (stored(model) == {}) == plain
    cells._same_when_loaded(model, tmp_path)
    if model.can_generate():
        loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager")
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        ids, mask = cells.IDS, torch.ones_like(cells.IDS)
        with_cache = loaded.generate(ids, attention_mask=mask, **options)
        assert torch.equal(with_cache, loaded.generate(ids, attention_mask=mask, use_cache=False, **options))


def test_blocks_keep_their_cache_apart_after_loading(tmp_path):
    model = architectures.make("Gemma 2")  # one block looks at 8 tokens, the other at all
    keep_blocks(model, find_stacks(model)[0], [1])
    mark(model)
    assert model.config.layer_types == ["full_attention"]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids, mask = cells.IDS, torch.ones_like(cells.IDS)
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(loaded.generate(ids, attention_mask=mask, **options), expected)


def test_a_model_pruned_evenly_loads_without_hf_slim(tmp_path):
    model = trimmed("Qwen2", "head", lambda number: 1)
    with unfused(model):
        for units in find_units(model, ("neuron",)):
            remove_units(model, units, torch.arange(len(units)) >= 16)
    mark(model)
    model.save_pretrained(tmp_path)
    torch.save(cells.logits(model), tmp_path / "logits.pt")
    code = f"""
import sys
sys.modules["hf_slim"] = None
import torch, transformers
model, info = transformers.AutoModelForCausalLM.from_pretrained(
    {str(tmp_path)!r}, output_loading_info=True, attn_implementation="eager")
assert not any(info.values()), info
out = model(torch.tensor({cells.IDS.tolist()})).logits
assert torch.allclose(out, torch.load({str(tmp_path / "logits.pt")!r}), atol=1e-5)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_what_the_config_says_alone_is_changed():
    model = architectures.make("Llama")
    before = model.config.to_dict()
    mark(model)
    assert model.config.to_dict() == before
    model = trimmed("Llama", "neuron", lambda number: 16)
    changed = {key for key, value in model.config.to_dict().items() if value != before[key]}
    assert changed == {"intermediate_size"}
    model = trimmed("Llama", "neuron", lambda number: 8 * number)
    assert stored(model)
    assert model.config.intermediate_size == before["intermediate_size"]


@pytest.mark.parametrize(
    ("name", "kept", "hint"),
    [("Llama", [], "ascending"), ("Llama", [1, 0], "ascending"), ("Llama", [2], "0 to 1"), ("T5", [1], "first")],
)
def test_blocks_that_cannot_go_are_refused_before_anything_changes(name, kept, hint):
    model = architectures.make(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(PlanError, match=hint if name != "T5" else "relative_attention_bias"):
        keep_blocks(model, find_stacks(model)[0], kept)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_blocks_that_were_cut_by_hand_are_named():
    model = architectures.make("Gemma 2")
    del model.model.layers[0]
    with pytest.raises(ModelError, match="keep_blocks"):
        mark(model)


def test_formats_with_one_shape_for_all_refuse_others_by_name():
    even = trimmed("Llama", "neuron", lambda number: 8)
    assert shape_problems(find_layers(even).values(), even, "GGUF") == []
    uneven = trimmed("Llama", "neuron", lambda number: 8 * number)
    (problem,) = shape_problems(find_layers(uneven).values(), uneven, "GGUF")
    assert "model.layers.1.mlp.gate_proj" in problem
    for method in ("export.gguf", "export.compressed_tensors"):
        with pytest.raises(PlanError, match=r"layers\.1\.mlp\.gate_proj"):
            hf_slim.compress(uneven, method, to=str(Path("nowhere")))


def test_experts_of_different_sizes_and_fewer_experts(tmp_path):
    model = architectures.make("Mixtral")
    block = model.model.layers[0].mlp
    for name in ("gate_up_proj", "down_proj"):
        setattr(block.experts, name, torch.nn.Parameter(getattr(block.experts, name)[:3].clone()))
    block.gate.weight = torch.nn.Parameter(block.gate.weight[:3].clone())
    block.experts.num_experts = block.gate.num_experts = 3
    mark(model)
    assert stored(model)["numbers"]["model.layers.0.mlp.experts"] == {"num_experts": 3}
    cells._same_when_loaded(model, tmp_path)
