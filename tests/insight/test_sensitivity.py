"""What pruning one layer alone costs: against whole runs of pruned copies, and without a trace in the model."""

from __future__ import annotations

import importlib
import json

import architectures
import pytest
import tiny
import torch
from reference import insight as reference

import hf_slim
from hf_slim import insight
from hf_slim.core.errors import DataError, ModelError, PlanError
from hf_slim.core.forward import logits_of
from hf_slim.core.select import Select, find_stacks
from hf_slim.insight.resuming import Resumable


def snapshot(model):
    """Every module and every tensor, so that neither a copy nor a change goes unseen."""
    tensors = {name: (value, value.clone()) for name, value in model.named_parameters()}
    return dict(model.named_modules()), tensors, [m.__dict__.get("forward") for m in model.modules()]


def assert_untouched(model, seen):
    modules, tensors, forwards = seen
    assert dict(model.named_modules()) == modules
    assert [m.__dict__.get("forward") for m in model.modules()] == forwards
    now = dict(model.named_parameters())
    assert list(now) == list(tensors)
    assert all(now[name] is same and torch.equal(same, value) for name, (same, value) in tensors.items())


def test_changes_are_those_of_pruned_copies():
    model, ids = tiny.llama(), tiny.ids(6, 16)
    seen = snapshot(model)
    found = insight.sensitivity(model, ids, sparsities=(0.25, 0.75))
    assert_untouched(model, seen)
    assert len(found.rows) == 14
    assert found.measure == "loss"
    assert found.tokens == 6 * 15
    assert found.base == pytest.approx(reference.loss_when_pruned(model, [], 0, ids), rel=1e-5)
    for row in found.rows:
        for sparsity, change in zip(found.sparsities, row.change, strict=True):
            pruned = reference.loss_when_pruned(model, [row.name], sparsity, ids)
            assert change == pytest.approx(pruned - found.base, abs=1e-4)
    assert max(row.change[1] for row in found.rows) > 0.01  # the comparison above is not one of noise
    assert [row.block for row in found.rows] == [0] * 7 + [1] * 7


def test_layers_of_a_kind_can_be_pruned_together():
    model, ids = tiny.llama(), tiny.ids(4, 16)
    found = insight.sensitivity(model, ids, sparsities=(0.5,), by_kind=True)
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [row.name for row in found.rows] == kinds
    together = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    up = reference.loss_when_pruned(model, together, 0.5, ids) - found.base
    assert found.rows[5].change[0] == pytest.approx(up, abs=1e-4)


def test_an_interruption_leaves_the_model_as_it_was(monkeypatch):
    module = importlib.import_module("hf_slim.insight.sensitivity")  # the package has a function of that name
    model, calls = tiny.llama(), []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return loss(*arguments)

    loss = module._loss
    monkeypatch.setattr(module, "_loss", interrupted)
    seen = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        insight.sensitivity(model, tiny.ids())
    assert_untouched(model, seen)


@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "Falcon", "GPT-2", "Mixtral", "T5", "BERT", "GPT-NeoX"])
def test_running_on_from_a_block_gives_what_a_whole_run_gives(name):
    model, ids = architectures.make(name).eval(), tiny.ids(2, 12)
    blocks = [block for stack in find_stacks(model) for block in stack.blocks]
    with torch.no_grad():
        dense = Resumable(model, blocks, ids)
        assert dense.order == blocks
        for parameter in model.get_submodule(blocks[-1]).parameters():
            parameter.mul_(1.1)
        again = dense.run(blocks[-1:])
        assert torch.equal(again, logits_of(model, ids))
        assert not torch.equal(again, dense.logits)


def test_blocks_before_the_changed_one_are_not_computed_again():
    model = tiny.llama(layers=3)
    blocks, runs = [f"model.layers.{i}" for i in range(3)], []
    with torch.no_grad():
        dense = Resumable(model, blocks, tiny.ids())
        for block in blocks:
            projection = model.get_submodule(f"{block}.mlp.down_proj")
            projection.register_forward_hook(lambda *_, b=block: runs.append(b))
        dense.run(["model.layers.2", "model.layers.1"])
        assert runs == blocks[1:]
        dense.run([None])
    assert runs == blocks[1:] + blocks


def test_a_model_whose_blocks_share_state_runs_from_its_beginning():
    model = tiny.llama(layers=2)
    first, second = model.model.layers
    memory = {}
    first.register_forward_hook(lambda m, args, out: memory.update(out=out))  # runs whether or not it is skipped
    first.mlp.register_forward_hook(lambda m, args, out: memory.update(inner=torch.rand_like(out)))
    second.register_forward_hook(lambda m, args, out: out + memory.pop("inner"))
    with torch.no_grad():
        dense = Resumable(model, ["model.layers.0", "model.layers.1"], tiny.ids())
    assert dense.order == []


def test_experts_of_a_block_are_pruned_together():
    model = architectures.make("Mixtral")
    seen = {name: value.clone() for name, value in model.state_dict().items()}
    found = insight.sensitivity(model, tiny.ids(2, 12), sparsities=(0.5,))
    experts = [row for row in found.rows if "*" in row.name]
    assert len(experts) == 4  # up and down, in two blocks
    assert all(torch.equal(value, seen[name]) for name, value in model.state_dict().items())


def test_encoders_are_measured_by_their_divergence():
    model = tiny.bert_classifier()
    found = insight.sensitivity(model, tiny.ids(3, 12), sparsities=(0.0, 0.75))
    assert found.measure == "kl"
    assert found.base == 0
    assert found.tokens == 3
    assert all(row.change[0] == pytest.approx(0, abs=1e-6) and row.change[1] > 0 for row in found.rows)


def test_encoded_layers_are_decoded_to_be_pruned():
    model = tiny.llama()
    hf_slim.compress(model, "quantize.rtn", bits=8, group_size=8)
    seen = snapshot(model)
    found = insight.sensitivity(model, tiny.ids(), sparsities=(0.0, 0.75), layers=Select(include=("down_proj",)))
    assert_untouched(model, seen)
    assert [row.change[0] for row in found.rows] == pytest.approx([0, 0], abs=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sparsities": (0.5, 1.0)}, PlanError, r"below 1, got \[0\.5, 1\.0\]"),
        ({"sparsities": ()}, PlanError, "got"),
        ({"layers": Select(include=("nope",))}, PlanError, "'nope' matches no layer"),
        ({"data": torch.full((1, 4), 1000)}, DataError, "token ids run"),
        ({"data": {"input_ids": [[5], [6]], "attention_mask": [[1], [1]]}}, DataError, "predicts nothing"),
    ],
)
def test_unusable_input_is_refused(options, error, words):
    with pytest.raises(error, match=words):
        insight.sensitivity(tiny.llama(), **({"data": tiny.ids()} | options))


def test_a_damaged_weight_is_named():
    model = tiny.llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        insight.sensitivity(model, tiny.ids())


@pytest.mark.parametrize("by_kind", [False, True])
def test_the_result_goes_into_json_and_a_picture(tmp_path, by_kind):
    found = insight.sensitivity(tiny.llama(), tiny.ids(), by_kind=by_kind)
    assert json.loads(json.dumps(found.to_dict()))["sparsities"] == [0.25, 0.5, 0.75]
    assert found.plot(tmp_path / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
