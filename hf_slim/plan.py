"""The plan: what will happen to every layer, before any weight is loaded; or every reason why it cannot.

A recipe's stages are played through on the model's skeleton (meta device). Each re-encoding stage states, from shapes
alone, how each layer will be stored; rules between stages are data on the methods, so an order that would silently undo
an earlier stage is refused here, with the order that works.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from transformers import PreTrainedModel

from hf_slim.core.data import Role
from hf_slim.core.errors import PlanError
from hf_slim.core.experts import unseen
from hf_slim.core.forward import is_classifier
from hf_slim.core.layers import plan_layers
from hf_slim.core.model import ModelSource
from hf_slim.core.select import Layer, find_layers
from hf_slim.core.size import count_weights, stored_bytes
from hf_slim.core.stage import Stage
from hf_slim.core.ties import find_ties
from hf_slim.labels import label_problems
from hf_slim.methods import changes_model, data_needed, find_method, is_export
from hf_slim.recipe import Recipe

ROLES: tuple[Role, ...] = ("calibration", "train", "held_out")
TRAINING_BYTES = 16  # a float32 weight, its gradient and AdamW's two moments
RUNTIME_BYTES = 700 << 20  # Python, PyTorch and Transformers themselves, measured


@dataclass(frozen=True)
class Successor:
    """A model that takes the place of the one before it: its skeleton, its layers, and the bytes of what is no layer.

    Args:
        layers: as they are stored from the start.
        other_bytes: norms, biases, position tables.
    """

    skeleton: PreTrainedModel
    layers: dict[str, Layer]
    other_bytes: int


@dataclass(frozen=True)
class StagePlan:
    """One stage: the layers it re-encodes, as they will be after it, and the memory it will take.

    Args:
        successor: the model that the stage works on, where that is not the one before it.
    """

    stage: Stage
    layers: dict[str, Layer]
    memory: int
    successor: Successor | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first weight is read.

    Args:
        layers: the model's layers as they are now.
        other_bytes: norms, biases, position tables: what no stage touches.
        parameters: weights of the dense model, each shared one counted once.
        stages: one entry a stage.
        notes: what is odd but allowed.
    """

    recipe: Recipe
    source: ModelSource
    layers: dict[str, Layer]
    other_bytes: int
    parameters: int
    stages: tuple[StagePlan, ...]
    notes: tuple[str, ...] = field(default=())

    def after(self, stages: int) -> tuple[dict[str, Layer], int]:
        """The layers after so many stages, and the bytes of all that is stored by then."""
        layers, other = dict(self.layers), self.other_bytes
        for stage in self.stages[:stages]:
            if stage.successor is not None:
                layers, other = dict(stage.successor.layers), stage.successor.other_bytes
            layers |= stage.layers
        return layers, other + sum(layer.nbytes for layer in layers.values())

    @property
    def final_layers(self) -> dict[str, Layer]:
        """The layers as they will be at the end."""
        return self.after(len(self.stages))[0]

    @property
    def bytes_before(self) -> int:
        return self.after(0)[1]

    @property
    def bytes_after(self) -> int:
        return self.after(len(self.stages))[1]

    def roles(self) -> list[Role]:
        """The data that the stages need."""
        needed = {need for stage in self.stages for need in data_needed(stage.stage.method, stage.stage.options)}
        return [role for role in ROLES if role in needed]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.source.name,
            "parameters": self.parameters,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "notes": list(self.notes),
            "stages": [
                {
                    "method": s.stage.method,
                    "memory": s.memory,
                    "layers": [
                        {"name": n, "shape": [x.rows, x.cols], "encoding": x.encoding.describe(), "bytes": x.nbytes}
                        for n, x in s.layers.items()
                        if x.encoding is not None
                    ],
                }
                for s in self.stages
            ],
        }


