"""DistillationTrainer: `transformers.Trainer` whose loss is the divergence from a teacher's predictions.

    loss = (alpha · Σ w T² D + (1 - alpha) · Σ w cross entropy + Σ_f weight_f · Σ w feature_f) / Σ w

over the kept tokens of the batch; all weights w are 1, unless the data have a column `loss_weights` (`batches.py`).

The batch is what one optimizer step sees: all accumulated micro-batches on all processes. Dividing sums by that one
number, instead of averaging the micro-batches' means, is what makes the gradient independent of how the batch is cut up
and padded. The same function (`losses.positions`) decides what is counted and what is summed.

Neither model's logits exist for the whole batch where the models allow it and nobody asks for logits (`fused.py`).

Where we differ from the Trainer's own language model loss: a padding position that precedes the first real token (left
padding) does not count, so that left and right padding give the same loss; auxiliary losses that a model adds to its
label loss (mixture-of-experts balancing) are not added.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_slim.core.checkpoints import Resumes
from hf_slim.core.errors import DataError, PlanError
from hf_slim.core.forward import inputs_of
from hf_slim.core.model import ModelSource
from hf_slim.distillation import fused, projections
from hf_slim.distillation.arguments import DistillationConfig
from hf_slim.distillation.averages import Average
from hf_slim.distillation.batches import (
    NOT_FEATURES,
    count_of,
    positions_of,
    tokens_of,
    weights_of,
    weights_through,
)
from hf_slim.distillation.cache_data import check_not_empty
from hf_slim.distillation.checks import check_teaching, check_trainer_options, check_wrapped
from hf_slim.distillation.decoders import with_decoder_inputs
from hf_slim.distillation.features import FeatureLosses, read_features
from hf_slim.distillation.losses import WEIGHTS, Term, against_labels, sum_over_logits
from hf_slim.distillation.mixture import uses_labels
from hf_slim.distillation.on_policy import GENERATED, Generation
from hf_slim.distillation.pairs import Model, check_pair, check_student, task_of, words_of
from hf_slim.distillation.placement import place
from hf_slim.distillation.schedules import schedule_factor
from hf_slim.distillation.teacher_cache import ROW, CachedTeacher, WithRows, hand_rows_through
from hf_slim.distillation.teachers import LiveTeacher, Taught, check_finite, check_shapes, make_live

__all__ = ["DistillationConfig", "DistillationTrainer", "check_pair", "task_of"]


class DistillationTrainer(Resumes):
    """Trains `model` to predict what `teacher` predicts, on labelled or unlabelled data.

    For causal, masked and encoder-decoder language models, sequence and token classification. A position counts if it
    has a label (causal: the *next* token's label is not -100), or, without labels, if the attention mask is set. Logs
    the parts of the loss, before they are weighed, as `distillation_loss`, `label_loss` and `hidden_loss`,
    `embedding_loss`, `attention_loss`, `relation_loss`; evaluation reports them, too, and weighs them as at the start
    of every schedule, so that its losses can be compared.

    Data may have a column `loss_weights`, one number a label: how much predicting it counts beside the others. Columns
    that only the teacher reads (`token_type_ids` for a BERT that teaches a DistilBERT) are handed to it alone.

    The teacher is frozen in place (eval mode, no gradients), moved to the student's device, and is no part of the
    optimizer or of checkpoints. Every process holds the whole teacher, or its share of one that is sharded
    (`placement.py`). Projections of feature losses are trained by the same optimizer (without weight decay or clipping)
    and are in checkpoints, in a file of their own.

    Args:
        model: the student, a PreTrainedModel or a PeftModel around one.
        teacher: a model for the same task over the same vocabulary (or classes), of any size, or where it is to be
            loaded from, as it is stored: a Hub id or folder; for other vocabularies see
            `DistillationConfig.vocabulary`. None with a `teacher_cache`, and with `alpha` 0 and no features, where
            labels alone teach.
        args: a `DistillationConfig`, or `TrainingArguments` for the defaults of distillation.
        teacher_cache: folder that `teacher_cache.write_cache` has filled from `train_dataset`. Evaluation, on other
            data, then measures the label loss.
        teacher_tokenizer: of the teacher, to be compared with the student's, `processing_class`.
        kwargs: everything else that `Trainer` takes.

    Raises:
        ModelError: teacher and student do not fit; names both sizes and the way out.
        PlanError: options of the Trainer, or features, that cannot be honoured with these models.
        DataError: there are no data, or others than those that the teacher cache was made of.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Model | None = None,
        teacher: Model | str | Path | None = None,
        args: TrainingArguments | None = None,
        *,
        teacher_cache: str | Path | None = None,
        teacher_tokenizer: Any = None,
        **kwargs: Any,
    ):
        args = DistillationConfig() if args is None else args
        if isinstance(teacher, str | Path):
            teacher = ModelSource(str(teacher)).load()
        settings = args if isinstance(args, DistillationConfig) else DistillationConfig
        features = read_features(settings.features)
        check_trainer_options(args, kwargs)
        if model is None:
            raise PlanError("there is no student; pass model=")
        self.settings, self.task = settings, task_of(model)
        check_teaching(settings, self.task, live=teacher is not None, cached=teacher_cache is not None)
        tokenizers = kwargs.get("processing_class"), teacher_tokenizer
        check_student(model)
        if teacher is not None:
            check_pair(model, teacher, settings.vocabulary, tokenizers)
        check_not_empty(kwargs.get("train_dataset"))
        self.features = FeatureLosses(features, model, teacher, args.seed) if features and teacher is not None else None
        super().__init__(model, args, **kwargs)
        self.data_collator = weights_through(self.data_collator)
        check_wrapped(self)
        self.can_return_loss = True  # a loss needs no labels here, so evaluation without labels has one, too
        sharded = False
        if teacher is not None:
            teacher, sharded = place(teacher.requires_grad_(False).eval(), self)
        self.teacher = teacher
        self._fused = self._may_fuse()
        self._teaching: LiveTeacher | CachedTeacher | None = None
        if teacher is not None:
            options: dict[str, Any] = {"features": self.features, "whole": not sharded}
            self._teaching = make_live(
                teacher, model, settings, tokenizers, around=self.accelerator.autocast, **options
            )
        elif teacher_cache is not None:
            self._teaching = self._open_cache(teacher_cache)
        self._generation = Generation(settings.lmbda, settings.max_new_tokens, self.args.seed)
        self._only_teacher = self._read_by_teacher_alone()
        self._loss_only = False  # True while an evaluation wants no logits
        self._predicting = False  # True while predictions are wanted, with a loss or without
        if self.projections:
            self.projections.to(self.args.device)
            self.add_callback(projections.Gradients(self.projections, self.accelerator))
        self.current_gradient_accumulation_steps = 1  # the Trainer's; it sets it only once training has begun
        self._parts = {"train": Average(), "eval": Average()}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of one micro-batch, already scaled for accumulation and for the mean over processes (see `Trainer`)."""
        targets, keep = positions_of(inputs, self.task)
        weights = None if GENERATED in inputs else weights_of(inputs, self.task)
        progress = self._progress() if model.training else 0.0
        alpha = self.settings.alpha * schedule_factor(self.settings.alpha_schedule, progress)
        if targets is None and uses_labels(self.settings) and model.training:
            what = f"alpha={alpha}" if alpha < 1 else f"alpha_schedule={self.settings.alpha_schedule!r}"
            raise DataError(f"{what} needs labels, but the batch has none; add labels or keep alpha at 1.0")
        features = {name: value for name, value in inputs.items() if name not in NOT_FEATURES}
        if self.task == "seq2seq":
            features = with_decoder_inputs(self.model, features, inputs)
        features |= {"output_attentions": True} if self.features is not None and self.features.maps else {}
        unheard = isinstance(self._teaching, CachedTeacher) and not model.training and ROW not in inputs
        if targets is None and (unheard or self._teaching is None):
            raise DataError("without a live teacher evaluation needs labels, but the batch has none; add labels")
        taught = None
        needless = model.training and alpha == 0 and self.features is None
        if self._teaching is not None and not (unheard or needless):
            rows = {ROW: inputs[ROW]} if ROW in inputs else {}
            taught = self._teaching.teach(features | rows, progress)
        features = {name: value for name, value in features.items() if name not in self._only_teacher}
        terms: dict[str, Term] = {}
        if taught is not None:
            terms["distillation_loss"] = (alpha, taught.loss)
        if targets is not None and GENERATED not in inputs and (uses_labels(self.settings) or not model.training):
            terms["label_loss"] = (1.0 if unheard else 1 - alpha, against_labels(targets))

        watched = nullcontext() if self.features is None else self.features.watch(self.model, teacher=False)
        logits_wanted = return_outputs and not self._loss_only
        with watched as seen:
            sums, outputs = self._sums(model, features, (keep, weights), list(terms.values()), taught, logits_wanted)
        parts = dict(zip(terms, sums[1:].detach(), strict=True))
        total, keep = sums[0], keep.to(sums.device)
        if taught is not None:
            where = (self.state.global_step, tokens_of(inputs).shape[0])
            check_finite(parts["distillation_loss"], taught, keep, words_of(self.model), where)
        if self.features is not None:
            inside = self._inside(
                inputs, keep if weights is None else keep * weights.to(keep.device), seen, taught, outputs
            )
            shares = self.features.weights(progress)
            total = sum((shares[name] * loss for name, loss in inside.items()), total)
            parts |= {name: loss.detach() for name, loss in inside.items()}
        count = count_of(inputs, self.task) if num_items_in_batch is None else num_items_in_batch
        count = torch.as_tensor(count, device=sums.device)
        scale = (1 if num_items_in_batch is None else self._processes()) / torch.where(count > 0, count, 1)
        rows = tokens_of(inputs).shape[0]
        self._record({name: loss * scale for name, loss in parts.items()}, training=model.training, rows=rows)
        loss = total * scale
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As in `Trainer`, and a batch without labels has a loss as well: the teacher supplies the targets."""
        names, self.label_names = self.label_names, [name for name in self.label_names if name in inputs]
        self._loss_only = prediction_loss_only
        if not self.label_names and self._predicting and not isinstance(self._teaching, LiveTeacher):
            self.can_return_loss = False  # nothing to compare with; predictions are there all the same
            hidden = (*NOT_FEATURES, *self._only_teacher)
            inputs = {name: value for name, value in inputs.items() if name not in hidden}
        try:
            loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            return loss, logits, labels if self.label_names else None
        finally:
            self.label_names, self._loss_only, self.can_return_loss = names, False, True

    def predict(self, *args, **kwargs):
        """As in `Trainer`; without labels and without a live teacher there are predictions, but no loss."""
        self._predicting = not self.args.prediction_loss_only
        try:
            return super().predict(*args, **kwargs)
        finally:
            self._predicting = False

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """As in `Trainer`, with the parts of the loss among the metrics."""
        self._parts["eval"] = Average()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        parts = self._parts["eval"].take(self.accelerator)
        named = {f"{metric_key_prefix}_{name}": value for name, value in parts.items()}
        return output._replace(metrics={**(output.metrics or {}), **named})

    def log(self, logs, start_time=None):
        """As in `Trainer`, with the parts of the training loss, averaged over the same steps as `loss`."""
        if "loss" in logs:
            logs.update(self._parts["train"].take(self.accelerator))
        super().log(logs, start_time)

    def create_optimizer(self, model=None):
        """As in `Trainer`, and the projections of feature losses are trained with the student."""
        optimizer = super().create_optimizer(model)
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        new = [p for p in self.projections.parameters() if id(p) not in trained]
        if new:
            optimizer.add_param_group({"params": new, "weight_decay": 0.0})
        return optimizer

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in `Trainer`, and the student writes its share of the batches itself."""
        samples, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        step = self.state.global_step
        chosen = [number for number in range(len(samples)) if self._generation.is_chosen(step, number)]
        for number in chosen:
            place = (step, number, self.args.process_index)
            samples[number] = self._generation.write(self.model, samples[number], place, self.accelerator.autocast)
        return samples, self._get_num_items_in_batch(samples, device) if self.settings.lmbda else count

    def _open_cache(self, folder: str | Path) -> CachedTeacher:
        """The teacher's cache, whose rows the training data name from now on."""
        opened = CachedTeacher(
            folder,
            words=words_of(self.model),
            task=self.task,
            temperature=self.settings.temperature,
            tokenizer=self.processing_class,
            data=self.train_dataset,
        )
        if self.train_dataset is not None:
            self.train_dataset = WithRows(self.train_dataset)
        self.data_collator = hand_rows_through(self.data_collator)
        return opened

    def _set_signature_columns_if_needed(self):
        """As in `Trainer`; numbers of rows, weights and what only the teacher reads are no columns to be removed."""
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(
            dict.fromkeys([*self._signature_columns, ROW, WEIGHTS, *sorted(self._only_teacher)])
        )

    def _read_by_teacher_alone(self) -> set[str]:
        """Names of inputs that the teacher takes and the student does not; none where both tokenize for themselves."""
        if not isinstance(self._teaching, LiveTeacher) or self._teaching.translator is not None:
            return set()
        return self._teaching.reads - inputs_of(self.model)[0]

    def _progress(self) -> float:
        """Share of the steps that are done."""
        return self.state.global_step / max(1, self.state.max_steps)

    def _get_num_items_in_batch(self, batch_samples, device):
        """Kept positions of all micro-batches on all processes, or the sum of their weights.

        Not the Trainer's own count, which sees labels alone and shifts them for some causal models and not for others.
        """
        if not batch_samples:
            return None
        counts = [
            (positions_of(batch, self.task)[1].sum() if GENERATED in batch else count_of(batch, self.task)).to(device)
            for batch in batch_samples
        ]
        count = torch.stack(counts).sum()
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum() / self.get_tp_size()
        return count

    def _processes(self) -> int:
        """Processes whose gradients are averaged although the loss is already divided by their common count."""
        if not self.args.average_tokens_across_devices:
            return 1
        return self.accelerator.num_processes // self.get_tp_size()

    @property
    def projections(self) -> nn.ModuleDict:
        """What maps the student's widths to the teacher's in feature losses; empty where nothing has to."""
        return nn.ModuleDict() if self.features is None else self.features.projections

    def _may_fuse(self) -> bool:
        """Whether the student's losses may be computed from its hidden states.

        Raises:
            PlanError: it was asked for, and cannot be.
        """
        reason, head = None, fused.head_of(self.model)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            reason = "FSDP and DeepSpeed shard the head's weight"
        elif self.args.torch_compile or self.args.n_gpu > 1:
            reason = "a compiled model, or one on several GPUs of a process, cannot be given another head for a moment"
        elif self.settings.fused is not False:
            reason = fused.why_not(self.model)
        if self.settings.fused and (reason or not fused.is_plain(head)):
            reason = reason or f"the head is no plain linear layer but {type(head).__name__}, or watched by hooks"
            raise PlanError(
                f"fused=True is not possible here: {reason}; leave it out to fuse only where it is possible"
            )
        return self.settings.fused is not False and reason is None

    def _sums(
        self,
        model: nn.Module,
        features: dict[str, Any],
        kept: tuple[Tensor, Tensor | None],
        terms: list[Term],
        taught: Taught | None,
        logits_wanted: bool,
    ) -> tuple[Tensor, Any]:
        """The weighted total and each part, summed over kept positions by their weights; what the student put out."""
        keep, weights = kept
        head: Any = fused.head_of(self.model)
        if not self._fused or logits_wanted or not fused.is_plain(head):
            outputs = model(**features)
            check_shapes(tuple(outputs.logits.shape), taught)
            return sum_over_logits(outputs.logits.flatten(0, -2), keep, terms, weights), outputs

        def losses(hidden: Tensor) -> Tensor:
            weight = head.weight
            check_shapes((*hidden.shape[:-1], weight.shape[0]), taught)
            return fused.sum_over_hidden(hidden.flatten(0, -2), weight, head.bias, keep, terms, weights)

        with fused.replaced(head, losses):
            outputs = model(**features)
        return outputs.logits, outputs

    def _inside(
        self, inputs: Mapping[str, Any], counts: Tensor, seen: Any, taught: Any, outputs: Any
    ) -> dict[str, Tensor]:
        """The feature losses, summed over positions by what each counts; a sequence's class counts as one position."""
        shape, mask = tuple(tokens_of(inputs).shape[:2]), inputs.get("attention_mask")
        fits = mask is not None and mask.shape == shape
        real = (mask != 0).to(counts.device) if fits else torch.ones(shape, dtype=torch.bool, device=counts.device)
        if self.task == "sequence":
            weights = counts.unsqueeze(1) * real / real.sum(1, keepdim=True).clamp(min=1)
        else:
            weights = counts.view(shape).float()
        maps = (outputs.get("attentions"), taught.maps) if self.features.maps else None  # pyright: ignore[reportOptionalMemberAccess]
        return self.features.sums(seen, taught.seen, weights, real, maps)  # pyright: ignore[reportOptionalMemberAccess]

    def _record(self, parts: dict[str, Tensor], *, training: bool, rows: int) -> None:
        """Keep what is to be logged: per optimizer step when training, per row when evaluating, as the Trainer does."""
        if training:
            self._parts["train"].add(parts, weight=1 / self.current_gradient_accumulation_steps, scale=1.0)
        else:
            self._parts["eval"].add(parts, weight=rows, scale=rows)

    def _save_optimizer_and_scheduler(self, output_dir):
        """As in `Trainer`, with the projections of feature losses."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.projections and self.args.should_save:
            projections.save(self.projections, Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint):
        """As in `Trainer`, with the projections of feature losses."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.projections:
            projections.load(self.projections, Path(checkpoint))
