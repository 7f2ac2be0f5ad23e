"""DistillationTrainer: `transformers.Trainer` whose loss is the divergence from a teacher's predictions.

    loss = (alpha · Σ T² D + (1 - alpha) · Σ cross entropy + Σ_f weight_f · Σ feature_f) / (kept tokens of the batch)

The batch is what one optimizer step sees: all accumulated micro-batches on all processes. Dividing sums by that
one count, instead of averaging the micro-batches' means, is what makes the gradient independent of how the batch is cut
up and padded. The same function (`losses.positions`) decides what is counted and what is summed.

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
from hf_slim.core.errors import DataError, ModelError, PlanError
from hf_slim.core.model import ModelSource
from hf_slim.core.parallel import require_whole_weights
from hf_slim.distillation import fused, projections
from hf_slim.distillation.arguments import DistillationConfig, check_teaching, check_trainer_options
from hf_slim.distillation.averages import Average
from hf_slim.distillation.decoders import with_decoder_inputs, written
from hf_slim.distillation.features import FeatureLosses, read_features
from hf_slim.distillation.losses import Term, against_labels, chunks, positions, sum_over_logits
from hf_slim.distillation.on_policy import GENERATED, Generation
from hf_slim.distillation.pairs import Model, check_pair, task_of, words_of
from hf_slim.distillation.placement import place
from hf_slim.distillation.teacher_cache import ROW, CachedTeacher, WithRows, check_not_empty, hand_rows_through
from hf_slim.distillation.teachers import LiveTeacher, Taught, make_live

__all__ = ["DistillationConfig", "DistillationTrainer", "check_pair", "task_of"]

_NOT_FEATURES = ("labels", "shift_labels", ROW, GENERATED)


class DistillationTrainer(Resumes):
    """Trains `model` to predict what `teacher` predicts, on labelled or unlabelled data.

    For causal, masked and encoder-decoder language models, sequence and token classification. A position counts if it
    has a label (causal: the *next* token's label is not -100), or, without labels, if the attention mask is set. Logs
    the parts of the loss, before they are weighed, as `distillation_loss`, `label_loss` and `hidden_loss`,
    `embedding_loss`, `attention_loss`, `relation_loss`; evaluation reports them, too.

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
        model: Model,
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
        self.settings, self.task = settings, task_of(model)
        check_teaching(settings, self.task, live=teacher is not None, cached=teacher_cache is not None)
        tokenizers = kwargs.get("processing_class"), teacher_tokenizer
        if teacher is not None:
            check_pair(model, teacher, settings.vocabulary, tokenizers)
        check_not_empty(kwargs.get("train_dataset"))
        self.features = FeatureLosses(features, model, teacher, args.seed) if features and teacher is not None else None
        super().__init__(model, args, **kwargs)
        if self.get_cp_size() > 1 or self.get_sp_size() > 1:
            raise PlanError(
                "distillation shifts labels within whole sequences; set context and sequence parallelism to 1"
            )
        self.can_return_loss = True  # a loss needs no labels here, so evaluation without labels has one, too
        sharded = False
        if teacher is not None:
            teacher, sharded = place(teacher.requires_grad_(False).eval(), self)
        self.teacher = teacher
        self._fused = self._may_fuse()
        self._teaching: LiveTeacher | CachedTeacher | None = None
        if teacher is not None:
            self._teaching = make_live(
                teacher,
                model,
                settings,
                tokenizers,
                features=self.features,
                whole=not sharded,
                around=self.accelerator.autocast,
            )
        elif teacher_cache is not None:
            self._teaching = self._open_cache(teacher_cache)
        self._generation = Generation(settings.lmbda, settings.max_new_tokens, self.args.seed)
        self._loss_only = False  # True while an evaluation wants no logits
        if self._projections and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise PlanError(
                "features of models of different widths need projections, which FSDP and DeepSpeed do not train; "
                "use DistributedDataParallel, or compare relations (kind: relation), which need none"
            )
        if settings.lmbda:
            require_whole_weights("lmbda: a student that writes text")
        if self._projections and self.lr_scheduler is not None:
            raise PlanError(
                "features of models of different widths train projections, which a scheduler made before does not "
                "know; pass optimizers=(optimizer, None), or none"
            )
        if self._projections:
            self._projections.to(self.args.device)
            self.add_callback(projections.Gradients(self._projections, self.accelerator))
        self.current_gradient_accumulation_steps = 1  # the Trainer's; it sets it only once training has begun
        self._parts = {"train": Average(), "eval": Average()}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of one micro-batch, already scaled for accumulation and for the mean over processes (see `Trainer`)."""
        targets, keep = self._positions(inputs)
        alpha = self.settings.alpha
        if targets is None and alpha < 1 and model.training:
            raise DataError(f"alpha={alpha} needs labels, but the batch has none; add labels or set alpha=1.0")
        features = {name: value for name, value in inputs.items() if name not in _NOT_FEATURES}
        if self.task == "seq2seq":
            features = with_decoder_inputs(self.model, features, inputs)
        features |= {"output_attentions": True} if self.features is not None and self.features.maps else {}
        unheard = isinstance(self._teaching, CachedTeacher) and not model.training and ROW not in inputs
        if targets is None and (unheard or self._teaching is None):
            raise DataError("without a live teacher evaluation needs labels, but the batch has none; add labels")
        taught = None
        if self._teaching is not None and not unheard:
            taught = self._teaching.teach(features | ({ROW: inputs[ROW]} if ROW in inputs else {}))
        terms: dict[str, Term] = {}
        if taught is not None:
            terms["distillation_loss"] = (alpha, taught.loss)
        if targets is not None and GENERATED not in inputs and (alpha < 1 or not model.training):
            terms["label_loss"] = (1.0 if unheard else 1 - alpha, against_labels(targets))

        watched = nullcontext() if self.features is None else self.features.watch(self.model, teacher=False)
        logits_wanted = return_outputs and not self._loss_only
        with watched as seen:
            sums, outputs = self._sums(model, features, keep, list(terms.values()), taught, logits_wanted)
        parts = dict(zip(terms, sums[1:].detach(), strict=True))
        total, keep = sums[0], keep.to(sums.device)
        if taught is not None:
            self._check_finite(parts["distillation_loss"], taught, keep, _tokens(inputs).shape[0])
        if self.features is not None:
            inside = self._inside(inputs, keep, seen, taught, outputs)
            weights = self.features.weights(self.state.global_step / max(1, self.state.max_steps))
            total = sum((weights[name] * loss for name, loss in inside.items()), total)
            parts |= {name: loss.detach() for name, loss in inside.items()}
        count = keep.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=sums.device)
        scale = (1 if num_items_in_batch is None else self._processes()) / count.clamp(min=1)
        rows = _tokens(inputs).shape[0]
        self._record({name: loss * scale for name, loss in parts.items()}, training=model.training, rows=rows)
        loss = total * scale
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As in `Trainer`, and a batch without labels has a loss as well: the teacher supplies the targets."""
        names, self.label_names = self.label_names, [name for name in self.label_names if name in inputs]
        self._loss_only = prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self.label_names, self._loss_only = names, False

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
        new = [p for p in self._projections.parameters() if id(p) not in trained]
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
        """As in `Trainer`; the numbers of rows are no column to be removed."""
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, ROW]))

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
        tokens, mask = _tokens(inputs), inputs.get("attention_mask")
        if self.task == "seq2seq":
            tokens, mask = written(inputs), inputs.get("decoder_attention_mask")
        shape = tokens.shape[: 1 if self.task == "sequence" else 2]
        labels = inputs.get("shift_labels", inputs.get("labels"))
        if labels is not None and (labels.shape != shape or labels.is_floating_point()):
            raise DataError(
                f"labels must be class indices of shape {list(shape)}, got {labels.dtype} {list(labels.shape)}; "
                "regression and multi-label targets cannot be distilled"
            )
        if mask is not None and mask.shape != shape:  # sequence classification, or a packed [batch, 1, query, key] mask
            mask = None
        return positions(shape, labels, mask, shift=self.task == "causal" and "shift_labels" not in inputs)

    @property
    def _projections(self) -> nn.ModuleDict:
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
        keep: Tensor,
        terms: list[Term],
        taught: Taught | None,
        logits_wanted: bool,
    ) -> tuple[Tensor, Any]:
        """The weighted total and each part, summed over the kept positions, and what the student put out."""
        head: Any = fused.head_of(self.model)
        if not self._fused or logits_wanted or not fused.is_plain(head):
            outputs = model(**features)
            _check_shapes(tuple(outputs.logits.shape), taught)
            return sum_over_logits(outputs.logits.flatten(0, -2), keep, terms), outputs

        def losses(hidden: Tensor) -> Tensor:
            weight = head.weight
            _check_shapes((*hidden.shape[:-1], weight.shape[0]), taught)
            return fused.sum_over_hidden(hidden.flatten(0, -2), weight, head.bias, keep, terms)

        with fused.replaced(head, losses):
            outputs = model(**features)
        return outputs.logits, outputs

    def _inside(
        self, inputs: Mapping[str, Any], keep: Tensor, seen: Any, taught: Any, outputs: Any
    ) -> dict[str, Tensor]:
        """The feature losses, summed over the positions that count; a sequence's class counts as one position."""
        shape, mask = tuple(_tokens(inputs).shape[:2]), inputs.get("attention_mask")
        fits = mask is not None and mask.shape == shape
        real = (mask != 0).to(keep.device) if fits else torch.ones(shape, dtype=torch.bool, device=keep.device)
        if self.task == "sequence":
            weights = keep.unsqueeze(1) * real / real.sum(1, keepdim=True).clamp(min=1)
        else:
            weights = keep.view(shape).float()
        maps = (outputs.get("attentions"), taught.maps) if self.features.maps else None  # pyright: ignore[reportOptionalMemberAccess]
        return self.features.sums(seen, taught.seen, weights, real, maps)  # pyright: ignore[reportOptionalMemberAccess]

    def _check_finite(self, loss: Tensor, taught: Taught, keep: Tensor, rows: int) -> None:
        """Refuse a teacher that predicts NaN or infinity; a student that diverges is the Trainer's business."""
        if torch.isfinite(loss) or taught.rows is None:
            return
        wrong = []
        for tokens in chunks(keep, words_of(self.model)):
            logits = taught.rows(tokens)
            # -inf is a probability of zero, and legal unless the whole row is
            bad = (logits.isnan() | (logits == torch.inf)).any(-1) | (logits == -torch.inf).all(-1)
            wrong.append(tokens[bad.to(tokens.device)])
        where = sorted({token // (len(keep) // rows) for token in torch.cat(wrong).tolist()})
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

    def _save_optimizer_and_scheduler(self, output_dir):
        """As in `Trainer`, with the projections of feature losses."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self._projections and self.args.should_save:
            projections.save(self._projections, Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint):
        """As in `Trainer`, with the projections of feature losses."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._projections:
            projections.load(self._projections, Path(checkpoint))


def _tokens(inputs: Mapping[str, Any]) -> Tensor:
    """What a model reads, [batch, length] or [batch, length, width]."""
    return inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]


def _check_shapes(student: tuple[int, ...], taught: Taught | None) -> None:
    """Refuse a teacher that saw other tokens or predicts over another vocabulary."""
    if taught is not None and taught.shape is not None and student != taught.shape:
        raise ModelError(
            f"the teacher's logits have shape {list(taught.shape)}, the student's {list(student)}; "
            "both must see the same tokens and predict over the same vocabulary (or classes)"
        )
