"""What a model consists of: layers, shapes, weights and bytes by kind, tied weights. Reads its config, no weights."""

from __future__ import annotations

from typing import Any

from hf_slim.core.model import ModelSource
from hf_slim.core.select import Layer, find_layers
from hf_slim.core.size import count_weights, stored_bytes

KINDS = ("embedding", "linear in blocks", "linear outside", "head")


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


def _kind(layer: Layer) -> str:
    if layer.kind != "linear":
        return layer.kind
    return "linear in blocks" if layer.block else "linear outside"


def _count(kind: str, layers: list[Layer], total: int) -> dict[str, Any]:
    own = [layer for layer in layers if layer.tied_to is None]
    stored = sum(layer.nbytes for layer in own)
    weights = sum(layer.rows * layer.cols for layer in own)
    return {"kind": kind, "count": len(own), "parameters": weights, "bytes": stored, "share": stored / total}
