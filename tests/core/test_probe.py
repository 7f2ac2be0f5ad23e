"""Subclasses of PyTorch's layers are judged by what they compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.llama4.modeling_llama4 import Llama4Router

from hf_slim.core.probe import embedding_scale, is_plain_linear
from hf_slim.encodings import Affine
from hf_slim.encodings.modules import EncodedLinear


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Shifted(nn.Embedding):
    def forward(self, input):
        return super().forward(input) + 1


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_linear_subclasses(place):
    with torch.device(place):
        assert is_plain_linear(nn.Linear(4, 3))
        assert is_plain_linear(FalconLinear(4, 3))
        assert not is_plain_linear(Doubled(4, 3))
        assert not is_plain_linear(EncodedLinear(4, 3, Affine(bits=4, group_size=None, symmetric=False)))
        assert not is_plain_linear(nn.MultiheadAttention(4, 2).out_proj)  # read by its owner, never called
        assert not is_plain_linear(nn.Embedding(4, 3))


def test_a_router_is_no_linear_layer():
    class Config:
        hidden_size, num_local_experts, num_experts_per_tok = 4, 3, 1

    assert not is_plain_linear(Llama4Router(Config()))


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_embedding_subclasses(place):
    with torch.device(place):
        assert embedding_scale(nn.Embedding(4, 3)) == 1.0
        assert embedding_scale(Gemma3TextScaledWordEmbedding(4, 3, 0, embed_scale=2.5)) == 2.5
        assert embedding_scale(BartScaledWordEmbedding(4, 3, 0, embed_scale=1.5)) == 1.5
        assert embedding_scale(Shifted(4, 3)) is None
        assert embedding_scale(nn.Embedding(4, 3, max_norm=1.0)) is None
        assert embedding_scale(nn.Linear(4, 3)) is None
