"""GPTQ through whole models: better than rounding, pruned weights stay zero, every kind of layer and shape."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import runs
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from hf_slim import compress
from hf_slim.core.select import find_layers
from hf_slim.core.size import stored_bytes
from hf_slim.core.swap import get_weight
from hf_slim.encodings.modules import EncodedEmbedding, EncodedLinear, TiedHead
from hf_slim.evaluation.agreement import agreement

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260K"
IDS = tiny.ids(12, 32, seed=1)
HELD_OUT = tiny.ids(4, 32, seed=2)
logits = partial(tiny.logits, tokens=HELD_OUT)
output_error = partial(tiny.output_error, tokens=HELD_OUT)
GPTQ = {"bits": 3, "group_size": 16}


def errors(name, **options):
    """Output errors of rounding and of GPTQ."""
    found = []
    for method in ("quantize.rtn", "quantize.gptq"):
        model = tiny.ALL[name]()
        compress(model, method, data=IDS, **{**GPTQ, **options})
        found.append(output_error(model, tiny.ALL[name]()))
    return found


@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_outputs_are_closer_than_those_of_rounding(name):
    rounded, repaired = errors(name, bits=4)
    assert repaired < 0.9 * rounded


def test_trained_model_agrees_better_than_rounded():
    if not STORIES.exists():
        pytest.skip(f"no trained model at {STORIES}")
    tokenizer = AutoTokenizer.from_pretrained(STORIES)

    def load():
        return AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()

    torch.manual_seed(0)
    start = torch.full((32, 1), tokenizer.bos_token_id)
    mask = torch.ones_like(start)
    told = load().generate(start, attention_mask=mask, do_sample=True, max_new_tokens=63, min_new_tokens=63)
    kl = {}
    for method in ("quantize.rtn", "quantize.gptq"):
        model = load()
        compress(model, method, data=told[:16])
        kl[method] = agreement(model, load(), told[16:]).kl
    assert kl["quantize.gptq"] < 0.75 * kl["quantize.rtn"]


@pytest.mark.parametrize("second", ["quantize.gptq", "share.kmeans", "quantize.rtn"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_pruned_weights_stay_zero_and_take_no_room(name, second):
    options = {"bits": 4} | ({"group_size": 16} if second.startswith("quantize") else {})
    dense, model = tiny.ALL[name](), tiny.ALL[name]()
    compress(dense, second, data=IDS, **options)
    pruned = compress(model, "prune.magnitude", sparsity=0.5)
    zeros = {row.name: get_weight(model.get_submodule(row.name)) == 0 for row in pruned.layers}
    compress(model, second, data=IDS, **options)
    for layer, zero in zeros.items():
        W = get_weight(model.get_submodule(layer))
        assert zero.sum() == zero.numel() // 2
        assert (W[zero] == 0).all()
        assert W[~zero].count_nonzero() > 0.5 * (~zero).sum()
    assert stored_bytes(model) < stored_bytes(dense)


def test_survivors_repair_what_pruning_and_rounding_break():
    """With the mask known, GPTQ beats rounding on the pruned model too."""
    found = {}
    for method in ("quantize.rtn", "quantize.gptq"):
        pruned, model = tiny.llama(), tiny.llama()
        for each in (pruned, model):
            compress(each, "prune.magnitude", sparsity=0.5)
        compress(model, method, data=IDS, **GPTQ)
        found[method] = output_error(model, pruned)
    assert found["quantize.gptq"] < found["quantize.rtn"]


@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_embedding_and_tied_head_are_stored_once(name):
    model, original = tiny.ALL[name](), tiny.ALL[name]()
    report = compress(model, "quantize.gptq", data=IDS, bits=4, group_size=16, embeddings={"bits": 8})
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, EncodedEmbedding)
    assert isinstance(head, TiedHead)
    assert report.layers[0].name == next(n for n, m in model.named_modules() if m is table)
    hidden = torch.randn(3, table.cols)
    torch.testing.assert_close(head(hidden), hidden @ get_weight(table).T)
    assert output_error(model, original) < 0.2


@pytest.mark.parametrize("group_size", [7, 16, 64, None], ids=str)
def test_any_group_size_fits_any_row(group_size):
    """Rows have 40 and 72 columns: the last group is shorter, or one group is all."""
    model = tiny.llama()
    report = compress(model, "quantize.gptq", data=IDS, bits=8, group_size=group_size)
    assert {row.cols for row in report.layers} == {40, 72}
    for row in report.layers:
        groups = -(-row.cols // (group_size or row.cols))
        assert row.bytes == row.rows * row.cols + row.rows * groups * 3  # codes; float16 scales and uint8 zero points
    assert output_error(model, tiny.llama()) < 2e-3


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert"])
def test_biases_are_left_alone(name):
    model, original = tiny.ALL[name](), tiny.ALL[name]()
    for each in (model, original):
        torch.manual_seed(3)
        for parameter in each.parameters():
            if parameter.dim() == 1:
                parameter.data.normal_(0, 0.5)
    report = compress(model, "quantize.gptq", data=IDS, bits=8, group_size=16)
    for row in report.layers:
        bias = original.get_submodule(row.name).bias
        assert torch.equal(model.get_submodule(row.name).bias, bias)
        assert bias.any()
    assert output_error(model, original) < 1e-3


def test_conv1d_is_turned_round():
    model, original = tiny.gpt2(), tiny.gpt2()
    report = compress(model, "quantize.gptq", data=IDS, bits=8, group_size=16)
    for row in report.layers:
        dense = original.get_submodule(row.name)
        assert isinstance(dense, Conv1D)
        assert isinstance(model.get_submodule(row.name), EncodedLinear)
        assert (row.rows, row.cols) == (dense.nf, dense.nx)
        torch.testing.assert_close(get_weight(model.get_submodule(row.name)), dense.weight.T, atol=0.02, rtol=0)
        assert row.error < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", tiny.ALL)
def test_artifact_computes_the_same_after_reload(tmp_path, name, dtype):
    model = tiny.ALL[name](dtype)
    everything = {"layers": {"include": ["*"]}} if name == "bert_classifier" else {"embeddings": {"bits": 8}}
    compress(model, "quantize.gptq", data=IDS, bits=4, group_size=16, **everything)
    assert model.dtype == dtype
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=dtype).eval()
    assert torch.equal(logits(again), logits(model))
    assert stored_bytes(again) == stored_bytes(model)
    assert {n: x.nbytes for n, x in find_layers(again).items()} == {n: x.nbytes for n, x in find_layers(model).items()}


def test_data_may_be_text():
    model = tiny.llama()
    report = compress(
        model, "quantize.gptq", tokenizer=tiny.tokenizer(), data=[runs.text(1), runs.text(2)], length=16, samples=8
    )
    assert len(report.layers) == 14
