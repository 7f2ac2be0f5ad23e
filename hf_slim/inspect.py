"""What a model consists of: layers, shapes, weights and bytes by kind, tied weights. Reads its config, no weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from hf_slim.core.arithmetic import fast_dtype
from hf_slim.core.model import ModelSource
from hf_slim.core.select import Layer, find_layers
from hf_slim.core.size import count_weights, stored_bytes
from hf_slim.encodings.kernels import FEW_ROWS, kernel_for, why_not_packed

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


def _kernels(layers: Iterable[Layer]) -> list[dict[str, Any]]:
    """How this machine multiplies by each kind of encoded weight, and why not by a packed kernel: said once."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    heads = {layer.tied_to for layer in layers if layer.kind == "head"}
    found: dict[tuple[str, str, str | None], dict[str, Any]] = {}
    for layer in layers:
        if layer.encoding is None or layer.tied_to or (layer.kind == "embedding" and layer.name not in heads):
            continue
        reason = why_not_packed(layer.encoding, layer.cols, layer.dtype, device)
        kernel = kernel_for(layer.encoding, layer.cols, layer.dtype, device)
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
