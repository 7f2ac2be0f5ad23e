"""Tiny models whose columns fill GGUF blocks, and tokenizers of both kinds that GGUF knows."""

from __future__ import annotations

import json
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaTokenizer,
    LlamaConfig,
    LlamaTokenizer,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from hf_slim.export.gguf_tokenizer import SPLITS

TEXT = (
    "Once upon a time there was a little fox who lived in the forest. The fox liked to run and to play with her "
    "friends. One day, in 2024, she found 31 red berries: \"What's that?\" she asked. They've gone to the naïve owl.\n"
    "def run(x_1):\n\treturn x_1 + 3.14  # the end\n"
)
LINES = (
    "The little fox found the forest.",
    "They've 2024 berries,  two spaces\n\tand a tab",
    "naïve 日本語 🦊",
    "<|turn|>What's that?",
)
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "mistral": (MistralConfig, {"sliding_window": None, "rope_theta": 1e6}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 128}),
    "gemma2": (Gemma2Config, {"head_dim": 256, "sliding_window": 16}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 256, "sliding_window": 16, "num_hidden_layers": 7}),
}
TOKENIZERS = {  # which kind each family has
    "llama": "llama-bpe",
    "mistral": "sentencepiece",
    "qwen2": "qwen2",
    "qwen3": "qwen2",
    "gemma2": "gemma",
    "gemma3": "gemma",
}


def model(family: str, dtype: torch.dtype = torch.float32, vocabulary: int = 384, **options: Any) -> PreTrainedModel:
    """A random model whose every number is a float16 one, norm weights and biases included."""
    cls, defaults = CONFIGS[family]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = cls(**SHAPE | {"vocab_size": vocabulary} | ids | defaults | options)
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            spread = 2.0 * parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.25
            center = 0.0 if parameter.dim() == 2 else parameter.float().mean()
            parameter.copy_((center + spread * torch.randn(parameter.shape)).half())
    return made.eval()


def tokenizer(kind: str, **options: Any) -> Any:
    """A tokenizer trained on a few lines: "gpt-2", "smollm", a name of `SPLITS`, "sentencepiece" or "gemma"."""
    if kind in ("sentencepiece", "gemma"):
        return _sentencepiece(kind, options)
    steps: dict[str, list[Any]] = {"gpt-2": [], "smollm": [pre_tokenizers.Digits(individual_digits=True)]}
    steps |= {name: [pre_tokenizers.Split(Regex(regex), behavior="isolated")] for name, regex in SPLITS.items()}
    inner = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind not in SPLITS)
    inner.pre_tokenizer = pre_tokenizers.Sequence([*steps[kind], level]) if steps[kind] else level
    inner.decoder = decoders.ByteLevel()
    special = ["<pad>", "<|begin|>", "<|end|>", "<|turn|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([TEXT] * 2, trainer)
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, additional_special_tokens=["<|turn|>"], **names | options)


def _sentencepiece(kind: str, options: dict[str, Any]) -> Any:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=100, show_progress=False))
    learned = json.loads(inner.to_str())["model"]
    special = ["<unk>", "<s>", "</s>"] if kind == "sentencepiece" else ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces = [*special, *[f"<0x{byte:02X}>" for byte in range(256)], *learned["vocab"]]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(merge) for merge in learned["merges"]]
    made = (LlamaTokenizer if kind == "sentencepiece" else GemmaTokenizer)(vocab=vocabulary, merges=merges, **options)
    made.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    return made
