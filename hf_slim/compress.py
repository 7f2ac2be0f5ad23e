"""One stage in process: `hf_slim.compress(model, "quantize.gptq", tokenizer=tok, data=texts, bits=4)`."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from hf_slim.core.apply import run_stage
from hf_slim.core.context import Context
from hf_slim.core.data import tokens_from
from hf_slim.core.errors import PlanError
from hf_slim.core.experts import unfused
from hf_slim.core.layers import check_weights
from hf_slim.core.model import check_tokens
from hf_slim.core.progress import Progress
from hf_slim.core.report import StageReport
from hf_slim.core.select import find_layers
from hf_slim.core.stage import Stage, make_stage
from hf_slim.methods import data_needed
from hf_slim.plan import plan_stage


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
            [samples, length], or a `datasets.Dataset`.
        length, samples: tokens in a window (512 for texts) and number of windows (all).
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
        plan_stage(layers, stage, model)
        _check_needs(stage, data, original)
        check_weights(model, [layer for layer in layers.values() if layer.tied_to is None])
    windows = None if data is None else tokens_from(data, tokenizer, length, samples, seed).ids
    if windows is not None:
        check_tokens(model, windows, "data")
    context = Context(
        seed=seed,
        tokenizer=tokenizer,
        windows=None if windows is None else lambda role: windows,
        load_original=None if original is None else lambda: original,
        progress=progress or Progress(),
    )
    return run_stage(model, stage, context)


def _check_needs(stage: Stage, data: Any, original: PreTrainedModel | None) -> None:
    method, needs = stage.method, data_needed(stage.method, stage.options)
    problems = []
    if data is None and (roles := [need for need in needs if need != "original"]):
        problems.append(f"{method} needs {' and '.join(roles)} data; pass data=texts (and tokenizer=...) or token ids")
    if original is None and "original" in needs:
        problems.append(f"{method} needs the uncompressed model; pass original=model")
    if problems:
        raise PlanError(problems)
