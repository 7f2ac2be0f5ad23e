"""APoZ and contribution of neurons: against loops, without padding, for ReLU, gates and experts."""

from __future__ import annotations

import json

import architectures
import pytest
import tiny
import torch
from reference import insight as reference

from hf_slim import insight
from hf_slim.core.errors import DataError, ModelError, PlanError
from hf_slim.insight.activations import counts_zeros
from hf_slim.insight.batches import token_batches


def test_a_gated_layer_counts_what_is_small_beside_its_rms():
    model, ids = tiny.llama(), tiny.ids(4, 16)
    found = insight.activations(model, ids, fraction=0.2)
    assert [row.layer for row in found.rows] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    for row in found.rows:
        h = reference.inputs_of(model, row.layer, list(ids))
        assert not row.exact
        assert row.threshold == pytest.approx(0.2 * float(h.square().mean().sqrt()), rel=1e-5)
        share = reference.idle_share(h, row.threshold)
        assert row.apoz == pytest.approx(share, abs=2 / len(h))  # a number at the threshold may fall to either side
        assert sum(row.zeros) == 0
        norms = model.get_submodule(row.layer).weight.double().norm(dim=0)
        assert row.contribution == pytest.approx((h.abs().mean(0) * norms).tolist(), rel=1e-4)
        assert row.mean == pytest.approx(sum(row.apoz) / 72)
        assert row.over == sum(a > row.mean + row.std for a in row.apoz)
        assert row.tokens == found.tokens == 64


def test_relu_counts_exact_zeros():
    model, ids = tiny.opt(), tiny.ids(4, 16)
    row = insight.activations(model, ids).rows[0]
    assert row.exact
    h = reference.inputs_of(model, row.layer, list(ids))
    assert row.apoz == row.zeros == pytest.approx(reference.idle_share(h, None))
    assert 0.2 < row.mean < 0.8


def test_dead_neurons_are_counted_and_do_not_make_a_layer_one_of_exact_zeros():
    model = tiny.llama()
    model.model.layers[0].mlp.gate_proj.weight.data[:50] = 0
    row = insight.activations(model, tiny.ids()).rows[0]
    assert not row.exact
    assert row.dead == 50
    assert row.contribution[:50] == (0,) * 50
    assert row.weakest_tenth == 0


def test_which_layers_count_exact_zeros():
    assert counts_zeros(torch.tensor([0.9, 0.3, 0.2]).double())
    assert not counts_zeros(torch.tensor([1.0, 1.0, 0.0, 0.01]).double())
    assert not counts_zeros(torch.ones(3).double())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side):
    model, ids = tiny.bert(), tiny.ids(3, 12)
    lengths = (12, 5, 7)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, 12 - length :] = 1
        if side == "right":
            mask[row] = mask[row].flip(0)
    batch = {"input_ids": ids, "attention_mask": mask}
    found = insight.activations(model, [batch])
    assert found.tokens == sum(lengths)
    real = [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)]
    for row in found.rows:
        h = reference.inputs_of(model, row.layer, real)
        assert row.tokens == len(h) == 24
        assert row.apoz == pytest.approx(reference.idle_share(h, row.threshold), abs=1 / 24 + 1e-9)


def test_rows_of_a_data_set_and_one_mapping_are_the_same_batches():
    ids = tiny.ids(3, 6)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [1] * 6])
    whole = token_batches({"input_ids": ids, "attention_mask": mask})
    rows = ({"input_ids": i.tolist(), "attention_mask": m.tolist()} for i, m in zip(ids, mask, strict=True))
    assert [batch.tolist() for batch in token_batches(rows)] == [batch.tolist() for batch in whole]
    assert [list(batch.shape) for batch in whole] == [[1, 4], [2, 6]]
    assert [list(b.shape) for b in token_batches({"input_ids": ids, "attention_mask": mask}, samples=2, length=5)] == [
        [1, 4],
        [1, 5],
    ]


@pytest.mark.parametrize("name", ["Mixtral", "T5", "Phi-3"])
def test_experts_fused_gates_and_encoder_decoders_have_neurons_too(name):
    model = architectures.make(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = insight.activations(model, tiny.ids(4, 16))
    assert {len(row.apoz) for row in found.rows} == {48}
    assert len(found.rows) == {"Mixtral": 8, "T5": 4, "Phi-3": 2}[name]
    if name == "Mixtral":  # every token goes to two of four experts in each of two blocks
        assert sum(row.tokens for row in found.rows) == 2 * 2 * 64
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]}, DataError, "holes"),
        ({"input_ids": [[1, 2, 3]], "attention_mask": [[0, 0, 0]]}, DataError, "no token"),
        ({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 1]]}, DataError, "one shape"),
        (["some text"], DataError, "no tokenizer"),
        (torch.full((1, 4), 1000), DataError, "token ids run"),
    ],
)
def test_unusable_data_is_refused(data, error, words):
    with pytest.raises(error, match=words):
        insight.activations(tiny.llama(), data)


def test_fractions_and_models_that_make_no_sense_are_refused():
    with pytest.raises(PlanError, match="fraction"):
        insight.activations(tiny.llama(), tiny.ids(), fraction=0.0)
    model = tiny.llama(layers=1)
    for block in model.model.layers:
        block.mlp = torch.nn.Identity()
    with pytest.raises(ModelError, match="no MLP"):
        insight.activations(model, tiny.ids())


def test_the_result_goes_into_json_and_a_picture(tmp_path):
    found = insight.activations(tiny.opt(), tiny.ids())
    row = json.loads(json.dumps(found.to_dict()))["rows"][1]
    assert row["apoz"] == pytest.approx(found.rows[1].apoz, rel=1e-5)
    assert found.plot(tmp_path / "activations.png").read_bytes().startswith(b"\x89PNG")
