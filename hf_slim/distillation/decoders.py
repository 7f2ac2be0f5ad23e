"""Encoder-decoders: what the decoder reads and predicts.

The model predicts label i from the labels before it, so its decoder reads the labels moved by one place, a start token
before them (`decoder_input_ids`). Student and teacher read the same ones; the student makes them if the batch has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_slim.core.errors import DataError
from hf_slim.core.forward import shift_right
from hf_slim.distillation.losses import IGNORED


def written(batch: Mapping[str, Any]) -> Tensor:
    """What has the shape of the decoder's text, [batch, length].

    Raises:
        DataError: there is nothing for the decoder to write.
    """
    for name in ("labels", "decoder_input_ids"):
        if batch.get(name) is not None:
            return batch[name]
    raise DataError("the decoder has nothing to write: a batch needs labels or decoder_input_ids")


def with_decoder_inputs(model: Any, inputs: dict[str, Any], batch: Mapping[str, Any]) -> dict[str, Any]:
    """A model's inputs with those of its decoder.

    Args:
        model: an encoder-decoder.
        inputs: of a batch, without labels.
        batch: with labels.
    """
    if "decoder_input_ids" in inputs or "decoder_inputs_embeds" in inputs:
        return inputs
    labels = written(batch)
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        return inputs | {"decoder_input_ids": own(labels)}
    pad = model.config.get_text_config().pad_token_id
    filled = labels.masked_fill(labels == IGNORED, 0 if pad is None else pad)
    return inputs | {"decoder_input_ids": shift_right(model, filled)}
