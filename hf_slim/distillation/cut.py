"""What a cut of a model keeps: which blocks, how many neurons and heads of each; see `student.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, Field, model_validator
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.errors import PlanError
from hf_slim.core.method import MethodConfig
from hf_slim.core.select import Layer, Stack, find_stacks
from hf_slim.core.units import Kind, expected_units
from hf_slim.distillation.inherit import spread
from hf_slim.methods import find_method

Count: TypeAlias = Annotated[int, Field(ge=1, strict=True)]
Layers: TypeAlias = Count | Literal["every_second"] | Annotated[tuple[int, ...], Field(min_length=1)]
Size: TypeAlias = Count | Annotated[float, Field(gt=0, lt=1)]


class StudentOptions(BaseModel):
    """How a student is made from a model."""

    model_config = MethodConfig.model_config

    layers: Layers | None = Field(None, description="how many blocks stay, 'every_second', or their numbers")
    encoder_layers: Layers | None = Field(None, description="the same for the encoder of an encoder-decoder alone")
    decoder_layers: Layers | None = Field(None, description="the same for its decoder alone")
    choose: Literal["spread", "kl", "influence"] = Field(
        "spread", description="which blocks stay of so many: evenly spread, or as prune.depth chooses them"
    )
    mlp_width: Size | None = Field(None, description="share of every MLP's neurons that stays, or their number")
    heads: Size | None = Field(None, description="share of every attention's heads that stays, or their number")
    config: dict[str, Any] | None = Field(
        None, min_length=1, description="entries of the config of a new model, such as {num_hidden_layers: 4}"
    )

    @property
    def measures(self) -> bool:
        """Whether calibration data decide."""
        return self.mlp_width is not None or self.heads is not None or self.choose != "spread"

    @property
    def depths(self) -> dict[str, Layers | None]:
        """The options that say which blocks stay."""
        return {key: getattr(self, key) for key in ("layers", "encoder_layers", "decoder_layers")}

    @model_validator(mode="after")
    def _one_way(self) -> StudentOptions:
        cuts = [key for key in (*self.depths, "mlp_width", "heads") if getattr(self, key) is not None]
        if self.config is not None and cuts:
            raise ValueError(f"config makes a new model, and {', '.join(cuts)} would cut this one; choose either")
        if self.config is None and not cuts:
            raise ValueError("says nothing; give layers, mlp_width, heads or config, or leave student out")
        if self.layers is not None and {"encoder_layers", "decoder_layers"} & {*cuts}:
            raise ValueError("layers is for all stacks of blocks; give it alone, or encoder_layers and decoder_layers")
        if self.choose != "spread" and not any(type(chosen) is int for chosen in self.depths.values()):
            raise ValueError(f"choose: {self.choose} finds blocks; say how many with layers, such as 6")
        return self


def shortened(model: PreTrainedModel, student: StudentOptions) -> list[tuple[Stack, Layers]]:
    """The stacks that become shorter, and what is to stay of each."""
    stacks, depths = find_stacks(model), student.depths
    if not any(chosen is not None for chosen in depths.values()):
        return []
    if not stacks:
        raise PlanError("student.layers: the model has no repeated blocks")
    if not getattr(model.config, "is_encoder_decoder", False):
        if wrong := [key for key in ("encoder_layers", "decoder_layers") if depths[key] is not None]:
            raise PlanError(f"student.{wrong[0]}: {type(model).__name__} is no encoder-decoder; give layers")
        if len(stacks) > 1:
            names = ", ".join(stack.name for stack in stacks)
            raise PlanError(f"student.layers: the model has several stacks of blocks ({names}); use prune.depth")
        return [(stacks[0], student.layers or ())]
    encoder = {id(module) for module in model.get_encoder().modules()}
    found: list[tuple[Stack, Layers]] = []
    for stack in stacks:
        key = "encoder_layers" if id(model.get_submodule(stack.name)) in encoder else "decoder_layers"
        chosen = depths["layers"] if depths[key] is None else depths[key]
        if chosen is not None:
            found.append((stack, chosen))
    return found


def chosen_blocks(stack: Stack, chosen: Layers) -> list[int]:
    """Numbers of the blocks that stay, in ascending order.

    Raises:
        PlanError: more blocks than there are.
    """
    total = len(stack.blocks)
    if chosen == "every_second":
        return list(range(0, total, 2))
    if isinstance(chosen, int):
        if chosen > total:
            raise PlanError(
                f"student.layers: {chosen} blocks are to stay of {stack.name}, which has {total}; give {total} or fewer"
            )
        return spread(chosen, total)
    return [number + total if -total <= number < 0 else number for number in chosen]  # type: ignore[union-attr]


def kept_blocks(
    model: PreTrainedModel, stack: Stack, chosen: Layers, student: StudentOptions, context: Context
) -> list[int]:
    """Numbers of the blocks that stay, found by measuring where that is wanted; the model stays as it is."""
    total = len(stack.blocks)
    if student.choose == "spread" or not isinstance(chosen, int) or chosen == total:
        return chosen_blocks(stack, chosen)
    depth = find_method("prune.depth")
    options = depth.Config(blocks=total - chosen, criterion=student.choose, stack=stack.name)
    gone, _ = depth.choose_blocks(model, options, context)
    return [number for number in range(total) if number not in gone]


def without_blocks(layers: Mapping[str, Layer], stack: Stack, kept: Sequence[int]) -> dict[str, Layer]:
    """Layers as they are once a stack has lost blocks: those of the blocks that stay have new names."""
    names = {stack.blocks[number]: f"{stack.name}.{place}" for place, number in enumerate(kept)}

    def renamed(name: str, block: str | None) -> str:
        return name if block is None or block not in names else names[block] + name.removeprefix(block)

    made: dict[str, Layer] = {}
    for layer in layers.values():
        if layer.block in stack.blocks and layer.block not in names:
            continue
        new = replace(layer, name=renamed(layer.name, layer.block))
        if layer.block in names:
            place = kept.index(stack.blocks.index(layer.block)), len(kept)
            new = replace(new, block=names[layer.block], place=place)
            if layer.tied_to is not None:
                owner = next((block for block in stack.blocks if layer.tied_to.startswith(f"{block}.")), None)
                new = replace(new, tied_to=renamed(layer.tied_to, owner))
        made[new.name] = new
    return made


def narrowing(student: StudentOptions, model: PreTrainedModel) -> list[tuple[str, MethodConfig]]:
    """Methods that make blocks narrower, with their options.

    Raises:
        PlanError: sizes that do not fit, all of them.
    """
    found: list[tuple[str, MethodConfig]] = []
    problems: list[str] = []
    wanted: list[tuple[str, Kind, Size | None]] = [("prune.heads", "head", student.heads)]
    for address, kind, size in [*wanted, ("prune.apoz", "neuron", student.mlp_width)]:
        if size is None:
            continue
        share: float = 0
        if isinstance(size, float):
            share = 1 - size
        else:
            counts = {len(units) for units in expected_units(model, (kind,))}
            share, problem = _heads_gone(size, counts, model) if kind == "head" else _neurons_gone(size, counts)
            problems += problem
        if share:
            found.append((address, find_method(address).Config(share=share)))
    if problems:
        raise PlanError(problems)
    return found


def _neurons_gone(size: int, counts: set[int]) -> tuple[float, list[str]]:
    if len(counts) > 1:
        widths = ", ".join(map(str, sorted(counts)))
        return 0, [f"student.mlp_width: the MLPs have {widths} neurons; give the share that stays, such as 0.5"]
    total = next(iter(counts), 0)
    if size > total:
        return 0, [f"student.mlp_width: {size} neurons are to stay of {total}; give {total} or fewer"]
    return (total - size) / total, []


def _heads_gone(size: int, counts: set[int], model: PreTrainedModel) -> tuple[float, list[str]]:
    if not counts:
        return 0, ["student.heads: none can go; all blocks share a position bias, or values are normed across heads"]
    if len(counts) > 1:
        return 0, ["student.heads: the attentions have different numbers of heads; give a share that stays, as 0.5"]
    groups = counts.pop()
    total = getattr(model.config.get_text_config(), "num_attention_heads", groups)
    each = total // groups
    if size > total:
        return 0, [f"student.heads: {size} heads are to stay of {total}; give {total} or fewer"]
    if size % each:
        return 0, [
            f"student.heads: {size} of {total} heads cannot stay: {each} query heads share a key/value head and go "
            f"with it; give a multiple of {each}"
        ]
    return (total - size) / total, []
