"""Speed at batch 1: tokens per second of reading a prompt and of writing new tokens.

Prefill is one forward pass over the prompt that computes the last position's logits, as generation does; decode is one
forward pass a token with the key-value cache, greedy. Both are written out here, without `generate`, whose logits
processors and stopping rules would be timed along. Random tokens: the time does not depend on which they are.

A figure is the median of the repeats; its spread is half the range between the fastest and the slowest. Two models are
compared by taking turns, A B A B, so that a machine that slows down slows both; the ratio is the median over the turns.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.errors import DataError
from hf_slim.core.forward import accepts, device_of, evaluating, is_causal, require_context, run_on
from hf_slim.core.method import MethodConfig, Rules
from hf_slim.core.report import StageReport
from hf_slim.encodings.modules import cache_decoded

RULES = Rules(needs=("original",), preserves=("zeros", "codes", "foreign", "tied"))


class Config(MethodConfig):
    """Options of `evaluate.latency`."""

    prompt_length: int = Field(512, ge=1, description="tokens read in the prefill")
    new_tokens: int = Field(32, ge=1, description="tokens written one by one")
    repeats: int = Field(3, ge=1, description="timed runs; the median counts")


@dataclass(frozen=True)
class Speed:
    """Tokens per second: median and half the range over the repeats."""

    median: float
    spread: float


@dataclass(frozen=True)
class LatencyResult:
    """Speed of one model at batch 1.

    Args:
        prefill: of reading the prompt.
        decode: of writing; None for a model that does not generate.
        prompt_length, new_tokens, repeats: what was timed.
        threads: that PyTorch used within one operation.
        device: that the model's input was on.
    """

    prefill: Speed
    decode: Speed | None
    prompt_length: int
    new_tokens: int
    repeats: int
    threads: int
    device: str


@dataclass(frozen=True)
class LatencyPair:
    """Two models timed in turns; a ratio above 1 means that the model is faster than its original."""

    model: LatencyResult
    original: LatencyResult
    prefill_ratio: float
    decode_ratio: float | None


def latency(model: nn.Module, prompt_length: int = 512, new_tokens: int = 32, repeats: int = 3) -> LatencyResult:
    """Time one model at batch 1, after one run to warm up.

    Args:
        model: any model that takes `input_ids`; an encoder or classifier is timed at prefill alone.
        prompt_length: tokens read.
        new_tokens: tokens written.
        repeats: timed runs.

    Raises:
        DataError: prompt and new tokens exceed the model's context.
    """
    return _timed([model], prompt_length, new_tokens, repeats)[0][0]


def latency_pair(
    model: nn.Module, original: nn.Module, prompt_length: int = 512, new_tokens: int = 32, repeats: int = 3
) -> LatencyPair:
    """Time a model and its original in turns; see `latency` for the arguments and errors."""
    (ours, our_runs), (theirs, their_runs) = _timed([model, original], prompt_length, new_tokens, repeats)
    prefill, decode = ([b / a for a, b in zip(*pair, strict=True)] for pair in zip(our_runs, their_runs, strict=True))
    return LatencyPair(ours, theirs, median(prefill), median(decode) if decode else None)


Runs = tuple[list[float], list[float]]  # seconds of each repeat: prefill, decode (empty if there is none)


def _timed(
    models: list[nn.Module], prompt_length: int, new_tokens: int, repeats: int
) -> list[tuple[LatencyResult, Runs]]:
    """Time the models in turns; the result and the raw seconds of each."""
    for model in models:
        require_context(model, prompt_length + new_tokens if is_causal(model) else prompt_length)
    prompts = [_prompt(model, prompt_length) for model in models]
    runs: list[Runs] = [([], []) for _ in models]
    for repeat in range(repeats + 1):
        for model, ids, (prefill, decode) in zip(models, prompts, runs, strict=True):
            with evaluating(model):
                read, write = _run(model, ids, new_tokens)
            if repeat:  # the first is the warm-up
                prefill.append(read)
                decode.extend([] if write is None else [write])
    return [
        (_result(model, seconds, prompt_length, new_tokens), seconds)
        for model, seconds in zip(models, runs, strict=True)
    ]


def _result(model: nn.Module, seconds: Runs, prompt_length: int, new_tokens: int) -> LatencyResult:
    prefill, decode = seconds
    return LatencyResult(
        prefill=_speed(prompt_length, prefill),
        decode=_speed(new_tokens, decode) if decode else None,
        prompt_length=prompt_length,
        new_tokens=new_tokens if decode else 0,
        repeats=len(prefill),
        threads=torch.get_num_threads(),
        device=str(device_of(model)),
    )


def _speed(tokens: int, seconds: list[float]) -> Speed:
    speeds = [tokens / each for each in seconds]
    return Speed(median(speeds), (max(speeds) - min(speeds)) / 2)


def _prompt(model: nn.Module, length: int) -> Int[Tensor, "1 length"]:
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if not vocabulary:
        raise DataError(f"{type(model).__name__} has no config.vocab_size, so no prompt can be drawn")
    return torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(0)).to(device_of(model))


def _run(model: nn.Module, ids: Int[Tensor, "1 length"], new_tokens: int) -> tuple[float, float | None]:
    """Seconds of one prefill and of `new_tokens` decode steps."""
    options: dict[str, Any] = {"logits_to_keep": 1} if accepts(model, "logits_to_keep") else {}
    if not is_causal(model):
        start = _now(ids.device)
        run_on(model, ids)
        return _now(ids.device) - start, None
    start = _now(ids.device)
    output = model(input_ids=ids, use_cache=True, **options)
    read = _now(ids.device)
    for _ in range(new_tokens):
        token = output.logits[:, -1:].argmax(dim=-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    return read - start, _now(ids.device) - read


def _now(device: torch.device) -> float:
    """Seconds, once the device has done all it was asked to."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Speed of the original, of the model as it is now, and of that with its weights decoded once."""
    sizes = (config.prompt_length, config.new_tokens, config.repeats)
    pair = latency_pair(model, context.original, *sizes)
    cache_decoded(model)
    try:
        decoded = latency(model, *sizes)
    finally:
        cache_decoded(model, on=False)
    found = {"before": pair.original, "after": pair.model, "decoded": decoded}
    medians = {key: {"prefill": x.prefill.median, "decode": x.decode and x.decode.median} for key, x in found.items()}
    return StageReport(metrics={**medians, "threads": decoded.threads, "device": decoded.device, **config.model_dump()})
