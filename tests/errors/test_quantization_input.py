"""What quantization cannot do, or does in another way than asked, is said in the error, the plan or the report."""

from __future__ import annotations

import pytest
import tiny
import torch

import hf_slim
from hf_slim.core.context import Context
from hf_slim.core.errors import ModelError, PlanError
from hf_slim.core.model import ModelSource
from hf_slim.plan import make_plan
from hf_slim.quantization import gptq
from hf_slim.recipe import Recipe

IDS = tiny.ids()


def test_groups_that_do_not_divide_are_noted_in_the_plan(tmp_path):
    folder = tiny.save(tiny.llama(), tmp_path)
    stages = [{"quantize.rtn": {"group_size": 16}}]
    plan = make_plan(Recipe.model_validate({"model": folder, "stages": stages}), ModelSource(folder))
    (odd, wide) = plan.notes
    assert "12 layers have 40 columns, no multiple of group_size 16: the last group of a row holds 8" in odd
    assert "2 layers have 72 columns" in wide
    fitting = Recipe.model_validate({"model": folder, "stages": [{"quantize.rtn": {"group_size": 8}}]})
    assert make_plan(fitting, ModelSource(folder)).notes == ()


def test_hessians_that_stay_singular_are_counted(monkeypatch):
    def singular(*args, **kwargs):
        raise gptq.SingularHessian("not positive definite with damping 1")

    monkeypatch.setattr(gptq, "factor", singular)
    model, rounded = tiny.llama(), tiny.llama()
    report = hf_slim.compress(model, "quantize.gptq", data=IDS, group_size=8)
    assert report.metrics["rounded_to_nearest"] == 14 == len(report.notes)
    assert "q_proj: rounded to nearest: not positive definite" in report.notes[0]
    hf_slim.compress(rounded, "quantize.rtn", group_size=8)
    for name, tensor in rounded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_a_healthy_model_counts_no_fallback():
    assert hf_slim.compress(tiny.llama(), "quantize.gptq", data=IDS, group_size=8).metrics == {"rounded_to_nearest": 0}


def test_activations_that_break_name_layer_and_batch(monkeypatch):
    monkeypatch.setattr("hf_slim.core.capture.BATCH_TOKENS", 16)
    model = tiny.gpt2()
    model.transformer.wte.weight.data[int(IDS[2, 5])] = float("nan")
    first = next(i for i, window in enumerate(IDS) if int(IDS[2, 5]) in window)
    with torch.no_grad():  # the table itself is not compressed, so that only activations can tell
        assert not torch.isfinite(model(input_ids=IDS).logits).all()
    with pytest.raises(ModelError, match=rf"h\.0\.attn\.c_attn is fed NaN .* by calibration batch {first}"):
        gptq.apply(model, gptq.Config(group_size=8), Context(windows=lambda role: IDS))


@pytest.mark.parametrize("second", ["quantize.rtn", "quantize.gptq"])
def test_quantizing_what_is_quantized_is_refused(second):
    model = tiny.llama()
    hf_slim.compress(model, "quantize.rtn", group_size=8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(PlanError, match="already stored as 4-bit"):
        hf_slim.compress(model, second, data=IDS, group_size=8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
