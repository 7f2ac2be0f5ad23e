"""GGUF, the format of llama.cpp (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): F16, Q8_0, Q4_0 and Q4_1.

The rounding that was chosen is kept where a block type holds it (`gguf_blocks.py`):

    ours                                   in the file
    up to 4 bits symmetric, up to 3 bits   Q4_0, the same integers and scales
    4 bits asymmetric                      Q4_1, the same integers and scales; minimum -zero * scale in float16
    5 to 8 bits symmetric, up to 7 bits    Q8_0, the same integers and scales
    dense, sparse                          F16; norms and biases F32

each with one scale a row or groups of a multiple of 32 columns, and columns that are one. Anything else (codebooks,
other groups, 8 bits asymmetric) is decoded and rounded again, into Q8_0 unless `type` says otherwise; the plan and the
report count those layers, `strict` refuses them. Fewer than 4 bits take 4.5 in the file, pruned weights are stored.
A head tied to the embedding is left out, as readers expect. Names and options: `gguf_model.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.errors import ArtifactError
from hf_slim.core.layers import relative_error
from hf_slim.core.method import MethodConfig, Rules
from hf_slim.core.report import StageReport
from hf_slim.core.select import Layer, find_layers
from hf_slim.core.shapes import shape_problems
from hf_slim.core.swap import get_weight
from hf_slim.encodings import Affine
from hf_slim.encodings.modules import EncodedModule
from hf_slim.export import gguf_model
from hf_slim.export.files import write_export
from hf_slim.export.gguf_blocks import BLOCK, block_grid, groups_fit, pack_grid, steps_fit
from hf_slim.export.gguf_tokenizer import describe_tokenizer

RULES = Rules(preserves=("codes", "zeros"))
FILE = "model.gguf"
PROBE = "Once upon a time, in 2024, a naïve  fox\n\tsaid: it's 3.14! 日本語 (x_1 += 2)"

Type = Literal["f16", "q8_0", "q4_0", "q4_1"]
Fate = Literal["kept", "minimum", "dense", "rounded"]


class Config(MethodConfig):
    """Options.

    Args:
        to: folder to write `model.gguf` into: below OUT/exports in a run, below the working directory in a script.
        type: block type of every weight matrix; "auto" takes the smallest that keeps what is stored.
        strict: refuse layers that would have to be rounded again.
        pre: llama.cpp's name for how the tokenizer splits text, where it is not recognized.
    """

    to: str = Field(default="gguf", min_length=1)
    type: Literal["auto", "f16", "q8_0", "q4_0", "q4_1"] = "auto"
    strict: bool = False
    pre: str | None = None


@dataclass(frozen=True)
class Placement:
    """What becomes of a layer's weight.

    Args:
        fate: "kept" exactly; "minimum": kept but for a group's minimum in float16; "dense": float16 of a weight that is
            not quantized; "rounded" again, because of `why`.
    """

    type: Type
    fate: Fate
    why: str = ""


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: `data` makes it, when its turn comes."""

    name: str
    type: str
    shape: tuple[int, ...]
    data: Callable[[], np.ndarray]


def place(layer: Layer, wanted: str = "auto") -> Placement:
    """How a layer's weight goes into the file, from its shape and encoding alone."""
    encoding = layer.encoding
    if not isinstance(encoding, Affine):
        stored = "dense" if encoding is None or encoding.lossless else encoding.describe()
        if stored == "dense" and wanted in ("auto", "f16"):
            return Placement("f16", "dense")
        return _round_again(layer, wanted, f"{stored} weights are on no grid of blocks")
    if not groups_fit(encoding, layer.cols):
        return _round_again(
            layer, wanted, f"{encoding.describe()} x {layer.cols} columns do not fill blocks of {BLOCK}"
        )
    for kind in ("q4_0", "q4_1", "q8_0"):
        if wanted in ("auto", kind) and steps_fit(encoding, kind):
            return Placement(kind, "minimum" if kind == "q4_1" else "kept")
    lacking = "every block type" if wanted == "auto" else wanted.upper()
    return _round_again(layer, wanted, f"{encoding.describe()} has levels that {lacking} lacks")


def problems(layers: dict[str, Layer], config: Config, model: PreTrainedModel) -> list[str]:
    """What the format cannot hold."""
    found = gguf_model.config_problems(model.config)
    found += shape_problems(layers.values(), model, "GGUF")
    if found:
        return found
    family = gguf_model.FAMILIES[model.config.model_type]
    found = [
        f"{name} has no place in a GGUF file of the architecture {family.name!r}"
        for name in [*_matrices(layers), *_vectors(model)]
        if gguf_model.tensor_name(family, model.config, f"{name}.weight" if name in layers else name) is None
    ]
    if config.strict:
        found += [
            f"{name} would be rounded again ({placed.why}); leave strict out to allow it"
            for name, placed in _placements(layers, config).items()
            if placed.fate == "rounded"
        ]
    return found


