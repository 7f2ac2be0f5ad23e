"""Depth pruning: remove whole blocks, those that the model misses least, one after the other.

"kl": the block goes whose removal moves the predictions least, measured again after every removal:

    l = argmin over the remaining l  of  KL(p || p without R and l),   R <- R + l

p is what the model as it came into the stage predicts. Close to what depth pruning of Minitron (Muralidharan et al.
2024, arXiv:2407.14679) and EvoPress (Sieberling et al. 2024, arXiv:2410.14649) do, as a greedy search. A candidate
costs only the blocks behind it: what enters it is known. So choosing n of L blocks takes about n L²/2 runs of a block.

"influence": ShortGPT's (Men et al. 2024, arXiv:2403.03853), one pass, all blocks chosen at once: the least of

    BI_l = 1 - E cos(x_l, x_l+1)          x_l, x_l+1 [tokens, width]: what enters block l, and what it puts out

The KL after each removal is reported for both. A block that owns parameters which the others have not (T5's first one
holds the position bias of all) stays. On stories260K (5 blocks, perplexity 4.25; 16 windows of 256 tokens to choose, 16
others to test) the search gives 9.6 with one block less, where influence chooses the same, and 26.4 with two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.errors import PlanError
from hf_slim.core.forward import evaluating, logits_of
from hf_slim.core.method import MethodConfig, Rules
from hf_slim.core.parallel import processes, sum_over_processes
from hf_slim.core.report import LayerReport, StageReport
from hf_slim.core.select import Layer, Stack, choose_stack, find_layers
from hf_slim.core.shapes import keep_blocks, plan_blocks
from hf_slim.evaluation.agreement import divergence

RULES = Rules(
    needs=("calibration",),
    preserves=("zeros", "codes", "tied"),
    paper="Muralidharan et al. 2024, arXiv:2407.14679",
)

BATCH_TOKENS = 1024  # whose logits, and what enters every block, are held at a time


class Config(MethodConfig):
    """Options of `prune.depth`: how many blocks go (`blocks`, 1 by default, or `share`), or which stay (`keep`)."""

    blocks: int | None = Field(None, ge=1, description="how many blocks to remove")
    share: float | None = Field(None, gt=0, lt=1, description="share of the blocks to remove, rounded, at least one")
    keep: tuple[int, ...] | None = Field(None, min_length=1, description="numbers of the blocks that stay, from 0")
    criterion: Literal["kl", "influence"] = Field("kl", description="'influence' is far cheaper, and worse")
    stack: str | None = Field(None, description="name of the stack of blocks, where the model has several")
    windows: int = Field(8, ge=1, description="calibration windows that decide")

    @model_validator(mode="after")
    def _one_way(self) -> Config:
        given = [name for name in ("blocks", "share", "keep") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of blocks, share and keep, not {' and '.join(given)}")
        return self


def influence(x: Float[Tensor, "*shape width"], y: Float[Tensor, "*shape width"]) -> Float[Tensor, "*shape"]:
    """1 - cos of every token's hidden state before and after a block: 0 for a block that does nothing."""
    return 1 - torch.cosine_similarity(x.float(), y.float(), dim=-1)


