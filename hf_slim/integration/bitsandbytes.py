"""bitsandbytes through Transformers' own `BitsAndBytesConfig`; the only file that knows about the package.

A model quantized here is a stock Transformers model: its layers are `bitsandbytes.nn` modules, `config.json` names
bitsandbytes, and `from_pretrained` loads it where hf_slim is not installed. Weights are quantized by the conversion
that Transformers applies to arriving weights, so that the model in memory is the one that loading with the same
`BitsAndBytesConfig` gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.import_utils import is_bitsandbytes_available

from hf_slim.core.errors import ModelError, PlanError
from hf_slim.encodings import Encoding
from hf_slim.encodings.base import TensorSpec

Format = Literal["nf4", "int8"]

_BLOCK = 64  # weights that share an absolute maximum
_NESTED = 256  # absolute maxima that share one of their own, when they are quantized too


class BnbEncoding(Encoding):
    """How bitsandbytes stores a weight, as far as plans and reports need to know; its own modules read it."""

    kind: Literal["bitsandbytes"] = "bitsandbytes"
    format: Format = "nf4"
    double_quant: bool = False

    def layout(self, rows: int, cols: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        """Everything but a description of about a hundred bytes that NF4 keeps beside each weight."""
        if self.format == "int8":
            return {"weight": TensorSpec((rows, cols), torch.int8), "SCB": TensorSpec((rows,), torch.float32)}
        blocks = -(-rows * cols // _BLOCK)
        specs = {
            "weight": TensorSpec((-(-rows * cols // 2), 1), torch.uint8),
            "absmax": TensorSpec((blocks,), torch.uint8 if self.double_quant else torch.float32),
            "quant_map": TensorSpec((16,), torch.float32),
        }
        if self.double_quant:
            specs["nested_absmax"] = TensorSpec((-(-blocks // _NESTED),), torch.float32)
            specs["nested_quant_map"] = TensorSpec((_NESTED,), torch.float32)
        return specs

    def decode(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Float[Tensor, "rows cols"]:
        """Not ours to do.

        Raises:
            ModelError: always.
        """
        raise ModelError("a bitsandbytes weight is decoded by its own module; call model.dequantize()")

    def describe(self) -> str:
        return self.format + (" nested" if self.double_quant else "")


def check_installed() -> None:
    """Refuse to plan what cannot run.

    Raises:
        PlanError: bitsandbytes is missing or too old.
    """
    if not is_bitsandbytes_available():
        raise PlanError("bitsandbytes is not installed, or too old; run: pip install 'bitsandbytes>=0.48'")


def make_config(
    format: Format,
    double_quant: bool = False,
    threshold: float = 6.0,
    compute_dtype: torch.dtype = torch.float32,
    skip: list[str] | None = None,
) -> BitsAndBytesConfig:
    """Transformers' own description of NF4 or LLM.int8.

    Args:
        double_quant: quantize NF4's absolute maxima too.
        threshold: of LLM.int8: input columns that reach it are multiplied in floating point.
        compute_dtype: what NF4 decodes to and multiplies in.
        skip: names of linear layers to leave alone; None for the output head.
    """
    if format == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=skip,
    )


def others(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Names of the linear layers that are not among `names`."""
    chosen = set(names)
    return [n for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D) and n not in chosen]


def check_modules(modules: Mapping[str, nn.Module]) -> None:
    """Refuse layers that Transformers would leave dense without a word.

    Raises:
        PlanError: subclasses of `nn.Linear`, by name.
    """
    odd = [(name, type(m).__name__) for name, m in modules.items() if type(m) not in (nn.Linear, Conv1D)]
    if odd:
        raise PlanError(
            [f"{name} is a {kind}, and bitsandbytes replaces nn.Linear itself only; exclude it" for name, kind in odd]
        )


@torch.no_grad()
def quantize_in_place(model: PreTrainedModel, config: BitsAndBytesConfig) -> list[str]:
    """Put bitsandbytes modules in the place of the linear layers that `config` does not skip.

    Returns:
        Their names.
    """
    check_installed()
    dense = {n: m for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D)}
    quantizer: Any = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map=None, dtype=model.dtype)
    operation = quantizer.get_quantize_ops()
    replaced = [name for name, module in dense.items() if model.get_submodule(name) is not module]
    for name in replaced:
        old, new, key = dense[name], model.get_submodule(name), f"{name}.weight"
        found = operation.convert({key: [old.weight.detach()]}, model=model, full_layer_name=key)
        new.weight = nn.Parameter(found[key], False) if not isinstance(found[key], nn.Parameter) else found[key]
        if old.bias is not None:
            new.bias = nn.Parameter(old.bias.detach(), requires_grad=False)  # pyright: ignore
        new.train(old.training)
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer  # pyright: ignore
    keep_layout(model)
    return replaced


def keep_layout(model: nn.Module) -> None:
    """Have 4-bit layers compute from the weights as they are stored, on every processor; others are left alone.

    On one with bfloat16 arithmetic (AVX-512 BF16) bitsandbytes rearranges a 4-bit weight in place when a layer is first
    evaluated: it fails for rows that are no multiple of 32, rounds the absolute maxima for good, and does not bring all
    of them back in order when the model is saved.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportAttributeAccessIssue]


def stored_weight_bytes(module: nn.Module) -> int:
    """Bytes that the module's weight takes when it is saved, without the bias."""
    return sum(tensor.nbytes for name, tensor in module.state_dict().items() if name != "bias")


def decoded(module: nn.Module) -> Float[Tensor, "rows cols"]:
    """The weight that a bitsandbytes module multiplies by."""
    weight: Any = module.weight
    return dequantize_bnb_weight(weight, getattr(module, "state", None)).float()  # pyright: ignore
