"""Checkpoints that other programs have quantized, read as dense models.

With codes [rows, cols], g(c) the group of column c, scales and zeros one a row and group:  W = (code - zero) scale.

    gptq                qweight int32 [words, rows], codes packed down the columns; qzeros int32 [groups, words], packed
                        along the rows, one less than the zero point (unless checkpoint_format is gptq_v2); scales
                        [groups, rows]; g_idx [cols], the group of each column
    awq (gemm)          qweight int32 [cols, words] and qzeros int32 [groups, words], both packed along the rows, eight
                        4-bit codes a word in the order 0 2 4 6 1 3 5 7; scales [groups, rows]
    compressed-tensors  weight_packed, weight_scale, weight_zero_point, weight_shape, weight_g_idx, or weight in int8 or
                        float8 with weight_scale (see `export/compressed_tensors.py`)

Bits and groups are read off the tensors' shapes, which cannot contradict them; so layers may differ. What the programs'
own loaders would compute in float16 is computed in float32 here, and rounded once, to the model's dtype.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from jaxtyping import Float, Int, Int32, Integer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from hf_slim.core.errors import ModelError
from hf_slim.encodings.words import unpack_words, words_of

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds row AWQ_ORDER[i] of its eight

GGUF_FLOATS = {"F64", "F32", "F16", "BF16"}

Parts = dict[str, Tensor]


def from_codes(
    codes: Integer[Tensor, "rows cols"],
    scales: Float[Tensor, "rows groups"],
    zeros: Integer[Tensor, "rows groups"],
    group_of: Int[Tensor, " cols"],
) -> Float[Tensor, "rows cols"]:
    """The float32 weights that integers stand for.

    Args:
        group_of: the group that each column belongs to.
    """
    return (codes.float() - zeros.float()[:, group_of]) * scales.float()[:, group_of]


def from_gptq(parts: Parts, bits: int, offset: int) -> Float[Tensor, "rows cols"]:
    """A GPTQ layer's weight.

    Args:
        bits: of a code, where there is no g_idx to tell the number of columns.
        offset: what was taken off the zero points before they were stored: 1, or 0 in the second version.
    """
    packed, scales = parts["qweight"].T, parts["scales"].T
    group_of = parts.get("g_idx")
    cols = packed.shape[1] * 32 // bits if group_of is None else len(group_of)
    bits = _bits(packed, cols)
    zeros = unpack_words(parts["qzeros"], _bits(parts["qzeros"], len(packed)), len(packed)).T
    group_of = _even_groups(cols, scales.shape[1]) if group_of is None else group_of.long()
    return from_codes(unpack_words(packed, bits, cols), scales, zeros.int() + offset, group_of)


def from_awq(parts: Parts) -> Float[Tensor, "rows cols"]:
    """An AWQ layer's weight (4 bits, "gemm")."""
    scales = parts["scales"].T
    rows, cols = scales.shape[0], parts["qweight"].shape[0]
    codes, zeros = (_in_order(unpack_words(parts[name], 4, rows)).T for name in ("qweight", "qzeros"))
    return from_codes(codes, scales, zeros, _even_groups(cols, scales.shape[1]))


def from_compressed_tensors(parts: Parts) -> Float[Tensor, "rows cols"]:
    """A compressed-tensors layer's weight: packed integers, int8 or float8."""
    scales = parts["weight_scale"]
    if "weight_packed" not in parts:
        return _scaled(parts["weight"], scales, parts.get("weight_zero_point"))
    rows, cols = parts["weight_shape"].tolist()
    bits = _bits(parts["weight_packed"], cols)
    codes = unpack_words(parts["weight_packed"], bits, cols)
    zeros = torch.full(scales.shape, 2 ** (bits - 1))
    if "weight_zero_point" in parts:
        zeros = unpack_words(parts["weight_zero_point"].T, bits, rows).T
    group_of = parts.get("weight_g_idx")
    group_of = _even_groups(cols, scales.shape[1]) if group_of is None else group_of.long()
    return from_codes(codes, scales, zeros, group_of)


def _scaled(W: Tensor, scales: Tensor, zeros: Tensor | None) -> Float[Tensor, "rows cols"]:
    """Stored as int8 or float8: one scale for all weights, or one a row or group of columns.

    A wider dtype means that the weights were left as they were decoded, their scales beside them.
    """
    if W.is_floating_point() and W.itemsize > 1:
        return W.float()
    if scales.numel() == 1:
        return (W.float() - (0 if zeros is None else zeros.float())) * scales.float()
    if scales.dim() != 2 or len(scales) != len(W):
        raise ModelError(f"scales of shape {tuple(scales.shape)} belong to blocks, which are not read")
    group_of = _even_groups(W.shape[1], scales.shape[1])
    steps = W.float() if zeros is None else W.float() - zeros.float()[:, group_of]
    return steps * scales.float()[:, group_of]


def _bits(packed: Int32[Tensor, "rows words"], cols: int) -> int:
    """Bits a code, from how many words the columns take."""
    bits = 32 * packed.shape[1] // cols
    if not 1 <= bits <= 8 or words_of(cols, bits) != packed.shape[1]:
        raise ModelError(f"{packed.shape[1]} words for {cols} columns are no packing that is known")
    return bits


def _even_groups(cols: int, groups: int) -> Int[Tensor, " cols"]:
    return torch.arange(cols) // -(-cols // groups)


