"""Weights looked at in parts are what numpy says of all of them together."""

from __future__ import annotations

import json
from functools import reduce
from operator import add

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import hf_slim
from hf_slim import insight
from hf_slim.core.errors import ModelError
from hf_slim.core.select import find_layers
from hf_slim.core.swap import get_weight
from hf_slim.insight.magnitudes import BINS, REACH, exact_quantiles, excess_kurtosis, first_reading, second_reading
from hf_slim.insight.names import kind_names, told_apart

QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.9, 0.999, 1.0)
THRESHOLDS = (0.01, 0.1, 0.5, 1.0)


def numbers(seed: int, count: int, dtype=torch.float32, mean: float = 0.0) -> torch.Tensor:
    w = torch.randn(count, generator=torch.Generator().manual_seed(seed)) ** 3 * 0.1 + mean
    w[:: max(2, count // 7)] = 0
    return w.to(dtype)


def read(w: torch.Tensor, parts: int):
    pieces = w.tensor_split(parts)
    first = reduce(add, map(first_reading, pieces))
    return first, reduce(add, (second_reading(piece, first, THRESHOLDS, QUANTILES) for piece in pieces))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_both_readings_match_numpy_on_the_whole(dtype, mean):
    w = numbers(0, 5000, dtype, mean)
    first, second = read(w, 3)
    x = w.double().numpy()
    assert first.count == 5000
    assert first.zeros == (x == 0).sum()
    assert first.sigma == pytest.approx(x.std(), rel=1e-9)
    assert first.largest == np.abs(x).max()
    assert second.under.tolist() == [(np.abs(x) < t * first.sigma).sum() for t in THRESHOLDS]
    assert second.beyond == (np.abs(x) > 3 * first.sigma).sum()
    assert excess_kurtosis(first, second) == pytest.approx(((x - x.mean()) ** 4).mean() / x.var() ** 2 - 3, rel=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 400), st.integers(1, 5), st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16]))
def test_quantiles_are_the_order_statistics_however_the_parts_are_cut(count, parts, seed, dtype):
    w = numbers(seed, count, dtype)
    first, second = read(w, min(parts, count))
    ordered = np.sort(w.float().abs().numpy())
    ranks = [max(1, int(np.ceil(np.round(q * count, 6)))) for q in QUANTILES]
    assert exact_quantiles(first, second, QUANTILES) == [ordered[rank - 1] for rank in ranks]


def test_the_histogram_counts_every_weight_once_and_zero_in_the_middle():
    w = torch.cat([torch.zeros(50), numbers(1, 2000)])
    first, second = read(w, 2)
    scaled = np.clip(w.numpy() / first.sigma, -REACH + 1e-4, REACH - 1e-4)
    counts, _ = np.histogram(scaled, bins=BINS, range=(-REACH, REACH))
    assert second.histogram.sum() == 2050
    assert np.abs(second.histogram.numpy() - counts).sum() <= 4  # a weight on an edge may fall to either side
    assert second.histogram[BINS // 2] >= 50
    assert int(torch.argmax(second.histogram)) == BINS // 2


def test_weights_that_are_all_equal_have_no_spread():
    first, second = read(torch.zeros(10), 2)
    assert first.sigma == 0
    assert excess_kurtosis(first, second) == 0
    assert exact_quantiles(first, second, QUANTILES) == [0.0] * 7


def test_normal_weights_look_normal_and_pruned_ones_show_it():
    model = tiny.llama()
    with torch.no_grad():
        for layer in find_layers(model).values():
            weight = model.get_submodule(layer.name).weight
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(layer.rows)))
    before = {row.name: row for row in insight.weights(model).rows}
    hf_slim.compress(model, "prune.magnitude", sparsity=0.5)
    after = {row.name: row for row in insight.weights(model).rows}
    up = before["up_proj"]
    assert up.zeros == 0
    assert up.under[0.5] == pytest.approx(0.383, abs=0.03)
    assert abs(up.kurtosis) < 0.3
    assert after["up_proj"].zeros == 0.5  # stored pruned, and decoded to be looked at
    assert after["up_proj"].quantiles[0.25] == 0
    assert after["up_proj"].kurtosis > up.kurtosis + 0.2
    assert after["embed_tokens"] == before["embed_tokens"]


@pytest.mark.parametrize("by", ["kind", "layer"])
def test_rows_cover_every_weight_once(by):
    model = tiny.llama(tied=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    rows = insight.weights(model, by=by).rows
    owned = [x for x in find_layers(model).values() if x.tied_to is None]
    assert sum(row.weights for row in rows) == sum(x.rows * x.cols for x in owned)
    assert sum(row.layers for row in rows) == len(owned)
    if by == "layer":
        largest = {x.name: get_weight(model.get_submodule(x.name)).abs().max() for x in owned}
        assert all(row.largest * row.sigma == pytest.approx(float(largest[row.name])) for row in rows)
    else:
        assert [row.name for row in rows][:3] == ["embed_tokens", "q_proj", "k_proj"]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_kinds_that_end_alike_are_told_apart():
    assert set(kind_names(find_layers(tiny.gpt2()).values()).values()) == {
        "wte", "lm_head", "c_attn", "attn.c_proj", "c_fc", "mlp.c_proj",
    }  # fmt: skip
    kinds = kind_names(find_layers(tiny.bert()).values())
    assert kinds["bert.encoder.layer.1.output.dense"] != kinds["bert.encoder.layer.1.attention.output.dense"]
    assert kinds["bert.encoder.layer.0.output.dense"] == kinds["bert.encoder.layer.1.output.dense"]


def test_names_in_a_table_keep_what_they_differ_in():
    assert told_apart(["a.layers.0.mlp.down", "a.layers.11.mlp.down"]) == (["0", "11"], "a.layers.*.mlp.down")
    assert told_apart(["enc.0.wo", "dec.0.wo"]) == (["enc", "dec"], "*.0.wo")
    assert told_apart(["layers.0.mlp.1.down", "layers.0.down"]) == (["mlp.1.down", "down"], "layers.0.*")
    assert told_apart(["only.one"]) == (["one"], "only.*")


def test_damaged_weights_are_named():
    model = tiny.llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        insight.weights(model)


def test_the_result_goes_into_json_a_narrow_table_and_a_picture(tmp_path):
    found = insight.weights(tiny.llama(torch.bfloat16))
    assert json.loads(json.dumps(found.to_dict()))["rows"][0]["name"] == "embed_tokens"
    console = Console(width=80, record=True, file=(tmp_path / "table").open("w"))
    console.print(found.table())
    text = console.export_text()
    assert "down_proj" in text
    assert text.count("down_proj") == 2  # whole, in both tables: no name was folded
    assert found.plot(tmp_path / "plots" / "weights.png").read_bytes().startswith(b"\x89PNG")
