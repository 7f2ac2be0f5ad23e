"""Compressed tiny models, and loading them with nothing missing and nothing left over."""

from __future__ import annotations

import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import hf_slim
from hf_slim.encodings.modules import EncodedModule

AUTO = dict.fromkeys(tiny.CAUSAL, AutoModelForCausalLM) | {
    "bert": AutoModelForMaskedLM,
    "bert_classifier": AutoModelForSequenceClassification,
}
METHODS = {
    "rtn": ("quantize.rtn", {"bits": 4, "group_size": 16, "clip": "minmax", "embeddings": {"bits": 8}}),
    "kmeans": ("share.kmeans", {"bits": 3, "scope": "tensor"}),
    "unstructured": ("prune.magnitude", {"sparsity": 0.6}),
    "2:4": ("prune.magnitude", {"pattern": "2:4"}),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.ids(), attention_mask=torch.ones_like(tiny.ids())).logits


def compressed(architecture: str, method: str, dtype: torch.dtype = torch.float32, **options) -> PreTrainedModel:
    address, defaults = METHODS[method]
    model = tiny.ALL[architecture](dtype)
    hf_slim.compress(model, address, **defaults | options)
    return model


def load(architecture: str, folder, **options) -> PreTrainedModel:
    """Load a model, and insist that every tensor was there and none was left over."""
    model, info = AUTO[architecture].from_pretrained(folder, output_loading_info=True, **options)
    assert {name: found for name, found in info.items() if found} == {}
    return model.eval()


def encoded_names(model: PreTrainedModel) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, EncodedModule)]
