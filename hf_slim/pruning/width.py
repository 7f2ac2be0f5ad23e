"""Width pruning: remove channels of the residual stream, everywhere at once (Minitron, arXiv:2407.14679).

Every embedding, norm and layer that reads or writes the residual stream loses the same channels; heads, head size and
MLPs keep theirs. What is left is a plain model with a smaller `hidden_size`. The channels go that the norms put out
least of (Muralidharan et al. 2024, section 2.2):

    I_j = sum over norms of  || mean over tokens |norm(x)_j| ||_2       the norm over windows

Norms see fewer channels: RMSNorm divides by the root mean square of those that are left, r_K instead of r. The weight
of each norm is multiplied by E r_K / r, which makes its output for the channels that stay the least-squares fit of what
it was (LayerNorm likewise, with deviations). That of the last norm is multiplied by what makes the head's input as
large as before. The paper does without, and trains.

What belongs to the residual stream is found without names: the config is asked for a model of the new width, and the
dimensions that differ are the ones to cut. Where the width of the attention follows the hidden size (GPT-2, OPT, BERT)
they are not told apart, and the model is refused: `prune.heads` and `prune.apoz` make those models smaller.

On stories260K (64 channels, 16 windows of 256 tokens to calibrate, 16 others to test) 48 channels take perplexity from
4.25 to 46.5, without rescaling to 40.2: a model that is cut so far has to be trained again either way. Rescaling is
what makes the removal of channels that are zero everywhere exact.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import reduce
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_slim.core.capture import own_share
from hf_slim.core.context import Context
from hf_slim.core.errors import PlanError
from hf_slim.core.forward import evaluating, run_on
from hf_slim.core.method import MethodConfig, Rules
from hf_slim.core.parallel import processes
from hf_slim.core.probe import numbers
from hf_slim.core.report import LayerReport, StageReport
from hf_slim.core.select import Layer, find_layers
from hf_slim.core.swap import get_weight
from hf_slim.encodings import Sparse
from hf_slim.pruning.channels import Cut, cut_channels, plan_cut

RULES = Rules(needs=("calibration",), preserves=("zeros",), paper="Muralidharan et al. 2024, arXiv:2407.14679")


class Config(MethodConfig):
    """Options of `prune.width`."""

    share: float = Field(0.25, gt=0, lt=1, description="share of the channels to remove")
    multiple_of: int = Field(1, ge=1, description="the new width is a multiple of this; 64 suits most kernels")
    rescale: bool = Field(True, description="multiply norm weights by what fewer channels change in their inputs")


def importance(outputs: Float[Tensor, "windows length width"]) -> Float[Tensor, " width"]:
    """Sum over windows of (mean over tokens of |norm output|)², whose root is a norm's part of the importance."""
    return outputs.float().abs().mean(1).square().sum(0)


def spread(x: Float[Tensor, "*shape width"], centred: bool) -> Float[Tensor, "*shape"]:
    """What a norm divides by, but for its epsilon: the root mean square, or the standard deviation (`centred`)."""
    x = x.float()
    return (x - x.mean(-1, keepdim=True) if centred else x).square().mean(-1).sqrt()