def notes(layers: dict[str, Layer], config: Config, model: PreTrainedModel) -> list[str]:
    """What the format holds in another way."""
    if gguf_model.config_problems(model.config):
        return []
    placements = _placements(layers, config)
    found = gguf_model.config_notes(model.config)
    minimum = [name for name, placed in placements.items() if placed.fate == "minimum"]
    if minimum:
        found.append(f"{_layers(minimum)} to Q4_1: integers and scales stay, the groups' minima become float16")
    for again in dict.fromkeys(placed for placed in placements.values() if placed.fate == "rounded"):
        names = [name for name, placed in placements.items() if placed == again]
        found.append(f"{_layers(names)} rounded again, to {again.type.upper()}: {again.why}")
    encodings = {name: layers[name].encoding for name in placements}
    affine = {name: encoding for name, encoding in encodings.items() if isinstance(encoding, Affine)}
    small = [name for name, e in affine.items() if e.bits < 4 and placements[name].type != "f16"]
    if small:
        found.append(f"{_layers(small)} of fewer than 4 bits take no less room in the file than 4-bit ones")
    pruned = [name for name in placements if layers[name].survivors is not None]
    if pruned:
        found.append(f"{_layers(pruned)} with pruned weights: the file stores the zeros too")
    integer = [name for name, e in affine.items() if e.activations is not None]
    if integer:
        found.append(f"{_layers(integer)} meant for int8 activations: readers of the file multiply as they see fit")
    return found


