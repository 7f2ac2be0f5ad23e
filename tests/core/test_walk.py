"""The loop over blocks: its statistics are those of the full model, whatever the architecture, batch or process."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

import hf_slim
from hf_slim.core import capture, forward, statistics
from hf_slim.core import walk as walking
from hf_slim.core.context import Context
from hf_slim.core.errors import DataError, ModelError
from hf_slim.core.layers import targets
from hf_slim.core.select import Select, find_layers
from hf_slim.core.swap import get_weight
from hf_slim.core.walk import Solution
from hf_slim.encodings.modules import EncodedModule
from hf_slim.quantization import gptq, rtn

IDS = tiny.ids(6, 16)


def chosen(model, include=None, exclude=()):
    return targets(find_layers(model), rtn, rtn.Config(layers=Select(include=include, exclude=exclude)))


def oracle(model, names, ids):
    """H = 2/n XᵀX of each layer's input, by hooks on the whole model, all windows at once, in float64."""
    found = {}

    def keep(name):
        def hook(module, args):
            x = args[0].detach().double().reshape(-1, args[0].shape[-1])
            found[name] = 2 / len(x) * x.T @ x

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return found


def gather(model, layers, ids=IDS, **options):
    """Statistics of a walk that replaces nothing."""
    found = {}
    walking.walk(model, layers, ids, lambda known, block: found.update(known) or {}, Context(), **options)
    return found


