"""What a model consists of: layers, shapes, weights and bytes by kind, tied weights. Reads its config, no weights.

`look_into` goes further and loads it: what its weights look like, what its neurons do, what each layer can spare.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from hf_slim import insight
from hf_slim.core.arithmetic import fast_dtype
from hf_slim.core.data import DataSource, load_tokens
from hf_slim.core.model import ModelSource
from hf_slim.core.parallel import device as computing_device
from hf_slim.core.progress import Progress
from hf_slim.core.select import Layer, find_layers
from hf_slim.core.size import count_weights, stored_bytes
from hf_slim.encodings.kernels import FEW_ROWS, kernel_for, why_not_packed

KINDS = ("embedding", "linear in blocks", "linear outside", "head")
INSIGHTS = ("weights", "activations", "sensitivity")
Insight = insight.WeightInsight | insight.ActivationInsight | insight.SensitivityInsight


def inspect_model(source: ModelSource) -> dict[str, Any]:
    """Facts about a model, ready for JSON.

    Raises:
        ModelError: its config cannot be found or read.
    """
    model = source.skeleton()
    layers = find_layers(model)
    total_bytes, total = stored_bytes(model), count_weights(model)
    kinds = [_count(kind, [x for x in layers.values() if _kind(x) == kind], total_bytes) for kind in KINDS]
    rest = {
        key: total_of - sum(kind[key] for kind in kinds)
        for key, total_of in (("parameters", total), ("bytes", total_bytes))
    }
    kinds.append({"kind": "norms, biases, ...", "count": 0, **rest, "share": rest["bytes"] / total_bytes})
    return {
        "model": source.name,
        "architecture": type(model).__name__,
        "parameters": total,
        "bytes": total_bytes,
        "bits": 8 * total_bytes / total,
        "kinds": [kind for kind in kinds if kind["parameters"]],
        "tied": {x.name: x.tied_to for x in layers.values() if x.tied_to},
        "kernels": _kernels(layers.values()),
        "layers": [
            {
                "name": x.name,
                "kind": x.kind,
                "rows": x.rows,
                "cols": x.cols,
                "encoding": x.encoding.describe() if x.encoding else str(x.dtype).removeprefix("torch."),
                "bytes": x.nbytes,
                "tied_to": x.tied_to,
            }
            for x in layers.values()
        ],
    }


def look_into(
    source: ModelSource,
    wanted: Iterable[str],
    data: DataSource,
    *,
    by_layer: bool = False,
    by_kind: bool = False,
    fraction: float = 0.1,
    progress: Progress | None = None,
) -> dict[str, Insight]:
    """Load a model and look at it in one or several ways.

    Args:
        wanted: of INSIGHTS.
        data: text for activations and sensitivity; its held-out windows.
        by_layer: weights of every layer, not of every kind of layer.
        by_kind: sensitivity of all layers of a kind together, not of each layer.
        fraction: of a layer's rms under which an output counts as nothing.

    Raises:
        ModelError, DataError: model or text cannot be used.
    """
    wanted = set(wanted)
    windows = load_tokens(data, "held_out", source.load_tokenizer()).ids if wanted - {"weights"} else None
    model = source.load().to(computing_device())
    looks = {
        "weights": lambda: insight.weights(model, by="layer" if by_layer else "kind", progress=progress),
        "activations": lambda: insight.activations(model, windows, fraction=fraction, progress=progress),
        "sensitivity": lambda: insight.sensitivity(model, windows, by_kind=by_kind, progress=progress),
    }
    return {name: looks[name]() for name in INSIGHTS if name in wanted}


def _kernels(layers: Iterable[Layer]) -> list[dict[str, Any]]:
    """How this machine multiplies by each kind of encoded weight, and why not by a packed kernel: said once."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    heads = {layer.tied_to for layer in layers if layer.kind == "head"}
    found: dict[tuple[str, str, str | None], dict[str, Any]] = {}
    for layer in layers:
        if layer.encoding is None or layer.tied_to or (layer.kind == "embedding" and layer.name not in heads):
            continue
        reason = why_not_packed(layer.encoding, layer.cols, layer.dtype, device, layer.rows)
        kernel = kernel_for(layer.encoding, layer.cols, layer.dtype, device, layer.rows)
        dense = f"decoded to {str(fast_dtype(layer.dtype, device)).removeprefix('torch.')}"
        few = kernel.name if kernel else dense
        row = {"encoding": layer.encoding.describe(), "layers": 0, "few": few, "many": dense, "why_not": reason}
        found.setdefault((row["encoding"], few, reason), row)["layers"] += 1
    return [row | {"few_rows": FEW_ROWS, "device": str(device)} for row in found.values()]


def _kind(layer: Layer) -> str:
    if layer.kind != "linear":
        return layer.kind
    return "linear in blocks" if layer.block else "linear outside"


def _count(kind: str, layers: list[Layer], total: int) -> dict[str, Any]:
    own = [layer for layer in layers if layer.tied_to is None]
    stored = sum(layer.nbytes for layer in own)
    weights = sum(layer.rows * layer.cols for layer in own)
    return {"kind": kind, "count": len(own), "parameters": weights, "bytes": stored, "share": stored / total}
