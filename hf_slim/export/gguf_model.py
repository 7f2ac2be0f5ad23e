"""What GGUF calls a model's tensors and options, and what it stores otherwise than Transformers does.

Names come from the gguf package's own map. Two conventions of llama.cpp change values:

- Llama and Mistral: the rows of the query and key projections are interleaved, because its rotary embedding turns
  neighbouring rows where Transformers' turns row i with row i + head_dim / 2;
- Gemma: norm weights are stored plus one.

A GGUF file holds a fixed set of options; a reader takes the rest (activation, attention pattern, query scale) as the
architecture has it. So a config fits when reading the written options back gives an equal one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import gguf
import torch
from gguf import Keys
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.integrations import GGUF_CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


@dataclass(frozen=True)
class Family:
    """An architecture in GGUF's terms.

    Args:
        interleaved: rows of the query and key projections are.
        shifted: norm weights are stored plus one.
        reads_as: Transformers' model type for a file of this architecture.
    """

    architecture: gguf.MODEL_ARCH
    reads_as: str
    interleaved: bool = False
    shifted: bool = False

    @property
    def name(self) -> str:
        return gguf.MODEL_ARCH_NAMES[self.architecture]


_LLAMA = Family(gguf.MODEL_ARCH.LLAMA, "llama", interleaved=True)
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Family(gguf.MODEL_ARCH.QWEN2, "qwen2"),
    "qwen3": Family(gguf.MODEL_ARCH.QWEN3, "qwen3"),
    "gemma2": Family(gguf.MODEL_ARCH.GEMMA2, "gemma2", shifted=True),
    "gemma3_text": Family(gguf.MODEL_ARCH.GEMMA3, "gemma3_text", shifted=True),
}
ROPES = ("default", "linear", "llama3")  # kinds of rotary scaling that a file can state
_UNUSED = {  # options that change no logits of an evaluated model, or that are checked elsewhere
    *("architectures", "model_type", "dtype", "transformers_version", "_name_or_path", "quantization_config"),
    *("output_hidden_states", "output_attentions", "return_dict", "chunk_size_feed_forward", "is_encoder_decoder"),
    *("id2label", "label2id", "problem_type", "initializer_range", "use_cache", "attention_dropout", "pretraining_tp"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"),
    *("use_sliding_window", "max_window_layers", "sliding_window"),  # what they mean is in layer_types
}


def tensor_name(family: Family, config: PretrainedConfig, parameter: str) -> str | None:
    """GGUF's name of a parameter such as "model.layers.0.mlp.up_proj.weight"; None when it has none."""
    names = _names(family.architecture, config.num_hidden_layers)
    return names.get_name(parameter, try_suffixes=(".weight", ".bias"))


def row_order(family: Family, config: PretrainedConfig, parameter: str) -> Int[Tensor, "rows"] | None:
    """The order in which GGUF stores a parameter's rows; None for the same order."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    projection = parameter.split(".")[-2]
    if not family.interleaved or projection not in heads:
        return None
    return torch.arange(heads[projection] * head_dim(config)).view(heads[projection], 2, -1).mT.flatten()


def vector(family: Family, config: PretrainedConfig, parameter: str, values: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """A bias or norm weight as GGUF stores it, float32."""
    order = row_order(family, config, parameter)
    values = values.float() if order is None else values.float()[order]
    return values + 1 if family.shifted and parameter.endswith("norm.weight") else values


def options(family: Family, config: PretrainedConfig) -> dict[str, int | float | str]:
    """The model's options under their GGUF keys."""
    found: dict[str, Any] = {
        Keys.LLM.BLOCK_COUNT: config.num_hidden_layers,
        Keys.LLM.CONTEXT_LENGTH: config.max_position_embeddings,
        Keys.LLM.EMBEDDING_LENGTH: config.hidden_size,
        Keys.LLM.FEED_FORWARD_LENGTH: config.intermediate_size,
        Keys.LLM.VOCAB_SIZE: config.vocab_size,
        Keys.Attention.HEAD_COUNT: config.num_attention_heads,
        Keys.Attention.HEAD_COUNT_KV: config.num_key_value_heads,
        Keys.Attention.KEY_LENGTH: head_dim(config),
        Keys.Attention.VALUE_LENGTH: head_dim(config),
        Keys.Attention.LAYERNORM_RMS_EPS: float(config.rms_norm_eps),
        Keys.Rope.DIMENSION_COUNT: head_dim(config),
        Keys.Rope.FREQ_BASE: float(_rope(config)["rope_theta"]),
    }
    if _rope(config)["rope_type"] == "linear":
        found[Keys.Rope.SCALING_TYPE] = "linear"
        found[Keys.Rope.SCALING_FACTOR] = float(_rope(config)["factor"])
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        found[Keys.Attention.SLIDING_WINDOW] = config.sliding_window
    for key, name in (
        (Keys.LLM.ATTN_LOGIT_SOFTCAPPING, "attn_logit_softcapping"),
        (Keys.LLM.FINAL_LOGIT_SOFTCAPPING, "final_logit_softcapping"),
    ):
        if getattr(config, name, None) is not None:
            found[key] = float(getattr(config, name))
    return {key.format(arch=family.name): value for key, value in found.items()}


