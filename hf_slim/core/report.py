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
        method: address, such as "quantize.gptq".
        options: the options that were set.
        seconds: wall-clock time.
        peak_memory: highest resident memory of the process so far, bytes.
        layers: one row a compressed layer.
        metrics: what an evaluation or training stage measured.
        notes: warnings, fallbacks.
    """

    model_config = ConfigDict(extra="forbid")

    method: str
    options: Json = {}
    seconds: float = 0.0
    peak_memory: int = 0
    layers: list[LayerReport] = []
    metrics: Json = {}
    notes: list[str] = []
