"""bitsandbytes: NF4 (Dettmers et al. 2023, arXiv:2305.14314) and LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339).

    nf4    W_hat = absmax * level[code], 16 levels that split a normal distribution evenly, an absmax for 64 weights
    int8   W_hat = absmax / 127 * code,  an absmax a row; inputs are rounded to 8 bits too, a scale a token, but columns
           of the input that reach `threshold` somewhere are multiplied in floating point

Needs no data, and no code of ours to load: rounding, layers and files are bitsandbytes', through Transformers' own
`BitsAndBytesConfig` (see `integration/bitsandbytes.py`). The result can be trained with adapters (QLoRA) or teach. It
says the same once in `config.json` for the whole model, so no layer can be stored in another way beside it, and every
stage that changes weights has to come before.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.errors import PlanError
from hf_slim.core.layers import check_weights, relative_error, targets
from hf_slim.core.method import MethodConfig, Rules
from hf_slim.core.report import LayerReport, StageReport
from hf_slim.core.select import Layer, Select, find_layers
from hf_slim.core.shapes import shape_problems
from hf_slim.core.swap import get_weight
from hf_slim.integration import bitsandbytes as bnb
from hf_slim.methods import find_method

RULES = Rules(makes=("foreign",), preserves=("zeros", "codes"), paper="Dettmers et al. 2023, arXiv:2305.14314")


class Config(MethodConfig):
    """Options of `quantize.bnb`."""

    format: Literal["nf4", "int8"] = Field("nf4", description="4-bit NormalFloat, or LLM.int8")
    double_quant: bool = Field(False, description="quantize NF4's absolute maxima too: 4.13 bits a weight, not 4.5")
    compute_dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="what NF4 multiplies in")
    threshold: float = Field(6.0, ge=0, description="LLM.int8: inputs this large are not rounded; 0 rounds all")
    layers: Select = Select()

    @model_validator(mode="after")
    def _fits_the_format(self) -> Config:
        wrong = {"nf4": {"threshold"}, "int8": {"double_quant", "compute_dtype"}}[self.format] & self.changed()
        if wrong:
            raise ValueError(f"{', '.join(sorted(wrong))} cannot be set with format: {self.format}; leave it out")
        return self


def plan(layers: dict[str, Layer], config: Config, model: PreTrainedModel) -> dict[str, Layer]:
    """The layers that will be bitsandbytes modules, as they will be stored.

    Raises:
        PlanError: bitsandbytes is missing, the model holds encoded layers or uneven shapes, or experts are chosen.
    """
    bnb.check_installed()
    chosen = targets(layers, find_method("quantize.bnb"), config)
    problems = [
        f"{layer.name} is already stored as {layer.encoding.describe()}; a bitsandbytes model holds dense layers "
        "beside its own and no others: leave the earlier stage out"
        for layer in layers.values()
        if layer.encoding is not None
    ]
    problems += [
        f"{layer.name} is an expert, and bitsandbytes leaves fused experts alone; add it to layers.exclude"
        for layer in chosen
        if layer.routed
    ]
    problems += shape_problems(layers.values(), model, "bitsandbytes")
    if problems:
        raise PlanError(problems)
    stored = bnb.BnbEncoding(format=config.format, double_quant=config.double_quant)
    return {layer.name: layer.encoded(stored) for layer in chosen}


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Quantize the chosen layers of a model; it is a bitsandbytes model afterwards."""
    layers = find_layers(model)
    planned = plan(layers, config, model)
    bnb.check_modules({name: model.get_submodule(name) for name in planned})
    check_weights(model, [layers[name] for name in planned])
    before = {name: get_weight(model.get_submodule(name)) for name in planned}
    dtype = getattr(torch, config.compute_dtype)
    skip = bnb.others(model, planned)
    bnb.quantize_in_place(model, bnb.make_config(config.format, config.double_quant, config.threshold, dtype, skip))
    rows = []
    for name, layer in context.progress.track(planned.items(), "measuring layers"):
        module = model.get_submodule(name)
        rows.append(
            LayerReport(
                name=name,
                rows=layer.rows,
                cols=layer.cols,
                encoding=layer.encoding.describe(),  # pyright: ignore[reportOptionalMemberAccess]
                bytes_before=layers[name].nbytes,
                bytes=bnb.stored_weight_bytes(module),
                error=relative_error(before.pop(name), bnb.decoded(module)),
            )
        )
    return StageReport(layers=rows)
