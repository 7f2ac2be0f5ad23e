"""Channels of the residual stream: where they are in a model, and how they are taken out.

Found without names: the model's config is asked for a skeleton of another hidden size, heads as wide as they were, and
the dimensions in which the two skeletons differ are those of the residual stream. Whatever else follows the hidden size
(a factor of the embeddings) differs too, and is brought along.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_slim.core.errors import PlanError
from hf_slim.core.experts import Experts, unfuse
from hf_slim.core.express import adopt
from hf_slim.core.probe import FAILURES, embedding_scale
from hf_slim.core.reshape import cut_layer
from hf_slim.core.skeleton import CONFIG, DERIVED, build, read
from hf_slim.encodings.modules import EncodedModule


@dataclass(frozen=True)
class Cut:
    """How a model becomes narrower.

    Args:
        config: that of the narrower model.
        same, narrow: skeletons of the model as it is and of the narrower one, experts unfused.
        axes: {parameter: its dimensions that are channels of the residual stream}, by the names of the skeleton.
    """

    width: int
    config: PretrainedConfig
    same: PreTrainedModel
    narrow: PreTrainedModel
    axes: dict[str, tuple[int, ...]]

    def sides(self, model: nn.Module, name: str) -> tuple[bool, bool]:
        """Whether a layer's rows, and whether its columns, are channels of the residual stream."""
        axes = self.axes.get(f"{name}.weight", ())
        return (1 in axes, 0 in axes) if _is_turned(model.get_submodule(name)) else (0 in axes, 1 in axes)

    def table_scale(self, name: str) -> float:
        """How much more the narrow model multiplies the rows of an embedding by; 1 for anything else."""
        before, after = (embedding_scale(skeleton.get_submodule(name)) for skeleton in (self.same, self.narrow))
        return 1.0 if before is None or after is None else after / before


def plan_cut(model: PreTrainedModel, share: float, multiple_of: int) -> Cut:
    """The narrower model, and what of this one has to go; needs no weights.

    Args:
        model: or its skeleton; experts unfused.
        share: of the channels, to remove.
        multiple_of: the new width is the multiple of this nearest to that share that the config accepts.

    Raises:
        PlanError: the config knows no hidden size, or no narrower model can be built, or attention follows the width.
    """
    text = model.config.get_text_config()
    hidden = getattr(text, "hidden_size", None)
    if not isinstance(hidden, int):
        raise PlanError(f"{type(model).__name__}: its config has no hidden_size; prune.width cannot make it narrower")
    same = _with_width(model, hidden)
    target = round(hidden * (1 - share) / multiple_of) * multiple_of
    for width in _near(max(target, multiple_of), hidden, multiple_of):
        narrow = _with_width(model, width)
        if same is not None and narrow is not None:
            return _compared(same, narrow, hidden, width)
    raise PlanError(
        f"{type(model).__name__}: its config builds no model narrower than {hidden} channels in steps of "
        f"{multiple_of}; choose another share or multiple_of"
    )


def cut_channels(model: PreTrainedModel, cut: Cut, keep: Bool[Tensor, " width"]) -> None:
    """Take the channels out of every tensor, and out of the numbers that modules keep."""
    index = keep.nonzero().flatten()
    made: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for name, module in list(model.named_modules()):
        if isinstance(module, EncodedModule):
            rows, cols = cut.sides(model, name)
            if rows or cols:
                cut_layer(model, name, index if rows else None, index if cols else None)
            continue
        for key, old in module._parameters.items():
            axes = cut.axes.get(f"{name}.{key}", ())
            if old is not None and axes:
                if id(old) not in made:
                    new = old.detach().index_select(axes[0], index.to(old.device))
                    made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad)
                module._parameters[key] = made[id(old)]
    _renumber(model, cut)
    adopt(model, cut.config)


def _renumber(model: nn.Module, cut: Cut) -> None:
    """Give modules the numbers that those of the narrow model keep, and keep embeddings as large as they were."""
    narrow, before, after = dict(cut.narrow.named_modules()), read(cut.same).numbers, read(cut.narrow).numbers
    scaled: set[int] = set()
    for name, module in model.named_modules():
        holder = module._stock[0] if isinstance(module, Experts) else module
        for key in DERIVED if not isinstance(module, EncodedModule | Experts) else ():
            if key in vars(module):
                setattr(holder, key, getattr(narrow[name], key))
        for key, value in after.get(name, {}).items():
            old = before[name].get(key)
            if value != old and not key.startswith(CONFIG):
                setattr(holder, key, value)
                for buffer in holder._buffers.values():
                    if buffer is not None and buffer.dim() == 0 and math.isclose(float(buffer), old, rel_tol=1e-2):
                        buffer.fill_(value)
        weight = module._parameters.get("weight")
        ratio = cut.table_scale(name)
        if weight is not None and ratio != 1 and id(weight) not in scaled:
            weight.data.div_(ratio)
            scaled.add(id(weight))


def _with_width(model: PreTrainedModel, width: int) -> PreTrainedModel | None:
    """The skeleton of a model with another hidden size, heads as wide as they are; None where there is none such."""
    config = copy.deepcopy(model.config)
    text: Any = config.get_text_config()
    try:
        if getattr(text, "head_dim", None) is None:
            text.head_dim = text.hidden_size // text.num_attention_heads
        text.hidden_size = width
        config = type(config).from_dict(config.to_dict())  # checks it, as loading will
    except (*FAILURES, StrictDataclassError):
        return None
    skeleton = build(type(model), config)
    if skeleton is not None:
        unfuse(skeleton)
    return skeleton


def _near(target: int, hidden: int, step: int) -> Iterator[int]:
    """Widths below `hidden`, the nearest to the target first."""
    for offset in range(0, hidden, step):
        yield from (width for width in dict.fromkeys((target + offset, target - offset)) if 0 < width < hidden)


def _compared(same: PreTrainedModel, narrow: PreTrainedModel, hidden: int, width: int) -> Cut:
    """The dimensions in which two models differ, all of them the hidden size."""
    axes: dict[str, tuple[int, ...]] = {}
    before, after = ({name: tuple(tensor.shape) for name, tensor in _tensors(model)} for model in (same, narrow))
    for name, shape in before.items():
        other = after.get(name, ())
        differing = tuple(i for i, (a, b) in enumerate(zip(shape, other, strict=False)) if a != b)
        expected = tuple(width if i in differing else size for i, size in enumerate(shape))
        if other != expected or any(shape[i] != hidden for i in differing) or len(differing) > 1:
            raise PlanError(
                f"{type(same).__name__}: {name} is {list(shape)} and would become {list(other)}: the width of its "
                "attention follows the hidden size, so channels and heads cannot be told apart; prune.heads and "
                "prune.apoz make it smaller"
            )
        if differing:
            axes[name] = differing
    return Cut(width, narrow.config, same, narrow, axes)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _is_turned(module: nn.Module) -> bool:
    return isinstance(module, Conv1D) or bool(getattr(module, "turned", False))
