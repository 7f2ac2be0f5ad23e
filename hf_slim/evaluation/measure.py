"""Several measures of one model at once, for people who just want the numbers."""

from __future__ import annotations

from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from hf_slim.core.examples import Examples, check_examples
from hf_slim.core.forward import is_causal
from hf_slim.core.size import count_weights, stored_bytes
from hf_slim.evaluation.accuracy import accuracy
from hf_slim.evaluation.agreement import agreement
from hf_slim.evaluation.latency import latency
from hf_slim.evaluation.perplexity import perplexity


def measure(
    model: PreTrainedModel,
    ids: Int[Tensor, "windows length"],
    original: PreTrainedModel | None = None,
    speed: bool = False,
    examples: Examples | None = None,
    tokenizer: Any = None,
) -> dict[str, float]:
    """Size, and what else applies: perplexity (causal models), accuracy (classifiers), agreement, speed (on demand).

    Args:
        ids: held-out token windows.
        examples: held-out texts with their classes.
        tokenizer: pads them.
    """
    found: dict[str, float] = {
        "megabytes": stored_bytes(model) / 1e6,
        "bits per weight": 8 * stored_bytes(model) / count_weights(model),
    }
    if is_causal(model):
        found["perplexity"] = perplexity(model, ids).perplexity
    if examples is not None:
        check_examples(model, examples)
        found["accuracy"] = accuracy(model, examples, tokenizer).accuracy
    if original is not None:
        compared = agreement(model, original, ids)
        found |= {"KL from the original": compared.kl, "same top-1 token": compared.top1}
    if speed:
        timed = latency(model)
        found["prefill tokens/s"] = timed.prefill.median
        if timed.decode is not None:
            found["decode tokens/s"] = timed.decode.median
    return found
