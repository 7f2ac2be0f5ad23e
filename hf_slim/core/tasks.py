"""The head of a model for a task: which class a config means, and a head that the checkpoint does not have yet.

A base model becomes a classifier by a head of random weights, drawn by the run's seed: the same in every run, in every
process, and in the original that a result is compared with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from hf_slim.core.errors import ModelError

Task = Literal["sequence-classification"]


def model_class(config: PretrainedConfig, task: Task | None = None) -> type[PreTrainedModel]:
    """The class that the config names, or the one of its kind for a task.

    Of a config that names no class, as of a GGUF file, it is the causal language model.

    Raises:
        ModelError: Transformers knows no such class.
    """
    if task is not None:
        return _for_task(config, task)
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    if not config.architectures and type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        known: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        return known[type(config)]
    raise ModelError(
        f"model {config.name_or_path!r}: its config names no architecture that Transformers "
        f"{transformers.__version__} knows (got {config.architectures}); "
        "models with code of their own are not supported"
    )


def _for_task(config: PretrainedConfig, task: Task) -> type[PreTrainedModel]:
    known: Any = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if type(config) not in known:
        raise ModelError(
            f"model {config.name_or_path!r}: Transformers has no {task} model of the kind {config.model_type!r}; "
            "choose another model, or leave task out"
        )
    return known[type(config)]


def is_new_head(config: PretrainedConfig, task: Task | None) -> bool:
    """Whether the head for a task is one that the checkpoint does not have."""
    return task is not None and model_class(config, task).__name__ not in (config.architectures or ())


def check_classes(config: PretrainedConfig, task: Task | None, num_labels: int | None) -> None:
    """Raises ModelError if a checkpoint has a head of its own for other classes."""
    if num_labels is None or is_new_head(config, task) or config.num_labels == num_labels:
        return
    raise ModelError(
        f"model {config.name_or_path!r} has a head for {config.num_labels} classes, and num_labels is {num_labels}; "
        "leave num_labels out, or start from the model that it was made from"
    )


def outside_head(names: Iterable[str], model: PreTrainedModel) -> list[str]:
    """Those names of weights that no new head can explain: a head is what lies outside the base, and its pooler."""
    base = f"{model.base_model_prefix}."
    return [name for name in names if name.startswith(base) and "pooler" not in name.split(".")]


@contextmanager
def drawn_by(seed: int) -> Iterator[None]:
    """Random numbers of this seed inside, and those that would have come anyway afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
