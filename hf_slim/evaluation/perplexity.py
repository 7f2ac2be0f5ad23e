"""Perplexity of held-out text: exp of the mean negative log-likelihood of a token.

    nll = -1/N sum_i log p(x_i | x_<i),   perplexity = exp(nll)

Windows do not overlap, so no token is counted twice; the first token of a window has no context and is not counted; all
N tokens weigh the same. Logits are cast to float32 before the softmax. The sum runs in float64 over float32 terms.

The standard error treats windows as independent and is carried over to the perplexity by its derivative: perplexity
times the standard error of the mean nll.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import evaluate
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.data import tokens_from
from hf_slim.core.forward import evaluating, logits_of, require_causal, require_context, standard_error
from hf_slim.core.method import MethodConfig, Rules
from hf_slim.core.report import StageReport

CHUNK = 128  # positions whose float32 logits exist at a time: 25 MB at a vocabulary of 49,152


RULES = Rules(
    needs=("held_out", "original"), preserves=("zeros", "codes", "foreign", "tied"), paper="Jelinek et al. 1977"
)


class Config(MethodConfig):
    """Options of `evaluate.perplexity`."""

    batch: int = Field(1, ge=1, description="windows in one forward pass; on a CPU more is no faster")


def negative_log_likelihood(
    logits: Float[Tensor, "batch length vocab"], ids: Int[Tensor, "batch length"]
) -> tuple[Float[Tensor, " batch"], int]:
    """Nats that each window's tokens cost, given all tokens before them in the window.

    Args:
        logits: prediction at every position, any float dtype; position i predicts token i + 1.
        ids: the window's tokens.

    Returns:
        Sum in nats of each window, float64; number of tokens predicted in all windows together, batch * (length - 1).
    """
    nats = torch.zeros(ids.shape[0], dtype=torch.float64, device=logits.device)
    predictions, targets = logits[:, :-1], ids[:, 1:].to(logits.device)
    for start in range(0, targets.shape[1], CHUNK):
        part = predictions[:, start : start + CHUNK].float()
        wanted = targets[:, start : start + CHUNK]
        nats += F.cross_entropy(part.transpose(1, 2), wanted, reduction="none").double().sum(dim=1)
    return nats, targets.numel()


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity and what it rests on.

    Args:
        perplexity: exp(nll).
        nll: mean nats a token.
        tokens: number of predicted tokens.
        stderr: standard error of the perplexity; None for a single window.
    """

    perplexity: float
    nll: float
    tokens: int
    stderr: float | None


def perplexity(model: nn.Module, ids: Int[Tensor, "windows length"], batch: int = 1) -> PerplexityResult:
    """Perplexity of a causal language model on windows of tokens.

    Args:
        model: causal language model on any device; its training mode is restored afterwards.
        ids: non-overlapping windows.
        batch: windows in one forward pass; does not change the result beyond rounding.

    Raises:
        ModelError: not a causal language model.
        DataError: windows longer than the model's context.
    """
    require_causal(model, "perplexity")
    require_context(model, ids.shape[1])
    nats, tokens = [], 0
    with evaluating(model):
        for part in ids.split(batch):
            part_nats, part_tokens = negative_log_likelihood(logits_of(model, part), part)
            nats.append(part_nats.cpu())
            tokens += part_tokens
    windows = torch.cat(nats)
    nll = float(windows.sum()) / tokens
    value = math.exp(nll) if nll < 700 else math.inf  # exp overflows float64 beyond 709
    spread = standard_error(windows / (ids.shape[1] - 1))
    return PerplexityResult(value, nll, tokens, None if spread is None else value * spread)


class Perplexity(evaluate.Metric):
    """`perplexity` as a metric of the evaluate library, for a model object or a folder.

    >>> Perplexity().compute(model=model, tokenizer=tokenizer, predictions=texts)["perplexity"]  # doctest: +SKIP

    `compute` takes `predictions`, a list of texts or of token id lists, `model`, a model object, folder or Hub id, and
    optionally `tokenizer` (the folder's own if not given), `length` of the windows, and `batch`.
    """

    def __init__(self, *args: Any, keep_in_memory: bool = True, **options: Any):
        super().__init__(*args, keep_in_memory=keep_in_memory, **options)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Perplexity of a causal language model on non-overlapping windows of text.",
            citation="",
            inputs_description="predictions: texts or token id lists; model: object, folder or Hub id.",
            features=[
                datasets.Features({"predictions": datasets.Value("string")}),
                datasets.Features({"predictions": datasets.Sequence(datasets.Value("int64"))}),
            ],
        )

    def _compute(
        self,
        predictions: Sequence[str] | Sequence[Sequence[int]],
        model: nn.Module | str | Path,
        tokenizer: Any = None,
        length: int | None = None,
        batch: int = 1,
    ) -> dict[str, Any]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if isinstance(model, (str, Path)):
            if tokenizer is None and isinstance(predictions[0], str):
                tokenizer = AutoTokenizer.from_pretrained(model)
            model = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        windows = tokens_from(predictions, tokenizer, length)
        return asdict(perplexity(model, windows.ids, batch))


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Perplexity on held-out text, of the original and of the model as it is now."""
    ids = context.tokens("held_out")
    before = perplexity(context.original, ids, config.batch)
    after = perplexity(model, ids, config.batch)
    return StageReport(metrics={"before": asdict(before), "after": asdict(after)})
