from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reference.evaluation import nats_of_window
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from hf_slim.core.data import DataSource, load_tokens
from hf_slim.core.errors import DataError, ModelError
from hf_slim.evaluation.perplexity import CHUNK, Perplexity, negative_log_likelihood, perplexity

SHARED = Path(__file__).parents[3] / "shared"
VOCAB = 61


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tiny = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=64, **sizes))
    nn.init.normal_(tiny.lm_head.weight, std=2.0)  # far from uniform
    return tiny.eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, VOCAB, (6, 24), generator=torch.Generator().manual_seed(1))


class Constant(nn.Module):
    """Predicts the same logits everywhere."""

    def __init__(self, logits, dtype=torch.float32):
        super().__init__()
        self.logits = logits.to(dtype)

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [2, 1000, 49152])
def test_uniform_prediction_has_the_perplexity_of_the_vocabulary(vocab, dtype):
    ids = torch.randint(0, vocab, (3, 2 * CHUNK + 5), generator=torch.Generator().manual_seed(0))
    result = perplexity(Constant(torch.full((vocab,), 3.5), dtype), ids)
    assert result.perplexity == pytest.approx(vocab, rel=1e-5)
    assert result.stderr == pytest.approx(0, abs=1e-6 * vocab)
    assert result.tokens == 3 * (2 * CHUNK + 4)


def test_certain_and_right_has_perplexity_one():
    logits = torch.full((5,), -1e4)
    logits[3] = 0.0
    assert perplexity(Constant(logits), torch.full((2, 9), 3)).perplexity == 1.0


def test_certain_and_wrong_is_infinite_not_an_error():
    logits = torch.full((5,), -1e4)
    logits[3] = 0.0
    assert perplexity(Constant(logits), torch.full((2, 9), 2)).perplexity == math.inf


@pytest.mark.parametrize("length", [2, 3, CHUNK, CHUNK + 1, CHUNK + 2, 2 * CHUNK + 3])
def test_kernel_matches_the_oracle(length):
    generator = torch.Generator().manual_seed(length)
    logits = 5 * torch.randn(2, length, 11, generator=generator)
    ids = torch.randint(0, 11, (2, length), generator=generator)
    nats, tokens = negative_log_likelihood(logits, ids)
    expected = [nats_of_window(logits[i].numpy(), ids[i].numpy()) for i in range(2)]
    np.testing.assert_allclose(nats.numpy(), expected, rtol=1e-6)
    assert tokens == 2 * (length - 1)


def test_half_precision_logits_are_summed_in_float32():
    """600 likely tokens of one nat each: a bfloat16 sum would stop growing at 256."""
    logits = torch.zeros(1, 601, 3, dtype=torch.bfloat16)
    nats, tokens = negative_log_likelihood(logits, torch.zeros(1, 601, dtype=torch.long))
    assert nats.item() == pytest.approx(600 * math.log(3), rel=1e-6)
    assert tokens == 600


def test_model_matches_the_oracle(model, ids):
    result = perplexity(model, ids)
    with torch.no_grad():
        logits = model(ids).logits.numpy()
    windows = [nats_of_window(logits[i], ids[i].numpy()) for i in range(len(ids))]
    assert result.nll == pytest.approx(sum(windows) / (6 * 23), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(sum(windows) / (6 * 23)), rel=1e-5)
    assert result.tokens == 6 * 23
    means = np.array(windows) / 23
    assert result.stderr == pytest.approx(result.perplexity * means.std(ddof=1) / math.sqrt(6), rel=1e-4)


def test_order_of_windows_and_batch_size_do_not_matter(model, ids):
    result = perplexity(model, ids)
    for other in (perplexity(model, ids.flip(0)), perplexity(model, ids, batch=4), perplexity(model, ids, batch=99)):
        assert other.perplexity == pytest.approx(result.perplexity, rel=1e-5)
        assert other.stderr == pytest.approx(result.stderr, rel=1e-3)
        assert other.tokens == result.tokens


def test_single_window_has_no_standard_error(model, ids):
    assert perplexity(model, ids[:1]).stderr is None


def test_modes_and_gradients_are_restored(model, ids):
    model.train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    perplexity(model, ids)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.is_grad_enabled()
    model.eval()


def test_dropout_is_off(ids):
    class Dropping(Constant):
        def forward(self, input_ids):
            output = super().forward(input_ids)
            return SimpleNamespace(logits=nn.functional.dropout(output.logits, 0.5, self.training))

    dropping = Dropping(torch.arange(VOCAB).float()).train()
    assert perplexity(dropping, ids) == perplexity(Constant(torch.arange(VOCAB).float()), ids)


def test_masked_language_model_is_refused(ids):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertForMaskedLM(BertConfig(vocab_size=VOCAB, **sizes))
    with pytest.raises(ModelError, match=r"needs a causal language model, got BertForMaskedLM; .*agreement"):
        perplexity(bert, ids)


def test_windows_beyond_the_context_are_refused(model):
    with pytest.raises(DataError, match="65 tokens do not fit the 64 positions"):
        perplexity(model, torch.zeros(1, 65, dtype=torch.long))


def test_metric_takes_ids_and_model_objects(model, ids):
    computed = Perplexity().compute(model=model, predictions=ids.tolist())
    assert computed == vars(perplexity(model, ids))


def test_metric_takes_texts_and_a_folder(tmp_path):
    folder = SHARED / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip("the trained test model lies beside the repository, in ../shared")
    texts = ["Once upon a time there was a little girl named Lily. She liked to play outside."] * 30
    computed = Perplexity().compute(model=str(folder), predictions=texts, length=64, batch=4)
    tokenizer, trained = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert computed == Perplexity().compute(model=trained, tokenizer=tokenizer, predictions=texts, length=64, batch=4)
    assert computed["tokens"] % 63 == 0
    trained.save_pretrained(tmp_path)  # a folder without a tokenizer, which ids do not need
    rows = torch.randint(0, 512, (3, 16), generator=torch.Generator().manual_seed(0)).tolist()
    from_folder = Perplexity().compute(model=tmp_path, predictions=rows)
    assert from_folder == Perplexity().compute(model=trained, predictions=rows)


def test_trained_model_has_its_known_perplexity():
    folder, text = SHARED / "models" / "stories260K", SHARED / "data" / "tinystories" / "valid.txt"
    if not (folder.is_dir() and text.is_file()):
        pytest.skip("the trained test model and its text lie beside the repository, in ../shared")
    tokenizer, trained = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    windows = load_tokens(DataSource(source=str(text), samples=64, length=256), "held_out", tokenizer)
    result = perplexity(trained, windows.ids, batch=16)
    assert abs(result.perplexity - 4.05) < 2 * result.stderr  # 4.05 is that of the whole file
    assert result.stderr < 0.1
