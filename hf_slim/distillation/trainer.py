"""DistillationTrainer: `transformers.Trainer` whose loss is the divergence from a teacher's predictions.

    loss = (alpha · Σ T² KL + (1 - alpha) · Σ cross entropy) / (kept tokens of the whole batch)

The whole batch is what one optimizer step sees: all accumulated micro-batches on all processes. Dividing sums by that
one count, instead of averaging the micro-batches' means, is what makes the gradient independent of how the batch is cut
up and padded. The same function (`losses.positions`) decides what is counted and what is summed.

Where we differ from the Trainer's own language model loss: a padding position that precedes the first real token (left
padding) does not count, so that left and right padding give the same loss; auxiliary losses that a model adds to its
label loss (mixture-of-experts balancing) are not added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.loss.loss_utils import (
    LOSS_MAPPING,
    ForCausalLMLoss,
    ForMaskedLMLoss,
    ForSequenceClassificationLoss,
    ForTokenClassification,
)

from hf_slim.core.errors import DataError, ModelError, PlanError
from hf_slim.distillation.losses import kl_divergence, label_cross_entropy, positions

Task = Literal["causal", "masked", "token", "sequence"]

_TASKS: dict[Any, Task] = {
    ForCausalLMLoss: "causal",
    ForMaskedLMLoss: "masked",
    ForTokenClassification: "token",
    ForSequenceClassificationLoss: "sequence",
}
_LABELS = ("labels", "shift_labels")
_NO_DISTRIBUTION = ("regression", "multi_label_classification")


@dataclass
class DistillationConfig(TrainingArguments):
    """`TrainingArguments` and the three dials of distillation.

    Args:
        temperature: T > 0; both models' logits are divided by it. 2.0 as in DistilBERT and oBERT.
        alpha: share of the distillation loss, from 0 to 1; the labels' cross entropy has the rest. The default 1.0 is
            right when a compressed model is to behave as it did before: the teacher knows more than the label. Use 0.5
            to 0.9 when a smaller student learns a task from labelled data.
        divergence: "forward_kl" (the student covers all that the teacher deems likely; best for perplexity) or
            "reverse_kl" (the student concentrates on the teacher's main mode; used for generation).
    """

    temperature: float = field(default=2.0, metadata={"help": "Both models' logits are divided by it; above 0."})
    alpha: float = field(
        default=1.0, metadata={"help": "Share of the distillation loss, 0 to 1; the label loss has the rest."}
    )
    divergence: Literal["forward_kl", "reverse_kl"] = field(
        default="forward_kl",
        metadata={"help": "forward_kl: KL(teacher || student); reverse_kl: KL(student || teacher)."},
    )

    def __post_init__(self):
        problems = []
        if not self.temperature > 0:
            problems.append(f"temperature must be above 0, got {self.temperature}; 1 to 4 is usual")
        if not 0 <= self.alpha <= 1:
            problems.append(f"alpha is the share of the distillation loss, from 0 to 1, got {self.alpha}")
        if self.divergence not in ("forward_kl", "reverse_kl"):
            problems.append(f"divergence must be 'forward_kl' or 'reverse_kl', got {self.divergence!r}")
        if problems:
            raise PlanError(problems)
        super().__post_init__()


class DistillationTrainer(Trainer):
    """Trains `model` to predict what `teacher` predicts, on labelled or unlabelled data.

    For causal and masked language models, sequence and token classification. A position counts if it has a label
    (causal: the *next* token's label is not -100), or, without labels, if the attention mask is set. Logs the two parts
    of the loss, before `alpha` weighs them, as `distillation_loss` and `label_loss`; evaluation reports both, too.

    The teacher is frozen in place (eval mode, no gradients), moved to the student's device, and is no part of the
    optimizer or of checkpoints. Every process holds the whole teacher.

    Args:
        model: the student.
        teacher: a model for the same task over the same vocabulary (or classes), of any size; None with `alpha` 0,
            where labels alone teach.
        args: a `DistillationConfig`, or `TrainingArguments` for the defaults of distillation.
        kwargs: everything else that `Trainer` takes.

    Raises:
        ModelError: teacher and student do not fit; names both sizes and the way out.
        PlanError: options of the Trainer that distillation cannot honour.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None,
        args: TrainingArguments | None = None,
        **kwargs: Any,
    ):
        args = DistillationConfig() if args is None else args
        _check_options(args, kwargs)
        if teacher is not None:
            check_pair(model, teacher)
        settings = args if isinstance(args, DistillationConfig) else DistillationConfig
        self.temperature, self.alpha, self.divergence = settings.temperature, settings.alpha, settings.divergence
        if teacher is None and self.alpha > 0:
            raise PlanError(
                f"alpha={self.alpha} needs a teacher, got None; pass one, or set alpha=0 to use labels alone"
            )
        self.task = task_of(model)
        super().__init__(model, args, **kwargs)
        if self.get_cp_size() > 1 or self.get_sp_size() > 1:
            raise PlanError(
                "distillation shifts labels within whole sequences; set context and sequence parallelism to 1"
            )
        self.can_return_loss = True  # a loss needs no labels here, so evaluation without labels has one, too
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval()
        if teacher is not None and getattr(teacher, "hf_device_map", None) is None:
            teacher.to(self.args.device)
        self._teacher_accepts = None if teacher is None else _accepted(teacher)
        self.current_gradient_accumulation_steps = 1  # the Trainer's; it sets it only once training has begun
        self._parts = {"train": _Average(), "eval": _Average()}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of one micro-batch, already scaled for accumulation and for the mean over processes (see `Trainer`)."""
        targets, keep = self._positions(inputs)
        if targets is None and self.alpha < 1:
            raise DataError(f"alpha={self.alpha} needs labels, but the batch has none; add labels or set alpha=1.0")
        features = {name: value for name, value in inputs.items() if name not in _LABELS}
        outputs = model(**features)
        student = outputs.logits.reshape(-1, outputs.logits.shape[-1])
        rows, keep = outputs.logits.shape[0], keep.to(student.device)

        losses: dict[str, Tensor] = {}
        if self.teacher is not None:
            teacher = self._teach(outputs.logits, features)
            losses["distillation_loss"] = kl_divergence(student, teacher, keep, self.temperature, self.divergence)
            self._check_finite(losses["distillation_loss"], teacher, keep, rows)
        if targets is not None and (self.alpha < 1 or not model.training):
            losses["label_loss"] = label_cross_entropy(student, targets.to(student.device), keep)
        count = keep.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=student.device)
        processes = 1 if num_items_in_batch is None else self._processes()
        losses = {name: loss * processes / count.clamp(min=1) for name, loss in losses.items()}
        self._record(losses, training=model.training, rows=rows)

        weights = {"distillation_loss": self.alpha, "label_loss": 1 - self.alpha}
        loss = sum((weights[name] * part for name, part in losses.items()), student.new_zeros(()))
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As in `Trainer`, and a batch without labels has a loss as well: the teacher supplies the targets."""
        names, self.label_names = self.label_names, [name for name in self.label_names if name in inputs]
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self.label_names = names

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """As in `Trainer`, with both parts of the loss among the metrics."""
        self._parts["eval"] = _Average()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        parts = self._parts["eval"].take(self.accelerator)
        named = {f"{metric_key_prefix}_{name}": value for name, value in parts.items()}
        return output._replace(metrics={**(output.metrics or {}), **named})

    def log(self, logs, start_time=None):
        """As in `Trainer`, with both parts of the training loss, averaged over the same steps as `loss`."""
        if "loss" in logs:
            logs.update(self._parts["train"].take(self.accelerator))
        super().log(logs, start_time)

    def _get_num_items_in_batch(self, batch_samples, device):
        """Kept positions of all micro-batches on all processes.

        Not the Trainer's own count, which sees labels alone and shifts them for some causal models and not for others.
        """
        if not batch_samples:
            return None
        count = torch.stack([self._positions(batch)[1].sum().to(device) for batch in batch_samples]).sum()
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum() / self.get_tp_size()
        return count

    def _processes(self) -> int:
        """Processes whose gradients are averaged although the loss is already divided by their common count."""
        if not self.args.average_tokens_across_devices:
            return 1
        return self.accelerator.num_processes // self.get_tp_size()

    def _positions(self, inputs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor]:
        """Targets and kept positions of a batch, flattened; see `losses.positions`."""
        first = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
        shape = first.shape[:1] if self.task == "sequence" else first.shape[:2]
        labels, mask = inputs.get("shift_labels", inputs.get("labels")), inputs.get("attention_mask")
        if labels is not None and (labels.shape != shape or labels.is_floating_point()):
            raise DataError(
                f"labels must be class indices of shape {list(shape)}, got {labels.dtype} {list(labels.shape)}; "
                "regression and multi-label targets cannot be distilled"
            )
        if mask is not None and mask.shape != shape:  # sequence classification, or a packed [batch, 1, query, key] mask
            mask = None
        return positions(shape, labels, mask, shift=self.task == "causal" and "shift_labels" not in inputs)

    def _teach(self, student: Tensor, features: dict[str, Any]) -> Tensor:
        """The teacher's logits, [tokens, vocab], for those of the student."""
        known = self._teacher_accepts
        features = {name: value for name, value in features.items() if known is None or name in known}
        with torch.no_grad(), self.accelerator.autocast():
            teacher = self.teacher(**features).logits  # pyright: ignore[reportOptionalCall]
        if student.shape != teacher.shape:
            raise ModelError(
                f"the teacher's logits have shape {list(teacher.shape)}, the student's {list(student.shape)}; "
                "both must see the same tokens and predict over the same vocabulary (or classes)"
            )
        return teacher.to(student.device).reshape(-1, student.shape[-1])

    def _check_finite(self, loss: Tensor, teacher: Tensor, keep: Tensor, rows: int) -> None:
        """Refuse a teacher that predicts NaN or infinity; a student that diverges is the Trainer's business."""
        if torch.isfinite(loss):
            return
        # -inf is a probability of zero, and legal unless the whole row is
        bad = (teacher.isnan() | (teacher == torch.inf)).any(-1) | (teacher == -torch.inf).all(-1)
        where = (bad & keep).view(rows, -1).any(-1).nonzero().squeeze(1).tolist()
        if where:
            raise ModelError(
                f"the teacher's logits hold NaN or infinite values at step {self.state.global_step}, rows {where} of "
                "the batch; load the teacher in bfloat16 or float32, or check that its weights are finite"
            )

    def _record(self, parts: dict[str, Tensor], *, training: bool, rows: int) -> None:
        """Keep what is to be logged: per optimizer step when training, per row when evaluating, as the Trainer does."""
        if training:
            self._parts["train"].add(parts, weight=1 / self.current_gradient_accumulation_steps, scale=1.0)
        else:
            self._parts["eval"].add(parts, weight=rows, scale=rows)


def task_of(model: PreTrainedModel) -> Task:
    """What the model's logits predict, told by the loss that transformers attaches to its class.

    Raises:
        ModelError: neither a causal or masked language model nor a token or sequence classifier.
    """
    # a class that names no loss (GPT2LMHeadModel) gets the causal one from transformers as well
    loss = LOSS_MAPPING.get(getattr(model, "loss_type", None), ForCausalLMLoss)
    if loss not in _TASKS or model.config.is_encoder_decoder:
        raise ModelError(
            f"{type(model).__name__} cannot be distilled: only causal and masked language models, token and sequence "
            "classifiers have logits that two models can be compared by"
        )
    return _TASKS[loss]


def check_pair(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse a teacher that cannot teach this student.

    Raises:
        ModelError: another task, another vocabulary or number of classes, or weights in common; all problems at once.
    """
    task, teacher_task = task_of(student), task_of(teacher)
    problems = []
    if task != teacher_task:
        problems.append(
            f"the teacher {type(teacher).__name__} and the student {type(student).__name__} predict different things; "
            "load both with the same AutoModelFor... class"
        )
    elif task in ("token", "sequence") and student.config.num_labels != teacher.config.num_labels:
        problems.append(
            f"the teacher predicts {teacher.config.num_labels} classes, the student {student.config.num_labels}; "
            f"load the student with num_labels={teacher.config.num_labels}"
        )
    sizes = [model.config.get_text_config().vocab_size for model in (teacher, student)]
    if sizes[0] != sizes[1]:
        problems.append(
            f"the teacher's vocabulary has {sizes[0]} entries, the student's {sizes[1]}; choose a teacher with the "
            "same tokenizer. If the tokenizers are equal and one table is merely padded, cut or pad it first: "
            f"teacher.resize_token_embeddings({sizes[1]})"
        )
    if task == "sequence" and (student.config.num_labels == 1 or student.config.problem_type in _NO_DISTRIBUTION):
        problems.append("regression and multi-label models cannot be distilled: their outputs are no distribution")
    if {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}:
        problems.append(
            "teacher and student share weights, so freezing the teacher would freeze the student; "
            "pass teacher=copy.deepcopy(model), made before adapters are added"
        )
    if problems:
        raise ModelError(problems)


def _check_options(args: TrainingArguments, options: Mapping[str, Any]) -> None:
    """Refuse what the Trainer would otherwise accept and distillation would ignore."""
    problems = []
    if args.label_smoothing_factor != 0:
        problems.append("label_smoothing_factor has no effect in distillation: the teacher is smooth; set it to 0")
    if options.get("compute_loss_func") is not None:
        problems.append("compute_loss_func would be ignored: DistillationTrainer computes the loss; leave it out")
    if args.use_liger_kernel:
        problems.append("use_liger_kernel hides the student's logits, which distillation compares; set it to False")
    if problems:
        raise PlanError(problems)


def _accepted(model: nn.Module) -> set[str] | None:
    """Names of inputs that the model's forward takes; None for any."""
    parameters = signature(model.forward).parameters.values()
    return None if any(p.kind == Parameter.VAR_KEYWORD for p in parameters) else {p.name for p in parameters}


class _Average:
    """A weighted running mean of named losses, kept on the device so that no step waits for a read-out."""

    def __init__(self):
        self.totals: dict[str, Tensor] = {}
        self.weight = 0.0

    def add(self, parts: dict[str, Tensor], *, weight: float, scale: float) -> None:
        for name, loss in parts.items():
            self.totals[name] = self.totals.get(name, 0.0) + loss.detach() * scale
        self.weight += weight

    def take(self, accelerator: Any) -> dict[str, float]:
        """The means over all processes; starts anew."""
        means = {name: total / self.weight for name, total in self.totals.items()}
        self.totals, self.weight = {}, 0.0
        return {name: accelerator.gather(mean).mean().item() for name, mean in means.items()}
