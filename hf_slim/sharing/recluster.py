"""Re-assignment of shared weights while their centroids learn (Han et al., "Deep Compression", arXiv:1510.00149).

Training a clustered model moves its centroids: the gradient of a centroid is the sum over its members, and who is a
member of what stays as it was, which is the paper's way. Here members may change, every `every` steps. For that each
weight remembers by how much it would have liked to move on its own,

    W = c[codes] + drift,    of which the product sees c[codes];    dL/d drift = dL/dW    (straight-through)

and the optimizer moves `drift` [rows, cols] as it moves the centroids. When it is time,

    codes <- nearest centroid of c[codes] + drift,      drift <- what is left

so a weight changes its centroid once its own steps have carried it more than half of the way to the next one. Weight
decay, if any, pulls weights back to their centroids. Pruned weights and outliers kept apart do not take part.

What it costs is a full training's memory: drift, its gradient and the optimizer's moments, 16 bytes a weight with Adam,
against the few that centroids alone take.

`ReassignCodes` works in any `Trainer`; as a stage it trains on labels, in `during` of `distill.logits` it learns from
the original.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float, UInt8
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, TrainerCallback

from hf_slim.core.context import Context
from hf_slim.core.errors import PlanError
from hf_slim.core.method import MethodConfig, Rules
from hf_slim.core.parallel import require_whole_weights
from hf_slim.core.report import LayerReport, StageReport
from hf_slim.core.select import Layer, Select, find_layers, select_layers
from hf_slim.core.training import TrainingOptions, configured, require_loss, train_with
from hf_slim.encodings import Codebook
from hf_slim.encodings.codes import load_codes, store_codes
from hf_slim.encodings.modules import EncodedLinear

RULES = Rules(needs=("train",), preserves=("zeros", "codes", "tied"), paper="Han et al. 2016, arXiv:1510.00149")


class Config(MethodConfig):
    """Options of `share.recluster`."""

    every: PositiveInt = Field(20, description="steps between assignments")
    until: float = Field(0.8, gt=0, le=1, description="share of the training after which members stay")
    layers: Select = Select()
    training: TrainingOptions = Field(TrainingOptions(), description="how to train, where this is a stage of its own")


def assign(W: Float[Tensor, "rows cols"], tables: Float[Tensor, "rows clusters dim"]) -> UInt8[Tensor, "rows runs"]:
    """The nearest entry of its row's table for every run of `dim` columns; of several the first.

    Args:
        W: a last run that is cut short is filled up with zeros.
        tables: the table of each row.
    """
    rows, clusters, dim = tables.shape
    runs = F.pad(W, (0, -W.shape[1] % dim)).view(rows, -1, dim)
    codes = torch.zeros(runs.shape[:2], dtype=torch.uint8, device=W.device)
    least = torch.full_like(runs[..., 0], torch.inf)
    for k in range(clusters):
        distance = (runs - tables[:, k, None]).square_().sum(-1)
        codes.masked_fill_(distance < least, k)
        torch.minimum(least, distance, out=least)
    return codes


def shared(layers: dict[str, Layer], config: Config) -> list[Layer]:
    """The chosen layers whose weights share centroids that learn.

    Raises:
        PlanError: there are none.
    """
    chosen = [
        layer
        for layer in select_layers(layers, config.layers)
        if isinstance(layer.encoding, Codebook) and layer.encoding.trainable
    ]
    if not chosen:
        raise PlanError("no layer has centroids that learn; put share.kmeans or another such method first")
    return chosen


def plan(layers: dict[str, Layer], config: Config, model: PreTrainedModel) -> dict[str, Layer]:
    """No layer will be stored in another way.

    Raises:
        PlanError: there is nothing to assign.
    """
    shared(layers, config)
    return {}


def callback(model: PreTrainedModel, config: Config) -> ReassignCodes:
    """The callback for a stage that trains."""
    return ReassignCodes(config)


def store(model: PreTrainedModel, trained: ReassignCodes) -> list[LayerReport]:
    """Nothing is left to do: layers have been encoded all along."""
    return []


def needs(config: Config) -> tuple[str, ...]:
    """The data that it needs: a classifier's with classes."""
    return (*RULES.needs, "labels")


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Train the model on its own loss, and re-assign its weights meanwhile."""
    require_loss(model, "share.recluster")
    moving = callback(model, config)
    metrics = train_with(moving, model, config.training, context)
    return StageReport(layers=[], metrics=metrics | {"reassigned": moving.reassigned})


class ReassignCodes(TrainerCallback):
    """Lets the weights of a clustered model change their centroids while any `Trainer` trains it.

        model = AutoModelForCausalLM.from_pretrained(clustered)
        Trainer(model, args, callbacks=[ReassignCodes(every=20)], ...).train()
        model.save_pretrained(folder)

    Pass it when the Trainer is made. A checkpoint holds `drift` beside the model, to be resumed, not to be served.

    Args:
        config: a `Config`, or a mapping of its fields.
        options: single fields of `Config`, which take precedence.

    Attributes:
        reassigned: the share of all indices that changed, time by time.

    Raises:
        PlanError: unknown options. When the Trainer is made: a model without centroids, sharded parameters.
    """

    def __init__(self, config: Config | Mapping[str, Any] | None = None, **options: Any):
        self.config = configured("share.recluster", Config, config, options)
        self.reassigned: list[float] = []
        self._modules: list[Any] = []

    def on_init_end(self, args, state, control, *, model, **kwargs):
        """Give every layer its drift, before there is an optimizer."""
        require_whole_weights("share.recluster")
        modules = [model.get_submodule(layer.name) for layer in shared(find_layers(model), self.config)]
        self._modules = [module for module in modules if isinstance(module, EncodedLinear)]
        for module in self._modules:
            module.drift = nn.Parameter(torch.zeros(module.rows, module.cols, device=module.centroids.device))
            module.forward = MethodType(_forward, module)

    def on_step_end(self, args, state, control, **kwargs):
        """Assign anew when it is time to."""
        step = state.global_step
        if step % self.config.every == 0 and step <= self.config.until * state.max_steps:
            changed = sum(reassign(module) for module in self._modules)
            self.reassigned.append(changed / max(1, sum(module.rows * module.cols for module in self._modules)))

    def on_train_end(self, args, state, control, **kwargs):
        """Leave the model as it came, with other indices."""
        for module in self._modules:
            del module.drift, module.forward
        self._modules = []


@torch.no_grad()
def reassign(module: Any) -> int:
    """Give every weight of a layer with drift the centroid that it is nearest to; the number of weights that moved."""
    encoding, tensors = module.encoding, module.tensors()
    before = encoding.decode(tensors, module.rows, module.cols)
    wanted = before + module.drift
    row = torch.arange(module.rows, device=wanted.device)
    book = torch.zeros_like(row) if encoding.rows_per_book is None else row // encoding.rows_per_book
    tables = tensors["centroids"].float().view(-1, encoding.clusters, encoding.dim)[book]
    scaled = wanted if encoding.scales is None else wanted / tensors["scales"].float()[:, None]
    runs = -(-module.cols // encoding.dim)
    old, keep = load_codes(tensors, encoding.bits, module.rows, runs, encoding.survivors, encoding.pattern)
    codes = assign(scaled, tables)
    if keep is not None:
        codes = torch.where(keep, codes, old)
    stored = store_codes(codes, encoding.bits, keep, encoding.pattern)["codes"]
    tensors["codes"].copy_(stored)
    after = encoding.decode(tensors, module.rows, module.cols)
    left = wanted - after
    module.drift.copy_(left if keep is None else left.masked_fill_(~keep, 0.0))
    return int((codes != old).sum()) * encoding.dim


def _forward(module: Any, x: Tensor) -> Tensor:
    """What the encoded layer computes; gradients reach its drift, too."""
    if not torch.is_grad_enabled():
        return type(module).forward(module, x)
    W = module.decoded(module.drift.dtype) + (module.drift - module.drift.detach())
    return F.linear(x, W.to(x.dtype), module.bias)
