"""One stage in process: `hf_slim.compress(model, "quantize.gptq", tokenizer=tok, data=texts, bits=4)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_slim.core.apply import run_stage
from hf_slim.core.context import Context
from hf_slim.core.data import tokens_from
from hf_slim.core.errors import PlanError
from hf_slim.core.examples import Examples, check_examples, examples_from
from hf_slim.core.experts import unfused
from hf_slim.core.forward import is_classifier
from hf_slim.core.layers import check_weights
from hf_slim.core.model import check_tokens
from hf_slim.core.progress import Progress
from hf_slim.core.report import StageReport
from hf_slim.core.select import find_layers
from hf_slim.core.stage import Stage, make_stage
from hf_slim.methods import data_needed
from hf_slim.plan import ROLES, find_successor, plan_stage


def compress(
    model: PreTrainedModel,
    method: str,
    *,
    tokenizer: Any = None,
    data: Any = None,
    length: int | None = None,
    samples: int | None = None,
    original: PreTrainedModel | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> StageReport:
    """Apply one method to a model, in place; `model.save_pretrained(dir)` then writes the compressed form.

    Args:
        method: address such as "quantize.gptq"; `hf-slim methods` lists them.
        tokenizer: needed when `data` is text.
        data: calibration, training or evaluation data, as the method needs: texts, lists of token ids, a tensor
            [samples, length], or a `datasets.Dataset`; for a classifier, rows with "text" and "label".
        length, samples: tokens in a window (512 for texts) and number of windows or labelled texts (all).
        original: the uncompressed model, for methods that compare with it or learn from it.
        seed: of the draw of windows and of training.
        options: the method's options.

    Returns:
        What the stage measured.

    Raises:
        RecipeError: unknown method or option; DataError: unusable data; PlanError: the method cannot work on this
        model, with every reason; ModelError: NaN weights, by name. All before anything is changed.

    >>> report = compress(model, "quantize.gptq", tokenizer=tok, data=texts, bits=4, group_size=64)  # doctest: +SKIP
    """
    stage = make_stage(method, options)
    with unfused(model):
        layers = find_layers(model)
        successor = find_successor(layers, stage, model)
        plan_stage(*(layers, stage, model) if successor is None else (successor.layers, stage, successor.skeleton))
        examples = examples_from(data, tokenizer, length, samples, seed) if is_classifier(model) else None
        _check_needs(stage, data, original, needs_labels=is_classifier(model) and examples is None)
        check_weights(model, [layer for layer in layers.values() if layer.tied_to is None])
    windows = None
    if examples is not None:
        check_examples(model, examples)
    elif data is not None:
        windows = tokens_from(data, tokenizer, length, samples, seed).ids
        check_tokens(model, windows, "data")
    context = Context(
        seed=seed,
        tokenizer=tokenizer,
        windows=_windows(windows, examples, tokenizer),
        labelled=lambda role: examples,
        load_original=None if original is None else lambda: original,
        progress=progress or Progress(),
    )
    return run_stage(model, stage, context)


def _windows(windows: Tensor | None, examples: Examples | None, tokenizer: Any) -> Callable[[str], Tensor] | None:
    """The windows of every role: those that were given, or the labelled texts joined, once they are asked for."""
    if examples is not None:
        return lambda role: examples.windows(tokenizer)
    return None if windows is None else lambda role: windows


def _check_needs(stage: Stage, data: Any, original: PreTrainedModel | None, needs_labels: bool) -> None:
    method, needs = stage.method, data_needed(stage.method, stage.options)
    problems = []
    if data is None and (roles := [need for need in needs if need in ROLES]):
        problems.append(f"{method} needs {' and '.join(roles)} data; pass data=texts (and tokenizer=...) or token ids")
    elif needs_labels and "labels" in needs:
        problems.append(f"{method} needs texts with classes; pass data=rows with 'text' and 'label', and tokenizer=")
    if original is None and "original" in needs:
        problems.append(f"{method} needs the uncompressed model; pass original=model")
    if problems:
        raise PlanError(problems)
