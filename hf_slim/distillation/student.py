"""Students: what is to learn, where that is not the model as it is.

    {layers: 6}                        a cut of the model: so many of its blocks, evenly spread (`inherit.spread`), or
                                       every second, or those of a list; or those that it misses least (`prune.depth`)
    {mlp_width: 0.5, heads: 0.5}       narrower MLPs and fewer heads, by measured importance, the layers that read them
                                       fitted to their old outputs (`prune.apoz`, `prune.heads`)
    {config: {hidden_size: 384}}       a new model of the same class, with what fits of the old weights (`inherit.py`)
    some/model                         another model of the same vocabulary, from the Hub or a folder

A cut whose widths are the same in every block is a plain model, which Transformers loads without hf_slim.

Perplexity on held-out TinyStories of two of the five blocks of stories260K (4.05; 32 windows of 256 tokens), before and
after 100 steps of 8 windows of 128 tokens, learning rate 0.003, means over seeds 0 to 2 (influence: 0):

                         cut     labels alone   teacher, T = 2   teacher, T = 1
    spread: 0, 4         524.7      13.04           13.05            12.07
    choose: kl           105.2      11.86           11.50            11.06
    choose: influence    959.5      12.55           12.33            11.85

A teacher is worth 5.5 to 7.8 % in every run at temperature 1. Influence chooses the first two blocks here. A new model
of 48 instead of 64 channels, most of it random, comes to 59.7 and, taught at T = 2, 45.1 (seed 0).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, ValidationError
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.data import tokens_from
from hf_slim.core.errors import PlanError
from hf_slim.core.experts import unfuse, unfused
from hf_slim.core.explain import InnerError, explain
from hf_slim.core.forward import is_classifier
from hf_slim.core.layers import check_weights
from hf_slim.core.model import ModelSource, check_tokens
from hf_slim.core.report import StageReport
from hf_slim.core.select import Layer, find_layers, find_stacks
from hf_slim.core.shapes import keep_blocks
from hf_slim.core.skeleton import build, without_weights
from hf_slim.distillation.cut import (
    StudentOptions,
    chosen_blocks,
    kept_blocks,
    narrowing,
    shortened,
    without_blocks,
)
from hf_slim.distillation.inherit import inherit, plan_config
from hf_slim.integration.transformers import mark
from hf_slim.methods import find_method

SELF = "self"


def _read(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    try:
        return StudentOptions.model_validate(value)
    except ValidationError as error:
        raise InnerError((), StudentOptions, error) from None


Student: TypeAlias = Annotated[str | StudentOptions, BeforeValidator(_read)]
"""Field type: "self", a Hub id or folder, or a mapping of `StudentOptions`."""


def make_student(
    teacher: PreTrainedModel,
    *,
    layers: int | str | Sequence[int] | None = None,
    encoder_layers: int | str | Sequence[int] | None = None,
    decoder_layers: int | str | Sequence[int] | None = None,
    choose: Literal["spread", "kl", "influence"] = "spread",
    mlp_width: float | None = None,
    heads: float | None = None,
    config: Mapping[str, Any] | None = None,
    data: Any = None,
    tokenizer: Any = None,
    seed: int = 0,
) -> PreTrainedModel:
    """A smaller model made from a teacher, which stays as it is; train it with `DistillationTrainer`.

    Args:
        teacher: any causal, masked or encoder-decoder language model or classifier, dense.
        layers: how many blocks stay, evenly spread from the first to the last; "every_second", beginning with the
            first; or their numbers. Of an encoder-decoder, in both stacks.
        encoder_layers, decoder_layers: the same for one stack of an encoder-decoder.
        choose: which blocks stay of so many: "spread", or by measured importance "kl" and "influence" (`prune.depth`).
        mlp_width: share of every MLP's neurons that stays, or their number, by measured importance (`prune.apoz`).
        heads: share of every attention's heads that stays, or their number, by measured importance (`prune.heads`).
        config: entries of the config of a new model of the same class, such as {"hidden_size": 384}, which starts with
            what fits of the teacher's weights.
        data: texts, token ids or windows, where importance is measured; see `hf_slim.compress`.
        tokenizer: for texts.
        seed: of weights that are drawn.

    Returns:
        A model of the teacher's class with a config of its own, all of it trainable.

    Raises:
        PlanError: options that do not fit this teacher, every one of them; DataError: unusable data.
    """
    given = {"layers": layers, "encoder_layers": encoder_layers, "decoder_layers": decoder_layers, "choose": choose}
    given |= {"mlp_width": mlp_width, "heads": heads, "config": config}
    options = _options({key: value for key, value in given.items() if value is not None})
    with unfused(teacher):
        known = find_layers(teacher)
        plan_student(known, options, teacher)
        check_weights(teacher, [layer for layer in known.values() if layer.tied_to is None])
    if data is None and options.measures:
        raise PlanError("the student's parts are chosen by what they do on text; pass data=texts (and tokenizer=...)")
    windows = None if data is None else tokens_from(data, tokenizer).ids
    if windows is not None:
        check_tokens(teacher, windows, "data")
    context = Context(seed=seed, tokenizer=tokenizer, windows=None if windows is None else lambda role: windows)
    student = copy.deepcopy(teacher)
    with unfused(student):
        turn_into_student(student, options, context)
    mark(student)
    return student.requires_grad_(True)


def plan_student(
    layers: Mapping[str, Layer], student: str | StudentOptions, model: PreTrainedModel
) -> tuple[PreTrainedModel, dict[str, Layer]]:
    """The student without weights, and its layers: their number and shapes are known before any weight is.

    Args:
        layers: of the model that it is made from, as they are stored by then.
        student: a Hub id or folder, or options.
        model: that model, or its skeleton; it stays as it is. Experts must be unfused.

    Raises:
        PlanError: everything that cannot be done.
        ModelError: no such model.
    """
    if isinstance(student, StudentOptions) and student.config is None:
        return _plan_cut(layers, student, model)
    stored = [layer for layer in layers.values() if layer.encoding is not None]
    if stored:
        raise PlanError(
            f"student: another model takes the place of this one, {len(stored)} of whose layers are stored in another "
            f"form by then, such as {stored[0].name}; make the student first"
        )
    if isinstance(student, str):
        skeleton = _source(student, model).skeleton()
    else:
        skeleton: Any = build(type(model), plan_config(model, student.config or {}))
        skeleton.to(dtype=model.dtype)
        unfuse(skeleton)
    return skeleton, find_layers(skeleton)


def turn_into_student(model: PreTrainedModel, student: str | StudentOptions, context: Context) -> StageReport:
    """Turn a model into the student, in place.

    Args:
        model: with its weights, experts unfused; `plan_student` has found nothing wrong.

    Returns:
        In `metrics`, where the student came from; in `layers`, what became narrower.
    """
    if isinstance(student, str):
        other: Any = _source(student, model, context.seed).load()
        other.to(model.device)
        unfuse(other)
        _become(model, other)
        return StageReport(metrics={"model": student})
    if student.config is not None:
        made, parts = inherit(model, plan_config(model, student.config), context.seed)
        unfuse(made)
        _become(model, made)
        counts = {kind: len(names) for kind, names in dataclasses.asdict(parts).items()}
        notes = [] if not parts.fresh else [f"student: {len(parts.fresh)} tensors are new, such as {parts.fresh[0]}"]
        return StageReport(metrics={"config": dict(student.config), **counts}, notes=notes)
    kept = {
        stack.name: kept_blocks(model, stack, chosen, student, context) for stack, chosen in shortened(model, student)
    }
    for stack in find_stacks(model):
        if stack.name in kept and len(kept[stack.name]) < len(stack.blocks):
            keep_blocks(model, stack, kept[stack.name])
    report = StageReport(metrics={"blocks": kept} if kept else {})
    for address, options in narrowing(student, model):
        blocks = None if context.blocks is None else context.blocks / address
        found = find_method(address).apply(model, options, replace(context, blocks=blocks))
        report.layers += found.layers
        report.metrics[address] = found.metrics
        report.notes += found.notes
    return report


def _options(given: Mapping[str, Any]) -> StudentOptions:
    try:
        return StudentOptions.model_validate(given)
    except ValidationError as error:
        found = explain(error, StudentOptions, dict(given))
        raise PlanError(
            [": ".join((".".join(map(str, about)) or "student", text)) for _, about, text in found]
        ) from None


def _plan_cut(
    layers: Mapping[str, Layer], student: StudentOptions, model: PreTrainedModel
) -> tuple[PreTrainedModel, dict[str, Layer]]:
    skeleton, current = without_weights(model), dict(layers)
    problems: list[str] = []
    try:
        for stack, chosen in shortened(skeleton, student):
            kept = chosen_blocks(stack, chosen)
            if len(kept) < len(stack.blocks):
                keep_blocks(skeleton, stack, kept)
                current = without_blocks(current, stack, kept)
    except PlanError as error:
        problems += error.problems
    try:
        for address, options in narrowing(student, skeleton):
            current |= find_method(address).plan(current, options, skeleton)
    except PlanError as error:
        problems += error.problems
    if problems:
        raise PlanError(problems)
    return skeleton, current


def _source(name: str, model: PreTrainedModel, seed: int = 0) -> ModelSource:
    """Where another model is found, for the same task."""
    if not is_classifier(model):
        return ModelSource(name, seed=seed)
    return ModelSource(name, task="sequence-classification", num_labels=model.config.num_labels, seed=seed)


def _become(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Let a model be another one: whoever holds it holds the other one from now on."""
    model.__class__ = type(other)
    vars(model).clear()
    vars(model).update(vars(other))
