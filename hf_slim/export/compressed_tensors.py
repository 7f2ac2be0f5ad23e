"""The compressed-tensors format, read by vLLM and by Transformers (github.com/vllm-project/compressed-tensors, 0.20).

Our affine codes go over as they are; only packing and names change. With P the format's bits (4 or 8), a layer
[rows, cols] with G groups becomes

    pack-quantized   weight_packed      int32 [rows, ceil(P cols / 32)]   code i of a row at bit P i, little-endian
                     weight_scale       model's dtype [rows, G]
                     weight_zero_point  int32 [ceil(P rows / 32), G]      asymmetric only; packed down the rows
                     weight_shape       int64 [2]                         rows, cols
    int-quantized    weight             int8 [rows, cols]                 code - 128, for 8-bit activations
                     weight_scale       model's dtype [rows, 1]

and W = (code - 2**(P-1)) scale, or (code - zero) scale. Grids of fewer than P bits are part of one of P bits, so 2- and
3-bit codes become 4-bit ones and 5- to 7-bit codes 8-bit ones, exactly: most readers know 4 and 8 only. A centered grid
(levels between the integers) becomes the odd integers of a grid of half its step.

Transformers 5.23 cannot hold asymmetric layers compressed (zero points are packed in files, but not in its modules), so
`config.json` tells it to decode those while loading. It does so by one scheme for all layers; several are refused.

Loaders keep scales in the model's dtype. Ours are float16, so in a bfloat16 model they lose three bits, 0.2 % at
most, as much as rounding to bfloat16 costs any weight; `dtype: float16` writes the whole model in float16 instead.
Measured on a trained Llama of 260,000 weights, logits of stock Transformers against ours, relative: equal in float32,
0.7 % in bfloat16. With 8-bit activations both round tokens alike, and differ by the few values that float32's own
rounding moves across the middle between two integers.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int8, UInt8
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_slim.core.context import Context
from hf_slim.core.errors import ArtifactError
from hf_slim.core.method import MethodConfig, Rules
from hf_slim.core.report import StageReport
from hf_slim.core.select import Layer, find_layers
from hf_slim.core.shapes import shape_problems
from hf_slim.encodings import Affine
from hf_slim.encodings.base import DTYPES
from hf_slim.encodings.codes import load_codes
from hf_slim.encodings.modules import EncodedLinear, EncodedModule
from hf_slim.encodings.packing import unpack
from hf_slim.encodings.words import pack_words
from hf_slim.export.files import write_export

RULES = Rules()

PACKED, INT8 = "pack-quantized", "int-quantized"
VLLM_GROUPS = (None, 32, 64, 128)  # columns that share a scale in vLLM's kernels; None for a whole row
# Layers that vLLM joins into one matrix. It does so by these names, so here, and only here, names decide.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Config(MethodConfig):
    """Options of `export.compressed_tensors`."""

    to: str = Field("compressed_tensors", min_length=1, description="folder to write")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of scales and of what is not quantized; auto is the model's own"
    )


def format_bits(bits: int) -> int:
    """Bits a code takes in the format."""
    return 4 if bits <= 4 else 8


def widen(
    codes: UInt8[Tensor, "rows cols"], scales: Float[Tensor, "rows groups"], encoding: Affine
) -> tuple[UInt8[Tensor, "rows cols"], Float[Tensor, "rows groups"]]:
    """Codes and scales on the format's grid, of the same weights; zero points stay what they are."""
    middle = 2 ** (format_bits(encoding.bits) - 1)
    if encoding.centered:
        return 2 * codes + (middle + 1 - 2**encoding.bits), scales / 2
    return (codes + (middle - 2 ** (encoding.bits - 1)) if encoding.symmetric else codes), scales


