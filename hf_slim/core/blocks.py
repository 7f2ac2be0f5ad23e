"""Finished blocks on disk: what lets a killed walk go on from where it was, with the very same numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_slim.core.files import write_text
from hf_slim.core.layers import Encoded
from hf_slim.core.parallel import is_main
from hf_slim.core.removal import Removal, carry_out, from_tensors, to_tensors
from hf_slim.core.report import LayerReport
from hf_slim.core.swap import encode_layer
from hf_slim.core.units import Units
from hf_slim.encodings import read_encoding

DENSE = "dense:"  # begins the keys of parameters that stay dense; no module's name holds a colon


class BlockStore:
    """One safetensors file a block, and beside it what was reported. `folder` None keeps nothing."""

    def __init__(self, folder: Path | None):
        self.folder = folder

    def save(
        self,
        label: str,
        rows: list[LayerReport],
        layers: dict[str, Encoded],
        dense: dict[str, Tensor] | None = None,
        removals: Sequence[Removal] = (),
    ) -> None:
        """Keep a block. The report is written last and atomically: a block without one does not count.

        Args:
            dense: parameters that changed and stay dense, by their names in the model.
            removals: what made layers smaller.
        """
        if self.folder is None or not is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{name}.{key}": t.contiguous() for name, (_, ts) in layers.items() for key, t in ts.items()}
        kept = {f"{DENSE}{name}": tensor.contiguous() for name, tensor in (dense or {}).items()}
        save_file(tensors | kept | to_tensors(removals), self.folder / f"{label}.safetensors")
        entries: list[dict[str, Any]] = [{"report": row.model_dump()} for row in rows]
        for row, entry in zip(rows, entries, strict=True):
            if row.name in layers:
                encoding, own = layers[row.name]
                entry |= {"encoding": encoding.model_dump(), "tensors": sorted(own)}
        write_text(self.folder / f"{label}.json", json.dumps(entries))

    def restore(
        self, label: str, model: nn.Module, units: Mapping[str, Units] | None = None
    ) -> list[LayerReport] | None:
        """Put a kept block's layers into the model; None when it was not kept.

        Args:
            units: those that can have been removed, by the name of the layer that reads them.
        """
        if self.folder is None or not (self.folder / f"{label}.json").exists():
            return None
        tensors = load_file(self.folder / f"{label}.safetensors")
        for removal in from_tensors(tensors, units or {}):
            carry_out(model, removal)
        rows = []
        for entry in json.loads((self.folder / f"{label}.json").read_text()):
            row = LayerReport.model_validate(entry["report"])
            rows.append(row)
            if "encoding" in entry:
                own = {key: tensors[f"{row.name}.{key}"] for key in entry["tensors"]}
                encode_layer(model, row.name, read_encoding(entry["encoding"]), own)
        for key in tensors:
            if key.startswith(DENSE):
                model.get_parameter(key.removeprefix(DENSE)).data.copy_(tensors[key])
        return rows
