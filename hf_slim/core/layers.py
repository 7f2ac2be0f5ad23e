"""What all methods that re-encode layers share: choosing the layers, refusing what cannot work, reporting.

Such a method's module offers

- `Config` with `layers: Select` and, where it handles embeddings, `embeddings`;
- `encoding(layer, config) -> Encoding`: how the layer will be stored, from its shape alone (no weights);
- `problems(layer, config) -> list[str]`: why this layer cannot be done;
- `encode(W, layer, config, keep) -> (Encoding, tensors)`, where it needs no data.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hf_slim.core.errors import ModelError, PlanError
from hf_slim.core.method import MethodConfig
from hf_slim.core.progress import Progress
from hf_slim.core.report import LayerReport
from hf_slim.core.select import Layer, Select, find_layers, select_layers
from hf_slim.core.swap import encode_layer, get_keep, get_weight
from hf_slim.encodings import Encoding, LowRank
from hf_slim.encodings.packing import packed_bytes
from hf_slim.encodings.places import place_layout
from hf_slim.methods import find_method

Encoded = tuple[Encoding, dict[str, Tensor]]


def targets(layers: dict[str, Layer], method: ModuleType, config: MethodConfig) -> list[Layer]:
    """Layers that a method will re-encode, in the model's order.

    Raises:
        PlanError: a pattern that matches nothing, or no layer to work on.
    """
    chosen = select_layers(layers, getattr(config, "layers", Select()))
    if getattr(config, "embeddings", None) is not None:
        chosen = [layer for layer in layers.values() if layer.kind == "embedding" and layer.tied_to is None] + chosen
    if not chosen:
        raise PlanError(
            "no layer to compress: the model has no linear layers inside repeated blocks"
            if not any(layer.block for layer in layers.values())
            else "no layer to compress: layers.exclude leaves nothing"
        )
    return chosen


def plan_layers(layers: dict[str, Layer], method: ModuleType, config: MethodConfig) -> dict[str, Layer]:
    """The layers a method will re-encode, as they will be stored after it.

    Raises:
        PlanError: every layer that cannot be done, with the reason and the way out.
    """
    problems: list[str] = []
    planned: dict[str, Layer] = {}
    for layer in targets(layers, method, config):
        if layer.encoding is not None and not layer.encoding.lossless:
            codes = "factors: {bits: 8} in share.low_rank stores its factors as codes; else "
            problems.append(
                f"{layer.name} is already stored as {layer.encoding.describe()}; compressing it again would add "
                f"error without need: {codes if isinstance(layer.encoding, LowRank) else ''}"
                "start from the dense model, or name it in layers.exclude"
            )
            continue
        found = method.problems(layer, config) if hasattr(method, "problems") else []
        problems += found
        if not found:
            planned[layer.name] = layer.encoded(method.encoding(layer, config))
    if problems:
        raise PlanError(problems)
    return planned


def stream_plan(model: nn.Module, address: str, config: MethodConfig) -> dict[str, Layer]:
    """The layers to encode while weights arrive, as they are before."""
    layers = find_layers(model)
    return {name: layers[name] for name in plan_layers(layers, find_method(address), config)}


def check_weights(model: nn.Module, layers: Iterable[Layer]) -> None:
    """Refuse weights that are not finite.

    Raises:
        ModelError: every layer with NaN or infinite weights.
    """
    bad = [layer.name for layer in layers if not torch.isfinite(get_weight(model.get_submodule(layer.name))).all()]
    if bad:
        raise ModelError(
            [f"{name}: the weight holds NaN or infinite values; the checkpoint is damaged" for name in bad]
        )


def relative_error(W: Float[Tensor, "rows cols"], decoded: Float[Tensor, "rows cols"]) -> float:
    """|W - What|^2 / |W|^2, 0 for an all-zero weight that is kept."""
    W = W.float()
    power = W.square().sum().item()
    loss = (W - decoded.float()).square().sum().item()
    return loss / power if power > 0 else loss


def put_layer(
    model: nn.Module,
    layer: Layer,
    encoded: Encoded,
    *,
    metrics: dict[str, float] | None = None,
    notes: Iterable[str] = (),
) -> LayerReport:
    """Swap a layer for its encoded form and report what that cost."""
    encoding, tensors = encoded
    W = get_weight(model.get_submodule(layer.name))
    before = layer.nbytes
    encode_layer(model, layer.name, encoding, tensors)
    return LayerReport(
        name=layer.name,
        rows=layer.rows,
        cols=layer.cols,
        encoding=encoding.describe(),
        bytes_before=before,
        bytes=encoding.nbytes(layer.rows, layer.cols, layer.dtype),  # the model may be in another dtype for the moment
        error=relative_error(W, encoding.decode(tensors, layer.rows, layer.cols)),
        metrics=metrics or {},
        notes=list(notes),
    )


def encode_layers(
    model: nn.Module, layers: Iterable[Layer], method: ModuleType, config: MethodConfig, progress: Progress
) -> list[LayerReport]:
    """Re-encode layers by `method.encode`, which needs no data."""
    rows = []
    for layer in progress.track(layers, "encoding layers"):
        module = model.get_submodule(layer.name)
        rows.append(put_layer(model, layer, method.encode(get_weight(module), layer, config, get_keep(module))))
    return rows


def worth_masking(layer: Layer, bits: int) -> int | None:
    """Survivors of a pruned layer, when a mask and their codes take less room than codes for every weight."""
    if layer.survivors is None or layer.rows * layer.cols + layer.survivors * bits >= layer.rows * layer.cols * bits:
        return None
    return layer.survivors


def only_survivors(layer: Layer, bits: int) -> dict[str, Any]:
    """Fields of an encoding that stores the codes of a pruned layer's survivors only, where that takes less room."""
    pattern = getattr(layer.encoding, "pattern", None)
    if layer.survivors is None or pattern is None:
        return {"survivors": worth_masking(layer, bits)}
    everywhere, places = packed_bytes(layer.cols, bits), place_layout(layer.rows, layer.cols, pattern)
    room = packed_bytes(layer.survivors, bits) + sum(spec.nbytes for spec in places.values())
    return {"survivors": layer.survivors, "pattern": pattern} if room < layer.rows * everywhere else {}


def plan_targets(model: nn.Module, address: str, config: MethodConfig) -> list[Layer]:
    """The layers that a method will re-encode, checked: they can be, and their weights are finite.

    Raises:
        PlanError: layers that cannot be done; ModelError: NaN or infinite weights. Nothing has been changed.
    """
    layers = find_layers(model)
    chosen = [layers[name] for name in plan_layers(layers, find_method(address), config)]
    check_weights(model, chosen)
    return chosen