def assert_close(hessian, expected, tolerance=1e-5):
    assert (hessian.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("include", [None, ("*",)], ids=["blocks", "all"])
@pytest.mark.parametrize("name", tiny.ALL)
def test_statistics_are_those_of_the_full_model(name, include):
    model = tiny.llama(tied=False) if name == "llama" else tiny.ALL[name]()
    layers = chosen(model, include)
    found = gather(model, layers)
    expected = oracle(model, [layer.name for layer in layers], IDS)
    assert found.keys() == expected.keys() == {layer.name for layer in layers}
    for layer, known in found.items():
        assert_close(known.hessian, expected[layer])


@pytest.mark.parametrize(
    ("make", "outside"),
    [
        (lambda: tiny.llama(tied=False), {"lm_head"}),
        (tiny.bert, {"cls.predictions.transform.dense"}),
        (tiny.bert_classifier, {"bert.pooler.dense", "classifier"}),
    ],
    ids=["untied llama", "bert", "classifier"],
)
def test_layers_outside_blocks_take_part_when_named(make, outside):
    model = make()
    found = gather(model, chosen(model, ("*",)))
    assert {name for name in found if find_layers(model)[name].block is None} == outside


def test_layers_with_one_input_share_one_hessian():
    found = gather(model := tiny.llama(), chosen(model))
    for layer in range(2):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        q, k, v, o = (found[f"{attention}.{x}_proj"].hessian for x in "qkvo")
        assert q is k is v
        assert q is not o
        assert found[f"{mlp}.gate_proj"].hessian is found[f"{mlp}.up_proj"].hessian
    assert len({id(known.hessian) for known in found.values()}) == 8


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_squares_alone_are_the_diagonal_of_the_hessian(name):
    model = tiny.ALL[name]()
    whole, alone = gather(model, chosen(model)), gather(model, chosen(model), squares=True)
    for layer, known in whole.items():
        torch.testing.assert_close(alone[layer].squares, known.hessian.diagonal())
        assert torch.equal(known.squares, known.hessian.diagonal())
        assert alone[layer].tokens == known.tokens
        with pytest.raises(RuntimeError, match="only the diagonal"):
            _ = alone[layer].hessian


@pytest.mark.parametrize("name", tiny.ALL)
def test_later_blocks_see_what_the_compressed_ones_put_out(name):
    """At every block the statistics are those of the model as it is then: earlier blocks replaced, this one not."""
    model = tiny.ALL[name]()
    config = rtn.Config(bits=2)
    layers = {layer.name: layer for layer in chosen(model, ("*",))}
    dense = oracle(model, layers, IDS)
    moved = {}

    def solve(known, block):
        expected = oracle(model, known, IDS)
        for layer, found in known.items():
            assert_close(found.hessian, expected[layer], 1e-4)
            moved[layer] = (expected[layer] - dense[layer]).norm() / dense[layer].norm()
        return {n: Solution(rtn.encode(get_weight(model.get_submodule(n)), layers[n], config, None), {}) for n in known}

    walking.walk(model, list(layers.values()), IDS, solve, Context())
    assert moved.keys() == layers.keys()
    later = [shift for layer, shift in moved.items() if ".1." in layer]
    assert later
    assert min(later) > 1e-3  # else the assertions above could not tell the two apart
    assert all(isinstance(model.get_submodule(layer), EncodedModule) for layer in layers)


def test_batching_does_not_matter(monkeypatch):
    model = tiny.llama()
    whole = gather(model, chosen(model))
    for tokens in (1, 48):  # a window at a time; three
        monkeypatch.setattr(capture, "BATCH_TOKENS", tokens)
        for name, known in gather(model, chosen(model)).items():
            assert known.tokens == whole[name].tokens == IDS.numel()
            assert_close(known.hessian, whole[name].hessian.double())


def test_tiles_of_a_wide_hessian_make_up_the_whole(monkeypatch):
    monkeypatch.setattr(statistics, "TILE", 7)
    model = tiny.opt()
    expected = oracle(model, [layer.name for layer in chosen(model)], IDS)
    for name, known in gather(model, chosen(model)).items():
        assert_close(known.hessian, expected[name])
        assert torch.equal(known.hessian, known.hessian.T)


def test_blocks_may_be_handed_different_arguments():
    """Sliding windows on some layers: every block gets its own mask, not the first one's."""
    config = Gemma2Config(
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    expected = oracle(model, [layer.name for layer in chosen(model)], IDS)
    for name, known in gather(model, chosen(model)).items():
        assert_close(known.hessian, expected[name])


def test_layer_never_reached_is_named():
    model = tiny.llama()
    model.model.layers[1].mlp.spare = torch.nn.Linear(40, 40)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.spare was never reached.*layers\.exclude"):
        gather(model, chosen(model))
    assert gather(model, chosen(model, exclude=("spare",))).keys() < find_layers(model).keys()


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_activations_that_are_not_finite_name_the_block(block, value):
    model = tiny.llama()
    model.model.layers[block].post_attention_layernorm.weight.data[3] = value
    with pytest.raises(ModelError, match=rf"model\.layers\.{block}\b.*NaN or infinite"):
        hf_slim.compress(model, "quantize.gptq", data=IDS, group_size=None)
    encoded = [name for name, m in model.named_modules() if isinstance(m, EncodedModule)]
    assert not any(f"layers.{block}." in name for name in encoded), "the block itself is left as it was"


def test_no_windows_is_an_error():
    model = tiny.llama()
    with pytest.raises(DataError, match="empty"):
        gather(model, chosen(model), IDS[:0])


@pytest.mark.parametrize("failing", [False, True], ids=["finished", "failed"])
def test_computing_in_float32_leaves_no_trace(monkeypatch, failing):
    monkeypatch.setattr(forward, "fast_dtype", lambda dtype, device: torch.float32)
    model = tiny.llama(torch.bfloat16).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen = []

    def solve(known, block):
        seen.extend({p.dtype for p in model.parameters()})
        if failing:
            raise ZeroDivisionError
        return {}

    if failing:
        with pytest.raises(ZeroDivisionError):
            walking.walk(model, chosen(model), IDS, solve, Context())
    else:
        walking.walk(model, chosen(model), IDS, solve, Context())
    assert set(seen) == {torch.float32}
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, before[name])


def gptq_walk(model, folder):
    """Report rows of GPTQ, with finished blocks kept in a folder."""
    return gptq.apply(model, gptq.Config(group_size=16), Context(windows=lambda role: IDS, blocks=folder)).layers


def test_a_kept_walk_is_restored_with_the_same_numbers(tmp_path, monkeypatch):
    """A second walk over kept blocks solves nothing and ends with the same weights and reports."""
    first, second = tiny.gpt2(), tiny.gpt2()
    rows = gptq_walk(first, tmp_path)
    monkeypatch.setattr(gptq, "factor", None)
    assert gptq_walk(second, tmp_path) == rows
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