def export(model: PreTrainedModel, tokenizer: Any, folder: Path, config: Config) -> list[str]:
    """Write `model.gguf` into a folder.

    Returns:
        What the file holds in another way, with the error that this made.

    Raises:
        ArtifactError: no tokenizer, or one that GGUF cannot hold; weights beyond float16.
    """
    if tokenizer is None:
        raise ArtifactError("a GGUF file holds the tokenizer too; pass tokenizer=tokenizer")
    layers = find_layers(model)
    placements = _placements(layers, config)
    family = gguf_model.FAMILIES[model.config.model_type]
    errors: dict[str, float] = {}
    entries = list(_entries(model, layers, placements, errors))
    table = model.get_input_embeddings()
    metadata = (
        _general(model, family, placements)
        | gguf_model.options(family, model.config)
        | describe_tokenizer(tokenizer, table.num_embeddings, config.pre)  # pyright: ignore[reportArgumentType]
    )
    write_file(folder / FILE, family.name, metadata, entries)
    found = notes(layers, config, model)
    if errors:
        worst = max(errors, key=errors.__getitem__)
        found.append(
            f"{_layers(errors)} changed: relative squared error {sum(errors.values()) / len(errors):.2g} on average, "
            f"{errors[worst]:.2g} in {worst}"
        )
    return found + tokenizer_notes(tokenizer, folder)


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Write the model as a GGUF file."""
    return write_export(lambda folder: export(model, context.tokenizer, folder, config), config.to, context)


def write_file(path: Path, architecture: str, metadata: dict[str, Any], entries: Iterable[Entry]) -> None:
    """Write a GGUF file, one tensor in memory at a time.

    Args:
        metadata: values by key: int (32 bits, unsigned), float (32 bits), bool, str, or a list of one of these.
    """
    entries = list(entries)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _put(writer, key, value)
    for entry in entries:
        kind = gguf.GGMLQuantizationType[entry.type.upper()]
        dtype = {"f32": np.float32, "f16": np.float16}.get(entry.type, np.uint8)
        shape = entry.shape if dtype != np.uint8 else gguf.quant_shape_to_byte_shape(entry.shape, kind)
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        writer.add_tensor_info(entry.name, shape, np.dtype(dtype), size, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(np.ascontiguousarray(entry.data()))
    finally:
        writer.close()


def tokenizer_notes(tokenizer: Any, folder: Path) -> list[str]:
    """Whether Transformers reads the tokenizer back as it was, on a line of text."""
    read = AutoTokenizer.from_pretrained(str(folder), gguf_file=FILE)
    before, after = tokenizer(PROBE)["input_ids"], read(PROBE)["input_ids"]
    if before == after and tokenizer.decode(before) == read.decode(after):
        return []
    return [
        "Transformers' GGUF reader makes another tokenizer of the file: keep the model's own one with it "
        f"({len(before)} tokens for a test line, {len(after)} as read; llama.cpp has its own reader)"
    ]


def _entries(
    model: PreTrainedModel, layers: dict[str, Layer], placements: dict[str, Placement], errors: dict[str, float]
) -> Iterator[Entry]:
    """Every tensor of the file; `errors` gets those of the weights that did not stay as they were."""
    config = model.config
    family = gguf_model.FAMILIES[config.model_type]
    for name in _matrices(layers):
        layer, parameter = layers[name], f"{name}.weight"
        order = gguf_model.row_order(family, config, parameter)
        make = partial(_matrix, model, layer, placements[name], order, errors)
        yield Entry(
            str(gguf_model.tensor_name(family, config, parameter)),
            placements[name].type,
            (layer.rows, layer.cols),
            make,
        )
    for parameter, values in _vectors(model).items():
        stored = gguf_model.vector(family, config, parameter, values.detach().cpu())
        yield Entry(str(gguf_model.tensor_name(family, config, parameter)), "f32", tuple(stored.shape), stored.numpy)
    divisors = gguf_model.rope_divisors(config)
    if divisors is not None:
        yield Entry("rope_freqs.weight", "f32", tuple(divisors.shape), divisors.numpy)


def _matrix(
    model: PreTrainedModel, layer: Layer, placed: Placement, order: Tensor | None, errors: dict[str, float]
) -> np.ndarray:
    """A weight as the file stores it; notes its error."""
    data, error = encode_layer(model, layer, placed, order)
    if error > 0:
        errors[layer.name] = error
    return data


def encode_layer(
    model: PreTrainedModel, layer: Layer, placed: Placement, order: Tensor | None
) -> tuple[np.ndarray, float]:
    """A weight as the file stores it, its rows in another order, and the relative squared error that this made.

    Raises:
        ArtifactError: the weight does not fit into float16.
    """
    module = model.get_submodule(layer.name)
    if isinstance(module, EncodedModule) and placed.fate in ("kept", "minimum"):
        grid = block_grid(module.encoding, module.tensors(), layer.rows, layer.cols)  # pyright: ignore
        packed = pack_grid(grid if order is None else grid.take(order), placed.type).numpy()  # pyright: ignore
        if placed.fate == "kept" and bool((grid.scales.half().float() == grid.scales).all()):
            return packed, 0.0
    else:
        W = _rows(module, order)
        with np.errstate(over="ignore"):  # infinities are found below
            packed = gguf.quantize(W.numpy(), _ggml(placed.type))
    read = torch.from_numpy(gguf.dequantize(packed, _ggml(placed.type)))
    if not torch.isfinite(read).all():
        raise ArtifactError(
            f"{layer.name}: values beyond float16, whose largest is 65504; {placed.type.upper()} cannot hold them"
        )
    return packed, relative_error(_rows(module, order), read)


def _rows(module: torch.nn.Module, order: Tensor | None) -> Float[Tensor, "rows cols"]:
    """The decoded weight in float32, its rows in another order."""
    if isinstance(module, EncodedModule):
        W = module.decoded(torch.float32).detach().cpu()
    else:
        W = get_weight(module).float().cpu()
    return W.contiguous() if order is None else W[order]


def _round_again(layer: Layer, wanted: str, why: str) -> Placement:
    if wanted == "f16" or layer.cols % BLOCK:
        return Placement("f16", "rounded", why)
    return Placement("q8_0" if wanted == "auto" else wanted, "rounded", why)  # pyright: ignore[reportArgumentType]


def _placements(layers: dict[str, Layer], config: Config) -> dict[str, Placement]:
    return {name: place(layers[name], config.type) for name in _matrices(layers)}


def _matrices(layers: dict[str, Layer]) -> list[str]:
    """Layers whose weight is in the file: a tied head's is the embedding's."""
    return [name for name, layer in layers.items() if layer.tied_to is None]


def _vectors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every other parameter: norms and biases."""
    weights = {f"{name}.weight" for name in find_layers(model)}
    encoded = {name: module for name, module in model.named_modules() if isinstance(module, EncodedModule)}
    weights |= {f"{name}.{part}" for name, module in encoded.items() for part in module.encoding.trainable}
    return {name: parameter for name, parameter in model.named_parameters() if name not in weights}


def _general(model: PreTrainedModel, family: gguf_model.Family, placements: dict[str, Placement]) -> dict[str, Any]:
    """What the file says about itself."""
    kinds = [placed.type for placed in placements.values()]
    name = Path(model.config.name_or_path or "model").name
    if name == "mistral":  # the one name that Transformers' reader takes for an architecture, with a window of its own
        name = "Mistral"
    return {
        "general.type": "model",
        "general.name": name,
        "general.quantized_by": "hf_slim",
        "general.file_type": int(gguf.LlamaFileType[f"MOSTLY_{max(kinds, key=kinds.count).upper()}"]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }


def _put(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _ggml(kind: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[kind.upper()]


def _layers(names: Iterable[str]) -> str:
    names = list(names)
    return f"1 layer ({names[0]})" if len(names) == 1 else f"{len(names)} layers ({names[0]}, ...)"
