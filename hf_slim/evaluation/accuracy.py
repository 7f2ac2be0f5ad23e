"""Accuracy of a classifier: the share of held-out texts whose most likely class is the right one.

    accuracy = 1/N sum_i [argmax_c p(c | x_i) = y_i]

The standard error treats texts as independent: that of the mean of N zeros and ones. Texts are padded in their batch;
those of like length share one, so that little is computed for padding. Each text weighs the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import datasets
import evaluate
import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.errors import ModelError, PlanError
from hf_slim.core.examples import Examples, collator
from hf_slim.core.forward import device_of, evaluating, is_classifier, require_context, standard_error
from hf_slim.core.method import MethodConfig, Rules
from hf_slim.core.report import StageReport
from hf_slim.core.select import Layer

RULES = Rules(needs=("held_out", "labels", "original"), preserves=("zeros", "codes", "foreign", "tied"))


class Config(MethodConfig):
    """Options of `evaluate.accuracy`."""

    batch: int = Field(32, ge=1, description="texts in one forward pass")


@dataclass(frozen=True)
class AccuracyResult:
    """Accuracy and what it rests on.

    Args:
        accuracy: share of the texts whose class is right, 0 to 1.
        stderr: its standard error; None for a single text.
        texts: number of texts.
    """

    accuracy: float
    stderr: float | None
    texts: int


class Accuracy(evaluate.Metric):
    """Accuracy with its standard error, as a metric of the evaluate library that needs no download.

    >>> Accuracy().compute(predictions=[0, 1, 1], references=[0, 1, 0])["accuracy"]  # doctest: +SKIP

    `add_batch` and `compute` are the library's, also over several processes (`num_process`, `process_id`).
    """

    def __init__(self, *args: Any, keep_in_memory: bool = True, **options: Any):
        super().__init__(*args, keep_in_memory=keep_in_memory, **options)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of texts whose predicted class is the right one.",
            citation="",
            inputs_description="predictions, references: classes as whole numbers.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, Any]:
        right = (torch.as_tensor(predictions) == torch.as_tensor(references)).double()
        return asdict(AccuracyResult(float(right.mean()), standard_error(right), len(right)))


def accuracy(model: PreTrainedModel, examples: Examples, tokenizer: Any, batch: int = 32) -> AccuracyResult:
    """Accuracy of a classifier on texts.

    Args:
        model: sequence classifier on any device; its training mode is restored afterwards.
        examples: texts with their classes.
        tokenizer: pads them.
        batch: texts in one forward pass; does not change the result beyond rounding.

    Raises:
        ModelError: not a sequence classifier.
        DataError: texts longer than the model's context.
    """
    require_classifier(model)
    require_context(model, max(map(len, examples.ids)))
    metric = Accuracy()
    with evaluating(model):
        for inputs in _batches(examples, tokenizer, batch):
            labels = inputs.pop("labels")
            logits = model(**{name: tensor.to(device_of(model)) for name, tensor in inputs.items()}).logits
            metric.add_batch(predictions=logits.argmax(dim=-1).cpu(), references=labels)
    return AccuracyResult(**(metric.compute() or {}))


def require_classifier(model: PreTrainedModel) -> None:
    """Raises ModelError unless the model predicts one of several classes for a whole text."""
    if not is_classifier(model):
        raise ModelError(
            f"accuracy needs a sequence classifier, got {type(model).__name__}; set task: sequence-classification in "
            "the recipe, or use evaluate.perplexity or evaluate.agreement"
        )


def _batches(examples: Examples, tokenizer: Any, batch: int) -> Iterator[dict[str, Tensor]]:
    """Padded batches of texts of like length, long ones first: what does not fit into memory shows at once."""
    pad = collator(tokenizer)
    order = sorted(range(len(examples)), key=lambda index: -len(examples.ids[index]))
    for start in range(0, len(order), batch):
        yield dict(pad([examples[index] for index in order[start : start + batch]]))


def plan(layers: dict[str, Layer], config: Config, model: PreTrainedModel) -> dict[str, Layer]:
    """Changes no layer; refuses a model that is no classifier."""
    try:
        require_classifier(model)
    except ModelError as error:
        raise PlanError(error.problems) from None
    return {}


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Accuracy on held-out texts, of the original (unless its head is a new one) and of the model as it is now."""
    examples = context.examples("held_out")
    if examples is None:
        raise PlanError("evaluate.accuracy needs held-out texts with classes; pass data=rows with 'text' and 'label'")
    new_head = context.source is not None and context.source.has_new_head
    before = None if new_head else asdict(accuracy(context.original, examples, context.tokenizer, config.batch))
    after = asdict(accuracy(model, examples, context.tokenizer, config.batch))
    return StageReport(metrics={"before": before, "after": after})
