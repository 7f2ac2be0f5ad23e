"""Removing channels of the residual stream: what stays must compute what it did, in every architecture that can."""

from __future__ import annotations

import architectures
import pytest
import tiny
import torch
from torch import Tensor

import hf_slim
from hf_slim.core.errors import PlanError
from hf_slim.core.experts import unfused
from hf_slim.core.forward import run_on
from hf_slim.core.select import find_layers
from hf_slim.pruning import channels, width

IDS = tiny.ids(4, 12)
PINNED = ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma 2", "Gemma 3", "Phi-3", "Mixtral", "Qwen3-MoE", "T5")
FOLLOWING = tuple(name for name in architectures.KINDS if name not in PINNED)
GONE = torch.tensor([1, 6, 8, 13, 17, 22, 27, 30])  # a quarter of the 32 channels, none at a special place


def _logits(model) -> Tensor:
    with torch.no_grad():
        return run_on(model.eval(), IDS).logits


@torch.no_grad()
def _silence(model) -> None:
    """Channels that nothing writes: zero in every tensor that holds them, norms' weights apart."""
    with unfused(model):
        cut = channels.plan_cut(model, 0.25, 1)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            for axis in cut.axes.get(name, ()):
                if parameter.dim() > 1:
                    parameter.index_fill_(axis, GONE, 0.0)
                else:
                    parameter.uniform_(0.5, 1.5)


@pytest.mark.parametrize("name", PINNED)
def test_channels_that_are_zero_everywhere_go_first_and_change_nothing(name: str) -> None:
    model = architectures.make(name)
    _silence(model)
    before = _logits(model)
    report = hf_slim.compress(model, "prune.width", data=IDS, share=0.25)
    assert report.metrics["width"] == model.config.get_text_config().hidden_size == 24
    assert report.metrics["importance_kept"] == pytest.approx(1.0)
    assert torch.allclose(_logits(model), before, atol=2e-4 * float(before.abs().max()))


def test_without_rescaling_the_same_removal_changes_the_outputs() -> None:
    model = architectures.make("Llama")
    _silence(model)
    before = _logits(model)
    hf_slim.compress(model, "prune.width", data=IDS, share=0.25, rescale=False)
    assert not torch.allclose(_logits(model), before, atol=1e-2 * float(before.abs().max()))


@pytest.mark.parametrize("name", FOLLOWING)
def test_attention_as_wide_as_the_hidden_size_is_refused_by_name(name: str) -> None:
    model = architectures.make(name)
    before = _logits(model)
    with pytest.raises(PlanError, match="the width of its attention follows the hidden size"):
        hf_slim.compress(model, "prune.width", data=IDS)
    assert torch.equal(_logits(model), before)


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Mixtral", "Gemma 2"])
def test_a_narrow_model_is_a_plain_one(name: str, tmp_path) -> None:
    model = architectures.make(name)
    hf_slim.compress(model, "prune.width", data=IDS, share=0.25)
    model.save_pretrained(tmp_path)
    assert not hasattr(model.config, "quantization_config")
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(_logits(loaded), _logits(model))


def test_importance_is_the_papers() -> None:
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    expected = [sum((sum(abs(float(x[w, t, j])) for t in range(5)) / 5) ** 2 for w in range(3)) for j in range(4)]
    assert width.importance(x).tolist() == pytest.approx(expected, rel=1e-5)


def test_spread_is_what_the_norms_divide_by() -> None:
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(0)) + 2
    rms, layer_norm = torch.nn.RMSNorm(16, eps=0.0), torch.nn.LayerNorm(16, eps=0.0)
    assert torch.allclose(rms(x), x / width.spread(x, False)[:, None], atol=1e-5)
    assert torch.allclose(layer_norm(x), (x - x.mean(-1, True)) / width.spread(x, True)[:, None], atol=1e-5)


@pytest.mark.parametrize("name", ["Llama", "Mixtral", "T5"])
def test_the_plan_foresees_every_shape(name: str) -> None:
    model = architectures.make(name)
    with unfused(model):
        layers = find_layers(model)
        planned = layers | width.plan(layers, width.Config(share=0.25), model)
    hf_slim.compress(model, "prune.width", data=IDS, share=0.25)
    with unfused(model):
        found = find_layers(model)
    assert {n: (x.rows, x.cols) for n, x in found.items()} == {n: (x.rows, x.cols) for n, x in planned.items()}


def test_the_width_is_one_that_the_config_accepts_and_a_multiple() -> None:
    for multiple, expected in ((1, 20), (8, 16)):  # 40 channels, 4 heads: 18 is no multiple of the heads
        model = tiny.llama()
        hf_slim.compress(model, "prune.width", data=IDS, share=0.55, multiple_of=multiple)
        assert model.config.hidden_size == expected
        assert model.config.head_dim == 10


def test_pruned_layers_stay_sparse() -> None:
    model = tiny.llama()
    hf_slim.compress(model, "prune.magnitude", sparsity=0.5)
    hf_slim.compress(model, "prune.width", data=IDS, share=0.2)
    layers = [layer for layer in find_layers(model).values() if layer.block]
    assert all(layer.survivors is not None for layer in layers)
    assert _logits(model).isfinite().all()


def test_what_cannot_be_done_is_said_before_anything_is_changed() -> None:
    model = tiny.llama()
    hf_slim.compress(model, "quantize.rtn", bits=8)
    before = _logits(model)
    with pytest.raises(PlanError) as raised:
        hf_slim.compress(model, "prune.width", data=IDS)
    assert len(raised.value.problems) == sum(layer.block is not None for layer in find_layers(model).values())
    assert "its channels cannot be cut; prune the dense model" in str(raised.value)
    with pytest.raises(PlanError, match="narrower than 40 channels in steps of 64"):
        hf_slim.compress(tiny.llama(), "prune.width", data=IDS, multiple_of=64)
    assert torch.equal(_logits(model), before)
