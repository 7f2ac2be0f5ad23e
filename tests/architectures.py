"""Tiny random models of every architecture that hf_slim is tested on, of fewer than 100,000 weights each.

`tiny.py` has the few that most tests use; here are all, for the tests that say what works on which.
"""

from __future__ import annotations

from collections.abc import Callable

import tiny
import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

VOCABULARY = tiny.VOCABULARY
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
ENCODER = {key: value for key, value in DECODER.items() if not key.endswith("_id") and "key_value" not in key}

KINDS: dict[str, tuple[str, dict]] = {
    "Llama": ("LlamaForCausalLM", DECODER),
    "Qwen2": ("Qwen2ForCausalLM", DECODER | {"tie_word_embeddings": True}),
    "Qwen3": ("Qwen3ForCausalLM", DECODER | {"head_dim": 8}),
    "Mistral": ("MistralForCausalLM", DECODER | {"sliding_window": 8}),
    "Gemma 2": ("Gemma2ForCausalLM", DECODER | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "Gemma 3": ("Gemma3ForCausalLM", DECODER | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "Phi-3": ("Phi3ForCausalLM", DECODER),
    "OPT": (
        "OPTForCausalLM",
        {
            **{key: DECODER[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
            **{"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 128, "pad_token_id": 1},
        },
    ),
    "GPT-2": (
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    ),
    "GPT-NeoX": ("GPTNeoXForCausalLM", DECODER),
    "Falcon": (
        "FalconForCausalLM",
        {key: value for key, value in DECODER.items() if key not in ("intermediate_size", "num_key_value_heads")}
        | {"ffn_hidden_size": 48},
    ),
    "Mixtral": ("MixtralForCausalLM", DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen3-MoE": (
        "Qwen3MoeForCausalLM",
        DECODER | {"head_dim": 8, "moe_intermediate_size": 32, "num_experts": 6, "num_experts_per_tok": 2},
    ),
    "BERT": ("BertForMaskedLM", ENCODER),
    "RoBERTa": ("RobertaForMaskedLM", ENCODER | {"max_position_embeddings": 130}),
    "DistilBERT": (
        "DistilBertForMaskedLM",
        {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
        | {"max_position_embeddings": 128},
    ),
    "T5": (
        "T5ForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 0},
    ),
}


def config_of(name: str) -> PretrainedConfig:
    """The tiny configuration of an architecture."""
    cls, options = KINDS[name]
    config_class: Callable[..., PretrainedConfig] = getattr(transformers, cls).config_class
    return config_class(**options, attn_implementation="eager")


def make(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model with weights of trained-like size, so that different inputs give different outputs."""
    torch.manual_seed(seed)
    model = getattr(transformers, KINDS[name][0])._from_config(config_of(name), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
    return model.eval()
