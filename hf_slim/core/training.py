"""Training inside a stage: options that all training stages share, and one way of running a Trainer.

A model is trained in float32 whatever its dtype (bfloat16 loses most of a small update) and handed back in its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from pydantic import Field, ValidationError
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hf_slim.core.checkpoints import Resumes
from hf_slim.core.context import Context
from hf_slim.core.errors import ModelError, PlanError
from hf_slim.core.examples import collator
from hf_slim.core.explain import explain
from hf_slim.core.forward import is_classifier
from hf_slim.core.method import MethodConfig
from hf_slim.core.parallel import require_whole_weights
from hf_slim.core.precision import in_dtype
from hf_slim.core.targets import Targets, pair_collator

AnyConfig = TypeVar("AnyConfig", bound=MethodConfig)


class TrainingOptions(MethodConfig):
    """What every training stage takes."""

    steps: int = Field(200, ge=1, description="optimizer steps")
    learning_rate: float = Field(2e-5, gt=0, description="peak of a linear schedule")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    batch_size: int = Field(4, ge=1, description="windows in a forward pass, on each process")
    gradient_accumulation: int = Field(1, ge=1, description="forward passes in a step")
    weight_decay: float = Field(0.0, ge=0)
    checkpoint_every: int | None = Field(None, ge=1, description="steps between checkpoints that a killed run resumes")


class Windows(Dataset):
    """Token windows [samples, length] as a Trainer wants them; causal models get them as labels too."""

    def __init__(self, ids: Tensor, labels: bool):
        self.ids, self.labels = ids, labels

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index]} | ({"labels": self.ids[index]} if self.labels else {})


def configured(
    method: str, Config: type[AnyConfig], config: AnyConfig | Mapping[str, Any] | None, options: Mapping[str, Any]
) -> AnyConfig:
    """The options of a callback that is made in a script.

    Args:
        method: whose options they are, for errors.
        config: a `Config`, or a mapping of its fields.
        options: single fields, which take precedence.

    Raises:
        PlanError: unknown or contradictory options, all of them.
    """
    given = {k: getattr(config, k) for k in config.model_fields_set} if isinstance(config, Config) else config or {}
    options = {**given, **options}  # pyright: ignore[reportGeneralTypeIssues]
    try:
        return Config(**options)
    except ValidationError as error:
        found = [([method, *about], text) for _, about, text in explain(error, Config, options)]
        raise PlanError([f"{'.'.join(map(str, key))}: {text}" for key, text in found]) from error


def require_loss(model: PreTrainedModel, method: str) -> None:
    """Raises ModelError unless token windows, or a class for each text, are all that its own loss needs."""
    if not model.can_generate() and not is_classifier(model):
        raise ModelError(
            f"{method} trains a model on its own loss, and {type(model).__name__} has none on plain text; "
            f"put it under distill.logits (during: [{method}]), or use its callback in a Trainer of your own"
        )


def class_loss(
    outputs: Any, labels: Int[Tensor, " batch"], num_items_in_batch: Tensor | int | None = None
) -> Float[Tensor, ""]:
    """Cross entropy of a classifier, for a Trainer's `compute_loss_func`: a mean over all that one step sees.

    A model's own loss is a mean over a part of the step's batch, which the Trainer then takes for such a share.
    """
    count = labels.numel() if num_items_in_batch is None else num_items_in_batch
    return F.cross_entropy(outputs.logits.float(), labels.to(outputs.logits.device), reduction="sum") / count


def own_loss(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments that have a plain Trainer train a model on its labels."""
    return {"compute_loss_func": class_loss} if is_classifier(model) else {}


def unscale(args: TrainingArguments, optimizer: Any) -> None:
    """Make gradients of float16 training those of the loss itself, for a callback before the optimizer's step.

    Gradient clipping has done so where there is any.
    """
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None or args.max_grad_norm:
        return
    inner = optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    scaler.unscale_(inner)


def train(
    model: PreTrainedModel,
    options: TrainingOptions,
    context: Context,
    arguments: type[TrainingArguments],
    make_trainer: Callable[..., Trainer],
    **extra: Any,
) -> dict[str, Any]:
    """Train `model` in place: a classifier on classified texts where there are such, else on the train windows.

    Args:
        arguments: class of the training arguments, called with `extra` beside the options.
        make_trainer: called with `model`, `args`, `train_dataset` and, for texts of any length, `data_collator`.

    Returns:
        Steps, tokens (or texts) seen, and the first and last logged losses.
    """
    require_whole_weights("training in a recipe")
    data, seen = _training_data(model, options, context)
    caching = getattr(model.config, "use_cache", None)  # the Trainer turns it off, and it would be saved so
    with _folder(context) as folder, in_dtype(model, torch.float32):
        args = arguments(
            output_dir=str(folder),
            max_steps=options.steps,
            learning_rate=options.learning_rate,
            warmup_steps=options.warmup,
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.gradient_accumulation,
            weight_decay=options.weight_decay,
            save_strategy="steps" if options.checkpoint_every else "no",
            save_steps=options.checkpoint_every or options.steps,
            save_total_limit=1,
            logging_steps=max(1, options.steps // 10),
            seed=context.seed,
            disable_tqdm=not context.progress.show,
            report_to=[],
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            **extra,
        )
        trainer = make_trainer(model=model, args=args, **data)
        trainer.remove_callback(PrinterCallback)  # what it would print goes into the report
        trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
        model.zero_grad()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    model.eval()
    if caching is not None:
        model.config.use_cache = caching
    return {"steps": options.steps, **seen, "first_loss": losses[0], "last_loss": losses[-1]}


def train_with(
    callback: TrainerCallback, model: PreTrainedModel, options: TrainingOptions, context: Context
) -> dict[str, Any]:
    """Train `model` in place on its own loss, with a callback at work; returns what `train` does."""
    make = partial(Resumes, callbacks=[callback], **own_loss(model))
    return train(model, options, context, TrainingArguments, make)


def _training_data(
    model: PreTrainedModel, options: TrainingOptions, context: Context
) -> tuple[dict[str, Any], dict[str, int]]:
    """What a Trainer is handed to train on, and how much of it this training sees."""
    rows = options.steps * options.batch_size * options.gradient_accumulation
    examples = context.examples("train") if is_classifier(model) or model.config.is_encoder_decoder else None
    if examples is not None:
        collate = pair_collator if isinstance(examples, Targets) else collator
        return {"train_dataset": examples, "data_collator": collate(context.tokenizer)}, {"texts": rows}
    windows = Windows(context.tokens("train"), labels=model.can_generate())
    return {"train_dataset": windows}, {"tokens": rows * windows.ids.shape[1]}


@contextmanager
def _folder(context: Context) -> Iterator[Path]:
    """Where checkpoints go: the stage's own folder, or one that disappears."""
    if context.work is not None:
        context.work.mkdir(parents=True, exist_ok=True)
        yield context.work
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint; its state file is written last."""
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.partition("-")[2]))) if complete else None
