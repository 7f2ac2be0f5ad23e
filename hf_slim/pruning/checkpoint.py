"""The part of a pruning run that weights do not hold, in a file of its own beside each of the Trainer's checkpoints.

The Trainer tells callbacks which step they resume at, but not from where. So the checkpoint's own folder is noted in
its trainer_state.json; where that has been moved, the output folder is looked into.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_slim.core.errors import ModelError

FILE = "pruning.safetensors"


def folder_of(args: Any, step: int) -> Path:
    """Where the Trainer puts the checkpoint of a step."""
    return (Path(args.output_dir) / f"checkpoint-{step}").absolute()


def save_state(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the state into a checkpoint's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, folder / FILE)


def load_state(folders: list[Path]) -> dict[str, Tensor]:
    """The state in the first of some folders that has one.

    Raises:
        ModelError: none has; names them.
    """
    for folder in folders:
        if (folder / FILE).exists():
            return load_file(folder / FILE)
    raise ModelError(
        f"this pruning cannot be resumed without {FILE} beside the checkpoint, looked for in "
        f"{' and '.join(map(str, dict.fromkeys(folders)))}; start anew, or resume with score: magnitude, without shadow"
    )
