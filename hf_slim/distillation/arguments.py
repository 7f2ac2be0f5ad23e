"""DistillationConfig: the arguments of `DistillationTrainer`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from hf_slim.core.errors import PlanError
from hf_slim.distillation.divergences import DIVERGENCES, Divergence, divergence_problems
from hf_slim.distillation.features import read_features


@dataclass
class DistillationConfig(TrainingArguments):
    """`TrainingArguments` and the dials of distillation.

    Args:
        temperature: T > 0; both models' logits are divided by it. 2.0 as in DistilBERT and oBERT.
        alpha: share of the distillation loss, from 0 to 1; the labels' cross entropy has the rest. The default 1.0 is
            right when a compressed model is to behave as it did before: the teacher knows more than the label. Use 0.5
            to 0.9 when a smaller student learns a task from labelled data.
        divergence: "forward_kl" (the student covers all that the teacher deems likely; best for perplexity),
            "reverse_kl" (the student concentrates on the teacher's main mode; used for generation), "jsd" (between the
            two, see `beta`), "skewed_kl" and "skewed_reverse_kl" (DistiLLM's, see `skew`).
        beta: of "jsd" alone, the teacher's share of the mixture; 0 is forward KL, 1 is reverse KL, as in TRL.
        skew: of the skewed divergences alone, the share mixed in, at least 0 and below 1.
        features: feature losses, each a mapping of the options of `features.Feature`, such as
            {"kind": "hidden", "weight": 1.0, "distance": "mse", "layers": "uniform", "schedule": "constant"}.
        fused: compute the loss from hidden states, without the logits of the whole batch. None: where the model allows
            it, and where nobody asks for logits; True: refuse a model that does not; False: never.
    """

    temperature: float = field(default=2.0, metadata={"help": "Both models' logits are divided by it; above 0."})
    alpha: float = field(
        default=1.0, metadata={"help": "Share of the distillation loss, 0 to 1; the label loss has the rest."}
    )
    divergence: Divergence = field(
        default="forward_kl",
        metadata={"help": f"One of {', '.join(DIVERGENCES)}; forward_kl is KL(teacher || student)."},
    )
    beta: float = field(default=0.5, metadata={"help": "jsd: the teacher's share; 0 forward KL, 1 reverse KL."})
    skew: float = field(default=0.1, metadata={"help": "skewed_kl, skewed_reverse_kl: the share mixed in, below 1."})
    features: list[dict[str, Any]] | None = field(
        default=None, metadata={"help": "Feature losses: kind, weight, distance, layers, schedule of each."}
    )
    fused: bool | None = field(
        default=None, metadata={"help": "Loss from hidden states, never all logits; where possible if not given."}
    )

    def __post_init__(self):
        problems = divergence_problems(self.divergence, self.beta, self.skew)
        if not self.temperature > 0:
            problems.append(f"temperature must be above 0, got {self.temperature}; 1 to 4 is usual")
        if not 0 <= self.alpha <= 1:
            problems.append(f"alpha is the share of the distillation loss, from 0 to 1, got {self.alpha}")
        try:
            read_features(self.features)
        except PlanError as error:
            problems += error.problems
        if problems:
            raise PlanError(problems)
        super().__post_init__()


def check_trainer_options(args: TrainingArguments, options: Mapping[str, Any]) -> None:
    """Refuse what the Trainer would otherwise accept and distillation would ignore."""
    problems = []
    if args.label_smoothing_factor != 0:
        problems.append("label_smoothing_factor has no effect in distillation: the teacher is smooth; set it to 0")
    if options.get("compute_loss_func") is not None:
        problems.append("compute_loss_func would be ignored: DistillationTrainer computes the loss; leave it out")
    if args.use_liger_kernel:
        problems.append("use_liger_kernel hides the student's logits, which distillation compares; set it to False")
    names = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")  # the newer, and the older
    checkpointing = next((found for name in names if (found := getattr(args, name, None))), {})
    if getattr(args, "features", None) and checkpointing.get("use_reentrant"):
        problems.append(
            "reentrant gradient checkpointing cuts features off from their gradient; "
            'set gradient_checkpointing_kwargs={"use_reentrant": False}'
        )
    if problems:
        raise PlanError(problems)
