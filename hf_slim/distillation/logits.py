"""Distillation of logits: a student learns to predict what its teacher predicts (Hinton et al. 2015, arXiv:1503.02531).

loss = alpha * T^2 D(teacher, student) + (1 - alpha) * cross entropy + feature losses, a mean over tokens. D is forward
KL unless another divergence is chosen (`divergences.py`); features compare the insides of both models (`features.py`).

By default the teacher is the original model and the student its compressed self, which needs no layer maps and no
labels: training recovers what compression broke. Any other `student` (`student.py`), such as {layers: 10}, takes the
model's place before it is trained, and goes on to later stages. With `teacher: previous` the teacher is the model as
the stages before left it, such as a classifier that an earlier stage has trained; with `alpha: 0` there is none, and
labels alone teach. What `during` names happens to the student while it is trained (`during.py`): it is pruned,
rounded, or its weights come to be shared. With `lora` its weights stay as they are, codes too, and adapters beside them
learn, which become part of the model at the end (`adapters.py`).
Kernels are in `losses.py`, the loop is `DistillationTrainer`.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator
from transformers import PreTrainedModel, TrainerCallback, default_data_collator

from hf_slim.core.context import Context
from hf_slim.core.errors import ModelError, PlanError
from hf_slim.core.examples import check_examples
from hf_slim.core.forward import is_classifier
from hf_slim.core.method import Rules
from hf_slim.core.model import ModelSource, check_tokens
from hf_slim.core.precision import fast_dtype, in_dtype
from hf_slim.core.report import StageReport
from hf_slim.core.select import Layer, find_layers
from hf_slim.core.stage import StageList
from hf_slim.core.training import TrainingOptions, train
from hf_slim.distillation import adapters, during
from hf_slim.distillation.adapters import Lora
from hf_slim.distillation.checks import check_teaching
from hf_slim.distillation.cut import StudentOptions
from hf_slim.distillation.divergences import Divergence
from hf_slim.distillation.features import Feature
from hf_slim.distillation.mixture import LogitLoss, uses_labels
from hf_slim.distillation.pairs import check_pair, check_trainable, words_of
from hf_slim.distillation.schedules import Schedule
from hf_slim.distillation.student import SELF, Student, plan_student, turn_into_student
from hf_slim.distillation.taps import eager_attention
from hf_slim.distillation.teacher_cache import CacheOptions, write_cache
from hf_slim.distillation.trainer import DistillationConfig, DistillationTrainer
from hf_slim.distillation.vocabulary import Vocabulary, same_words
from hf_slim.integration.bitsandbytes import check_installed, make_config

PREVIOUS = "previous"
RULES = Rules(
    needs=("train", "original"),
    preserves=("zeros", "centroids", "tied"),
    otherwise={"codes": "train adapters beside them (lora: {r: 8}), or tune their scales (quantize.scales)"},
    paper="Hinton et al. 2015, arXiv:1503.02531",
)


class Config(TrainingOptions):
    """Options of `distill.logits`."""

    student: Student = Field(
        SELF, description="'self', the model as it is by then; what is to be made of it, as {layers: 6}; a Hub id"
    )
    teacher: str | None = Field(
        None, description="Hub id or folder; 'previous' for the model as it is before; the original if not given"
    )
    teacher_quantization: Literal["nf4", "int8"] | None = Field(
        None, description="load the teacher through bitsandbytes, to save memory"
    )
    temperature: float = Field(1.0, gt=0, description="both models' logits are divided by it")
    alpha: float = Field(
        1.0, ge=0, le=1, description="share of the distillation loss, 0 for none; the labels have the rest"
    )
    alpha_schedule: Schedule = Field("constant", description="of alpha: constant, or falling to 0 (linear, cosine)")
    temperature_schedule: Schedule = Field("constant", description="of the temperature, which falls to 1 likewise")
    divergence: Divergence = "forward_kl"
    divergences: tuple[LogitLoss, ...] = Field((), description="several instead, as [{kind: forward_kl, weight: 0.5}]")
    beta: float = Field(0.5, ge=0, le=1, description="of jsd: the teacher's share; 0 is forward KL, 1 reverse KL")
    skew: float = Field(0.1, ge=0, lt=1, description="of skewed divergences: the share mixed in")
    features: tuple[Feature, ...] = Field((), description="losses on what happens inside, such as [{kind: hidden}]")
    fused: bool | None = Field(
        None, description="never hold all logits; where the model allows it if not given, true refuses others"
    )
    teacher_cache: CacheOptions | None = Field(
        None, description="ask the teacher once and keep what it says, as {k: 64} or {draws: 50}"
    )
    vocabulary: Vocabulary = Field(
        "same", description="align: the teacher's table is padded; universal: it has another tokenizer"
    )
    lmbda: float = Field(0.0, ge=0, le=1, description="share of batches whose second half the student writes itself")
    max_new_tokens: int = Field(128, ge=1, description="tokens that the student writes at most, with lmbda")
    during: StageList = Field((), description="what happens while training, such as prune.gradual")
    lora: Lora | None = Field(None, description="train adapters alone, beside weights or codes; {} for the usual ones")

    @property
    def taught(self) -> bool:
        """Whether there is a teacher."""
        return self.alpha > 0 or bool(self.features)

    @property
    def own_teacher(self) -> str | None:
        """Hub id or folder of a teacher that is neither the original nor the model itself."""
        return self.teacher if self.taught and self.teacher != PREVIOUS else None

    @property
    def own_student(self) -> str | None:
        """Hub id or folder of a student that is made from no other model."""
        return self.student if isinstance(self.student, str) and self.student != SELF else None

    @model_validator(mode="after")
    def _teacher_fits(self) -> Config:
        if self.teacher == PREVIOUS and self.teacher_quantization is not None:
            raise ValueError(
                "teacher: previous is in memory already, and teacher_quantization works while a teacher is loaded; "
                "leave one of them out"
            )
        if self.divergences and self.changed() & {"divergence", "beta", "skew"}:
            raise ValueError("divergence, beta and skew are of one divergence, and divergences are several; give one")
        if self.vocabulary == "universal" and self.own_teacher is None:
            raise ValueError("vocabulary: universal is for a teacher with another tokenizer; name one with teacher:")
        cached = self.teacher_cache is not None
        try:
            check_teaching(self, "causal", live=self.taught and not cached, cached=cached)
        except PlanError as error:
            raise ValueError("; ".join(error.problems)) from None
        return self

    @field_validator("during")
    @classmethod
    def _work_together(cls, stages: StageList) -> StageList:
        """Refuse stages that are no callbacks, and callbacks that would undo what others do."""
        if problems := during.find_problems(stages):
            raise ValueError("; ".join(problems))
        return stages

    @model_validator(mode="after")
    def _weights_stay(self) -> Config:
        if self.lora is not None and self.during:
            raise ValueError(
                f"lora trains adapters beside weights that stay as they are, and {self.during[0].method} changes "
                "those: leave lora or during out"
            )
        return self


def successor(
    layers: dict[str, Layer], config: Config, model: PreTrainedModel
) -> tuple[PreTrainedModel, dict[str, Layer]] | None:
    """The student's skeleton and its layers, where another model than this one is trained."""
    return None if config.student == SELF else plan_student(layers, config.student, model)