def repack(tensors: dict[str, Tensor], encoding: Affine, rows: int, cols: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The format's tensors of one weight, by their names after the layer's.

    Args:
        tensors: as our encoding stores them.
        dtype: of the scales.
    """
    codes, _ = load_codes(tensors, encoding.bits, rows, cols, None)
    codes, scales = widen(codes, tensors["scales"].float(), encoding)
    if encoding.activations is not None:
        return {"weight": to_int8(codes), "weight_scale": scales.to(dtype)}
    bits = format_bits(encoding.bits)
    stored = {"weight_packed": pack_words(codes, bits), "weight_scale": scales.to(dtype)}
    if not encoding.symmetric:
        zeros = unpack(tensors["zeros"], encoding.bits, encoding.groups(cols))
        stored["weight_zero_point"] = pack_words(zeros.T.contiguous(), bits).T.contiguous()
    return stored | {"weight_shape": torch.tensor([rows, cols])}


def to_int8(codes: UInt8[Tensor, "rows cols"]) -> Int8[Tensor, "rows cols"]:
    """8-bit codes as signed steps of the scale."""
    return (codes ^ 128).view(torch.int8)  # flipping the highest bit subtracts 128


def scheme(encoding: Affine, cols: int) -> dict[str, Any]:
    """How the format describes a layer: the part of a config group that does not name its layers."""
    group = None if encoding.groups(cols) == 1 else encoding.group_size
    weights = {
        "num_bits": format_bits(encoding.bits),
        "type": "int",
        "symmetric": encoding.symmetric,
        "strategy": "channel" if group is None else "group",
        "group_size": group,
        "dynamic": False,
    }
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "group_size": None, "dynamic": True}
    integer = encoding.activations is not None
    return {
        "weights": weights,
        "input_activations": inputs if integer else None,
        "output_activations": None,
        "format": INT8 if integer else PACKED,
    }


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """What goes into `config.json`.

    One scheme for all layers is said of the class Linear, with the dense ones ignored, as most readers expect it.
    Several are said of layers by name: vLLM takes the class before the names where it has joined layers.
    """
    groups: list[tuple[dict[str, Any], list[str]]] = []
    dense = []
    for name, module in model.named_modules():
        if isinstance(module, EncodedLinear):
            found = scheme(module.encoding, module.cols)  # pyright: ignore[reportArgumentType]
            same = next((names for known, names in groups if known == found), None)
            if same is None:
                groups.append((found, [name]))
            else:
                same.append(name)
        elif isinstance(module, nn.Linear):
            dense.append(name)
    formats = {found["format"] for found, _ in groups}
    decode = {"dequantize": True} if any(_asymmetric(found) for found, _ in groups) else {}
    return {
        **decode,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {
            f"group_{i}": {"targets": names if len(groups) > 1 else ["Linear"], **found}
            for i, (found, names) in enumerate(groups)
        },
        "ignore": dense,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def problems(layers: dict[str, Layer], config: Config, model: PreTrainedModel) -> list[str]:
    """What the format cannot hold, each kind of it once."""
    if any(x.routed for x in layers.values()) or any(parameter.dim() == 3 for parameter in model.parameters()):
        return [
            "the model has fused experts, which Transformers 5.23 does not load from this format as they are written"
        ]
    if shapes := shape_problems(layers.values(), model, "compressed-tensors"):
        return shapes
    own = [layer for layer in layers.values() if layer.kind != "embedding" and layer.tied_to is None]
    encoded = [layer for layer in own if layer.encoding is not None]
    if not encoded:
        return ["no linear layer is stored as integers, and the format is for those; quantize first"]
    found: dict[str, list[str]] = defaultdict(list)
    for layer in encoded:
        reason = _problem(layer, model)
        if reason is not None:
            found[reason].append(layer.name)
    return [f"{_some(names)}: {reason}" for reason, names in found.items()] or _too_many_schemes(encoded)


def _too_many_schemes(encoded: list[Layer]) -> list[str]:
    schemes = {str(found): found for layer in encoded for found in [scheme(_affine(layer), layer.cols)]}.values()
    if len(schemes) == 1 or not any(map(_asymmetric, schemes)):
        return []
    kinds = ", ".join(sorted({_affine(layer).describe() for layer in encoded}))
    return [
        f"layers are stored in different ways ({kinds}), and Transformers reads asymmetric grids only where all layers "
        "have the same; use symmetric: true, or the same bits and group size for all"
    ]


def _problem(layer: Layer, model: PreTrainedModel) -> str | None:
    encoding, module = layer.encoding, model.get_submodule(layer.name)
    if isinstance(module, Conv1D) or getattr(module, "turned", False):
        return f"a Conv1D, of which {type(model).__name__} is made, and the format's readers take nn.Linear only"
    if not isinstance(encoding, Affine):
        described = "" if encoding is None else encoding.describe()
        return f"stored as {described}, and the format holds integer grids only; use quantize.gptq or quantize.rtn"
    if encoding.survivors is not None:
        return f"stored as {encoding.describe()}, and the format has no masks; leave the pruning out"
    if encoding.group_size is not None and encoding.groups(layer.cols) > 1 and layer.cols % encoding.group_size:
        return (
            f"its {layer.cols} columns are no multiple of group_size {encoding.group_size}, and the format has no "
            "shorter groups; choose a group size that divides, or null for one scale a row"
        )
    return None


def notes(layers: dict[str, Layer], config: Config, model: PreTrainedModel) -> list[str]:
    """What the format holds in another way, and who cannot read it."""
    own = [layer for layer in layers.values() if layer.tied_to is None]
    linear = [x for x in own if x.kind != "embedding" and isinstance(x.encoding, Affine)]
    dtype = _dtype(config, model)
    word = str(dtype).removeprefix("torch.")
    found = [
        f"{x.name}, stored as {x.encoding.describe()}, is written dense, in "
        f"{x.rows * x.cols * dtype.itemsize / 1e6:.1f} MB instead of {x.nbytes / 1e6:.1f}, as readers expect"
        for x in own
        if x.kind == "embedding" and x.encoding is not None
    ]
    for bits, count in sorted(Counter(_affine(x).bits for x in linear).items()):
        if bits != format_bits(bits):
            found.append(f"{count} layers of {bits} bits are written with {format_bits(bits)} a code, the same weights")
    if rounded := [x.name for x in linear if dtype not in (DTYPES[_affine(x).scale_dtype], torch.float32)]:
        found.append(
            f"{_some(rounded)}: scales are rounded to {word}, the model's dtype, where loaders keep them; "
            "dtype: float16 keeps them exact"
        )
    if odd := [x.name for x in linear if _affine(x).groups(x.cols) > 1 and _affine(x).group_size not in VLLM_GROUPS]:
        found.append(f"{_some(odd)}: vLLM's kernels take groups of 32, 64 or 128 columns, or whole rows; not these")
    return found + _unlike(layers)


def _unlike(layers: dict[str, Layer]) -> list[str]:
    """Layers that vLLM joins although they are stored in different ways, each kind of join once."""
    found: dict[str, list[str]] = defaultdict(list)
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in layers):
        for names in FUSED:
            joined = [layers[f"{parent}.{name}"] for name in names if f"{parent}.{name}" in layers]
            ways = {isinstance(x.encoding, Affine) and str(scheme(x.encoding, x.cols)) for x in joined}
            if len(ways) > 1:
                how = [x.encoding.describe() if x.encoding else "dense" for x in joined]
                text = ", ".join(f"{x.name.rpartition('.')[2]} {way}" for x, way in zip(joined, how, strict=True))
                found[text].append(parent)
    return [
        f"{_some(parents)}: vLLM joins these layers and refuses them stored in different ways ({text}); "
        "Transformers reads them. Give them the same options to serve them with vLLM"
        for text, parents in found.items()
    ]


def export(model: PreTrainedModel, tokenizer: Any, folder: Path, config: Config) -> list[str]:
    """Write a model whose linear layers hold integer grids, and its tokenizer, into a folder.

    Args:
        tokenizer: None to write none.

    Returns:
        What the format holds in another way.

    Raises:
        ArtifactError: what the format cannot hold, or values that `config.dtype` cannot.
    """
    layers = find_layers(model)
    if found := problems(layers, config, model):
        raise ArtifactError(found)
    plain = copy.deepcopy(model.config)
    plain.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        shell = type(model)._from_config(plain, dtype=_dtype(config, model))
    shell.config.quantization_config = quantization_config(model)
    if model.can_generate():
        shell.generation_config = model.generation_config
    state = _state(model, config)
    _check_state(state, shell)
    shell.save_pretrained(folder, state_dict=state)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return notes(layers, config, model)


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Write the model down; it stays what it is."""
    return write_export(lambda folder: export(model, context.tokenizer, folder, config), config.to, context)


def _state(model: PreTrainedModel, config: Config) -> dict[str, Tensor]:
    """Every tensor that is written, by its name in the file."""
    dtype = _dtype(config, model)
    encoded = {name: m for name, m in model.named_modules() if isinstance(m, EncodedModule)}
    inside = {f"{name}.{tensor}" for name, m in encoded.items() for tensor in m.tensors()}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in inside}
    if config.dtype != "auto":
        state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
    for name, module in encoded.items():
        if isinstance(module, EncodedLinear):
            tensors = repack(module.tensors(), module.encoding, module.rows, module.cols, dtype)  # pyright: ignore
        else:
            tensors = {"weight": module.decoded(dtype)}
        state |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
    return state


def _check_state(state: dict[str, Tensor], shell: PreTrainedModel) -> None:
    known = {name.rpartition(".")[0] for name in shell.state_dict()}
    lost = [f"{name}: the model's class has no such tensor" for name in state if name.rpartition(".")[0] not in known]
    wide = [
        f"{name}: holds values that {str(t.dtype).removeprefix('torch.')} cannot; choose another dtype"
        for name, t in state.items()
        if t.is_floating_point() and not torch.isfinite(t).all()
    ]
    if lost or wide:
        raise ArtifactError(lost + wide)


def _dtype(config: Config, model: PreTrainedModel) -> torch.dtype:
    return model.dtype if config.dtype == "auto" else DTYPES[config.dtype]


def _affine(layer: Layer) -> Affine:
    """The encoding of a layer that has been found to be affine."""
    return layer.encoding  # pyright: ignore[reportReturnType]


def _asymmetric(found: dict[str, Any]) -> bool:
    return not found["weights"]["symmetric"]


def _some(names: Iterable[str]) -> str:
    """The first of many names, and how many there are."""
    first, *rest = names
    return first if not rest else f"{first} and {len(rest)} more"
