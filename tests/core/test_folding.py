"""Folds are found on every architecture without its name, and leave what the model computes as it was."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Phi3Config, Phi3ForCausalLM

from hf_slim.core import folding
from hf_slim.core.folding import find_folds, fold, put_weight, storable
from hf_slim.core.layers import targets
from hf_slim.core.select import Select, find_layers
from hf_slim.quantization import rtn

IDS = tiny.ids(2, 16)
SHAPE = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


def gemma():
    """Norms multiply by 1 + weight, and there are norms whose output only a residual reads."""
    return Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=16)).eval()


def phi():
    """q, k and v are one layer, gate and up another."""
    return Phi3ForCausalLM(Phi3Config(**SHAPE, eos_token_id=1, bos_token_id=1)).eval()


MODELS = tiny.ALL | {"gemma": gemma, "phi": phi}


def make(name, seed=0):
    """A model whose norms and biases are not those of a fresh one."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def folds_of(model, exclude=()):
    config = rtn.Config(layers=Select(exclude=exclude))
    return find_folds(model, targets(find_layers(model), rtn, config), IDS)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def apply_folds(model, folds, strength=1.0):
    """Fold random scales everywhere."""
    generator = torch.Generator().manual_seed(7)
    for block, found in folds.items():
        module = model.get_submodule(block)
        random = [(f, torch.exp(strength * torch.randn(len(f.channels), generator=generator))) for f in found]
        result = fold(module, [(f, f.shared(scales, "mean")) for f, scales in random])
        for name, W in result.weights.items():
            put_weight(module, name, W)
        for name, value in result.dense.items():
            module.get_parameter(name).data.copy_(value)


def described(folds):
    """{source: (kind, consumers)} of the first block, by the last parts of names."""

    def last(name):
        return name.rpartition(".")[2]

    return {last(f.source): (f.kind, {last(name) for name in f.consumers}) for f in next(iter(folds.values()))}


LLAMA = {
    "input_layernorm": ("norm", {"q_proj", "k_proj", "v_proj"}),
    "post_attention_layernorm": ("norm", {"gate_proj", "up_proj"}),
    "v_proj": ("linear", {"o_proj"}),
    "up_proj": ("linear", {"down_proj"}),
}
EXPECTED = {
    "llama": LLAMA,
    "gpt2": {"ln_1": ("norm", {"c_attn"}), "ln_2": ("norm", {"c_fc"}), "c_attn": ("linear", {"c_proj"})},
    "opt": {
        "self_attn_layer_norm": ("norm", {"q_proj", "k_proj", "v_proj"}),
        "final_layer_norm": ("norm", {"fc1"}),
        "v_proj": ("linear", {"out_proj"}),
        "fc1": ("linear", {"fc2"}),
    },
    "bert": {"value": ("linear", {"dense"})},
    "bert_classifier": {"value": ("linear", {"dense"})},
    "gemma": {
        "input_layernorm": ("one_plus", {"q_proj", "k_proj", "v_proj"}),
        "pre_feedforward_layernorm": ("one_plus", {"gate_proj", "up_proj"}),
        "v_proj": ("linear", {"o_proj"}),
        "up_proj": ("linear", {"down_proj"}),
    },
    "phi": {
        "input_layernorm": ("norm", {"qkv_proj"}),
        "post_attention_layernorm": ("norm", {"gate_up_proj"}),
        "qkv_proj": ("linear", {"o_proj"}),
        "gate_up_proj": ("linear", {"down_proj"}),
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_fold_is_found_and_changes_nothing(name):
    model, original = make(name), make(name)
    folds = folds_of(model)
    assert len(folds) == 2
    assert described(folds) == EXPECTED[name]
    assert torch.equal(logits(model), logits(original)), "looking for folds leaves the model alone"
    apply_folds(model, folds)
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True)]
    assert sum(moved) >= 4
    expected = logits(original)
    assert (logits(model) - expected).norm() < 1e-4 * expected.norm()


def test_grouped_heads_share_the_scales_of_their_value_channels():
    model = make("llama")
    (found,) = (f for f in folds_of(model)["model.layers.1"] if f.source == "self_attn.v_proj")
    heads = torch.arange(20).view(2, 1, 10).expand(2, 2, 10).flatten()  # 4 heads of 10 channels, 2 of them stored
    assert torch.equal(found.channels, heads)
    values = torch.rand(40)
    assert torch.allclose(found.shared(values, "amax"), values.view(2, 2, 10).amax(1).flatten())
    assert torch.allclose(found.shared(values, "mean"), values.view(2, 2, 10).mean(1).flatten())


def test_only_the_value_rows_of_a_fused_layer_are_scaled():
    found = {f.source: f for f in folds_of(make("gpt2"))["transformer.h.0"]}["attn.c_attn"]
    scales = found.shared(torch.full((48,), 2.0), "mean")
    assert scales.tolist() == [1.0] * 96 + [2.0] * 48


@pytest.mark.parametrize(
    ("excluded", "lost"),
    [("k_proj", {"input_layernorm"}), ("v_proj", {"input_layernorm", "v_proj"}), ("down_proj", {"up_proj"})],
)
def test_layers_left_out_take_their_folds_with_them(excluded, lost):
    """A norm that a layer reads which must not change cannot be folded into; nor can that layer be a source."""
    assert described(folds_of(make("llama"), (excluded,))) == {k: v for k, v in LLAMA.items() if k not in lost}


class Gated(torch.nn.Module):
    """An MLP beside which its input takes another way."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x) + x.sigmoid()


def test_a_second_reader_forbids_the_fold():
    model = make("llama")
    for layer in model.model.layers:
        layer.mlp = Gated(layer.mlp)
    assert described(folds_of(model)) == {k: v for k, v in LLAMA.items() if k != "post_attention_layernorm"}


def test_parameters_used_twice_are_left_alone():
    model = make("llama")
    first, second = model.model.layers
    second.input_layernorm.weight = first.input_layernorm.weight
    assert described(folds_of(model)).keys() == LLAMA.keys() - {"input_layernorm"}


def test_the_proof_is_what_decides(monkeypatch):
    """Without it a norm would be taken that a residual reads as well."""
    assert "LayerNorm" not in described(folds_of(make("bert")))
    monkeypatch.setattr(folding, "_proved", lambda probe, found: True)
    assert "LayerNorm" in described(folds_of(make("bert")))


@pytest.mark.parametrize("kind", ["norm", "one_plus"])
def test_rounding_a_norm_is_made_up_for_by_the_scales(kind):
    weight, wanted = torch.randn(64), torch.rand(64) + 0.5
    weight[3] = -1.0 if kind == "one_plus" else 0.0  # puts out zero whatever the scale
    new, scales = storable(weight, wanted, kind, torch.bfloat16)
    assert torch.equal(new, new.bfloat16().float())
    one = 1.0 if kind == "one_plus" else 0.0
    torch.testing.assert_close((one + new) * scales, one + weight, rtol=1e-5, atol=1e-6)
    far = (scales / wanted - 1).abs()
    assert far[3] == 0
    assert 0 < far.median() < 2**-8
