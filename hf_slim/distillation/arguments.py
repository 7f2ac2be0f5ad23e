"""DistillationConfig: the arguments of `DistillationTrainer`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, get_args

from transformers import TrainingArguments

from hf_slim.core.errors import PlanError, nearest
from hf_slim.distillation.divergences import DIVERGENCES, Divergence, divergence_problems
from hf_slim.distillation.features import read_features
from hf_slim.distillation.mixture import read_divergences
from hf_slim.distillation.schedules import Schedule
from hf_slim.distillation.vocabulary import Vocabulary


@dataclass
class DistillationConfig(TrainingArguments):
    """`TrainingArguments` and the dials of distillation.

    Args:
        temperature: T > 0; both models' logits are divided by it. At 1.0 the student learns the
            distribution itself, as language models are used; 2.0 and more, as in DistilBERT and oBERT, weighs what is
            unlikely more; it gained nothing on the one small language model of `student.py`.
        alpha: share of the distillation loss, from 0 to 1; the labels' cross entropy has the rest. The default 1.0 is
            right when a compressed model is to behave as it did before: the teacher knows more than the label. Use 0.5
            to 0.9 when a smaller student learns a task from labelled data.
        alpha_schedule: of alpha: constant, or falling to 0 as a line or a cosine, so that labels take over.
        temperature_schedule: of the temperature: constant, or falling to 1 likewise (annealed distillation).
        divergence: "forward_kl" (the student covers all that the teacher deems likely; best for perplexity),
            "reverse_kl" (the student concentrates on the teacher's main mode; used for generation), "jsd" (between the
            two, see `beta`), "skewed_kl" and "skewed_reverse_kl" (DistiLLM's, see `skew`).
        beta: of "jsd" alone, the teacher's share of the mixture; 0 is forward KL, 1 is reverse KL, as in TRL.
        skew: of the skewed divergences alone, the share mixed in, at least 0 and below 1.
        divergences: several of them instead, each a mapping of the options of `mixture.LogitLoss`, such as
            {"kind": "reverse_kl", "weight": 0.5, "temperature": 1.0, "schedule": "linear"}; alpha weighs their sum.
        features: feature losses, each a mapping of the options of `features.Feature`, such as
            {"kind": "hidden", "weight": 1.0, "distance": "mse", "layers": "uniform", "schedule": "constant"}.
        fused: compute the loss from hidden states, without the logits of the whole batch. None: where the model allows
            it, and where nobody asks for logits; True: refuse a model that does not; False: never.
    """

    temperature: float = field(default=1.0, metadata={"help": "Both models' logits are divided by it; above 0."})
    alpha: float = field(
        default=1.0, metadata={"help": "Share of the distillation loss, 0 to 1; the label loss has the rest."}
    )
    alpha_schedule: Schedule = field(
        default="constant", metadata={"help": "Of alpha: constant, linear or cosine (falling to 0)."}
    )
    temperature_schedule: Schedule = field(
        default="constant", metadata={"help": "Of the temperature: constant, linear or cosine (falling to 1)."}
    )
    divergence: Divergence = field(
        default="forward_kl",
        metadata={"help": f"One of {', '.join(DIVERGENCES)}; forward_kl is KL(teacher || student)."},
    )
    beta: float = field(default=0.5, metadata={"help": "jsd: the teacher's share; 0 forward KL, 1 reverse KL."})
    skew: float = field(default=0.1, metadata={"help": "skewed_kl, skewed_reverse_kl: the share mixed in, below 1."})
    divergences: list[dict[str, Any]] | str | None = field(
        default=None, metadata={"help": "Several divergences, as JSON: kind, weight, schedule, temperature of each."}
    )
    features: list[dict[str, Any]] | str | None = field(
        default=None, metadata={"help": "Feature losses, as JSON: kind, weight, distance, layers, schedule of each."}
    )
    fused: bool | None = field(
        default=None, metadata={"help": "Loss from hidden states, never all logits; where possible if not given."}
    )
    vocabulary: Vocabulary = field(
        default="same", metadata={"help": "same, align (padded tables), universal (other tokenizers)."}
    )
    lmbda: float = field(default=0.0, metadata={"help": "Share of batches that the student writes itself, 0 to 1."})
    max_new_tokens: int = field(default=128, metadata={"help": "Tokens that the student writes at most."})

    def __post_init__(self):
        problems = divergence_problems(self.divergence, self.beta, self.skew)
        if not self.temperature > 0:
            problems.append(f"temperature must be above 0, got {self.temperature}; 1 to 4 is usual")
        if not 0 <= self.alpha <= 1:
            problems.append(f"alpha is the share of the distillation loss, from 0 to 1, got {self.alpha}")
        if not 0 <= self.lmbda <= 1:
            problems.append(f"lmbda is the share of batches that the student writes, from 0 to 1, got {self.lmbda}")
        if not self.max_new_tokens >= 1:
            problems.append(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.vocabulary not in get_args(Vocabulary):
            problems.append(
                f"vocabulary: there is no {self.vocabulary!r}; {nearest(str(self.vocabulary), get_args(Vocabulary))}"
            )
        for name in ("alpha_schedule", "temperature_schedule"):
            if getattr(self, name) not in get_args(Schedule):
                given = getattr(self, name)
                problems.append(f"{name}: there is no {given!r}; {nearest(str(given), get_args(Schedule))}")
        if self.divergences and self.divergence != "forward_kl":
            problems.append("divergence is one and divergences are several; give one of the two")
        for name, read in (("divergences", read_divergences), ("features", read_features)):
            try:
                setattr(self, name, _list_of(name, getattr(self, name)))
                read(getattr(self, name))
            except PlanError as error:
                problems += error.problems
        if problems:
            raise PlanError(problems)
        super().__post_init__()


def _list_of(name: str, given: Any) -> Any:
    """A list of options, which on a command line is given as JSON.

    Raises:
        PlanError: text that is none.
    """
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except json.JSONDecodeError as error:
        raise PlanError(f"{name} is not valid JSON ({error}); write a list, as '[{{\"kind\": ...}}]'") from error
