"""SmoothQuant: the paper's scales, far better than plain 8 bits where activations have outliers, resumable."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import tiny
import torch

from hf_slim import compress
from hf_slim.core.context import Context
from hf_slim.core.errors import ModelError
from hf_slim.core.swap import get_weight
from hf_slim.quantization import scaling, smoothquant

IDS = tiny.ids(12, 32, seed=1)
HELD_OUT = tiny.ids(4, 32, seed=2)
output_error = partial(tiny.output_error, tokens=HELD_OUT)


def with_outliers(name, dtype=torch.float32):
    """Some channels of every norm are far larger, and the weights that read them far smaller, as in real models."""
    model = tiny.ALL[name](dtype)
    generator = torch.Generator().manual_seed(5)
    for key, parameter in model.named_parameters():
        if parameter.dim() == 1 and key.endswith("weight") and ".1." in key:
            large = torch.randperm(len(parameter), generator=generator)[:2]
            parameter.data[large] *= 100
            for name_below, layer in model.named_modules():
                if name_below.endswith(READERS[key.split(".")[-2]]) and ".1." in name_below:
                    get_weight(layer)[:, large] /= 100
    return model


READERS = {
    "input_layernorm": ("q_proj", "k_proj", "v_proj"),
    "post_attention_layernorm": ("gate_proj", "up_proj"),
    "self_attn_layer_norm": ("q_proj", "k_proj", "v_proj"),
    "final_layer_norm": ("fc1",),
    "ln_1": ("c_attn",),
    "ln_2": ("c_fc",),
}


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_scales_are_those_of_the_paper(alpha):
    x_max, w_max = torch.rand(20) + 0.1, torch.rand(20) + 0.1
    expected = x_max.numpy() ** alpha / w_max.numpy() ** (1 - alpha)
    np.testing.assert_allclose(smoothquant.smoothing(x_max, w_max, alpha).numpy(), expected, rtol=1e-5)
    if alpha == 0.5:  # inputs and weights come out equally large
        torch.testing.assert_close(x_max / torch.from_numpy(expected), w_max * torch.from_numpy(expected))
    x_max[3], w_max[5] = 0, 0
    scales = smoothquant.smoothing(x_max, w_max, alpha)
    assert scales[3] == scales[5] == 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_outliers_cost_far_less_than_in_plain_8_bits(monkeypatch, name):
    errors = {}
    for smoothed in (True, False):
        model = with_outliers(name)
        if not smoothed:
            monkeypatch.setattr(scaling, "judge", lambda block, trials: [1.0, 2.0])
        report = compress(model, "quantize.smoothquant", data=IDS)
        errors[smoothed] = output_error(model, with_outliers(name))
        assert {row.encoding for row in report.layers} == {"8-bit row sym, int8 activations"}
    assert errors[True] < 0.2 * errors[False]


def test_maxima_are_those_of_all_calibration_tokens(monkeypatch):
    """The norm's new weight is the old one over the scales that the inputs' and weights' maxima give."""
    monkeypatch.setattr(scaling, "judge", lambda block, trials: [2.0, 1.0])
    model, original = with_outliers("llama"), with_outliers("llama")
    seen = []
    attention = original.model.layers[0].self_attn
    attention.q_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].abs().flatten(0, 1).amax(0)))
    with torch.no_grad():
        original(input_ids=IDS)
    W = torch.cat([get_weight(getattr(attention, f"{x}_proj")) for x in "qkv"])
    expected = smoothquant.smoothing(seen[0], W.abs().amax(0))
    compress(model, "quantize.smoothquant", data=IDS, layers={"exclude": ["layers.1.*"]})
    found = original.model.layers[0].input_layernorm.weight / model.model.layers[0].input_layernorm.weight
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_activations_that_are_not_finite_name_the_layer():
    model = tiny.llama()
    model.model.layers[1].input_layernorm.weight.data[3] = float("nan")
    with pytest.raises(ModelError, match=r"model\.layers\.1\.self_attn\.q_proj is fed NaN or infinite"):
        compress(model, "quantize.smoothquant", data=IDS)


def test_without_folds_it_is_plain_8_bits_and_says_so():
    report = compress(tiny.bert(), "quantize.smoothquant", data=IDS, layers={"include": ["intermediate.dense"]})
    assert [note.split(": ")[1] for note in report.notes] == ["no scales"] * 2
    assert all(row.error < 1e-3 for row in report.layers)


def test_a_kept_walk_is_restored_with_its_norms(tmp_path, monkeypatch):
    def walked(model):
        return smoothquant.apply(model, smoothquant.Config(), Context(windows=lambda role: IDS, blocks=tmp_path)).layers

    first, second = with_outliers("llama", torch.bfloat16), with_outliers("llama", torch.bfloat16)
    rows = walked(first)
    monkeypatch.setattr(smoothquant, "encode", None)
    assert walked(second) == rows
    for key, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[key]), key
    norm = "model.layers.1.input_layernorm.weight"
    assert not torch.equal(first.state_dict()[norm], with_outliers("llama", torch.bfloat16).state_dict()[norm])
