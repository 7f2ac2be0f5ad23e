from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from hf_slim.core.errors import DataError
from hf_slim.evaluation import latency as latency_module
from hf_slim.evaluation.latency import latency, latency_pair

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


class Clock:
    """Time that only models move on."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self, device):
        return self.seconds


class Timed(nn.Module):
    """Takes a fixed time a token, and notes the shape of every call."""

    def __init__(self, clock, costs):
        super().__init__()
        self.clock, self.costs, self.calls = clock, list(costs), []
        self.config = SimpleNamespace(vocab_size=7, max_position_embeddings=100)

    def forward(self, input_ids, past_key_values=None, use_cache=False):
        seen = past_key_values or 0
        self.calls.append((seen, input_ids.shape[1]))
        cost = self.costs[min(sum(1 for past, _ in self.calls if past == 0), len(self.costs)) - 1]
        self.clock.seconds += cost * input_ids.shape[1]
        return SimpleNamespace(logits=torch.zeros(1, 1, 7), past_key_values=seen + input_ids.shape[1])


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(latency_module, "_now", clock)
    return clock


def test_figures_are_tokens_over_seconds(clock):
    model = Timed(clock, [0.25])
    result = latency(model, prompt_length=10, new_tokens=4, repeats=2)
    assert (result.prefill.median, result.prefill.spread) == (4.0, 0.0)
    assert (result.decode.median, result.decode.spread) == (4.0, 0.0)
    run = [(0, 10), (10, 1), (11, 1), (12, 1), (13, 1)]
    assert model.calls == 3 * run  # a warm-up and two repeats, each token after the cache of those before it


def test_median_and_spread_leave_the_warm_up_out(clock):
    result = latency(Timed(clock, [100.0, 1.0, 0.5, 0.25]), prompt_length=10, new_tokens=4, repeats=3)
    assert (result.prefill.median, result.prefill.spread) == (2.0, 1.5)
    assert result.repeats == 3


def test_pair_takes_turns_and_compares_turn_by_turn(clock):
    """The machine slows down fourfold; the model stays twice as fast as its original in every turn."""
    model, original = Timed(clock, [1, 1, 2, 4]), Timed(clock, [2, 2, 4, 8])
    pair = latency_pair(model, original, prompt_length=8, new_tokens=2, repeats=3)
    assert (pair.prefill_ratio, pair.decode_ratio) == (2.0, 2.0)
    assert pair.model.prefill.median == 0.5
    assert pair.original.prefill.median == 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoder(dtype):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=31, max_position_embeddings=64, **SIZES)).to(dtype).train()
    result = latency(model, prompt_length=16, new_tokens=4, repeats=2)
    assert result.prefill.median > 0
    assert result.decode.median > 0
    assert (result.prompt_length, result.new_tokens, result.device) == (16, 4, "cpu")
    assert result.threads == torch.get_num_threads()
    assert model.training


def test_encoder_is_timed_at_prefill_alone():
    bert = BertForMaskedLM(BertConfig(vocab_size=31, max_position_embeddings=16, **SIZES))
    result = latency(bert, prompt_length=16, new_tokens=4, repeats=1)
    assert result.prefill.median > 0
    assert result.decode is None
    assert result.new_tokens == 0
    assert latency_pair(bert, bert, prompt_length=16, repeats=1).decode_ratio is None


def test_context_counts_prompt_and_new_tokens():
    model = LlamaForCausalLM(LlamaConfig(vocab_size=31, max_position_embeddings=64, **SIZES))
    latency(model, prompt_length=60, new_tokens=4, repeats=1)
    with pytest.raises(DataError, match="65 tokens do not fit the 64 positions"):
        latency(model, prompt_length=60, new_tokens=5, repeats=1)


def test_model_without_a_vocabulary_is_refused():
    with pytest.raises(DataError, match=r"Linear has no config\.vocab_size"):
        latency(nn.Linear(2, 2))
