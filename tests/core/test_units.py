"""Units are found on every architecture without its name; removing them is the same as setting them to zero."""

from __future__ import annotations

import copy

import architectures
import pytest
import tiny
import torch
from torch import nn
from transformers import FalconConfig, FalconForCausalLM, GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_slim.core.errors import ModelError
from hf_slim.core.experts import unfuse
from hf_slim.core.forward import run_on
from hf_slim.core.probe import numbers
from hf_slim.core.reshape import OwnConfig, cut_layer, remove_units, shape_of, zero_units
from hf_slim.core.swap import encode_layer, get_keep, get_weight
from hf_slim.core.units import expected_units, find_units
from hf_slim.core.wiring import Wiring
from hf_slim.encodings import Affine, Sparse

torch.set_num_threads(1)
IDS = tiny.ids(2, 12)
SHARED_BIAS = ("T5",)  # one position bias for the heads of all blocks
HEADS = dict.fromkeys(("OPT", "GPT-2", "GPT-NeoX", "Falcon", "BERT", "RoBERTa", "DistilBERT"), 4)
NEURONS = {"GPT-2": 128, "Qwen3-MoE": 32}


def make(name):
    """A model that is no fresh one: its biases and norms have values."""
    model = architectures.make(name)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    unfuse(model)
    return model


@torch.no_grad()
def logits(model):
    return run_on(model, IDS).logits


def alike(a, b):
    return (a - b).norm() <= 1e-5 * b.norm()


def some(units, seed=0):
    """A mask that keeps about half of the units."""
    keep = torch.rand(len(units), generator=torch.Generator().manual_seed(seed)) < 0.5
    keep[seed % len(units)] = True
    keep[(seed + 1) % len(units)] = False
    return keep


def same(a, b):
    return (
        (a.kind, a.block, a.reader, a.counts) == (b.kind, b.block, b.reader, b.counts)
        and torch.equal(a.columns, b.columns)
        and a.writers.keys() == b.writers.keys()
        and all(torch.equal(rows, b.writers[name]) for name, rows in a.writers.items())
    )


@pytest.mark.parametrize("name", architectures.KINDS)
def test_every_block_has_its_neurons_and_heads(name):
    model = make(name)
    found = find_units(model)
    blocks = 4 if name == "T5" else 2
    heads = [units for units in found if units.kind == "head"]
    neurons = [units for units in found if units.kind == "neuron"]
    assert [len(units) for units in heads] == ([] if name in SHARED_BIAS else [HEADS.get(name, 2)] * blocks)
    experts = {"Mixtral": 4, "Qwen3-MoE": 6}.get(name, 1)
    assert [len(units) for units in neurons] == [NEURONS.get(name, 48)] * blocks * experts
    for units in found:
        assert units.columns.unique().tolist() == list(range(shape_of(model.get_submodule(units.reader))[1]))
        for writer, rows in units.writers.items():
            assert len(rows.unique()) == rows.numel() <= shape_of(model.get_submodule(writer))[0]


@pytest.mark.parametrize("name", architectures.KINDS)
def test_removing_is_zeroing(name):
    """Half of the units, others in every block: the whole model says that it is the same, not a copy of a block."""
    zeroed, removed = make(name), make(name)
    found = find_units(zeroed)
    for number, units in enumerate(found):
        zero_units(zeroed, units, some(units, number))
        remove_units(removed, units, some(units, number))
    assert not alike(logits(zeroed), logits(make(name)))
    assert alike(logits(removed), logits(zeroed))
    for number, units in enumerate(found):
        left = int(some(units, number).sum()) * units.columns.shape[1]
        assert get_weight(removed.get_submodule(units.reader)).shape[1] == left


@pytest.mark.parametrize("name", architectures.KINDS)
def test_units_are_foreseen_without_weights(name):
    with torch.device("meta"):
        skeleton = type(architectures.make(name))._from_config(architectures.config_of(name))
    unfuse(skeleton)
    foreseen, found = expected_units(skeleton), find_units(make(name))
    assert len(foreseen) == len(found) > 0
    assert all(map(same, foreseen, found))


