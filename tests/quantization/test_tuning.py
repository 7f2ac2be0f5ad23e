"""Tuning blocks: gradients are the formula's, the best iterate is kept, what is stored is what was tuned."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jobs
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import together
from reference import tuning as slow
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_slim import compress
from hf_slim.core import blocks
from hf_slim.core.context import Context
from hf_slim.core.errors import RecipeError
from hf_slim.core.stage import make_stage
from hf_slim.core.swap import get_weight
from hf_slim.core.tuning import computed
from hf_slim.encodings import Affine
from hf_slim.evaluation.agreement import agreement
from hf_slim.quantization import autoround, blockwise, soft, tuning
from hf_slim.quantization.grid import fit_grid, from_grid, round_to_grid
from hf_slim.quantization.soft import Start

ROOT = Path(__file__).parents[2]
STORIES = ROOT.parent / "shared" / "models" / "stories260K"
METHODS = ["quantize.autoround", "quantize.blockwise"]
IDS = tiny.ids(32, 32, seed=1)
HELD_OUT = tiny.ids(8, 32, seed=2)
logits = partial(tiny.logits, tokens=HELD_OUT)
output_error = partial(tiny.output_error, tokens=HELD_OUT)
OPTIONS = {"bits": 2, "group_size": 16, "batch_tokens": 256, "iterations": 12}


def compressed(method, name="gpt2", data=IDS, **options):
    model = tiny.ALL[name]()
    report = compress(model, method, data=data, **(OPTIONS | options))
    return model, report


def a_start(rows=6, cols=40, bits=3, group_size=16, symmetric=False, pruned=False, seed=0):
    """A layer whose starting codes are the nearest ones in two of three places only."""
    draw = torch.Generator().manual_seed(seed)
    keep = torch.rand(rows, cols, generator=draw) > 0.4 if pruned else None
    W = torch.randn(rows, cols, generator=draw) * (1.0 if keep is None else keep)
    scales, zeros = fit_grid(W, bits, group_size, symmetric)
    nearest = round_to_grid(W, scales, zeros, bits, group_size)
    away = torch.randint(-1, 2, W.shape, generator=draw) * (W != 0)
    codes = (nearest.int() + away).clamp(0, 2**bits - 1).to(torch.uint8)
    return Start(W, codes, scales, zeros, bits, group_size, symmetric, keep)


def test_gradients_are_those_of_the_formula():
    draw = np.random.default_rng(0)
    u, slope = draw.uniform(-0.49, 7.49, (3, 2, 5)), draw.normal(size=(3, 2, 5))
    scales, zeros = draw.normal(size=(3, 2)), draw.integers(0, 8, (3, 2)).astype(float)
    W, d_u, d_scales = slow.round_straight(u, scales, zeros, slope)
    ours = [torch.tensor(x, requires_grad=True) for x in (u, scales)]
    out = soft.round_straight(*ours, torch.tensor(zeros))
    out.backward(torch.tensor(slope))
    for found, expected in ((out.detach(), W), (ours[0].grad, d_u), (ours[1].grad, d_scales)):
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_scale_gradient_is_that_of_finite_differences():
    """Codes do not depend on the scales, so the straight-through gradient is the true one."""
    draw = torch.Generator().manual_seed(0)
    u = torch.rand(2, 2, 6, generator=draw, dtype=torch.float64) * 7
    scales, zeros = torch.rand(2, 2, generator=draw, dtype=torch.float64) + 0.1, torch.full((2, 2), 3.0).double()
    slope = torch.randn(2, 2, 6, generator=draw, dtype=torch.float64)
    scales.requires_grad_()
    (soft.round_straight(u, scales, zeros) * slope).sum().backward()
    for place in np.ndindex(2, 2):
        near = [scales.detach().clone() for _ in range(2)]
        near[0][place] -= 1e-4
        near[1][place] += 1e-4
        low, high = ((soft.round_straight(u, s, zeros) * slope).sum() for s in near)
        assert scales.grad[place].item() == pytest.approx(((high - low) / 2e-4).item(), rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([None, 7, 16]), st.booleans(), st.booleans(), st.integers(0, 99)
)
def test_weights_start_where_they_round_to_the_starting_codes(bits, group_size, symmetric, pruned, seed):
    start = a_start(bits=bits, group_size=group_size, symmetric=symmetric, pruned=pruned, seed=seed)
    u = soft.place(start)
    assert torch.equal(u.round().to(torch.uint8), start.codes)
    groups = (lambda t: t.float()[:, :1]) if group_size is None else None
    spread = groups or (lambda t: t.float().repeat_interleave(group_size, 1)[:, : u.shape[1]])
    own = start.W / spread(start.scales) + spread(start.zeros)
    near = (own - start.codes).abs() < 0.48
    torch.testing.assert_close(u[near], own[near])
    assert near.any()


@pytest.mark.parametrize("pruned", [False, True], ids=["dense", "pruned"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("group_size", [None, 7, 16], ids=str)
def test_what_is_stored_decodes_to_what_was_computed_with(group_size, symmetric, pruned):
    start = a_start(group_size=group_size, symmetric=symmetric, pruned=pruned)
    layer = soft.Soft(start)
    begin = from_grid(start.codes, start.scales, start.zeros, group_size)
    torch.testing.assert_close(layer().detach(), begin if start.keep is None else begin * start.keep)
    torch.manual_seed(0)
    (layer() * torch.randn(6, 40)).sum().backward()
    with torch.no_grad():
        layer.u.sub_(torch.rand_like(layer.u) * 1.5 * layer.u.grad.sign())
        layer.scales.stretch.normal_(0, 0.1)
        layer.confine()
    stored = Affine(bits=3, group_size=group_size, symmetric=symmetric)
    W = stored.decode(stored.pack(*layer.chosen()), 6, 40)
    assert torch.equal(W, layer().detach())
    assert (begin != W).any()
    if start.keep is not None:
        assert (W[~start.keep] == 0).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_compressed_model_computes_what_was_tuned(monkeypatch, tmp_path, method, name):
    """Also after a round trip through files."""
    values = {}
    tune = tuning.tune

    def watched(block, parts, *rest):
        result = tune(block, parts, *rest)
        values.update({f"{block.name}.{key}": v.clone() for key, v in computed(block, parts).items()})
        return result

    monkeypatch.setattr(tuning, "tune", watched)
    model, _ = compressed(method, name)
    expected = tiny.ALL[name]()
    moved = 0
    for key, value in values.items():
        before = expected.get_parameter(key)
        moved += value.dim() == 1 and not torch.equal(before, value)
        before.data.copy_(value)
    assert moved > 2, "norms learn"
    assert (logits(model) - logits(expected)).abs().max() < 1e-4 * logits(expected).abs().max()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("method", METHODS)
def test_pruned_weights_stay_zero(method):
    model = tiny.llama()
    pruned = compress(model, "prune.magnitude", sparsity=0.5)
    zeros = {row.name: get_weight(model.get_submodule(row.name)) == 0 for row in pruned.layers}
    report = compress(model, method, data=IDS, **(OPTIONS | {"bits": 4}))
    assert report.layers[0].metrics["block_error"] < report.layers[0].metrics["block_error_before"]
    for layer, zero in zeros.items():
        W = get_weight(model.get_submodule(layer))
        assert (W[zero] == 0).all()
        assert W[~zero].count_nonzero() > 0.5 * (~zero).sum()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_tuning_beats_its_start(method, name):
    model, report = compressed(method, name, iterations=24)
    start, _ = compressed(method, name, iterations=0)
    original = tiny.ALL[name]()
    for row in report.layers:
        assert row.metrics["block_error"] < 0.95 * row.metrics["block_error_before"]
    assert output_error(model, original) < 0.97 * output_error(start, original)


@pytest.mark.parametrize("method", METHODS)
def test_start_is_kept_where_nothing_beats_it(method):
    wild = {"quantize.autoround": {"reach": 1.0}, "quantize.blockwise": {"weight_rate": 1.0}}[method]
    options = {**OPTIONS, "bits": 8, "scale_rate": 1.0, "dense_rate": 1.0} | wild
    model, report = compressed(method, "llama", **options)
    assert report.notes[0].endswith("tuning found nothing better")
    start, _ = compressed(method, "llama", bits=8, iterations=0)
    for name, tensor in start.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_seed_decides(method):
    """And nothing else does."""
    states = []
    for seed in (0, 0, 1):
        model, _ = compressed(method, "llama", seed=seed)
        torch.rand(7)
        states.append(model.state_dict())
    same, other = ([torch.equal(states[0][k], state[k]) for k in states[0]] for state in states[1:])
    assert all(same)
    assert not all(other)


@pytest.mark.parametrize("method", METHODS)
def test_killed_walk_goes_on_with_the_same_numbers(monkeypatch, tmp_path, method):
    stage = make_stage(method, OPTIONS)
    module = {"quantize.autoround": autoround, "quantize.blockwise": blockwise}[method]

    def run(folder):
        model = tiny.llama(torch.bfloat16)
        module.apply(model, stage.options, Context(windows=lambda role: IDS, blocks=folder))
        return model.state_dict()

    whole = run(None)
    put = blocks.BlockStore.save

    def dying(self, label, *rest):
        put(self, label, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(blocks.BlockStore, "save", dying)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    resumed = run(tmp_path)
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(whole[norm], tiny.llama(torch.bfloat16).state_dict()[norm])
    assert whole[norm].dtype == torch.bfloat16
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_layers_may_differ_and_those_outside_of_blocks_are_not_tuned(method):
    layers = {"include": ["*"], "*.output.dense": {"bits": 4}}
    _, report = compressed(method, "bert_classifier", layers=layers, start="rtn")
    assert {row.encoding for row in report.layers if row.name.endswith("output.dense")} == {"4-bit g16"}
    assert {row.encoding for row in report.layers if "query" in row.name} == {"2-bit g16"}
    assert set(report.notes) == {
        "bert.pooler.dense: outside of blocks: not tuned",
        "classifier: outside of blocks: not tuned",
    }


@pytest.mark.parametrize("option", [{"true_sequential": True}, {"guided": 4}])
@pytest.mark.parametrize("method", METHODS)
def test_options_that_make_no_sense_here_are_refused(method, option):
    with pytest.raises(RecipeError, match=next(iter(option))):
        make_stage(method, option)


@pytest.mark.parametrize("method", METHODS)
def test_embedding_is_rounded_first(method):
    _, report = compressed(method, "llama", embeddings={"bits": 8})
    assert report.layers[0].name == "model.embed_tokens"
    assert report.layers[0].encoding.startswith("8-bit")


@pytest.mark.parametrize("method", METHODS)
def test_trained_model_agrees_better_than_its_start(method):
    if not STORIES.exists():
        pytest.skip(f"no trained model at {STORIES}")
    tokenizer = AutoTokenizer.from_pretrained(STORIES)

    def load():
        return AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()

    torch.manual_seed(0)
    begin = torch.full((48, 1), tokenizer.bos_token_id)
    mask = torch.ones_like(begin)
    told = load().generate(begin, attention_mask=mask, do_sample=True, max_new_tokens=63, min_new_tokens=63)
    kl = []
    for iterations in (0, 24):
        model = load()
        compress(model, method, data=told[:32], bits=2, group_size=32, batch_tokens=256, iterations=iterations)
        kl.append(agreement(model, load(), told[32:]).kl)
    assert kl[1] < 0.8 * kl[0]


def test_processes_with_the_same_windows_do_what_one_does():
    """Gradients are averaged, so the numbers are the very same, in every process."""
    options = {"quantize.autoround": OPTIONS | {"batch_tokens": 128, "iterations": 6}}
    one, *two = (
        x["quantize.autoround"] for x in (jobs.compress_alike(options), *together(jobs.compress_alike, options))
    )
    assert any(key.endswith("codes") for key in one)
    for state in two:
        assert all(torch.equal(tensor, state[name]) for name, tensor in one.items())
