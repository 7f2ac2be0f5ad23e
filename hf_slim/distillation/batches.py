"""What a trainer reads off a batch: which positions count, how much each of them weighs, what models are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from hf_slim.core.errors import DataError
from hf_slim.distillation.decoders import written
from hf_slim.distillation.losses import WEIGHTS, positions
from hf_slim.distillation.on_policy import GENERATED
from hf_slim.distillation.teacher_cache import ROW
from hf_slim.distillation.vocabulary import real_positions

NOT_FEATURES = ("labels", "shift_labels", ROW, GENERATED, WEIGHTS)
"""What a batch holds for the trainer alone."""


def tokens_of(inputs: Mapping[str, Any]) -> Tensor:
    """What a model reads, [batch, length] or [batch, length, width]."""
    return inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]


def positions_of(inputs: Mapping[str, Any], task: str) -> tuple[Int[Tensor, " tokens"] | None, Bool[Tensor, " tokens"]]:
    """Targets and kept positions of a batch, flattened; see `losses.positions`.

    Raises:
        DataError: labels that are no class indices, or of another shape.
    """
    shape, mask = _shape(inputs, task), inputs.get("attention_mask")
    if task == "seq2seq":
        mask = inputs.get("decoder_attention_mask")
    labels = inputs.get("shift_labels", inputs.get("labels"))
    if labels is not None and (labels.shape != shape or labels.is_floating_point()):
        raise DataError(
            f"labels must be class indices of shape {list(shape)}, got {labels.dtype} {list(labels.shape)}; "
            "regression and multi-label targets cannot be distilled"
        )
    if mask is not None and mask.shape != shape:  # sequence classification, or a packed [batch, 1, query, key] mask
        mask = None
    return positions(shape, labels, mask, shift=_shifts(inputs, task))


def weights_of(inputs: Mapping[str, Any], task: str) -> Float[Tensor, " tokens"] | None:
    """The weight of each position, flattened as `positions_of` does; None where all weigh the same.

    Raises:
        DataError: of another shape than the labels, or not all of them finite and at least 0.
    """
    weights, shape = inputs.get(WEIGHTS), _shape(inputs, task)
    if weights is None:
        return None
    if weights.shape != shape:
        raise DataError(f"{WEIGHTS} must have the shape of the labels, {list(shape)}, got {list(weights.shape)}")
    weights = weights.float()
    if not (torch.isfinite(weights) & (weights >= 0)).all():
        raise DataError(f"{WEIGHTS} must be finite and at least 0; the smallest is {float(weights.min())}")
    return (pad(weights[:, 1:], (0, 1)) if _shifts(inputs, task) else weights).reshape(-1)


def count_of(inputs: Mapping[str, Any], task: str) -> Tensor:
    """What a batch counts for in the mean: its kept positions, or the sum of their weights."""
    keep, weights = positions_of(inputs, task)[1], weights_of(inputs, task)
    return keep.sum() if weights is None else (weights * keep.to(weights.device)).sum()


def weights_through(collate: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """A collator of Transformers', which cannot pad weights, made to leave them where the tokens go; others as is."""
    # bound methods and functions alike; a collator of the user's own knows what it does with its columns
    if not (getattr(collate, "__module__", None) or type(collate).__module__).startswith("transformers."):
        return collate

    def with_weights(items: list[dict[str, Any]]) -> Mapping[str, Any]:
        given = [item[WEIGHTS] for item in items if WEIGHTS in item]
        if not given:
            return collate(items)
        batch = dict(collate([{name: value for name, value in item.items() if name != WEIGHTS} for item in items]))
        return batch | {WEIGHTS: _placed([torch.as_tensor(each, dtype=torch.float32) for each in given], batch)}

    return with_weights


def _placed(weights: list[Tensor], batch: Mapping[str, Any]) -> Tensor:
    """Weights of the items of a batch, where it holds their tokens."""
    if weights[0].ndim == 0:
        return torch.stack(weights)
    real, flat = real_positions(batch), torch.cat(weights)
    if len(flat) != int(real.sum()):
        raise DataError(
            f"the rows of a batch have {int(real.sum())} tokens and {len(flat)} {WEIGHTS}; give each token one, and "
            "for encoder-decoders a data_collator that pads them as it pads the labels"
        )
    return torch.zeros(real.shape).masked_scatter_(real, flat)


def _shape(inputs: Mapping[str, Any], task: str) -> tuple[int, ...]:
    tokens = written(inputs) if task == "seq2seq" else tokens_of(inputs)
    return tuple(tokens.shape[: 1 if task == "sequence" else 2])


def _shifts(inputs: Mapping[str, Any], task: str) -> bool:
    return task == "causal" and "shift_labels" not in inputs