def rope_divisors(config: PretrainedConfig) -> Float[Tensor, "half"] | None:
    """What each rotary frequency is divided by: Llama 3's way of stretching the context; None for nothing."""
    if _rope(config)["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    powers = torch.arange(0, head_dim(config), 2, dtype=torch.float32) / head_dim(config)
    return _rope(config)["rope_theta"] ** -powers / scaled


def config_problems(config: PretrainedConfig) -> list[str]:
    """Options that a GGUF file of this architecture cannot state, and that differ from what every reader assumes."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        return [
            f"GGUF export does not know the architecture {config.model_type!r}; it writes {', '.join(sorted(FAMILIES))}"
        ]
    if _rope(config)["rope_type"] not in ROPES:
        return [
            f"rope_type is {_rope(config)['rope_type']!r}; the exporter writes {', '.join(ROPES)}: "
            "set rope_parameters to one of these in the model's config"
        ]
    problems = [
        f"the model's {name} is {ours!r}, and a GGUF file cannot say so: its readers assume {theirs!r}"
        for name, (ours, theirs) in _unread(family, config).items()
        if name not in ("rope_parameters", "head_dim")
    ]
    scalar = getattr(config, "query_pre_attn_scalar", head_dim(config))
    if scalar != head_dim(config):
        problems.append(
            f"query_pre_attn_scalar is {scalar}, and llama.cpp divides by the head's {head_dim(config)} dimensions"
        )
    return problems


def config_notes(config: PretrainedConfig) -> list[str]:
    """Options that one reader heeds and another does not."""
    family = FAMILIES[config.model_type]
    notes = [
        f"{name} is in the file as llama.cpp expects it, but Transformers' GGUF reader assumes {theirs!r}, not {ours!r}"
        for name, (ours, theirs) in _unread(family, config).items()
        if name in ("rope_parameters", "head_dim")
    ]
    window = getattr(config, "sliding_window", None)
    if family is _LLAMA and window is not None and window < config.max_position_embeddings:
        notes.append(
            f"the sliding attention window is not in the file: texts longer than {window} tokens are attended in full"
        )
    return notes


def head_dim(config: PretrainedConfig) -> int:
    """Dimensions of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@cache
def _names(architecture: gguf.MODEL_ARCH, blocks: int) -> gguf.TensorNameMap:
    return gguf.get_tensor_name_map(architecture, blocks)


def _unread(family: Family, config: PretrainedConfig) -> dict[str, tuple[Any, Any]]:
    """Options that Transformers would read back otherwise: {name: (ours, what it reads)}."""
    known = GGUF_CONFIG_MAPPING[family.name]
    written = {key.removeprefix(f"{family.name}."): value for key, value in options(family, config).items()}
    fields = {name: written[key] for key, name in known.items() if name is not None and key in written}
    read = AutoConfig.for_model(family.reads_as, **fields).to_dict()
    ours = config.to_dict()
    return {
        name: (ours[name], read[name])
        for name in read
        if name in ours and name not in _UNUSED and not _equal(ours[name], read[name])
    }


def _equal(ours: Any, theirs: Any) -> bool:
    """Equality, but for the digits that float32 drops."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        return ours.keys() == theirs.keys() and all(_equal(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, float) and isinstance(theirs, float):
        return abs(ours - theirs) <= 1e-6 * abs(ours)
    return ours == theirs


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    """The rotary options of layers that attend to everything."""
    rope: Any = config.rope_parameters
    return rope.get("full_attention", rope)