def plan(layers: dict[str, Layer], config: Config, model: PreTrainedModel) -> dict[str, Layer]:
    """The layers that `during` re-encodes, or that adapters are added to, as they will be stored."""
    if config.teacher_quantization is not None:
        check_installed()
    if config.lora is not None:
        planned = adapters.plan(layers, config.lora, model)
        return {name: layer for name, layer in planned.items() if layer != layers[name]}
    return during.plan(config.during, layers, model)


def needs(config: Config) -> tuple[str, ...]:
    """The data and models that it needs with these options."""
    teacher = ("teacher",) if config.teacher else ("original",)
    measured = ("calibration",) if isinstance(config.student, StudentOptions) and config.student.measures else ()
    return ("train", *measured, *(teacher if config.taught else ()), *(("labels",) if uses_labels(config) else ()))


def preserves(config: Config) -> tuple[str, ...]:
    """What earlier stages made of the weights and these options leave as it is."""
    return RULES.preserves if config.lora is None else (*RULES.preserves, "codes")


def frees(config: Config) -> tuple[str, ...]:
    """Adapters that were added to codes can be trained further."""
    return () if config.lora is None else ("codes",)


def notes(layers: dict[str, Layer], config: Config, model: PreTrainedModel) -> list[str]:
    """Options that are odd but allowed."""
    found: list[str] = []
    if isinstance(config.student, StudentOptions) and config.student.choose == "kl":
        found.append(
            "student: choose: kl runs the model many times to find the blocks that stay, about 160 times on 8 windows "
            "for 15 of 30; choose: influence runs it once, and spread never"
        )
    if config.lora is None or "learning_rate" in config.model_fields_set:
        return found
    return [
        *found,
        f"lora: adapters begin at zero, and learning_rate {config.learning_rate:g} is for whole models; "
        f"{adapters.LEARNING_RATE:g} is usual for adapters",
    ]