def make_plan(recipe: Recipe, source: ModelSource | None = None) -> Plan:
    """Play a recipe through on the model's skeleton.

    Raises:
        PlanError: everything that cannot work, at once.
        ModelError: the model's config cannot be found or read.
    """
    if source is None:
        if recipe.model is None:
            raise PlanError("no model: give `model:` in the recipe, or --model on the command line")
        source = ModelSource(
            recipe.model, recipe.revision, recipe.dtype, recipe.task, recipe.num_labels, seed=recipe.seed
        )
    original = skeleton = source.skeleton()
    layers = find_layers(skeleton)
    other = _other_bytes(skeleton)
    problems, stages, notes = order_problems(recipe.stages) + place_problems(recipe.stages), [], []
    kind = {"classifies": is_classifier(skeleton), "writes": skeleton.config.is_encoder_decoder}
    problems += label_problems(recipe.stages, recipe.data, new_head=source.has_new_head, **kind)
    current = dict(layers)
    for number, stage in enumerate(recipe.stages, 1):
        changed, successor = {}, None
        try:
            successor = find_successor(current, stage, skeleton)
            if successor is not None:
                skeleton, current, other = successor.skeleton, dict(successor.layers), successor.other_bytes
            changed = plan_stage(current, stage, skeleton)
            current |= changed
            notes += [f"stage {number}, {stage.method}: {note}" for note in _told(stage, current, skeleton)]
        except PlanError as error:
            problems += [f"stage {number}, {stage.method}: {problem}" for problem in error.problems]
        stages.append(StagePlan(stage, changed, _memory(stage, current, other), successor))
    if problems:
        raise PlanError(problems)
    notes = (*source.notes(), *_notes(stages, recipe.stages), *unseen(skeleton), *notes)
    return Plan(recipe, source, layers, _other_bytes(original), count_weights(original), tuple(stages), notes)


def _told(stage: Stage, layers: dict[str, Layer], model: PreTrainedModel) -> list[str]:
    """What a method has to say about a stage that it can do."""
    method = find_method(stage.method)
    return method.notes(layers, stage.options, model) if hasattr(method, "notes") else []


def find_successor(layers: dict[str, Layer], stage: Stage, model: PreTrainedModel) -> Successor | None:
    """The model that a stage puts in the place of this one, if it does.

    Args:
        layers, model: as for `plan_stage`.

    Raises:
        PlanError: it cannot be made.
    """
    method = find_method(stage.method)
    found = method.successor(layers, stage.options, model) if hasattr(method, "successor") else None
    return None if found is None else Successor(found[0], found[1], _other_bytes(found[0]))


def plan_stage(layers: dict[str, Layer], stage: Stage, model: PreTrainedModel) -> dict[str, Layer]:
    """The layers that a stage changes, as they will be after it.

    Args:
        layers: as they are before it.
        model: the one that they belong to, or its skeleton; an export's format may not know its kind.

    Raises:
        PlanError: what this stage cannot do.
    """
    method, config = find_method(stage.method), stage.options
    if "tied" not in method.RULES.preserves and find_ties(model):
        raise PlanError(f"{stage.method} cannot work on this model: {_LOSSES['tied']}; use it before share.tie")
    if is_export(stage.method):
        if problems := method.problems(layers, config, model):
            raise PlanError(problems)
        return {}
    if hasattr(method, "plan"):
        return method.plan(layers, config, model)
    return plan_layers(layers, method, config) if hasattr(method, "encoding") else {}


def order_problems(stages: tuple[Stage, ...]) -> list[str]:
    """Stages that would undo what an earlier one made, or change a model that has been exported."""
    problems = []
    made: dict[str, tuple[int, str]] = {}
    for number, stage in enumerate(stages, 1):
        rules = find_method(stage.method).RULES
        for what, (earlier, maker) in made.items():
            export = is_export(stage.method)
            if not {what, *_HARDER.get(what, ())} & {*_preserves(stage)} and (what == "tied" or not export):
                remedy = f"leave {maker} out" if export else f"put {stage.method} before {maker}"
                remedy += f", {rules.otherwise[what]}" if what in rules.otherwise else ""
                problems.append(
                    f"stage {number}, {stage.method}, cannot follow stage {earlier}, {maker}: "
                    f"{_LOSSES.get(what, what)}; {remedy}"
                )
        made = {what: maker for what, maker in made.items() if what not in _frees(stage)}
        made |= dict.fromkeys(_makes(stage), (number, stage.method))
        later = [(n, s.method) for n, s in enumerate(stages[number:], number + 1) if changes_model(s.method)]
        if is_export(stage.method) and later:
            problems.append(
                f"stage {number}, {stage.method}, would write the model as it is before stage {later[-1][0]}, "
                f"{later[-1][1]}; put {stage.method} after {later[-1][1]}"
            )
    return problems


def place_problems(stages: tuple[Stage, ...]) -> list[str]:
    """Exports that would leave the artifact's folder, or overwrite one another."""
    problems = []
    taken: dict[PurePosixPath, int] = {}
    for number, stage in enumerate(stages, 1):
        if not is_export(stage.method):
            continue
        to = PurePosixPath(stage.options.to)  # pyright: ignore[reportAttributeAccessIssue]
        if to.is_absolute() or ".." in to.parts or not to.parts:
            problems.append(
                f"stage {number}, {stage.method}: to: {str(to)!r} leads out of the artifact; "
                "give a name, it is taken below its folder 'exports'"
            )
        for other, earlier in taken.items():
            if to == other or to in other.parents or other in to.parents:
                problems.append(
                    f"stage {number}, {stage.method}: to: {str(to)!r} would overwrite what stage {earlier} writes to "
                    f"{str(other)!r}; give it another name"
                )
        taken[to] = number
    return problems