def plan(layers: dict[str, Layer], config: Config, model: PreTrainedModel) -> dict[str, Layer]:
    """The layers of the residual stream, as wide as they will be.

    Raises:
        PlanError: see `plan_cut`; or layers that are stored as codes.
    """
    cut = plan_cut(model, config.share, config.multiple_of)
    sides = {name: cut.sides(model, name) for name in layers}
    _check_encoded([layer for name, layer in layers.items() if any(sides[name])])
    return {name: _narrowed(layer, *sides[name], cut.width) for name, layer in layers.items() if any(sides[name])}


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Make a model narrower."""
    layers = find_layers(model)
    chosen = [layers[name] for name in plan(layers, config, model) if layers[name].tied_to is None]
    cut = plan_cut(model, config.share, config.multiple_of)
    norms, batches = _norms(model, cut), own_share(context.tokens("calibration"))
    with evaluating(model):
        score = _observe(model, norms, batches, None).importance.cpu()
        keep = torch.zeros(len(score), dtype=torch.bool)
        keep[score.topk(cut.width).indices] = True
        seen = _observe(model, norms, batches, keep)
    lost = [_power(model, layer, cut.sides(model, layer.name), keep) for layer in chosen]
    cut_channels(model, cut, keep)
    if config.rescale:
        with evaluating(model):
            _rescale(model, cut, norms, seen, batches)
    kept = float(score[keep].sum() / score.sum())
    return StageReport(
        layers=_reports(chosen, find_layers(model), lost),
        metrics={"width": cut.width, "channels": len(keep), "importance_kept": kept},
        notes=[
            f"{name} is a norm of a kind unknown; it was not rescaled" for name in norms if norms[name].offset is None
        ],
    )


def _reports(before: Sequence[Layer], after: Mapping[str, Layer], lost: Sequence[float]) -> list[LayerReport]:
    return [
        LayerReport(
            name=old.name,
            rows=after[old.name].rows,
            cols=after[old.name].cols,
            encoding="dense" if old.encoding is None else old.encoding.describe(),
            bytes_before=old.nbytes,
            bytes=after[old.name].nbytes,
            error=error,
        )
        for old, error in zip(before, lost, strict=True)
    ]


def _check_encoded(layers: Sequence[Layer]) -> None:
    problems = [
        f"{layer.name} is stored as {layer.encoding.describe()}: its channels cannot be cut; prune the dense model"
        for layer in layers
        if layer.encoding is not None and (not layer.encoding.lossless or layer.kind == "embedding")
    ]
    if problems:
        raise PlanError(problems)


def _narrowed(layer: Layer, writes: bool, reads: bool, width: int) -> Layer:
    """A layer as it will be; what pruning left of it is taken to be spread evenly."""
    rows, cols = width if writes else layer.rows, width if reads else layer.cols
    if layer.survivors is None:
        return dataclasses.replace(layer, rows=rows, cols=cols)
    left = layer.survivors * rows * cols // (layer.rows * layer.cols)
    return dataclasses.replace(layer, rows=rows, cols=cols, encoding=Sparse(survivors=left), survivors=left)


@dataclass
class _Norm:
    """A norm of the residual stream.

    Args:
        centred: it takes the mean away first.
        offset: it multiplies by offset + weight; None for neither weight nor 1 + weight.
    """

    module: Any
    centred: bool
    offset: int | None

    def scale(self, factor: float) -> None:
        """Multiply what it puts out by a factor, its bias apart."""
        if self.offset is not None:
            self.module.weight.data.copy_((self.module.weight.float() + self.offset) * factor - self.offset)


def _norms(model: nn.Module, cut: Cut) -> dict[str, _Norm]:
    """Norms of the residual stream, by name, and how they compute."""
    return {
        name: _tried(module)
        for name, module in model.named_modules()
        if f"{name}.weight" in cut.axes and getattr(module, "weight", torch.empty(0, 0)).dim() == 1
    }


@torch.no_grad()
def _tried(module: Any) -> _Norm:
    probe = copy.deepcopy(module).cpu().float()
    x = numbers(3, len(probe.weight))

    def constant(weight: float) -> bool:
        probe.weight.fill_(weight)
        y = probe(x)
        return bool((y - y[0]).abs().max() < 1e-6)

    offset = next((offset for offset in (0, 1) if constant(-offset)), None)
    probe.weight.fill_(0.5)
    return _Norm(module, bool(torch.allclose(probe(x), probe(x + 3), atol=1e-4)), offset)


@dataclass
class _Seen:
    """What calibration windows showed.

    Args:
        importance: of every channel.
        ratios: E r_K / r of every norm, by name.
        last: name of the norm that ran last.
        head: sum of squares of what the head reads, of the channels that stay.
    """

    importance: Tensor
    ratios: dict[str, float]
    last: str
    head: float


def _observe(
    model: nn.Module, norms: Mapping[str, _Norm], batches: Sequence[Tensor], keep: Bool[Tensor, " width"] | None
) -> _Seen:
    """Run the windows through the model."""
    device = processes().device
    squares = {name: torch.zeros(norm.module.weight.shape[0], device=device) for name, norm in norms.items()}
    sums = {name: torch.zeros(2, device=device) for name in norms}
    head = torch.zeros(1, device=device)
    order: list[str] = []

    def on_norm(name: str, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        order.append(name)
        squares[name] += importance(out if out.dim() == 3 else out[None]).to(device)
        if keep is not None:
            ratio = spread(args[0][..., keep], norms[name].centred) / spread(args[0], norms[name].centred)
            sums[name] += torch.stack([ratio.nan_to_num(1.0).sum(), ratio.new_tensor(float(ratio.numel()))]).to(device)

    def on_head(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0] if keep is None else args[0][..., keep]
        head.add_(x.float().square().sum().to(device))

    handles = [norm.module.register_forward_hook(partial(on_norm, name)) for name, norm in norms.items()]
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if output is not None:
        handles.append(output.register_forward_pre_hook(on_head))
    try:
        for batch in batches:
            run_on(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    total = sum(_summed(square).sqrt() for square in squares.values())
    means = {name: float(pair[0] / pair[1].clamp(min=1)) for name, pair in ((n, _summed(s)) for n, s in sums.items())}
    return _Seen(torch.as_tensor(total), means, order[-1], float(_summed(head)))


def _summed(sums: Tensor) -> Tensor:
    return reduce(sums, reduction="sum")  # pyright: ignore


def _rescale(
    model: PreTrainedModel, cut: Cut, norms: Mapping[str, _Norm], seen: _Seen, batches: Sequence[Tensor]
) -> None:
    """Make norms put out what they did, on the channels that stay."""
    for name, norm in norms.items():
        if name != seen.last:
            norm.scale(seen.ratios[name])
    head: Any = model.get_output_embeddings()
    table: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    now = _observe(model, norms, batches, None).head
    if head is None or not now or not seen.head:
        norms[seen.last].scale(seen.ratios[seen.last])
        return
    tied = head.weight is table.weight
    names = {module: name for name, module in model.named_modules()}
    norms[seen.last].scale(math.sqrt(seen.head / now) * (cut.table_scale(names[table]) if tied else 1.0))


def _power(model: nn.Module, layer: Layer, sides: tuple[bool, bool], keep: Bool[Tensor, " width"]) -> float:
    """Share of a weight's squares that goes with the channels."""
    W = get_weight(model.get_submodule(layer.name)).float()
    kept = W[keep.to(W.device)] if sides[0] else W
    kept = kept[:, keep.to(W.device)] if sides[1] else kept
    power = float(W.square().sum())
    return 1 - float(kept.square().sum()) / power if power > 0 else 0.0