def keep_previous(model: PreTrainedModel, config: Config, context: Context) -> Context:
    """A context that remembers the model as it is now, where it is to be the teacher."""
    wanted = config.taught and config.teacher == PREVIOUS and context.previous is None
    return replace(context, previous=copy.deepcopy(model)) if wanted else context


def load_teacher(config: Config, context: Context) -> PreTrainedModel | None:
    """The teacher, as the options ask for it; None where there is none.

    Raises:
        PlanError: a teacher that is in memory already is to be quantized.
    """
    if not config.taught:
        return None
    if config.teacher == PREVIOUS:
        return context.previous
    source = context.source if config.teacher is None else ModelSource(config.teacher)
    if config.teacher_quantization is not None:
        if source is None:
            raise PlanError(
                "teacher_quantization works while a teacher is loaded: give teacher: a Hub id or folder, or load the "
                "original with quantization_config=BitsAndBytesConfig(...) yourself"
            )
        return source.load(make_config(config.teacher_quantization))
    return context.original if config.teacher is None else ModelSource(config.teacher).load()


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Train the model against its teacher.

    Raises:
        PlanError: the student has no trainable parts.
    """
    context = keep_previous(model, config, context)
    later = config.teacher_cache is not None and config.student == SELF
    teacher = None if later else load_teacher(config, context)
    if teacher is not None and config.student == SELF:
        _check_pair(model, teacher, config, context)
    if teacher is not None:
        _check_reads(teacher, config, context)
    if config.own_student is not None:
        _check_student_words(config.own_student, context)
    if config.student == SELF:
        made = StageReport()
    elif teacher is model:
        raise PlanError(
            "teacher and student would be one model, which is changed in place; pass original=copy.deepcopy(model), or "
            "teacher='previous'"
        )
    else:
        made = turn_into_student(model, config.student, context)
    chosen: list[Layer] = []
    learning = nullcontext({})
    if config.lora is None:
        check_trainable(model)
    else:
        layers = find_layers(model)
        chosen = [layers[name] for name in adapters.plan(layers, config.lora, model)]
        learning = adapters.adapting(model, chosen, config.lora, context.seed)
    callbacks = during.start(model, config.during)
    if config.teacher_cache is not None:
        teacher = None  # it is needed for one pass, and its memory for the student afterwards
    with learning as trained:
        metrics = _train(model, config, context, teacher, callbacks)
    rows = during.store(model, config.during, callbacks)
    if chosen:
        rows, metrics["adapters"] = adapters.absorb(model, chosen, trained)
    metrics |= {"student": made.metrics} if made.metrics else {}
    return StageReport(layers=made.layers + rows, metrics=metrics, notes=made.notes)


def _train(
    model: PreTrainedModel,
    config: Config,
    context: Context,
    teacher: PreTrainedModel | None,
    callbacks: list[TrainerCallback],
) -> dict[str, Any]:
    """Train against a teacher that is in memory, or one that is asked once; returns what `core.training.train` does."""
    eager = [m for m in (model, teacher) if m is not None and any(f.kind == "attention" for f in config.features)]
    fast = nullcontext() if teacher is None else in_dtype(teacher, fast_dtype(teacher.dtype, teacher.device))
    with fast, eager_attention(eager):
        return train(
            model,
            config,
            context,
            DistillationConfig,
            partial(_make_trainer, config, context, teacher, callbacks=callbacks),
            temperature=config.temperature,
            alpha=config.alpha,
            alpha_schedule=config.alpha_schedule,
            temperature_schedule=config.temperature_schedule,
            divergence=config.divergence,
            divergences=[loss.model_dump(exclude_unset=True) for loss in config.divergences],
            beta=config.beta,
            skew=config.skew,
            features=[feature.model_dump(exclude_unset=True) for feature in config.features],
            fused=config.fused,
            vocabulary=config.vocabulary,
            lmbda=config.lmbda,
            max_new_tokens=config.max_new_tokens,
        )


def _make_trainer(
    config: Config,
    context: Context,
    teacher: PreTrainedModel | None,
    *,
    model: PreTrainedModel,
    args: DistillationConfig,
    train_dataset: Any,
    data_collator: Any = default_data_collator,
    **options: Any,
) -> DistillationTrainer:
    """The trainer of this stage, once the teacher has been asked where its answers are kept."""
    options |= {"model": model, "args": args, "train_dataset": train_dataset, "data_collator": data_collator}
    other = _other_tokenizer(config)
    if other is None and config.own_student is not None and config.own_teacher is None:
        other = context.tokenizer  # the student's was found to be the same
    if other is not None and context.tokenizer is not None:
        options |= {"processing_class": context.tokenizer, "teacher_tokenizer": other}
    if config.teacher_cache is None:
        return DistillationTrainer(teacher=teacher, **options)
    folder = Path(config.teacher_cache.folder or Path(str(args.output_dir)) / "teacher_cache").expanduser()
    asked = load_teacher(config, context)
    _check_pair(model, asked, config, context)
    write_cache(
        folder,
        asked,
        train_dataset,
        config.teacher_cache,
        temperature=config.temperature,
        tokenizer=context.tokenizer,
        vocabulary=words_of(model),
        collate=data_collator,
        batch_size=config.batch_size,
        seed=context.seed,
    )
    context.release_original()
    options.pop("teacher_tokenizer", None)
    return DistillationTrainer(teacher_cache=folder, **options)


def _check_pair(model: PreTrainedModel, teacher: PreTrainedModel | None, config: Config, context: Context) -> None:
    """Refuse a teacher that cannot teach this student."""
    other = _other_tokenizer(config)
    check_pair(model, teacher, config.vocabulary, (context.tokenizer if other is not None else None, other))


def _check_student_words(student: str, context: Context) -> None:
    """Refuse another model as the student whose tokenizer is not that of the data, which goes into the result."""
    try:
        own = ModelSource(student).load_tokenizer()
    except ModelError:
        return
    if context.tokenizer is not None and not same_words(context.tokenizer, own):
        raise PlanError(
            f"student: {student!r} has another tokenizer than the model that the recipe names, which reads the data "
            "and is saved with the result; name the student as the recipe's model, and its teacher with teacher: and "
            "vocabulary: universal"
        )


def _other_tokenizer(config: Config) -> Any:
    """The tokenizer of a teacher that was named, if it has one."""
    if config.own_teacher is None:
        return None
    try:
        return ModelSource(config.own_teacher).load_tokenizer()
    except ModelError:
        if config.vocabulary == "universal":
            raise
        return None


def _check_reads(teacher: PreTrainedModel, config: Config, context: Context) -> None:
    """Refuse train data that the teacher cannot read; it reads its own tokens where it has another tokenizer."""
    examples = context.examples("train") if is_classifier(teacher) else None
    if examples is not None:
        check_examples(teacher, examples)
    elif config.vocabulary != "universal":
        check_tokens(teacher, context.tokens("train"), "train data, read by the teacher")