_LOSSES = {
    "tied": "its blocks share weights, and each would need its own",
    "codes": "it trains weights, and those are stored as integer codes by then",
    "centroids": "it changes single weights, and those share values by then",
    "zeros": "it would fill the pruned zeros again",
    "foreign": "the model is stored in bitsandbytes' own form by then, which nothing else changes",
}

_HARDER = {"centroids": ("codes",)}
"""Who leaves integer codes alone leaves shared values alone, too, which can be trained."""


def _makes(stage: Stage) -> tuple[str, ...]:
    method, during = find_method(stage.method), getattr(stage.options, "during", ())
    own = method.makes(stage.options) if hasattr(method, "makes") else method.RULES.makes
    return own + tuple(what for inner in during for what in _makes(inner))


def _preserves(stage: Stage) -> tuple[str, ...]:
    method = find_method(stage.method)
    return method.preserves(stage.options) if hasattr(method, "preserves") else method.RULES.preserves


def _frees(stage: Stage) -> tuple[str, ...]:
    """Properties that later stages need not heed any more."""
    method = find_method(stage.method)
    return method.frees(stage.options) if hasattr(method, "frees") else ()


def _other_bytes(model: PreTrainedModel) -> int:
    """Bytes of what is no layer."""
    return stored_bytes(model) - sum(layer.nbytes for layer in find_layers(model).values())


def _memory(stage: Stage, layers: dict[str, Layer], other: int) -> int:
    """A bound for the stage's peak, bytes: what is resident, and what the method adds."""
    weights = sum(layer.rows * layer.cols for layer in layers.values() if layer.tied_to is None)
    stored = other + sum(layer.nbytes for layer in layers.values())
    widest = max((layer.cols for layer in layers.values() if layer.kind == "linear"), default=0)
    largest = max((layer.rows * layer.cols for layer in layers.values()), default=0)
    needs = data_needed(stage.method, stage.options)
    extra = 4 * 4 * largest  # a few float32 copies of the largest weight
    if "calibration" in needs:
        extra += 4 * 4 * widest * widest
    if "train" in needs:
        extra += TRAINING_BYTES * weights
    if "original" in needs or "teacher" in needs:
        extra += 2 * weights
    return RUNTIME_BYTES + stored + extra


def _notes(plans: list[StagePlan], stages: tuple[Stage, ...]) -> list[str]:
    notes = []
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for number, plan in enumerate(plans, 1):
        if plan.memory > available:
            notes.append(
                f"stage {number}, {plan.stage.method}, may need {plan.memory / 2**30:.1f} GiB; "
                f"this machine has {available / 2**30:.1f} GiB"
            )
        notes += [f"stage {number}, {plan.stage.method}: {note}" for note in _odd_groups(plan.layers.values())]
    compressing = [i for i, s in enumerate(stages) if changes_model(s.method)]
    if any(s.method.startswith("evaluate.") for s in stages[: compressing[-1] if compressing else 0]):
        notes.append("an evaluate stage stands before the last compressing stage: it does not measure the final model")
    return notes + _untrained(stages)


def _untrained(stages: tuple[Stage, ...]) -> list[str]:
    """Stages whose result has to be trained, and is not."""
    return [
        f"stage {number}, {stage.method}, leaves a model that is of no use until it is trained, and no stage after it "
        "does that: put distill.logits after it, or train the artifact yourself"
        for number, stage in enumerate(stages, 1)
        if find_method(stage.method).RULES.wants_training
        and not any("train" in data_needed(later.method, later.options) for later in stages[number:])
    ]


def _odd_groups(layers: Iterable[Layer]) -> list[str]:
    """Group sizes that do not divide the columns: allowed here, but formats of others have no shorter groups."""
    shapes: dict[tuple[int, int], int] = {}
    for layer in layers:
        size = getattr(layer.encoding, "group_size", None)
        if size is not None and layer.cols % size:
            shapes[layer.cols, size] = shapes.get((layer.cols, size), 0) + 1
    return [
        f"{count} layers have {cols} columns, no multiple of group_size {size}: the last group of a row holds "
        f"{cols % size}; other libraries' formats cannot store that"
        for (cols, size), count in shapes.items()
    ]
