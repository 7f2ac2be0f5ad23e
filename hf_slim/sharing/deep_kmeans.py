"""Deep k-Means: weights are drawn together while they train, then shared (Wu et al. 2018, arXiv:1806.09228).

A weight is cut into n vectors of s consecutive columns, the columns of X [s, n]. k-means in K clusters looks for an
indicator F [n, K]; relaxed to any F with FᵀF = I, its least error has a closed form, and half of it is the penalty

    R(X) = 1/2 (tr XᵀX - tr FᵀXᵀXF) = 1/2 Σ_{i>K} σ_i(X)²,      dR/dX = X - X F Fᵀ,

with F the K right singular vectors of largest singular value. R is the energy of X outside of K directions. Where
K >= min(s, n), there is nothing outside: F Fᵀ (on the other side, U Uᵀ) is the identity, and R = 0 whatever the
weights are. So it is for scalars (s = 1), and for short vectors with many clusters: 16 centroids of 4 weights. There
the indicator is not relaxed:

    R(X) = 1/2 |X - C A|²,      dR/dX = X - C A,

the squared distance to the centroids C that plain k-means gives the vectors now, A being who belongs to whom. F, C and
A are found anew every `refresh` steps, constants in between. `penalty: null` takes the first where it is not zero.

`DeepKMeans` works in any `Trainer`. It sees no loss, and needs none: it adds λ dR/dX to the gradients that the
optimizer is about to use, after clipping, accumulation and the average over processes. λ is such that the penalty's
gradient, as it was at first, is the share `strength` of the loss's (a running mean of its norm); it grows from zero
while `warmup` lasts, and fades as weights reach their centroids. For the last `finetune` share of training weights are
their centroids: members move together, by the mean of their steps, and values are rounded as they will be stored. So
the model that is stored is the one that was trained.

Loss on unseen stories of a Llama of 260,000 weights after 60 steps of 1024 tokens (one table a matrix; mean of two
seeds at 2 bits, one at 3; 1.50 with dense weights):

    bits    trained, then k-means    centroids fine-tuned, no penalty    with the penalty
    3       2.68                     2.46                                2.39
    2       5.43                     4.95                                4.86

A model that has been trained already is better clustered at once, so that its centroids learn all the time: MiniLM's
90.1 % on SST-2 became, in 200 steps with a table for 4 rows, 88.6 at 2 bits and 82.5 at 1; 89.0 and 85.8 when
`share.kmeans` came first (each +- 1.2; one seed).

Where we differ: F comes from the smaller of both Gram matrices; λ is set by gradients; the paper fine-tunes all other
layers instead of the centroids. Weights that are zero are pruned ones: no penalty moves them, and they stay zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, TrainerCallback
from transformers.pytorch_utils import Conv1D
from transformers.trainer_callback import ExportableState

from hf_slim.core.context import Context
from hf_slim.core.errors import ModelError, PlanError
from hf_slim.core.layers import Encoded, plan_targets, put_layer
from hf_slim.core.method import MethodConfig, Rules
from hf_slim.core.parallel import require_whole_weights
from hf_slim.core.report import LayerReport, StageReport
from hf_slim.core.select import Layer, Select, find_layers
from hf_slim.core.swap import densify, get_weight
from hf_slim.core.training import TrainingOptions, configured, require_loss, train_with, unscale
from hf_slim.encodings import Codebook
from hf_slim.integration.transformers import mark
from hf_slim.sharing import kmeans
from hf_slim.sharing.members import Members
from hf_slim.sharing.vectors import cluster_vectors

RULES = Rules(
    needs=("train",), makes=("centroids",), preserves=("zeros", "tied"), paper="Wu et al. 2018, arXiv:1806.09228"
)

_MEMORY = 0.9  # share of the running mean of gradient norms that a step leaves


class Config(MethodConfig):
    """Options of `share.deep_kmeans`; those of the codebook are those of `share.kmeans`."""

    per_layer: ClassVar[tuple[str, ...]] = ("bits", "scope", "dim")

    bits: int = Field(3, ge=1, le=8, description="bits of an index; 2**bits centroids a table")
    scope: kmeans.Scope = Field(4, description="weights that share a table: 'tensor', 'row', or so many rows")
    dim: int = Field(1, ge=1, le=256, description="consecutive weights in a row that one index stands for")
    penalty: Literal["relaxed", "hard"] | None = Field(
        None, description="'relaxed' (the paper's), 'hard', or null for relaxed where that is not identically zero"
    )
    strength: float = Field(0.1, gt=0, description="the penalty's gradient beside the loss's, once warm and at first")
    warmup: float = Field(0.2, ge=0, le=1, description="share of the training before sharing in which it grows")
    refresh: PositiveInt = Field(20, description="steps between new centroids, or directions")
    finetune: float = Field(0.5, ge=0, lt=1, description="last share of the training, in which centroids learn")
    layers: Select = Select()
    training: TrainingOptions = Field(TrainingOptions(), description="how to train, where this is a stage of its own")

    @model_validator(mode="after")
    def _penalty_works(self) -> Config:
        if self.penalty == "relaxed" and 2**self.bits >= self.dim:
            raise ValueError(
                f"penalty: relaxed is zero whatever the weights are, because {2**self.bits} directions hold all "
                f"vectors of dim: {self.dim}; it needs fewer clusters than that. Set penalty: hard"
            )
        return self

    @property
    def relaxed(self) -> bool:
        """Which penalty it is."""
        return self.penalty == "relaxed" or (self.penalty is None and 2**self.bits < self.dim)


def directions(X: Float[Tensor, "n s"], clusters: int) -> Float[Tensor, "side clusters"]:
    """The directions of largest energy of n vectors of length s, orthonormal: on the shorter side of X.

    Args:
        X: vectors, one a row.
        clusters: how many; all of them where the shorter side has no more.
    """
    X = X.double()
    gram = X.T @ X if X.shape[1] <= X.shape[0] else X @ X.T
    return torch.linalg.eigh(gram).eigenvectors[:, -clusters:].float()


def outside(X: Float[Tensor, "n s"], Q: Float[Tensor, "side clusters"]) -> Float[Tensor, "n s"]:
    """The part of X outside of the directions Q: the gradient of the relaxed penalty, which is half its square."""
    return X - (X @ Q) @ Q.T if X.shape[1] <= X.shape[0] else X - Q @ (Q.T @ X)


def vectors(W: Float[Tensor, "rows cols"], dim: int) -> Float[Tensor, "n dim"]:
    """Runs of `dim` columns, those at the end of a row filled up with zeros."""
    return F.pad(W, (0, -W.shape[1] % dim)).reshape(-1, dim)


def encoding(layer: Layer, config: Config) -> Codebook:
    """How a layer will be stored once it is trained."""
    here = config.at(layer)
    scalar = kmeans.encoding(layer, kmeans.Config(bits=here.bits, scope=here.scope))
    if here.dim == 1:
        return scalar
    return Codebook(bits=here.bits, clusters=2**here.bits, rows_per_book=scalar.rows_per_book, dim=here.dim)


def problems(layer: Layer, config: Config) -> list[str]:
    """Why a layer cannot be shared so."""
    dim = config.at(layer).dim
    if dim > 1 and layer.survivors is not None:
        return [
            f"{layer.name} is pruned, and its zeros would be parts of shared vectors: set dim: 1, or name it in "
            "layers.exclude"
        ]
    return []


def encode(W: Float[Tensor, "rows cols"], layer: Layer, config: Config, keep: Tensor | None) -> Encoded:
    """Share one weight as it is; pruned weights stay zero."""
    here, stored = config.at(layer), encoding(layer, config)
    if here.dim == 1:
        return kmeans.encode(W, layer, kmeans.Config(bits=here.bits, scope=here.scope), keep)
    found = [
        cluster_vectors(vectors(book, here.dim), stored.clusters) for book in W.split(stored.rows_per_book or len(W))
    ]
    codes = torch.cat([codes for codes, _ in found]).view(len(W), -1)
    return stored, stored.pack(codes, torch.stack([centroids for _, centroids in found]))


def callback(model: PreTrainedModel, config: Config) -> DeepKMeans:
    """The callback for a stage that trains."""
    plan_targets(model, "share.deep_kmeans", config)
    return DeepKMeans(config)


def store(model: PreTrainedModel, trained: DeepKMeans) -> list[LayerReport]:
    """Store the layers that the callback has trained as indices and centroids."""
    layers = find_layers(model)
    return [put_layer(model, layers[name], encoded) for name, encoded in trained.encoded.items()]


def needs(config: Config) -> tuple[str, ...]:
    """The data that it needs: a classifier's with classes."""
    return (*RULES.needs, "labels")


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Train the model on its own loss and share its weights meanwhile."""
    require_loss(model, "share.deep_kmeans")
    sharing = callback(model, config)
    metrics = train_with(sharing, model, config.training, context)
    return StageReport(layers=store(model, sharing), metrics=metrics | {"distances": sharing.distances})


@dataclass(eq=False)
class Pulled:
    """One layer that is drawn together.

    Args:
        layer: as it was planned.
        module: whose `weight` it is.
        config: the options that hold for it.
        towards: directions, or the clustering that it is drawn to; None before the first.
        members: who shares a value, once weights do.
    """

    layer: Layer
    module: nn.Module
    config: Config
    towards: Tensor | Encoded | None = None
    members: Members | None = None

    @property
    def weight(self) -> Float[Tensor, "rows cols"]:
        """A view."""
        return get_weight(self.module)

    @property
    def gradient(self) -> Float[Tensor, "rows cols"] | None:
        """A view; None where there is none."""
        found: Tensor | None = self.module.weight.grad  # pyright: ignore
        return found.T if found is not None and isinstance(self.module, Conv1D) else found

    def solve(self) -> Encoded:
        """The weight as plain k-means would share it now; zeros stay zeros."""
        W = self.weight
        keep = W != 0
        left = int(keep.sum())
        pruned = 0 < left < W.numel() and self.config.dim == 1
        return encode(W, replace(self.layer, survivors=left if pruned else None), self.config, keep if pruned else None)

    def masked(self) -> Encoded:
        """The weight as k-means would share what is left of it; a mask says where, though that may take more room."""
        if self.config.dim > 1:
            return self.solve()
        keep = self.weight != 0
        here = encoding(replace(self.layer, survivors=None), self.config)
        return kmeans.solve(self.weight, here.model_copy(update={"survivors": int(keep.sum())}), keep)

    def refresh(self) -> None:
        """Where to draw the weight from now on."""
        config = self.config
        self.towards = directions(vectors(self.weight, config.dim), 2**config.bits) if config.relaxed else self.solve()

    def rest(self) -> Float[Tensor, "rows cols"]:
        """The penalty's gradient, whose squared norm is twice the penalty."""
        W = self.weight.float()
        if isinstance(self.towards, Tensor):
            X = outside(vectors(W, self.config.dim), self.towards)
            return X.reshape(len(W), -1)[:, : W.shape[1]] * (W != 0)
        assert self.towards is not None
        stored, tensors = self.towards
        return (W - stored.decode(tensors, *W.shape)).mul_(W != 0)


