"""Agreement with the original model: how far the predicted distributions moved, and how often the top choice stayed.

    KL(p || q) = sum_v p_v (log p_v - log q_v),   p the original's distribution, q the compressed model's

averaged over all positions (nats a token), with the share of positions where both have the same most likely token.
Unlike perplexity it needs no labels, so it works on any text, on encoders and on classifiers (one distribution a
window), and it sees changes that perplexity averages away. 0 and 1 exactly for identical models.

Log-softmax in float32. The standard error treats windows as independent.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.errors import ModelError
from hf_slim.core.forward import evaluating, logits_of, require_context, standard_error
from hf_slim.core.method import MethodConfig, Rules
from hf_slim.core.report import StageReport

CHUNK = 128  # rows whose float32 distributions exist at a time: 25 MB each at a vocabulary of 49,152


RULES = Rules(
    needs=("held_out", "original"), preserves=("zeros", "codes", "foreign", "tied"), paper="Kullback & Leibler 1951"
)


class Config(MethodConfig):
    """Options of `evaluate.agreement`."""

    batch: int = Field(1, ge=1, description="windows in one forward pass; on a CPU more is no faster")


def divergence(
    logits: Float[Tensor, "rows classes"], original: Float[Tensor, "rows classes"]
) -> tuple[Float[Tensor, " rows"], Bool[Tensor, " rows"]]:
    """KL(original || model) of every row in nats, float32, and whether the most likely class is the same.

    Args:
        logits: the compressed model's, any float dtype.
        original: the original model's.
    """
    kl, same = [], []
    for part, reference in zip(logits.split(CHUNK), original.to(logits.device).split(CHUNK), strict=True):
        log_q, log_p = part.float().log_softmax(dim=-1), reference.float().log_softmax(dim=-1)
        # A class that the original rules out (logit -inf) contributes nothing, as p log p -> 0.
        kl.append(torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q)).sum(dim=-1))
        same.append(log_q.argmax(dim=-1) == log_p.argmax(dim=-1))
    return torch.cat(kl), torch.cat(same)


@dataclass(frozen=True)
class AgreementResult:
    """How closely a model follows its original.

    Args:
        kl: mean KL(original || model) in nats a token (a window, for a classifier).
        kl_stderr: its standard error; None for a single window.
        top1: share of positions with the same most likely token.
        tokens: number of positions compared.
    """

    kl: float
    kl_stderr: float | None
    top1: float
    tokens: int


def agreement(
    model: nn.Module, original: nn.Module, ids: Int[Tensor, "windows length"], batch: int = 1
) -> AgreementResult:
    """Compare two models on the same tokens, holding the logits of one batch at a time.

    Args:
        model: the compressed model; training modes of both are restored afterwards.
        original: what it was made from; may be on another device.
        ids: windows of tokens.
        batch: windows in one forward pass; does not change the result beyond rounding.

    Raises:
        ModelError: the models have different vocabularies or numbers of classes.
        DataError: windows longer than the models' context.
    """
    require_context(model, ids.shape[1])
    kl, same = [], []
    with evaluating(model), evaluating(original):
        for part in ids.split(batch):
            ours, theirs = logits_of(model, part), logits_of(original, part)
            if ours.shape != theirs.shape:
                raise ModelError(
                    f"the models predict different things: logits {list(ours.shape)} against the original's "
                    f"{list(theirs.shape)}; compare models with the same vocabulary and the same head"
                )
            part_kl, part_same = divergence(ours.flatten(0, -2), theirs.flatten(0, -2))
            kl.append(part_kl.double().view(len(part), -1).cpu())
            same.append(part_same.cpu())
    windows, matches = torch.cat(kl), torch.cat(same)
    return AgreementResult(
        kl=float(windows.mean()),
        kl_stderr=standard_error(windows.mean(dim=1)),
        top1=float(matches.double().mean()),
        tokens=matches.numel(),
    )


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """How closely the model as it is now follows its original on held-out text."""
    return StageReport(metrics=asdict(agreement(model, context.original, context.tokens("held_out"), config.batch)))
