"""What is zero becomes smaller shapes; the model computes what it did, on every architecture."""

from __future__ import annotations

import architectures
import pytest
import tiny
import torch

import hf_slim
from hf_slim.core.errors import ModelError, SlimError
from hf_slim.core.experts import unfused
from hf_slim.core.forward import run_on
from hf_slim.core.reshape import zero_units
from hf_slim.core.size import count_weights, stored_bytes
from hf_slim.core.swap import get_weight
from hf_slim.core.units import find_units
from hf_slim.encodings.modules import EncodedLinear
from hf_slim.pruning import structurize
from hf_slim.pruning.structurize import Range, needless, rounded_up

torch.set_num_threads(1)
IDS = tiny.ids(2, 12)
NAN = float("nan")


def make(name, dtype=torch.float32, **options):
    model = architectures.make(name)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype)


@torch.no_grad()
def logits(model):
    return run_on(model, IDS).logits.float()


def distance(a, b):
    return float((a - b).norm() / b.norm())


def zero_half(model):
    """Set the first half of all units to zero; how many neurons and heads these are."""
    counts = {"neuron": 0, "head": 0}
    with unfused(model):
        for units in find_units(model):
            keep = torch.arange(len(units)) >= len(units) // 2
            zero_units(model, units, keep)
            counts[units.kind] += len(units) // 2
    return counts


def test_units_that_are_not_read_or_silent_or_constant_can_go():
    no, yes = torch.zeros(5, 1, dtype=torch.bool), torch.ones(5, 1, dtype=torch.bool)
    zero_columns = torch.tensor([[True], [False], [False], [False], [False]])
    zero_rows = torch.tensor([[False], [True], [True], [True], [False]])
    constant = torch.tensor([[NAN], [0.0], [0.5], [NAN], [0.5]])
    gone, folded = needless(zero_columns, zero_rows, constant, bias=True)
    assert gone.tolist() == [True, True, True, False, False]
    assert folded.tolist() == [False, False, True, False, False]
    gone, folded = needless(zero_columns, zero_rows, constant, bias=False)
    assert gone.tolist() == [True, True, False, False, False]
    assert not folded.any()
    assert needless(yes, no, constant, bias=False)[0].all()


def test_a_head_goes_only_when_all_of_its_columns_do():
    zero_columns = torch.tensor([[True, False], [True, True]])
    rows, constant = torch.zeros(2, 1, dtype=torch.bool), torch.full((2, 2), NAN)
    assert needless(zero_columns, rows, constant, False)[0].tolist() == [False, True]
    still = torch.tensor([[0.0, NAN], [0.0, 0.0]])
    assert needless(torch.zeros(2, 2, dtype=torch.bool), ~rows, still, False)[0].tolist() == [False, True]


@pytest.mark.parametrize(
    ("gone", "multiple_of", "left"),
    [
        ([1, 1, 0, 0, 0, 1], 1, 3),
        ([1, 1, 0, 0, 0, 1], 4, 4),
        ([1, 1, 0, 0, 0, 1], 8, 6),
        ([1, 1, 1], 1, 1),
        ([0, 0], 8, 2),
    ],
)
def test_multiples_keep_some_zero_units(gone, multiple_of, left):
    gone = torch.tensor(gone, dtype=torch.bool)
    keep = rounded_up(gone, multiple_of)
    assert int(keep.sum()) == left
    assert keep[~gone].all()


def test_constants_are_columns_that_never_change():
    seen = Range(torch.tensor([0.0, 0.5, -1.0, -0.5]), torch.tensor([0.0, 0.5, 1.0, -0.4]))
    assert seen.constant()[:2].tolist() == [0.0, 0.5]
    assert seen.constant()[2:].isnan().all()


