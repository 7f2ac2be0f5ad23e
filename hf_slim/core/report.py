"""Reports: what a stage measured. Nothing here is nominal: bytes are those of stored tensors."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

Json = dict[str, Any]


class LayerReport(BaseModel):
    """One compressed layer.

    Args:
        bytes_before, bytes: stored bytes of its weight before and after the stage.
        bits: stored bits a weight after the stage, everything counted.
        error: relative squared error of the weight, |W - What|^2 / |W|^2.
        notes: what is worth knowing, such as a fallback.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    rows: int
    cols: int
    encoding: str
    bytes_before: int
    bytes: int
    error: float
    metrics: dict[str, float] = {}
    notes: list[str] = []

    @property
    def bits(self) -> float:
        return 8 * self.bytes / max(1, self.rows * self.cols)


class StageReport(BaseModel):
    """One stage: what it did and what was measured.

    Args:
        method: address, such as "quantize.gptq"; filled in by whoever ran the stage.
        options: the options that were set.
        seconds: wall-clock time.
        peak_memory: highest resident memory of the process so far, bytes.
        layers: one row a compressed layer.
        metrics: what an evaluation or training stage measured.
        files: what an export wrote, as paths below the artifact's folder for exports.
        notes: warnings, fallbacks.
    """

    model_config = ConfigDict(extra="forbid")

    method: str = ""
    options: Json = {}
    seconds: float = 0.0
    peak_memory: int = 0
    layers: list[LayerReport] = []
    metrics: Json = {}
    files: list[str] = []
    notes: list[str] = []


class Size(BaseModel):
    """Bytes of weights, measured: of the original's tensors, and of the artifact's files.

    Args:
        parameters: weights of the original, each shared one counted once.
        file_bytes: the artifact's safetensors files.
    """

    model_config = ConfigDict(extra="forbid")

    parameters: int
    bytes_before: int
    bytes_after: int
    file_bytes: int

    @property
    def bits_before(self) -> float:
        return 8 * self.bytes_before / self.parameters

    @property
    def bits_after(self) -> float:
        return 8 * self.bytes_after / self.parameters


class RunReport(BaseModel):
    """`slim.json`: everything about a run.

    Args:
        format: version of this file.
        model, architecture: what was compressed.
        recipe, plan: what was asked for, and what was foreseen.
        inputs: fingerprints of recipe, model, data and code.
        files: what the artifact consists of.
        notes: what was lost before the run: the model came from a quantized checkpoint.
    """

    model_config = ConfigDict(extra="forbid")

    format: int = 1
    model: str
    architecture: str
    recipe: dict[str, Any]
    plan: dict[str, Any]
    inputs: dict[str, Any]
    versions: dict[str, str]
    size: Size
    stages: list[StageReport]
    files: list[str] = []
    notes: list[str] = []
