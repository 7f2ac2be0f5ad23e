from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.evaluation import kl_of_row
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_slim.core.errors import DataError, ModelError
from hf_slim.evaluation.agreement import CHUNK, agreement, divergence

VOCAB = 53
BERT = BertConfig(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=3
)


def make(kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=16, n_layer=1, n_head=2))
    if kind == "bert":
        return BertForMaskedLM(BERT)
    if kind == "classifier":
        return BertForSequenceClassification(BERT)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=64, **sizes))


def noisy(model, size=0.2):
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return other


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, VOCAB, (5, 20), generator=torch.Generator().manual_seed(1))


@given(st.integers(1, 2 * CHUNK + 1), st.integers(2, 17), st.floats(0.01, 30), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_kernel_matches_the_oracle(rows, classes, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    q, p = (scale * torch.randn(2, rows, classes, generator=generator)).unbind()
    kl, same = divergence(q, p)
    expected = np.array([kl_of_row(a, b) for a, b in zip(q.numpy(), p.numpy(), strict=True)])
    np.testing.assert_allclose(kl.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert (same.numpy() == (q.numpy().argmax(1) == p.numpy().argmax(1))).all()


@given(st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_divergence_is_zero_for_equals_and_ignores_constants(seed):
    logits = 4 * torch.randn(30, 9, generator=torch.Generator().manual_seed(seed))
    kl, same = divergence(logits, logits)
    assert (kl == 0).all()
    assert same.all()
    shifted, _ = divergence(logits + 3.0, logits)
    assert shifted.abs().max() < 1e-5


def test_direction_is_original_first():
    """The original spreads over two classes, the model is sure of one: KL(original || model) is the large one."""
    original, sure = torch.tensor([[0.0, 0.0]]), torch.tensor([[20.0, 0.0]])
    assert divergence(sure, original)[0].item() == pytest.approx(10 - np.log(2), rel=1e-5)
    assert divergence(original, sure)[0].item() == pytest.approx(np.log(2), rel=1e-5)


def test_classes_that_the_original_rules_out_count_nothing():
    original, model = torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([[0.0, 0.0, 0.0]])
    assert divergence(model, original)[0].item() == pytest.approx(np.log(3 / 2), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "classifier"])
def test_a_model_agrees_with_itself_and_less_with_others(kind, dtype, ids):
    model = make(kind).to(dtype)
    itself = agreement(copy.deepcopy(model), model, ids)
    assert (itself.kl, itself.kl_stderr, itself.top1) == (0.0, 0.0, 1.0)
    assert itself.tokens == (5 if kind == "classifier" else 100)
    other = agreement(noisy(model), model, ids)
    assert other.kl > 0
    assert 0 < other.kl_stderr < other.kl
    assert other.top1 < 1 or kind == "classifier"


def test_result_matches_the_oracle(ids):
    model = make("llama").eval()
    other = noisy(model).eval()
    with torch.no_grad():
        q, p = other(ids).logits.numpy(), model(ids).logits.numpy()
    kl = np.array([[kl_of_row(q[i, j], p[i, j]) for j in range(20)] for i in range(5)])
    result = agreement(other, model, ids, batch=2)
    assert result.kl == pytest.approx(kl.mean(), rel=1e-4)
    assert result.kl_stderr == pytest.approx(kl.mean(axis=1).std(ddof=1) / np.sqrt(5), rel=1e-3)
    assert result.top1 == pytest.approx((q.argmax(-1) == p.argmax(-1)).mean())


def test_batch_size_does_not_matter_and_modes_are_restored(ids):
    model = make("gpt2").train()
    other = noisy(model).eval()
    one, many = agreement(other, model, ids, batch=1), agreement(other, model, ids, batch=5)
    assert one.kl == pytest.approx(many.kl, rel=1e-4)
    assert one.top1 == pytest.approx(many.top1, abs=0.011)
    assert model.training
    assert not other.training


def test_single_window_has_no_standard_error(ids):
    model = make("llama")
    assert agreement(noisy(model), model, ids[:1]).kl_stderr is None


def test_another_vocabulary_is_refused(ids):
    small = make("llama")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    large = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB + 3, **sizes))
    with pytest.raises(ModelError, match=r"\[1, 20, 56\] against the original's \[1, 20, 53\]"):
        agreement(large, small, ids)


def test_windows_beyond_the_context_are_refused():
    model = make("llama")
    with pytest.raises(DataError, match="65 tokens do not fit the 64 positions"):
        agreement(model, model, torch.zeros(1, 65, dtype=torch.long))