@pytest.mark.parametrize("name", architectures.KINDS)
def test_a_structurized_model_computes_what_the_zeroed_one_did(name, tmp_path):
    model = make(name)
    counts = zero_half(model)
    before, weights = logits(model), count_weights(model)
    report = hf_slim.compress(model, "prune.structurize")
    assert distance(logits(model), before) < 1e-5
    assert report.metrics["difference"] < 1e-5
    assert (report.metrics["removed_neurons"], report.metrics["removed_heads"]) == (counts["neuron"], counts["head"])
    assert count_weights(model) < weights
    assert sum(row.bytes_before - row.bytes for row in report.layers) >= 0.4 * sum(
        r.bytes_before for r in report.layers
    )
    assert all(row.error == 0 for row in report.layers)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert {key: found for key, found in info.items() if found} == {}
    assert torch.equal(logits(loaded), logits(model))


def test_a_model_without_zeros_stays_as_it_is():
    model = make("Llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = hf_slim.compress(model, "prune.structurize")
    assert report.layers == []
    assert report.notes == ["no unit is all zero: nothing was removed"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["OPT", "GPT-2", "BERT"])
def test_constants_of_dead_neurons_go_into_the_readers_bias(name):
    """The rows are zero, the biases are not: act(bias) is what the neuron puts out."""
    model = make(name)
    units = find_units(model, ("neuron",))[0]
    for writer, rows in units.writers.items():
        get_weight(model.get_submodule(writer))[rows[:10].flatten()] = 0
    reader = model.get_submodule(units.reader)
    before, bias = logits(model), reader.bias.clone()
    report = hf_slim.compress(model, "prune.structurize")
    assert report.metrics["removed_neurons"] == 10
    assert distance(logits(model), before) < 1e-5
    assert (reader.bias - bias).norm() > 1e-3


def test_heads_without_values_but_with_biases_go_into_the_readers_bias():
    model = make("OPT")
    attention = model.model.decoder.layers[1].self_attn
    attention.v_proj.weight.data[8:16] = 0
    before = logits(model)
    report = hf_slim.compress(model, "prune.structurize")
    assert report.metrics["removed_heads"] == 1
    assert attention.q_proj.weight.shape == (24, 32)
    assert distance(logits(model), before) < 1e-5


def test_without_a_bias_to_take_it_a_constant_stays():
    model = make("Qwen2")  # q, k and v have biases, o has none
    attention = model.model.layers[0].self_attn
    attention.v_proj.weight.data[:8] = 0
    report = hf_slim.compress(model, "prune.structurize")
    assert report.metrics["removed_heads"] == 0
    assert any("model.layers.0.self_attn.o_proj has no bias: 1 heads" in note for note in report.notes)
    attention.v_proj.bias.data[:8] = 0
    assert hf_slim.compress(model, "prune.structurize").metrics["removed_heads"] == 1


def test_an_up_row_alone_or_a_column_alone_is_enough():
    model = make("Llama")
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight.data[:5] = 0
    mlp.gate_proj.weight.data[5:9] = 0
    mlp.down_proj.weight.data[:, 9:12] = 0
    model.model.layers[0].self_attn.q_proj.weight.data[:8] = 0  # looks at all tokens alike: no reason to go
    before = logits(model)
    report = hf_slim.compress(model, "prune.structurize")
    assert (report.metrics["removed_neurons"], report.metrics["removed_heads"]) == (12, 0)
    assert distance(logits(model), before) < 1e-5


def test_a_neuron_that_merely_does_not_fire_stays():
    model = make("OPT")
    layer = model.model.decoder.layers[0].fc1
    layer.bias.data[:10] = -1000.0
    assert hf_slim.compress(model, "prune.structurize").metrics["removed_neurons"] == 0


def test_options_say_which_and_how_many():
    model = make("Llama")
    zero_half(model)
    report = hf_slim.compress(model, "prune.structurize", kinds=["neuron"], multiple_of=16)
    assert report.metrics["removed_neurons"] == 2 * (48 - 32)
    assert "removed_heads" not in report.metrics
    assert model.model.layers[0].self_attn.o_proj.in_features == 32
    assert hf_slim.compress(model, "prune.structurize").metrics["removed_neurons"] == 2 * 8


def test_a_unit_of_every_kind_is_left_when_all_are_zero():
    model = make("Llama")
    for units in find_units(model):
        zero_units(model, units, torch.arange(len(units)) == 0)
        get_weight(model.get_submodule(units.reader)).zero_()
    before = logits(model)
    hf_slim.compress(model, "prune.structurize")
    assert distance(logits(model), before) < 1e-5
    assert model.model.layers[0].mlp.down_proj.in_features == 1
    assert model.model.layers[0].self_attn.o_proj.in_features == 16


def test_an_expert_of_zeros_becomes_one_neuron_wide():
    model = make("Mixtral")
    for block in model.model.layers:
        block.mlp.experts.down_proj.data[1] = 0
    before = logits(model)
    report = hf_slim.compress(model, "prune.structurize")
    assert report.metrics["removed_neurons"] == 2 * 47
    assert distance(logits(model), before) < 1e-5
    told = [note for note in report.notes if "1 of 4 experts are all zero (1)" in note]
    assert [note.partition(":")[0] for note in told] == [f"model.layers.{n}.mlp.experts" for n in (0, 1)]
    assert all("the router would choose others" in note for note in told)


def test_sparse_layers_stay_sparse_and_shrink():
    model = make("OPT")
    zero_half(model)
    hf_slim.compress(model, "prune.magnitude", sparsity=0.6)
    before, size = logits(model), stored_bytes(model)
    hf_slim.compress(model, "prune.structurize")
    assert isinstance(model.model.decoder.layers[0].fc2, EncodedLinear)
    assert distance(logits(model), before) < 1e-5
    assert stored_bytes(model) < size


@pytest.mark.parametrize("name", ["Llama", "OPT"])
def test_half_precision_is_proved_in_float32(name):
    model = make(name, torch.bfloat16)
    zero_half(model)
    report = hf_slim.compress(model, "prune.structurize")
    assert report.metrics["difference"] < 1e-5
    assert model.dtype == torch.bfloat16


def test_rounded_constants_are_allowed_for():
    model = make("OPT", torch.bfloat16)
    model.model.decoder.layers[0].fc1.weight.data[:10] = 0
    report = hf_slim.compress(model, "prune.structurize")
    assert report.metrics["removed_neurons"] == 10
    assert 1e-5 < report.metrics["difference"] < 2**-7


def test_the_proof_looks_at_calibration_data(monkeypatch):
    model, seen = make("Llama"), []
    run = structurize._run
    monkeypatch.setattr(structurize, "_run", lambda model, ids: seen.append(ids) or run(model, ids))
    hf_slim.compress(model, "prune.structurize", data=IDS)
    assert all(torch.equal(ids, IDS) for ids in seen)
    assert len(seen) == 2


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "OPT", "Phi-3", "Mixtral", "sparse"])
def test_a_model_that_would_compute_something_else_is_left_as_it_was(name, monkeypatch):
    """Shapes, counts, biases into which constants went, views of fused experts: all are back."""
    model = make("OPT" if name == "sparse" else name)
    if name == "sparse":
        hf_slim.compress(model, "prune.magnitude", sparsity=0.5)
    kinds = {path: type(module) for path, module in model.named_modules()}
    before, state = logits(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}

    def wrong(columns, rows, constant, bias):
        gone = torch.arange(len(columns)) == 0
        return gone, gone & bias

    monkeypatch.setattr(structurize, "needless", wrong)
    monkeypatch.setattr(Range, "constant", lambda seen: torch.full_like(seen.low, 3.0))
    with pytest.raises(ModelError, match=r"computes something else .* so none was removed"):
        hf_slim.compress(model, "prune.structurize")
    assert {path: type(module) for path, module in model.named_modules()} == kinds
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(logits(model), before)


def test_layers_of_codes_are_refused():
    model = make("Llama")
    hf_slim.compress(model, "quantize.rtn", bits=8)
    with pytest.raises(SlimError, match="structurize before quantizing"):
        hf_slim.compress(model, "prune.structurize")
