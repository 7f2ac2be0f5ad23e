"""What every method has in common: a closed Config, and what it does to the properties of a model's weights.

A method is a module, found by its address: `quantize.gptq` is `hf_slim/quantization/gptq.py`. It has

- a docstring whose first line names the method and its paper,
- `Config`, a `MethodConfig`,
- `RULES`, a `Rules`,
- pure kernels,
- `plan(layers, config) -> StagePlan` where it changes layers,
- `apply(model, config, context) -> StageReport`.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict


class MethodConfig(BaseModel):
    """Options of a method: closed (an unknown key is an error) and frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Rules:
    """How a method combines with the stages before it. Properties are words such as "dense", "zeros", "codes".

    Args:
        needs: data the method cannot do without: "calibration", "train", "held_out", "original".
        makes: properties that the weights have after it ("zeros": pruned weights; "codes": stored as integers).
        preserves: properties made by an earlier stage that survive it. What is not listed is undone, and the planner
            refuses such an order.
        paper: short reference for tables, "Authors year, arXiv:number".
    """

    needs: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    preserves: tuple[str, ...] = ()
    paper: str = ""