class Passing:
    """A model some of whose blocks are passed over, as if they were not there.

    Args:
        blocks: names of the stack's blocks.
        batch: the token windows that `run` runs on.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], batch: Int[Tensor, "windows length"]):
        self.model, self.batch = model, batch
        self.blocks = [model.get_submodule(name) for name in blocks]
        self.inputs: dict[int, Tensor] = {}  # what entered each block in the last whole run
        self.outputs: dict[int, Tensor] = {}
        self._others: dict[int, tuple[Any, ...] | None] = {}  # what a block returns beside its hidden state
        self.original = self.whole(frozenset())

    def whole(self, gone: frozenset[int]) -> Float[Tensor, "rows classes"]:
        """Logits without the blocks that are gone; what enters the others is remembered."""
        handles = [
            self.blocks[i].register_forward_hook(partial(self._note, i), with_kwargs=True)
            for i in range(len(self.blocks))
            if i not in gone
        ]
        try:
            with self._passing(gone, None):
                return logits_of(self.model, self.batch).flatten(0, -2)
        finally:
            for handle in handles:
                handle.remove()

    def without(self, gone: frozenset[int], candidate: int) -> Float[Tensor, "rows classes"]:
        """Logits of the last whole run's model without one block more; only the blocks behind it are run."""
        with self._passing(gone | frozenset(range(candidate + 1)), candidate):
            return logits_of(self.model, self.batch).flatten(0, -2)

    def _note(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.inputs[number] = _hidden(args, kwargs)
        self.outputs[number] = out[0] if isinstance(out, tuple) else out
        self._others[number] = out[1:] if isinstance(out, tuple) else None

    @contextmanager
    def _passing(self, over: frozenset[int], entry: int | None) -> Iterator[None]:
        kept = {i: vars(self.blocks[i]).get("forward") for i in over}
        for i in over:
            self.blocks[i].forward = partial(self._pass, i, entry)
        try:
            yield
        finally:
            for i, forward in kept.items():
                del self.blocks[i].forward
                if forward is not None:  # someone else's, such as accelerate's
                    self.blocks[i].forward = forward

    def _pass(self, number: int, entry: int | None, *args: Any, **kwargs: Any) -> Any:
        hidden = self.inputs[number] if number == entry else _hidden(args, kwargs)
        others = self._others[number]
        return hidden if others is None else (hidden, *others)


def removal_losses(
    model: nn.Module, blocks: Sequence[str], gone: frozenset[int], candidates: Sequence[int], batches: Sequence[Tensor]
) -> Float[Tensor, " candidates"]:
    """KL in nats a token between the whole model and the one without `gone` and, in turn, each candidate.

    Args:
        blocks: names of the stack's blocks.
        gone, candidates: their numbers.
        batches: token windows; this process's share of them.
    """
    sums = torch.zeros(len(candidates) + 1, dtype=torch.float64)
    for batch in batches:
        passing = Passing(model, blocks, batch)
        if gone:
            passing.whole(gone)
        for i, candidate in enumerate(candidates):
            sums[i] += divergence(passing.without(gone, candidate), passing.original)[0].double().sum().cpu()
        sums[-1] += len(passing.original)
    sums = sum_over_processes(sums)
    return sums[:-1] / sums[-1]


def influences(model: nn.Module, blocks: Sequence[str], batches: Sequence[Tensor]) -> Float[Tensor, " blocks"]:
    """Block influence of every block of a stack."""
    sums = torch.zeros(len(blocks) + 1, dtype=torch.float64)
    for batch in batches:
        passing = Passing(model, blocks, batch)
        for i in range(len(blocks)):
            sums[i] += influence(passing.inputs[i], passing.outputs[i]).double().mean().cpu() * len(batch)
        sums[-1] += len(batch)
    sums = sum_over_processes(sums)
    return sums[:-1] / sums[-1]


def passes(blocks: int, count: int) -> float:
    """Runs of the whole model that the greedy search costs, to remove `count` of its blocks."""
    behind = sum(left * (left + 1) / 2 for left in range(blocks, blocks - count, -1))
    return behind / blocks + count - 1  # what it is compared with is computed anew for every block that goes


def plan(layers: dict[str, Layer], config: Config, model: PreTrainedModel) -> dict[str, Layer]:
    """Which blocks go is known only once they have been tried; what cannot be done is known before.

    Raises:
        PlanError: no such stack, or not so many blocks.
    """
    _settle(model, config)
    return {}


def notes(layers: dict[str, Layer], config: Config, model: PreTrainedModel) -> list[str]:
    """What the plan cannot foresee, and what the search costs."""
    stack, count = _settle(model, config)
    found = ["which blocks go is known once they have been tried; sizes are predicted with all of them"]
    if config.criterion == "kl" and config.keep is None:
        cost = round(passes(len(stack.blocks), count))
        found.append(f"criterion: kl runs the model {cost} times on {config.windows} windows; influence, once")
    return found


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Remove blocks from a model."""
    stack, _ = _settle(model, config)
    layers = find_layers(model)
    order, losses = choose_blocks(model, config, context)
    rows = [_removed(layer) for layer in layers.values() if layer.place and layer.block in _names(stack, order)]
    keep_blocks(model, stack, [i for i in range(len(stack.blocks)) if i not in order])
    return StageReport(layers=rows, metrics={"stack": stack.name, "removed": order, "kl": losses})


def choose_blocks(model: PreTrainedModel, config: Config, context: Context) -> tuple[list[int], list[float]]:
    """The blocks to remove, in order, and the KL after each removal; the model stays as it is.

    Raises:
        PlanError: as for `plan`.
    """
    stack, count = _settle(model, config)
    windows = context.tokens("calibration")[: config.windows]
    batches = list(_own(windows).split(max(1, BATCH_TOKENS // windows.shape[1])))
    with evaluating(model):
        return _choose(model, stack, config, count, batches, context)


def _choose(
    model: PreTrainedModel,
    stack: Stack,
    config: Config,
    count: int,
    batches: Sequence[Tensor],
    context: Context,
) -> tuple[list[int], list[float]]:
    """The blocks to remove, in order, and the KL after each removal."""

    def measure(gone: list[int], candidates: list[int]) -> list[float]:
        return removal_losses(model, stack.blocks, frozenset(gone), candidates, batches).tolist()

    gone: list[int] = []
    losses: list[float] = []
    free = [i for i in range(len(stack.blocks)) if i not in (config.keep or _needed(model, stack))]
    if config.criterion == "influence" and config.keep is None:
        scores = influences(model, stack.blocks, batches)
        free.sort(key=lambda i: float(scores[i]))
    search = config.criterion == "kl" and config.keep is None
    for _ in context.progress.track(range(count), "removing blocks"):
        left = [i for i in free if i not in gone]
        found: dict[int, float] = {}
        if search:
            found = dict(zip(left, measure(gone, left), strict=True))
            left.sort(key=found.__getitem__)
        block = left[0] if config.keep is not None else _first_possible(model, stack, gone, left)
        losses.append(found[block] if search else measure(gone, [block])[0])
        gone.append(block)
    return gone, losses


def _settle(model: PreTrainedModel, config: Config) -> tuple[Stack, int]:
    """The stack, and how many of its blocks go."""
    stack = choose_stack(model, config.stack)
    total, needed = len(stack.blocks), _needed(model, stack)
    if config.keep is not None:
        _check_keep(model, stack, needed, config.keep)
        return stack, total - len(config.keep)
    count = config.blocks or 1
    if config.share is not None:
        count = max(1, round(config.share * total))
    most = total - max(1, len(needed))
    if count > most:
        why = f", and {_list(needed)} holds what the others need" if needed else ""
        raise PlanError(f"{stack.name} has {total} blocks{why}: {count} cannot go, {most} can; ask for fewer")
    return stack, count


def _check_keep(model: PreTrainedModel, stack: Stack, needed: list[int], keep: tuple[int, ...]) -> None:
    plan_blocks(model, stack, keep)
    if len(keep) == len(stack.blocks):
        raise PlanError(f"keep: all {len(keep)} blocks of {stack.name} stay; leave some out")
    if missing := [i for i in needed if i not in keep]:
        raise PlanError(f"keep: block {_list(missing)} of {stack.name} holds what the others need; it has to stay")


def _first_possible(model: PreTrainedModel, stack: Stack, gone: Sequence[int], ranked: Sequence[int]) -> int:
    """The first block that a config can do without besides those that are gone.

    Raises:
        PlanError: there is none.
    """
    problems: list[str] = []
    for candidate in ranked:
        try:
            plan_blocks(model, stack, [i for i in range(len(stack.blocks)) if i not in (*gone, candidate)])
            return candidate
        except PlanError as error:
            problems += error.problems
    raise PlanError(problems)


def _needed(model: nn.Module, stack: Stack) -> list[int]:
    """Blocks with a parameter that no other block has: the others may depend on what it computes."""
    own = [{name for name, _ in model.get_submodule(block).named_parameters()} for block in stack.blocks]
    return [i for i in range(len(own)) if own[i] - {name for j, names in enumerate(own) if j != i for name in names}]


def _names(stack: Stack, numbers: Sequence[int]) -> set[str]:
    return {stack.blocks[i] for i in numbers}


def _removed(layer: Layer) -> LayerReport:
    return LayerReport(
        name=layer.name,
        rows=layer.rows,
        cols=layer.cols,
        encoding="removed",
        bytes_before=layer.nbytes,
        bytes=0,
        error=1.0,
    )


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _own(windows: Tensor) -> Tensor:
    state = processes()
    return windows[state.process_index :: state.num_processes]


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
