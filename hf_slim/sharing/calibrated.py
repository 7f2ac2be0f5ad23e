"""What all codebook methods with calibration data share: statistics to the solver, block by block, and the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.feedback import SingularHessian
from hf_slim.core.layers import Encoded, plan_targets, put_layer
from hf_slim.core.method import MethodConfig
from hf_slim.core.report import StageReport
from hf_slim.core.saliency import fisher, token_weights
from hf_slim.core.select import Layer
from hf_slim.core.swap import get_keep, get_weight
from hf_slim.core.walk import Block, Solution, Statistics, walk
from hf_slim.quantization.embeddings import head_hessian, joint_hessian
from hf_slim.sharing.descent import Curvature, curvature_of

FALLBACK = "clustered plainly"


@dataclass(frozen=True)
class Known:
    """What is known of a layer when it is solved.

    Attributes:
        hessians: of its inputs, one for each run of rows.
        keep: which weights pruning left; None for a layer that is not pruned.
        weights: importance of each weight, where it was asked for.
    """

    hessians: Float[Tensor, "groups cols cols"]
    keep: Bool[Tensor, "rows cols"] | None = None
    weights: Float[Tensor, "rows cols"] | None = None
    _shared: dict[tuple[float, int], Curvature] = field(default_factory=dict)

    def curvature(self, damping: float, run: int = 1) -> Curvature:
        """`curvature_of` the Hessians, computed once for all layers that share them.

        Raises:
            SingularHessian: no damping makes one positive definite.
        """
        if (damping, run) not in self._shared:
            self._shared[damping, run] = curvature_of(self.hessians, damping, run)
        return self._shared[damping, run]


# What solves one layer: (weight, layer, what is known) -> (what is stored, relative error of its output).
Solve = Callable[[Tensor, Layer, Known], tuple[Encoded, float]]


class Options(MethodConfig):
    """What all methods with calibration data take."""

    damping: float = Field(0.01, gt=0, le=1, description="share of mean(diag H) added to the diagonal")
    guided: int | None = Field(
        None, ge=1, description="weigh tokens by squared gradients, for this many groups of rows"
    )
    true_sequential: bool = Field(False, description="o_proj sees what the shared q, k and v put out, and so on")
    min_tokens: int = Field(32, ge=1, description="an expert that fewer tokens were routed to is clustered plainly")


def compress(
    model: PreTrainedModel,
    address: str,
    config: MethodConfig,
    options: Options,
    context: Context,
    solve: Solve,
    by_fisher: bool = False,
) -> StageReport:
    """Replace the chosen layers block by block. Embeddings come first: every block sees what they will put out.

    Args:
        model: changed in place.
        address: the method's.
        config: its options.
        options: those that all of these methods have.
        context: data and progress.
        solve: solves one layer. Where nothing can be said of its inputs, it is handed an identity for H.
        by_fisher: measure the diagonal of the Fisher information, and hand it on as importance.
    """
    chosen = plan_targets(model, address, config)
    windows = context.tokens("calibration")
    tables = [layer for layer in chosen if layer.kind == "embedding"]
    layers = {layer.name: layer for layer in chosen if layer.kind != "embedding"}
    importance = fisher(model, [layer.name for layer in chosen], windows, context.progress) if by_fisher else {}
    weights = None
    if options.guided is not None:
        weights = token_weights(model, list(layers), windows, options.guided, context.progress)

    def solution(layer: Layer, hessians: Tensor, shared: dict[tuple[float, int], Curvature]) -> Solution:
        module = model.get_submodule(layer.name)
        known = Known(hessians, get_keep(module), importance.get(layer.name), shared)
        encoded, error = solve(get_weight(module).float(), layer, known)
        damping = max((curvature.damping for curvature in shared.values()), default=0.0)
        notes = (f"damping raised to {damping:g}",) if damping > options.damping else ()
        return Solution(encoded, {"output_error": error}, notes)

    def solver(statistics: Mapping[str, Statistics], block: Block | None) -> dict[str, Solution]:
        shared: dict[int, dict[tuple[float, int], Curvature]] = {}
        found = {}
        for name, known in statistics.items():
            source = known.hessian[None] if known.guided is None else known.guided
            same = shared.setdefault(id(known.hessian if known.guided is None else known.guided), {})
            layer, why = layers[name], None
            if known.tokens < options.min_tokens and layer.routed:
                why = f"only {known.tokens} tokens were routed to it"
            try:
                found[name] = solution(layer, source, same) if why is None else None
            except SingularHessian as error:
                why = str(error)
            if why is not None:
                plain = solution(layer, torch.eye(layer.cols, device=source.device)[None], {})
                found[name] = Solution(plain.encoded, {}, (f"{FALLBACK}: {why}",))
        return found

    rows = []
    for table in tables:
        H = head_hessian(model, table, windows)
        H = torch.eye(table.cols, device=get_weight(model.get_submodule(table.name)).device) if H is None else H
        found = solution(table, joint_hessian(H)[None], {})
        rows.append(put_layer(model, table, found.encoded, metrics=found.metrics, notes=found.notes))
    rows += walk(
        model, list(layers.values()), windows, solver, context, sequential=options.true_sequential, weights=weights
    )
    return StageReport(
        layers=rows,
        metrics={"clustered_plainly": sum(note.startswith(FALLBACK) for row in rows for note in row.notes)},
        notes=[f"{row.name}: {note}" for row in rows for note in row.notes],
    )