def _in_order(codes: Tensor) -> Tensor:
    """Undo AWQ's order of eight neighbours."""
    runs = codes.view(len(codes), -1, 8)
    ordered = torch.empty_like(runs)
    ordered[..., list(AWQ_ORDER)] = runs
    return ordered.flatten(1)


# what marks a layer's tensors; the rest of them, and what they were made with
_PARTS = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": (
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
    ),
}


def foreign(config: PretrainedConfig) -> dict[str, Any] | None:
    """How another program has quantized a checkpoint, as its config says; None for dense ones and our own."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    return None if stored.get("quant_method") == "hf_slim" else stored


def check_readable(stored: dict[str, Any], name: str) -> None:
    """Refuse what cannot be read.

    Raises:
        ModelError: says what can.
    """
    method = stored.get("quant_method")
    packing = stored.get("checkpoint_format") or stored.get("format") or stored.get("version") or ""
    known = {
        "gptq": ("", "gptq", "gptq_v2"),
        "awq": ("", "gemm"),
        "compressed-tensors": (*(f"{kind}-quantized" for kind in ("pack", "int", "float", "naive")), "mixed-precision"),
    }
    if method not in known:
        raise ModelError(
            f"model {name!r} was quantized by {method}, which is not read; start from the dense original "
            f"(read are: {', '.join(known)}, GGUF files, and what hf_slim wrote)"
        )
    if str(packing).lower() not in known[method]:
        raise ModelError(
            f"model {name!r} was quantized by {method} in its format {packing!r}, which is not read; start from the "
            f"dense original (read are: {', '.join(filter(None, known[method]))})"
        )
    if method == "awq" and stored.get("bits", stored.get("w_bit", 4)) != 4:
        raise ModelError(f"model {name!r}: awq has 4 bits a code, got {stored.get('bits')}")


def lost(stored: dict[str, Any], dtype: torch.dtype) -> str:
    """What reading such a checkpoint as a dense model means, in a sentence."""
    method = stored["quant_method"]
    bits = {stored.get("bits", stored.get("w_bit"))}
    if method == "compressed-tensors":
        groups = [g for g in stored.get("config_groups", {}).values() if isinstance(g, dict)]
        bits = {g["weights"]["num_bits"] for g in groups if g.get("weights")}
        activations = any(g.get("input_activations") for g in groups)
    else:
        activations = False
    words = " and ".join(str(b) for b in sorted(b for b in bits if b)) or "few"
    return (
        f"the model's weights were stored in {words} bits by {method}; they are now a "
        f"{str(dtype).removeprefix('torch.')} copy of those values: what the original had beyond them is gone"
        + (", and its activations are no longer quantized" if activations else "")
    )


def gguf_loss(path: Path) -> list[str]:
    """What reading a GGUF file as a dense model means: nothing where its weights are floats."""
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors} - GGUF_FLOATS
    if not kinds:
        return []
    return [
        f"the model's weights were stored as {', '.join(sorted(kinds))} in {path.name}; they are now a dense copy of "
        "those values: what the original had beyond them is gone"
    ]


def dense_state(folder: Path, stored: dict[str, Any], model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """A checkpoint's tensors, every quantized weight decoded.

    Args:
        model: the dense model, or its skeleton; says which layers are Conv1D.
        dtype: of the decoded weights.

    Raises:
        ModelError: every layer that cannot be decoded.
    """
    method, names = stored["quant_method"], _PARTS[stored["quant_method"]]
    state: dict[str, Tensor] = {}
    layers: dict[str, Parts] = defaultdict(dict)
    for name, tensor in _tensors(folder):
        layer, _, part = name.rpartition(".")
        if part in names:
            layers[layer][part] = tensor
        else:
            state[name] = tensor
    if not layers:
        raise ModelError(f"{folder}: config.json says {method}, but no layer is stored so; remove quantization_config")
    decode = _decoder(method, stored)
    modules, problems = dict(model.named_modules()), []
    for layer, parts in layers.items():
        if method == "compressed-tensors" and f"{layer}.weight" in state:
            parts["weight"] = state.pop(f"{layer}.weight")
        try:
            W = decode(parts).to(dtype)
        except (ModelError, KeyError, RuntimeError, IndexError) as error:
            problems.append(f"{layer}: cannot be decoded as {method}: {error}")
            continue
        state[f"{layer}.weight"] = W.T.contiguous() if isinstance(modules.get(layer), Conv1D) else W
    if problems:
        raise ModelError(problems)
    return state


def _decoder(method: str, stored: dict[str, Any]) -> Callable[[Parts], Tensor]:
    if method == "gptq":
        offset = 0 if stored.get("checkpoint_format", stored.get("format")) == "gptq_v2" else 1
        return lambda parts: from_gptq(parts, stored["bits"], offset)
    return from_awq if method == "awq" else from_compressed_tensors


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in _files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def _files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files: those that its index names, or the only one."""
    found = sorted(folder.glob("*.safetensors"))
    for index in sorted(folder.glob("*.safetensors.index.json")):
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if folder / "model.safetensors" in found:
        return [folder / "model.safetensors"]
    if len(found) != 1:
        raise ModelError(
            f"{folder}: expected one safetensors file or an index, found {len(found)}; pickles are not read"
        )
    return found