class DeepKMeans(TrainerCallback, ExportableState):
    """Draws weights together while any `Trainer` trains them, then has them share values.

        sharing = DeepKMeans(bits=2)
        Trainer(model, args, callbacks=[sharing], ...).train()
        sharing.store(model)
        model.save_pretrained(folder)

    Works with accumulation, mixed precision, data parallelism and `GradualMagnitudePruning`, before it in the list. A
    checkpoint holds float weights, to be resumed, not to be served.

    Args:
        config: a `Config`, or a mapping of its fields.
        options: single fields of `Config`, which take precedence.

    Attributes:
        distances: relative squared distance of all weights from shared ones whenever that was looked at.

    Raises:
        PlanError: unknown or contradictory options. When training begins: layers that cannot be shared, frozen or
            sharded weights.
        ModelError: weights that are not finite.
    """

    def __init__(self, config: Config | Mapping[str, Any] | None = None, **options: Any):
        self.config = configured("share.deep_kmeans", Config, config, options)
        self.encoded: dict[str, Encoded] = {}
        self.distances: list[float] = []
        self._pulled: list[Pulled] = []
        self._norm = self._reference = 0.0  # of the loss's gradient, and of the penalty's at first
        self._share_at = 0

    def state(self) -> dict:
        """What the Trainer writes into trainer_state.json."""
        known = {"_norm": self._norm, "_reference": self._reference, "distances": self.distances}
        return {"args": {"config": self.config.model_dump(mode="json", exclude_unset=True)}, "attributes": known}

    def on_init_end(self, args, state, control, *, model, **kwargs):
        """Make layers that are stored sparse dense ones, before there is an optimizer."""
        require_whole_weights("share.deep_kmeans")
        for layer in plan_targets(model, "share.deep_kmeans", self.config):
            if layer.encoding is not None:
                densify(model, layer.name)

    def on_train_begin(self, args, state, control, *, model, **kwargs):
        """Find what to share, and go on where a checkpoint left off."""
        self._pulled = [
            Pulled(layer, model.get_submodule(layer.name), self.config.at(layer))
            for layer in plan_targets(model, "share.deep_kmeans", self.config)
        ]
        if frozen := [p.layer.name for p in self._pulled if not p.module.weight.requires_grad]:  # pyright: ignore
            raise PlanError(
                f"share.deep_kmeans moves weights, and {len(frozen)} layers are frozen, such as {frozen[0]}; train "
                "them in full, or name them in layers.exclude"
            )
        saved = (state.stateful_callbacks or {}).get(type(self).__name__) or {}
        for name, value in (saved.get("attributes", {}) if isinstance(saved, dict) else {}).items():
            setattr(self, name, value)
        if state.stateful_callbacks is not None:
            state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self._share_at = max(1, round((1 - self.config.finetune) * state.max_steps))
        self._take_up(state.global_step)

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, *, optimizer=None, **kwargs):
        """Add the penalty's gradient, or have members share theirs."""
        unscale(args, optimizer)
        for pulled in self._pulled:
            if pulled.members is not None and pulled.gradient is not None:
                pulled.members.before_step(pulled.weight, pulled.gradient)
        if state.global_step < self._share_at:
            self._pull(state.global_step)

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):
        """Members move together."""
        for pulled in self._pulled:
            if pulled.members is not None:
                pulled.members.after_step(pulled.weight)

    def on_step_end(self, args, state, control, *, optimizer=None, **kwargs):
        """Share weights when it is time to, and look anew where they are drawn to until then."""
        step = state.global_step
        if step == self._share_at and optimizer is not None:
            for pulled in self._pulled:
                # Means over members are far smaller than what Adam remembers of single gradients: they would not count.
                optimizer.state.pop(pulled.module.weight, None)
        if step == self._share_at or (step < self._share_at and step % self.config.refresh == 0):
            self._take_up(step)

    def on_save(self, args, state, control, **kwargs):
        """Go on from what was saved, as a resumed run will."""
        self._take_up(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        """Take indices and centroids of the model that is handed over."""
        if not all(pulled.members for pulled in self._pulled):
            self._take_up(self._share_at)
        self.encoded = {pulled.layer.name: self._stored(pulled) for pulled in self._pulled}

    def store(self, model: PreTrainedModel) -> list[LayerReport]:
        """Put indices and centroids in the place of the weights; the model then saves as such."""
        reports = store(model, self)
        mark(model)
        self._pulled, self.encoded = [], {}
        return reports

    @torch.no_grad()
    def _take_up(self, step: int) -> None:
        """Clusterings or directions of the weights as they are; from the time of sharing on, weights take them over."""
        self._check_finite(step)
        for pulled in self._pulled:
            if step < self._share_at:
                pulled.refresh()
                continue
            pulled.members = Members(*pulled.solve(), *pulled.weight.shape)
            pulled.weight.copy_(pulled.members.decode(pulled.weight == 0))
        if step < self._share_at:
            power = sum(pulled.weight.float().square().sum().item() for pulled in self._pulled)
            self.distances.append(self._distance() ** 2 / max(power, 1e-30))

    def _pull(self, step: int) -> None:
        gradients = [pulled.gradient for pulled in self._pulled]
        norm = sum(g.float().square().sum().item() for g in gradients if g is not None) ** 0.5
        if not norm < torch.inf:  # of a float16 step that will be skipped
            return
        self._norm = _MEMORY * self._norm + (1 - _MEMORY) * norm if self._norm else norm
        self._reference = self._reference or self._distance()
        warm = min(1.0, (step + 1) / max(1.0, self.config.warmup * self._share_at))
        rate = warm * self.config.strength * self._norm / max(self._reference, 1e-30)
        for pulled, gradient in zip(self._pulled, gradients, strict=True):
            if gradient is not None:
                gradient.add_(pulled.rest().to(gradient.dtype), alpha=rate)

    def _distance(self) -> float:
        return sum(pulled.rest().square().sum().item() for pulled in self._pulled) ** 0.5

    def _check_finite(self, step: int) -> None:
        if bad := [pulled.layer.name for pulled in self._pulled if not torch.isfinite(pulled.weight).all()]:
            raise ModelError([f"{name} holds NaN or infinite values at step {step}; training diverged" for name in bad])

    @torch.no_grad()
    def _stored(self, pulled: Pulled) -> Encoded:
        """What decodes to the weight. Pruned after it was shared, it may lack a centroid at zero, and room for one."""
        assert pulled.members is not None
        W, found = pulled.weight.float(), pulled.members.encoded()
        for solve in (pulled.solve, pulled.masked):
            stored, tensors = found
            if torch.equal(stored.decode(tensors, *W.shape), W):
                break
            found = solve()
        return found
