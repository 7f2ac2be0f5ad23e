"""What distillation refuses before it begins: options of the Trainer, combinations of its own, wrappers of models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments

from hf_slim.core.errors import PlanError
from hf_slim.core.parallel import require_whole_weights


def check_trainer_options(args: TrainingArguments, options: Mapping[str, Any]) -> None:
    """Refuse what the Trainer would otherwise accept and distillation would ignore."""
    problems = []
    if options.get("model_init") is not None:
        problems.append(
            "model_init makes a new student for every run, which its teacher was not checked against; pass model="
        )
    if "teacher_model" in options:
        problems.append("the teacher is passed as teacher=, got teacher_model")
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
    several = settings.divergence != "forward_kl" or bool(settings.divergences)
    if cached and (several or settings.vocabulary == "universal"):
        named = "divergences" if settings.divergences else f"divergence={settings.divergence!r}"
        problems.append(
            f"a teacher cache allows forward_kl alone, got {named} and vocabulary={settings.vocabulary!r}; pass "
            "teacher= for others"
        )
    if cached and settings.temperature_schedule != "constant":
        problems.append("a teacher cache holds one temperature; leave temperature_schedule out, or pass teacher=")
    if settings.vocabulary == "universal" and several:
        problems.append(
            'vocabulary="universal" has a divergence of its own, between sorted probabilities; leave divergence and '
            "divergences out"
        )
    if not (live or cached) and (settings.alpha > 0 or settings.features):
        needs = f"alpha={settings.alpha}" if settings.alpha > 0 else "features"
        problems.append(f"{needs} needs a teacher, got None; pass one, or set alpha=0 to use labels alone")
    if problems:
        raise PlanError(problems)


def check_wrapped(trainer: Any) -> None:
    """Refuse what the devices and wrappers that a trainer has by then cannot honour.

    Raises:
        PlanError: all problems at once.
    """
    problems = []
    if trainer.get_cp_size() > 1 or trainer.get_sp_size() > 1:
        problems.append("distillation shifts labels within whole sequences; set context and sequence parallelism to 1")
    if trainer.projections and (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        problems.append(
            "features of models of different widths need projections, which FSDP and DeepSpeed do not train; "
            "use DistributedDataParallel, or compare relations (kind: relation), which need none"
        )
    if trainer.projections and trainer.lr_scheduler is not None:
        problems.append(
            "features of models of different widths train projections, which a scheduler made before does not "
            "know; pass optimizers=(optimizer, None), or none"
        )
    if problems:
        raise PlanError(problems)
    if trainer.settings.lmbda:
        require_whole_weights("lmbda: a student that writes text")
