"""Tiny random models of the four kinds that everything must work on, and a tokenizer that needs no download."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 96


def llama(dtype: torch.dtype = torch.float32, tied: bool = True, layers: int = 2, seed: int = 0) -> PreTrainedModel:
    """Grouped-query attention, gated MLP, 40 columns (no multiple of 16)."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=40,
        intermediate_size=72,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
    )
    return _make(LlamaForCausalLM, config, dtype, seed)


def gpt2(dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Linear layers are Conv1D: their weight is transposed."""
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=4, n_positions=128)
    return _make(GPT2LMHeadModel, config, dtype, seed)


def opt(dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """ReLU, learned positions, biases."""
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        ffn_dim=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=48,
        pad_token_id=1,
    )
    return _make(OPTForCausalLM, config, dtype, seed)


def bert(dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Encoder with a masked-language head tied to its embeddings."""
    return _make(BertForMaskedLM, _bert_config(), dtype, seed)


def bert_classifier(dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Encoder with a pooler and a classifier outside its blocks."""
    return _make(BertForSequenceClassification, _bert_config(), dtype, seed)


CAUSAL = {"llama": llama, "gpt2": gpt2, "opt": opt}
ALL = CAUSAL | {"bert": bert, "bert_classifier": bert_classifier}


def ids(samples: int = 4, length: int = 16, seed: int = 0) -> torch.Tensor:
    """Random token windows [samples, length]."""
    return torch.randint(2, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, for text of printable ASCII."""
    vocabulary = {"<unk>": 0, "</s>": 1} | {chr(c): c - 30 for c in range(32, 32 + VOCABULARY - 2)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", pad_token="</s>")


def save(model: PreTrainedModel, folder) -> str:
    """A model folder with a tokenizer, as `from_pretrained` expects it."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """What a model makes of tokens, by default of `ids()`."""
    return model.eval()(input_ids=ids() if tokens is None else tokens).logits


def output_error(model: PreTrainedModel, original: PreTrainedModel, tokens: torch.Tensor | None = None) -> float:
    """Relative squared error of the logits."""
    found, expected = logits(model, tokens).double(), logits(original, tokens).double()
    return ((found - expected).square().sum() / expected.square().sum()).item()


def _bert_config() -> BertConfig:
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )


def _make(cls, config, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = cls._from_config(config, dtype=dtype)  # `.to(dtype)` would round the rotary table too
    with torch.no_grad():  # the library's small random weights make every output alike; real ones do not
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 2.0 * parameter.shape[-1] ** -0.5)
    return model.eval()
