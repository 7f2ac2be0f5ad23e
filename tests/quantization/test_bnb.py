"""bitsandbytes as a stage: the same model as Transformers' own loading gives, saved and loaded as a stock artifact."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import hf_slim
from hf_slim.core.errors import PlanError, RecipeError
from hf_slim.core.reshape import cut_layer
from hf_slim.core.select import find_layers
from hf_slim.core.size import stored_bytes
from hf_slim.core.stage import make_stage
from hf_slim.integration import bitsandbytes as bnb
from hf_slim.plan import order_problems

STOCK = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


def same_state(a, b) -> None:
    here, there = a.state_dict(), b.state_dict()
    assert here.keys() == there.keys()
    for name in here:
        assert here[name].dtype == there[name].dtype, name
        assert torch.equal(here[name], there[name]), name


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_the_stage_gives_what_loading_with_the_config_gives(architecture, format, tmp_path):
    dense = tiny.CAUSAL[architecture]()
    folder = tiny.save(dense, tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(folder, quantization_config=STOCK[format])
    bnb.keep_layout(stock)
    hf_slim.compress(dense, "quantize.bnb", format=format)
    same_state(dense, stock)
    assert torch.equal(tiny.logits(dense), tiny.logits(stock))
    assert not torch.equal(tiny.logits(dense), tiny.logits(tiny.CAUSAL[architecture]()))


@pytest.mark.parametrize("options", [{}, {"double_quant": True}, {"format": "int8"}])
def test_the_artifact_is_a_stock_one_and_loads_with_the_same_logits(options, tmp_path):
    model = tiny.llama(torch.bfloat16)
    hf_slim.compress(model, "quantize.bnb", layers={"exclude": ["layers.0.*"]}, **options)
    before = tiny.logits(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    bnb.keep_layout(loaded)
    assert loaded.config.quantization_config.quant_method == "bitsandbytes"
    same_state(model, loaded)
    assert torch.equal(tiny.logits(loaded), before)
    assert type(loaded.model.layers[0].mlp.up_proj) is torch.nn.Linear


@pytest.mark.parametrize("options", [{}, {"double_quant": True}, {"format": "int8"}])
def test_bytes_are_counted_from_storage_and_planned_within_a_description(options):
    model = tiny.llama()
    planned = find_method_plan(model, options)
    before = stored_bytes(model)
    report = hf_slim.compress(model, "quantize.bnb", **options)
    saved = before - stored_bytes(model)
    assert saved == sum(row.bytes_before - row.bytes for row in report.layers) > 0
    for row in report.layers:
        assert 0 <= row.bytes - planned[row.name].nbytes < 300
        assert 0 < row.error < 0.02


def find_method_plan(model, options):
    from hf_slim.quantization import bnb as method

    return method.plan(find_layers(model), method.Config(**options), model)


def test_a_model_with_encoded_layers_is_refused_before_anything_changes():
    model = tiny.llama()
    hf_slim.compress(model, "quantize.rtn", layers={"include": ["down_proj"]}, group_size=8)
    before = tiny.logits(model)
    with pytest.raises(PlanError, match=r"down_proj is already stored as 4-bit g8; .* leave the earlier stage out"):
        hf_slim.compress(model, "quantize.bnb", layers={"include": ["up_proj"]})
    assert torch.equal(tiny.logits(model), before)


def test_a_model_of_uneven_widths_is_refused_before_anything_changes():
    model = tiny.llama()
    for name, rows, cols in (("gate_proj", True, False), ("up_proj", True, False), ("down_proj", False, True)):
        kept = torch.arange(16)
        cut_layer(model, f"model.layers.0.mlp.{name}", kept if rows else None, kept if cols else None)
    before = tiny.logits(model)
    with pytest.raises(PlanError, match="bitsandbytes has one shape for all"):
        hf_slim.compress(model, "quantize.bnb")
    assert torch.equal(tiny.logits(model), before)


def test_nothing_but_measuring_may_follow():
    stages = tuple(make_stage(name) for name in ("quantize.bnb", "quantize.rtn", "evaluate.perplexity"))
    problems = order_problems(stages)
    assert len(problems) == 1
    assert "quantize.rtn, cannot follow stage 1, quantize.bnb" in problems[0]


def test_options_of_the_other_format_are_refused():
    with pytest.raises(RecipeError, match="double_quant cannot be set with format: int8"):
        make_stage("quantize.bnb", {"format": "int8", "double_quant": True})


def test_a_missing_package_is_one_clear_message(monkeypatch):
    monkeypatch.setattr(bnb, "is_bitsandbytes_available", lambda: False)
    for stage in (("quantize.bnb", {}), ("distill.logits", {"teacher_quantization": "nf4"})):
        with pytest.raises(PlanError, match=r"pip install 'bitsandbytes>=0\.48'"):
            hf_slim.compress(tiny.llama(), stage[0], data=tiny.ids(), original=tiny.llama(), **stage[1])


def test_perplexity_of_the_compressed_model_leaves_its_codes_alone():
    model = tiny.llama(torch.bfloat16)
    hf_slim.compress(model, "quantize.bnb")
    codes = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = hf_slim.compress(model, "evaluate.perplexity", data=tiny.ids(), original=tiny.llama(torch.bfloat16))
    assert report.metrics
    assert all(torch.equal(tensor, codes[name]) for name, tensor in model.state_dict().items())
    assert model.config.quantization_config.quant_method == "bitsandbytes"
