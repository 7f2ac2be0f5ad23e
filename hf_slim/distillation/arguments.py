"""DistillationConfig: the arguments of `DistillationTrainer`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from transformers import TrainingArguments

from hf_slim.core.errors import PlanError, nearest
from hf_slim.distillation.divergences import DIVERGENCES, Divergence, divergence_problems
from hf_slim.distillation.features import read_features
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

    temperature: float = field(default=1.0, metadata={"help": "Both models' logits are divided by it; above 0."})
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
    if getattr(args, "features", None) and args.torch_compile:
        problems.append("features watch layers, which compiled code does not show; set torch_compile=False")
    if problems:
        raise PlanError(problems)


def check_teaching(settings: Any, task: str, *, live: bool, cached: bool) -> None:
    """Refuse options that ask for a teacher who is not there, or who cannot do what they ask for.

    Args:
        settings: a `DistillationConfig`, or its class for the defaults.
        task: what the student predicts.
        live: whether there is a teacher in memory.
        cached: whether there is a cache.
    """
    problems = []
    if settings.lmbda > 0 and task != "causal":
        problems.append("lmbda has the student write text, which takes a causal language model; set it to 0")
    if settings.lmbda > 0 and not (live and settings.alpha > 0):
        problems.append("lmbda has a live teacher judge what the student writes; pass teacher= and alpha above 0")
    if task == "seq2seq" and (cached or settings.features):
        problems.append(
            "an encoder-decoder learns from a live teacher's logits alone; leave features and teacher_cache out"
        )
    if cached and live:
        problems.append("teacher and teacher_cache both teach; give one of them")
    if cached and settings.alpha == 0:
        problems.append("alpha=0 uses labels alone, so that teacher_cache would be ignored; leave one of them out")
    if cached and settings.features:
        problems.append("features need a live teacher: a cache holds probabilities alone; pass teacher= instead")
    if cached and (settings.divergence != "forward_kl" or settings.vocabulary == "universal"):
        problems.append(
            f"a teacher cache allows forward_kl alone, got divergence={settings.divergence!r} and "
            f"vocabulary={settings.vocabulary!r}; pass teacher= for others"
        )
    if not (live or cached) and (settings.alpha > 0 or settings.features):
        needs = f"alpha={settings.alpha}" if settings.alpha > 0 else "features"
        problems.append(f"{needs} needs a teacher, got None; pass one, or set alpha=0 to use labels alone")
    if problems:
        raise PlanError(problems)
