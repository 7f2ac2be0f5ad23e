"""Feature losses: the student learns what happens inside its teacher, too, block by block.

    loss = alpha · distillation + (1 - alpha) · labels + Σ_f weight_f · schedule_f(progress) · feature_f

Each feature is a mean over the positions that count and over the pairs of blocks of its layer map. Kernels are in
`feature_kernels.py`. Hidden states are the blocks' outputs, "embedding" is what enters the first one. Where the widths
differ, a projection of its own for each pair maps the student's states to the teacher's width; it starts as Glorot's
uniform one, is trained and checkpointed with the student and is no part of it.

Queries, keys and values are read off the linear layers that make them, so that fast attention stays; attention maps
exist in eager attention alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from hf_slim.core.errors import PlanError
from hf_slim.core.explain import read_entries
from hf_slim.core.method import MethodConfig
from hf_slim.core.select import find_stacks
from hf_slim.distillation.feature_kernels import attention_distance, hidden_distance, relation_distance
from hf_slim.distillation.layer_map import LayerMap, map_problems, pair_layers
from hf_slim.distillation.pairs import Model
from hf_slim.distillation.schedules import Schedule, schedule_factor
from hf_slim.distillation.taps import Role, Seen, relation_problems

_DISTANCES = {
    "hidden": ("mse", "cosine"),
    "embedding": ("mse", "cosine"),
    "attention": ("kl", "mse"),
    "relation": ("kl",),
}


_ROLES: tuple[Role, ...] = ("query", "key", "value")


class Feature(BaseModel):
    """One feature loss."""

    model_config = MethodConfig.model_config

    kind: Literal["hidden", "embedding", "attention", "relation"] = Field(description="what is compared")
    weight: float = Field(1.0, gt=0, description="of this loss beside the others")
    distance: Literal["mse", "cosine", "kl"] | None = Field(
        None,
        description="hidden and embedding: mse or cosine; attention: kl or mse; relation: kl; the first if not given",
    )
    layers: LayerMap = Field("uniform", description="uniform, last, or pairs [[student block, teacher block], ...]")
    schedule: Schedule = Field("constant", description="of the weight: constant, or falling to 0 as a line or a cosine")
    relations: tuple[Role, ...] = Field(_ROLES, min_length=1, description="of kind: relation")
    relation_heads: int | None = Field(
        None, ge=1, description="of kind: relation; as many as divide both models' key/value heads if not given"
    )

    @property
    def measure(self) -> str:
        """The distance, chosen or by default."""
        return self.distance or _DISTANCES[self.kind][0]

    @model_validator(mode="after")
    def _fits(self) -> Feature:
        if self.measure not in _DISTANCES[self.kind]:
            raise ValueError(
                f"distance of {self.kind} must be {' or '.join(_DISTANCES[self.kind])}, got {self.distance}"
            )
        if self.kind != "relation" and (self.relations, self.relation_heads) != (_ROLES, None):
            raise ValueError(f"relations and relation_heads belong to kind: relation, this is {self.kind}")
        return self


def read_features(entries: Sequence[Mapping[str, Any]] | None) -> tuple[Feature, ...]:
    """Features from their options.

    Raises:
        PlanError: unknown options or values; all problems at once.
    """
    return read_entries(Feature, entries, "features")


@dataclass(frozen=True)
class _Planned:
    """A feature with the pairs of blocks that it compares, and the heads of its relations."""

    name: str
    feature: Feature
    pairs: tuple[tuple[int, int], ...]
    heads: int


class FeatureLosses:
    """The feature losses of one student and its teacher.

    Args:
        features: what is compared.
        student, teacher: the models.
        seed: of the projections, so that all processes start with the same ones.

    Attributes:
        projections: {"feature.pair": linear map from the student's width to the teacher's}; empty for equal widths.
        maps: whether attention maps are needed.

    Raises:
        PlanError: models that cannot be compared in this way; all problems at once.
    """

    def __init__(self, features: Sequence[Feature], student: Model, teacher: Model, seed: int):
        blocks = [_block_names(model) for model in (student, teacher)]
        problems = [p for f in features for p in _problems(f, student, teacher, len(blocks[0]), len(blocks[1]))]
        if problems:
            raise PlanError(list(dict.fromkeys(problems)))
        self.maps = any(feature.kind == "attention" for feature in features)
        self._blocks = blocks
        self._planned = [
            _Planned(
                name, feature, tuple(_pairs(feature, *map(len, blocks))), _relation_heads(feature, student, teacher)
            )
            for name, feature in zip(_names(features), features, strict=True)
        ]
        widths = [model.config.get_text_config().hidden_size for model in (student, teacher)]
        self.projections = _projections(self._planned, *widths, seed=seed)

    def weights(self, progress: float) -> dict[str, float]:
        """The weight of each loss at a share of the training."""
        return {p.name: p.feature.weight * schedule_factor(p.feature.schedule, progress) for p in self._planned}

    def watch(self, model: nn.Module, teacher: bool) -> Seen:
        """A context in which one forward pass of a model shows what the losses compare."""
        side, blocks = int(teacher), self._blocks[teacher]
        outputs, roles, embedding = set(), set(), False
        for plan in self._planned:
            if plan.feature.kind == "hidden":
                outputs |= {pair[side] for pair in plan.pairs}
            if plan.feature.kind == "relation":
                roles |= {(pair[side], role) for pair in plan.pairs for role in plan.feature.relations}
            embedding |= plan.feature.kind == "embedding"
        return Seen(model, blocks, outputs=outputs, roles=roles, embedding=embedding)

    def sums(
        self,
        student: Seen,
        teacher: Seen,
        weights: Tensor,
        real: Tensor,
        maps: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """Each loss, summed over positions.

        Args:
            student, teacher: what their forward passes showed.
            weights: [batch, length], of the positions.
            real: Bool [batch, length], False at padding.
            maps: the attention maps of both, by block.
        """
        return {plan.name: self._sum(plan, student, teacher, weights, real, maps) for plan in self._planned}

    def _sum(self, plan: _Planned, student: Seen, teacher: Seen, weights: Tensor, real: Tensor, maps: Any) -> Tensor:
        feature, total = plan.feature, weights.new_zeros(())
        for i, (m, n) in enumerate(plan.pairs):
            if feature.kind == "attention":
                total = total + attention_distance(maps[0][m], maps[1][n].to(weights.device), weights, feature.measure)
            elif feature.kind == "relation":
                for role in feature.relations:
                    s, t = student.roles[m, role], teacher.roles[n, role].to(weights.device)
                    total = total + relation_distance(s, t, weights, real, plan.heads) / len(feature.relations)
            else:
                kept = (student.embedding, teacher.embedding) if feature.kind == "embedding" else None
                s, t = kept or (student.outputs[m], teacher.outputs[n])
                key = f"{plan.name}_{i}"
                s = self.projections[key](s.float()) if key in self.projections else s
                t = t.to(weights.device)
                total = total + hidden_distance(s.flatten(0, 1), t.flatten(0, 1), weights.flatten(), feature.measure)
        return total / len(plan.pairs)


def _names(features: Sequence[Feature]) -> list[str]:
    """What the losses are logged as: hidden_loss, or hidden_loss_2 for a second of its kind."""
    seen: dict[str, int] = {}
    names = []
    for feature in features:
        seen[feature.kind] = seen.get(feature.kind, 0) + 1
        names.append(f"{feature.kind}_loss" + (f"_{seen[feature.kind]}" if seen[feature.kind] > 1 else ""))
    return names


def _pairs(feature: Feature, student: int, teacher: int) -> list[tuple[int, int]]:
    return [(0, 0)] if feature.kind == "embedding" else pair_layers(feature.layers, student, teacher)


def _block_names(model: nn.Module) -> tuple[str, ...]:
    stacks = find_stacks(model)
    return max((stack.blocks for stack in stacks), key=len, default=())


def _projections(planned: Sequence[_Planned], student: int, teacher: int, *, seed: int) -> nn.ModuleDict:
    made = nn.ModuleDict()
    generator = torch.Generator().manual_seed(seed)
    for plan in planned:
        if plan.feature.kind in ("hidden", "embedding") and student != teacher:
            for i in range(len(plan.pairs)):
                linear = nn.Linear(student, teacher, bias=False)
                nn.init.xavier_uniform_(linear.weight, generator=generator)
                made[f"{plan.name}_{i}"] = linear
    return made


def _problems(feature: Feature, student: Model, teacher: Model, blocks: int, teacher_blocks: int) -> list[str]:
    if not blocks or not teacher_blocks:
        whose = "student" if not blocks else "teacher"
        return [f"features compare blocks, and none were found in the {whose}; leave features out"]
    found = [] if feature.kind == "embedding" else map_problems(feature.layers, blocks, teacher_blocks)
    models: Mapping[str, Model] = {"student": student, "teacher": teacher}
    if feature.kind == "attention":
        found += _map_problems(models)
    if feature.kind == "relation":
        for whose, model in models.items():
            found += relation_problems(whose, model, _block_names(model), feature.relations)
            found += _head_problems(whose, model, feature.relation_heads)
    return found


def _map_problems(models: Mapping[str, Model]) -> list[str]:
    found = []
    for whose, model in models.items():
        used = getattr(model.config, "_attn_implementation", None)
        if used != "eager":
            found.append(
                f"attention maps exist in eager attention alone, and the {whose} uses {used}; load it with "
                'attn_implementation="eager", or compare relations instead (kind: relation)'
            )
    heads = [model.config.get_text_config().num_attention_heads for model in models.values()]
    if heads[0] != heads[1]:
        found.append(
            f"the student has {heads[0]} attention heads and the teacher {heads[1]}, and maps are compared head by "
            "head; compare relations instead (kind: relation)"
        )
    return found


def _heads(model: Model) -> tuple[int, int, int]:
    """Query heads, key/value heads, width of one."""
    config: Any = model.config.get_text_config()
    queries = config.num_attention_heads
    return (
        queries,
        getattr(config, "num_key_value_heads", None) or queries,
        getattr(config, "head_dim", None) or config.hidden_size // queries,
    )


def _relation_heads(feature: Feature, student: Model, teacher: Model) -> int:
    return feature.relation_heads or gcd(_heads(student)[1], _heads(teacher)[1])


def _head_problems(whose: str, model: Model, relation_heads: int | None) -> list[str]:
    queries, keys, width = _heads(model)
    widths = sorted({queries * width, keys * width})
    if relation_heads is None or all(w % relation_heads == 0 for w in widths):
        return []
    named = " and ".join(map(str, widths))
    return [
        f"relation_heads={relation_heads} does not divide the {whose}'s widths of queries, keys and values, {named}; "
        "leave it out for a number that does"
    ]
