"""What happens to a model while it is trained: it is pruned, rounded, or its weights come to share values.

Each of these is a callback that changes weights between the optimizer's steps, or what the forward pass makes of them,
and knows at the end how they are to be stored. Callbacks act in the order of the list, and what one has made of a layer
those after it must keep:

    first            then                 on the same layers
    prune.gradual    quantize.qat         zeros stay zero: zero is on the grid, or codes of zeros are not stored at all
    prune.gradual    share.deep_kmeans    zeros stay zero, and no member of any centroid but one at zero

Any others are refused on the same layers, which would be stored in two ways at once; on different layers all of them
can be at work together. Every layer is stored once, by the last callback that trained it, as what its last forward pass
computed with.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from transformers import PreTrainedModel, TrainerCallback

from hf_slim.core.errors import PlanError
from hf_slim.core.layers import plan_layers
from hf_slim.core.report import LayerReport
from hf_slim.core.select import Layer, select_layers
from hf_slim.core.stage import Stage
from hf_slim.methods import find_method


def find_problems(stages: Sequence[Stage]) -> list[str]:
    """Why callbacks cannot be at work together, as far as that does not depend on the model.

    Args:
        stages: what happens during training, in order.
    """
    wrong = [stage.method for stage in stages if not hasattr(find_method(stage.method), "callback")]
    if wrong:
        return [f"{', '.join(wrong)} cannot happen during training; make it a stage of its own, after this one"]
    names = [stage.method for stage in stages]
    problems = [
        f"{name} is named {names.count(name)} times; name it once, with options of their own for some layers where it "
        "has them (layers: {pattern: {...}}), or make two stages of it"
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    pairs = [(a, b) for a, b in combinations(stages, 2) if a.method != b.method and _patterns(a) == _patterns(b)]
    return problems + [why for a, b in pairs if (why := _clash(a, b))]


def plan(stages: Sequence[Stage], layers: dict[str, Layer], model: PreTrainedModel) -> dict[str, Layer]:
    """The layers that callbacks re-encode, as they will be stored.

    Raises:
        PlanError: everything that cannot be done.
    """
    chosen = [_chosen(stage, layers) for stage in stages]
    problems: list[str] = []
    for (first, own), (then, others) in combinations(zip(stages, chosen, strict=True), 2):
        both = [name for name in own if name in others]
        if both and (why := _clash(first, then)):
            more = f" and {len(both) - 1} more" if len(both) > 1 else ""
            problems.append(f"{why}; both work on {both[0]}{more}")
    if problems:
        raise PlanError(problems)
    changed: dict[str, Layer] = {}
    for stage in stages:
        method = find_method(stage.method)
        before = layers | changed if _stores(stage) else layers
        try:
            if hasattr(method, "plan"):
                changed |= method.plan(before, stage.options, model)
            else:
                changed |= plan_layers(before, method, stage.options)
        except PlanError as error:
            problems += error.problems
    if problems:
        raise PlanError(problems)
    return changed


def start(model: PreTrainedModel, stages: Sequence[Stage]) -> list[TrainerCallback]:
    """The callbacks for a Trainer, in order. Layers that they prune further become dense for as long as they train."""
    return [find_method(stage.method).callback(model, stage.options) for stage in stages]


def store(model: PreTrainedModel, stages: Sequence[Stage], callbacks: Sequence[TrainerCallback]) -> list[LayerReport]:
    """Store what was trained: each layer once, by the last callback that it belongs to."""
    found: list[LayerReport] = []
    for stage, callback in reversed(list(zip(stages, callbacks, strict=True))):
        found = find_method(stage.method).store(model, callback) + found
    return found


def _stores(stage: Stage) -> bool:
    """Whether it decides how layers are stored; others move what is stored already."""
    return hasattr(find_method(stage.method), "encoding")


def _patterns(stage: Stage) -> tuple[set[str] | None, set[str]]:
    """The patterns that choose its layers."""
    select = stage.options.layers  # pyright: ignore[reportAttributeAccessIssue]
    return None if select.include is None else set(select.include), set(select.exclude)


def _chosen(stage: Stage, layers: dict[str, Layer]) -> list[str]:
    """Names of the layers that it works on; none where its patterns are wrong, which its own plan will say."""
    try:
        selected = select_layers(layers, stage.options.layers)  # pyright: ignore[reportAttributeAccessIssue]
    except PlanError:
        return []
    return [layer.name for layer in selected if _stores(stage) or layer.encoding is not None]


def _keeps(then: Stage, first: Stage) -> bool:
    """Whether one keeps what another has made of the same layers."""
    made, kept = find_method(first.method).RULES.makes, find_method(then.method).RULES.preserves
    return _stores(first) and _stores(then) and set(made) <= set(kept)


def _clash(first: Stage, then: Stage) -> str | None:
    """Why two callbacks cannot work on the same layers in this order."""
    one, other = first.method, then.method
    if not _keeps(then, first):
        if _keeps(first, then):
            return f"{other} would undo on the same layers what {one} makes of them: put {other} before {one}"
        return (
            f"{one} and {other} would each store the same layers in its own way: give them different ones "
            "(layers: {include: [...]}), or leave one out"
        )
    if getattr(first.options, "shadow", False):
        return (
            f"{one} with shadow: true trains pruned weights behind the zeros, and {other} gives zeros no gradients: "
            "leave shadow out"
        )
    return None