@pytest.mark.parametrize("name", ["Llama", "Phi-3", "GPT-2", "Falcon"])
def test_what_is_left_can_be_found_and_removed_again(name):
    zeroed, removed = make(name), make(name)
    for units in find_units(removed, ("neuron",)):
        remove_units(removed, units, some(units))
        zero_units(zeroed, units, some(units))
    for units in find_units(removed, ("head",)):
        remove_units(removed, units, some(units))
    for units in find_units(zeroed, ("head",)):
        zero_units(zeroed, units, some(units))
    assert alike(logits(removed), logits(zeroed))
    again = find_units(removed)
    assert [len(units) for units in again if units.kind == "neuron"] == [
        int(some(range(NEURONS.get(name, 48))).sum())
    ] * 2


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "OPT", "Phi-3", "Falcon", "GPT-NeoX"])
def test_generation_with_a_cache_works_without_the_heads(name):
    zeroed, removed = make(name), make(name)
    for units in find_units(zeroed, ("head",)):
        zero_units(zeroed, units, some(units))
        remove_units(removed, units, some(units))
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(removed.generate(IDS, **how), zeroed.generate(IDS, **how))


@pytest.mark.parametrize("name", ["Llama", "Falcon", "Phi-3", "OPT"])
def test_another_attention_implementation_works_too(name):
    model = make(name)
    for units in find_units(model, ("head",)):
        remove_units(model, units, some(units))
    eager = logits(model)
    model.set_attn_implementation("sdpa")
    assert alike(logits(model), eager)


def test_one_key_value_head_for_all_queries_makes_units_of_query_heads():
    config = LlamaConfig(**architectures.DECODER | {"num_key_value_heads": 1}, attn_implementation="eager")
    model = LlamaForCausalLM(config).eval()
    units = find_units(model, ("head",))[0]
    assert len(units) == 4
    assert list(units.writers) == ["model.layers.0.self_attn.q_proj"]
    assert units.counts == ("model.layers.0.self_attn.num_key_value_groups",)


def test_grouped_heads_in_one_fused_layer():
    options = {k: v for k, v in architectures.DECODER.items() if k not in ("intermediate_size", "num_key_value_heads")}
    config = FalconConfig(**options, new_decoder_architecture=True, num_kv_heads=2, attn_implementation="eager")
    zeroed = FalconForCausalLM(config).eval()
    removed = copy.deepcopy(zeroed)
    for units in find_units(zeroed, ("head",)):
        assert len(units) == 2
        zero_units(zeroed, units, torch.tensor([False, True]))
        remove_units(removed, units, torch.tensor([False, True]))
    assert alike(logits(removed), logits(zeroed))


def test_position_biases_by_head_make_heads_stay():
    options = {k: v for k, v in architectures.DECODER.items() if k not in ("intermediate_size", "num_key_value_heads")}
    model = FalconForCausalLM(FalconConfig(**options, alibi=True, attn_implementation="eager")).eval()
    assert {units.kind for units in find_units(model)} == {"neuron"}


