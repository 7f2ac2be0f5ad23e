"""What tests of whole runs share: a tiny model's folder, two texts, recipes over them, and a look at folders."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import tiny
import torch

from hf_slim.recipe import Recipe

torch.set_num_threads(1)  # matrices are tiny, and threads that wait for a busy core take many times as long

GPTQ = "quantize.gptq: {bits: 4, group_size: 16}"


def text(seed: int, words: int = 600) -> str:
    """Made-up prose, about five characters a word."""
    draw = random.Random(seed)
    return " ".join("".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(words))


class Place:
    """A folder with a model, texts and an output folder that does not exist yet."""

    def __init__(self, folder: Path, model: torch.nn.Module | None = None):
        self.folder, self.out = folder, folder / "out"
        self.model = tiny.save(tiny.llama() if model is None else model, folder / "model")
        (folder / "calibration.txt").write_text(text(1))
        (folder / "held_out.txt").write_text(text(2))

    def yaml(self, *stages: str, head: str = "") -> str:
        """A recipe's text; each stage is one line."""
        lines = [f"model: {self.model}", "data:"]
        for role, samples in (("calibration", 6), ("held_out", 4)):
            lines.append(f"  {role}: {{source: {self.folder / f'{role}.txt'}, samples: {samples}, length: 16}}")
        return "\n".join([*lines, head, "stages:", *(f"  - {stage}" for stage in stages)]) + "\n"

    def recipe(self, *stages: str, **options: str) -> Recipe:
        """The same, read."""
        return Recipe.from_yaml(self.yaml(*stages, **options))

    def file(self, *stages: str) -> str:
        """The same, in a file."""
        path = self.folder / "recipe.yaml"
        path.write_text(self.yaml(*stages))
        return str(path)


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below a folder and its hash; empty when there is no such folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def result(folder: Path) -> dict[str, str]:
    """Hashes of what a run computes: weights and config."""
    return {name: hashed for name, hashed in snapshot(folder).items() if name in ("model.safetensors", "config.json")}
