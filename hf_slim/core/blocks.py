"""Finished blocks on disk: what lets a killed walk go on from where it was, with the very same numbers."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_slim.core.files import write_text
from hf_slim.core.layers import Encoded
from hf_slim.core.parallel import is_main
from hf_slim.core.report import LayerReport
from hf_slim.core.swap import encode_layer
from hf_slim.encodings import read_encoding

DENSE = "dense:"  # begins the keys of parameters that stay dense; no module's name holds a colon


class BlockStore:
    """One safetensors file a block, and beside it what was reported. `folder` None keeps nothing."""

    def __init__(self, folder: Path | None):
        self.folder = folder

    def save(
        self, label: str, rows: list[LayerReport], layers: dict[str, Encoded], dense: dict[str, Tensor] | None = None
    ) -> None:
        """Keep a block. The report is written last and atomically: a block without one does not count.

        Args:
            dense: parameters that changed and stay dense, by their names in the model.
        """
        if self.folder is None or not is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{name}.{key}": t.contiguous() for name, (_, ts) in layers.items() for key, t in ts.items()}
        kept = {f"{DENSE}{name}": tensor.contiguous() for name, tensor in (dense or {}).items()}
        save_file(tensors | kept, self.folder / f"{label}.safetensors")
        entries = [
            {
                "report": row.model_dump(),
                "encoding": layers[row.name][0].model_dump(),
                "tensors": sorted(layers[row.name][1]),
            }
            for row in rows
        ]
        write_text(self.folder / f"{label}.json", json.dumps(entries))

    def restore(self, label: str, model: nn.Module) -> list[LayerReport] | None:
        """Put a kept block's layers into the model; None when it was not kept."""
        if self.folder is None or not (self.folder / f"{label}.json").exists():
            return None
        tensors = load_file(self.folder / f"{label}.safetensors")
        rows = []
        for entry in json.loads((self.folder / f"{label}.json").read_text()):
            row = LayerReport.model_validate(entry["report"])
            own = {key: tensors[f"{row.name}.{key}"] for key in entry["tensors"]}
            encode_layer(model, row.name, read_encoding(entry["encoding"]), own)
            rows.append(row)
        for key in tensors:
            if key.startswith(DENSE):
                model.get_parameter(key.removeprefix(DENSE)).data.copy_(tensors[key])
        return rows