def test_interleaved_gates_with_biases_in_experts():
    options = architectures.DECODER | {"head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2}
    model = GptOssForCausalLM(GptOssConfig(**options, attn_implementation="eager")).eval()
    unfuse(model)
    units = find_units(model, ("neuron",))[0]
    assert units.writers["model.layers.0.mlp.experts.0.gate_up_proj"].tolist() == [
        [2 * i, 2 * i + 1] for i in range(48)
    ]


def test_kinds_are_those_asked_for():
    model = make("Llama")
    assert {units.kind for units in find_units(model, ("head",))} == {"head"}
    assert {units.kind for units in find_units(model, ("neuron",))} == {"neuron"}


def test_finding_leaves_the_model_as_it_was():
    model = make("GPT-2").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_units(model)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_config_of_its_own_is_the_models_in_everything_else():
    model = make("Phi-3")
    units = find_units(model, ("head",))[0]
    remove_units(model, units, torch.tensor([True, False]))
    attention = copy.deepcopy(model).model.layers[0].self_attn
    assert isinstance(attention.config, OwnConfig)
    assert attention.config.num_attention_heads == 2
    assert attention.config.hidden_size == model.config.hidden_size
    assert model.config.num_attention_heads == 4
    assert model.model.layers[1].self_attn.config is model.config
    model.config.hidden_act = "gelu"
    assert model.model.layers[0].self_attn.config.hidden_act == "gelu"


class Mixed(nn.Module):
    """Neurons, a run of two, a row that feeds all, and one that feeds nothing."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(3, 6), nn.Linear(4, 3)

    def forward(self, x):
        h = self.up(x)
        return self.down(torch.relu(torch.cat([h[..., [3, 0]] * h[..., 4:5], h[..., [1, 2]] + 0 * h[..., 5:6]], -1)))


def test_gradients_say_which_rows_feed_which_columns():
    module, x = Mixed(), numbers(8, 3)
    wiring = Wiring(module, ["up", "down"], lambda m: m(x))
    assert wiring.feeds("down", torch.tensor([0]))["up"].nonzero().flatten().tolist() == [3, 4]
    assert wiring.feeds("down", torch.tensor([2, 3]))["up"].nonzero().flatten().tolist() == [1, 2]
    assert wiring.feeds("up", torch.tensor([0])) == {}
    assert wiring.separates("down", 1) is False
    assert wiring.separates("down", 2) is True
    assert {name: rows.tolist() for name, rows in wiring.writers("down", 2).items()} == {}


def test_cutting_a_layer_keeps_the_rows_and_columns_named():
    for turned in (False, True):
        model = make("GPT-2" if turned else "OPT")
        name = "transformer.h.0.mlp.c_fc" if turned else "model.decoder.layers.0.fc1"
        layer = model.get_submodule(name)
        W, b = get_weight(layer).clone(), layer.bias.clone()
        rows, cols = torch.tensor([4, 0, 7]), torch.tensor([1, 3])
        cut_layer(model, name, rows, cols)
        assert torch.equal(get_weight(layer), W[rows][:, cols])
        assert torch.equal(layer.bias, b[rows])
        assert shape_of(layer) == (3, 2)
        x = numbers(5, 2)
        assert torch.allclose(layer(x), x @ W[rows][:, cols].T + b[rows], atol=1e-6)


@pytest.mark.parametrize("name", ["OPT", "GPT-2"])
def test_sparse_layers_stay_sparse(name):
    model = make(name)
    units = find_units(model, ("neuron",))[0]
    before = {}
    for layer in (units.reader, *units.writers):
        W = get_weight(model.get_submodule(layer))
        keep = numbers(*W.shape) > 0
        encode_layer(model, layer, Sparse(survivors=int(keep.sum())), Sparse(survivors=0).pack(W, keep))
        before[layer] = get_keep(model.get_submodule(layer))
    zeroed, keep = copy.deepcopy(model), some(units)
    zero_units(zeroed, units, keep)
    remove_units(model, units, keep)
    reader = model.get_submodule(units.reader)
    assert torch.equal(get_keep(reader), before[units.reader][:, keep])
    assert reader.encoding.survivors == int(before[units.reader][:, keep].sum())
    assert alike(logits(model), logits(zeroed))
    for layer in (units.reader, *units.writers):
        module = zeroed.get_submodule(layer)
        assert module.encoding.survivors == int((get_weight(module) != 0).sum())


def test_removing_everything_is_refused():
    model = make("Llama")
    units = find_units(model, ("head",))[0]
    with pytest.raises(ModelError, match=r"all 2 heads that model\.layers\.0\.self_attn\.o_proj reads would go"):
        remove_units(model, units, torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ModelError, match="keep marks 3 units, but there are 2"):
        remove_units(model, units, torch.ones(3, dtype=torch.bool))


def test_layers_of_codes_and_units_of_another_model_are_refused_before_anything_is_changed():
    model = make("Llama")
    units = find_units(model, ("neuron",))[0]
    keep = some(units)
    W = get_weight(model.get_submodule("model.layers.0.mlp.up_proj"))
    encoding = Affine(bits=8, group_size=None)
    layout = encoding.layout(*W.shape, W.dtype)
    tensors = {key: torch.ones(spec.shape, dtype=spec.dtype) for key, spec in layout.items()}
    encode_layer(model, "model.layers.0.mlp.up_proj", encoding, tensors)
    before = logits(model)
    with pytest.raises(ModelError, match="make it smaller before it is encoded"):
        remove_units(model, units, keep)
    assert torch.equal(logits(model), before)
    model = make("Llama")
    remove_units(model, units, keep)
    with pytest.raises(ModelError, match="find them again") as raised:
        remove_units(model, units, keep)
    assert len(raised.value.problems) == 3
