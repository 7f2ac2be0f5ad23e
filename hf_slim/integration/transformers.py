"""The one file that touches Transformers' quantizer: `SlimConfig`, the plug-in, and what marks a model as ours.

Written against Transformers 5.23. `from_pretrained` calls it in two ways:

- A checkpoint of ours: the modules named in `config.json` are replaced by empty encoded ones before the weights arrive;
  the stored tensors have the encoded modules' own names, so nothing is converted.
- A dense checkpoint with `quantization_config=SlimConfig(...)`: each weight is encoded when it arrives, and its layer
  replaced then; never more than one dense weight is in memory. Weights of experts arrive fused, all experts of a layer
  in one tensor, and are taken apart then.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_slim.core.errors import ArtifactError, ModelError, PlanError, nearest
from hf_slim.core.experts import Experts, Layout, fuse, unfuse
from hf_slim.core.layers import stream_plan
from hf_slim.core.method import MethodConfig
from hf_slim.core.select import Layer, find_layers
from hf_slim.core.shapes import Shapes, reshape, settle
from hf_slim.core.stage import Stage, make_stage
from hf_slim.core.swap import densify, empty_like, followers, put_encoded, set_module
from hf_slim.core.ties import Ties, declare, leave_biases, tie
from hf_slim.encodings import Encoding, read_encoding
from hf_slim.encodings.embeddings import TiedEmbedding
from hf_slim.encodings.modules import EncodedModule, TiedHead
from hf_slim.methods import find_method

QUANT_METHOD = "hf_slim"
FORMAT = 1


class SlimConfig(QuantizationConfigMixin):
    """How a model is compressed: pass it to `from_pretrained`, find it in the `config.json` of what we save.

    Args:
        method: a method that needs no data: "quantize.rtn", "share.kmeans" or "prune.magnitude".
        options: that method's options (`bits=4, group_size=64, ...`), checked at once.

    Raises:
        RecipeError: an unknown method or option.
        PlanError: a method that needs calibration data or a trainer (use `hf_slim.compress`).

    A stored config names no method but, layer by layer, the encoding: `encodings` is a list of descriptions, `modules`
    maps a module's name to its place in that list. Of a model that was pruned to shapes which its config cannot say,
    `shapes` has those of tensors, and `numbers` what modules hold about themselves (`num_heads`). Where blocks share
    weights, `tied` is {tensor: the one that it is the same as}.

    >>> SlimConfig("quantize.rtn", bits=4, group_size=64).options["bits"]
    4
    """

    def __init__(self, method: str | None = None, **options: Any):
        self.quant_method = QUANT_METHOD  # pyright: ignore[reportAttributeAccessIssue]
        self.encodings: list[dict[str, Any]] = options.pop("encodings", [])
        self.modules: dict[str, int] = options.pop("modules", {})
        self.shapes: dict[str, list[int]] = options.pop("shapes", {})
        self.numbers: dict[str, dict[str, Any]] = options.pop("numbers", {})
        self.tied: Ties = options.pop("tied", {})
        self.format: int = options.pop("format", FORMAT)
        options.pop("quant_method", None)
        self.method = method
        self.options: dict[str, Any] = options.pop("options", {}) | options
        if self.format > FORMAT:
            raise ArtifactError(
                f"the model was written in format {self.format}, this hf_slim reads {FORMAT}; upgrade hf_slim"
            )
        if method is not None:
            config = make_stage(method, self.options).options
            why_not = _streaming_problem(find_method(method), config)
            if why_not:
                raise PlanError(
                    f"{method} cannot work while weights are loading: {why_not}. "
                    f"Load the model first, then call hf_slim.compress(model, {method!r}, ...)"
                )
            self.options = config.model_dump(mode="json", exclude_defaults=True)
        elif self.options:
            raise PlanError(
                f"SlimConfig: options {sorted(self.options)} need a method, such as SlimConfig('quantize.rtn', ...)"
            )

    def encoding_of(self, name: str) -> Encoding:
        """The stored encoding of a module.

        Raises:
            ArtifactError: a damaged description, or none.
        """
        place = self.modules[name]
        if place not in range(len(self.encodings)):
            raise ArtifactError(
                f"quantization_config: {name} is stored in encoding {place}, but {len(self.encodings)} are listed; "
                "config.json is damaged"
            )
        return read_encoding(self.encodings[place])

    def to_dict(self) -> dict[str, Any]:
        stored = {k: v for k, v in copy.deepcopy(self.__dict__).items() if v not in (None, {}, [])}
        written = self.modules or self.shapes or self.numbers or self.tied
        return {k: v for k, v in stored.items() if k not in ("method", "options")} if written else stored

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class EncodeOnLoad(ConversionOps):
    """Encode a weight as it arrives, and swap its layer."""

    def __init__(self, quantizer: SlimQuantizer):
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(self, input_dict, *, full_layer_name: str, model: nn.Module, missing_keys=None, **kwargs):
        value = next(iter(input_dict.values()))
        weight: Tensor = value[0] if isinstance(value, list) else value
        missing: set[str] = set() if missing_keys is None else missing_keys
        missing.discard(full_layer_name)
        if full_layer_name in self.quantizer.fused:
            return self._experts(model, full_layer_name, weight)
        return self._layer(model, full_layer_name.removesuffix(".weight"), weight, missing)

    def _layer(self, model: nn.Module, name: str, weight: Tensor, missing: set[str]) -> dict[str, Tensor]:
        encoding, tensors = self.quantizer.encode(name, weight, model.get_submodule(name))
        encoded = empty_like(model.get_submodule(name), encoding, weight.dtype, "meta")
        put_encoded(model, name, encoded)
        missing -= {f"{follower}.weight" for follower in followers(model, encoded)}
        return {f"{name}.{key}": tensor for key, tensor in tensors.items()}

    def _experts(self, model: nn.Module, parameter: str, fused: Tensor) -> dict[str, Tensor]:
        """Take a fused parameter apart; what no layer of the plan needs stays dense."""
        name, _, matrix = parameter.rpartition(".")
        module: Any = model.get_submodule(name)
        if not isinstance(module, Experts):  # its first parameter
            module = Experts(module, self.quantizer.fused[parameter])
            set_module(model, name, module)
        arrived: dict[str, Tensor] = {}
        for number in range(module.layout.experts):
            layer = f"{name}.{number}.{matrix.removesuffix('_bias')}"
            if matrix.endswith("_bias"):
                arrived[f"{layer}.bias"] = fused[number]
            elif self.quantizer.plans(layer):
                arrived |= self._layer(model, layer, module.layout.weight(fused, number), set())
            else:
                arrived[f"{layer}.weight"] = module.layout.weight(fused, number)
        return arrived


class SlimQuantizer(HfQuantizer):
    """What Transformers calls while it loads, trains and saves a model of ours."""

    quantization_config: SlimConfig

    def __init__(self, quantization_config: SlimConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.fused: dict[str, Layout] = {}  # parameters of experts, some of which will be encoded
        self._planned: dict[str, Layer] = {}
        self._stage: Stage

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether there are stored tensors that can be trained: survivors and centroids can, codes cannot."""
        names = self.quantization_config.modules
        return not names or any(self.quantization_config.encoding_of(name).trainable for name in names)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """What Transformers calls before it saves: a training goes on from what is saved, as a resumed one will."""
        for module in model.modules():
            if isinstance(module, EncodedModule):
                module.settle()
        return super().get_state_dict_and_metadata(model)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, dtype=None, **kwargs: Any
    ) -> PreTrainedModel:
        left = reshape(model, _stored_shapes(model, self.quantization_config))
        untied = tie(model, _stored_ties(model, self.quantization_config))
        experts = unfuse(model)
        reshape(model, left)  # experts of different sizes
        untied = tie(model, untied)  # single experts
        if self.pre_quantized:
            for name, stored_name in _stored_layers(model, self.quantization_config).items():
                module = model.get_submodule(name)
                encoding = self.quantization_config.encoding_of(stored_name)
                put_encoded(model, name, empty_like(module, encoding, module.weight.dtype, "meta"))  # pyright: ignore
            tie(model, untied)  # stored tensors
        elif self.quantization_config.method is not None:
            self._stage = make_stage(self.quantization_config.method, self.quantization_config.options)
            self._planned = stream_plan(model, self._stage.method, self._stage.options)
            for name in experts:
                if any(layer.startswith(f"{name}.") for layer in self._planned):
                    layout: Layout = model.get_submodule(name).layout  # pyright: ignore
                    self.fused |= {f"{name}.{parameter}": layout for parameter in layout.parameters()}
        fuse(model)
        leave_biases(model, bool(declare(model)))
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.fused or (
            param_name.endswith(".weight") and self.plans(param_name.removesuffix(".weight"))
        )

    def plans(self, name: str) -> bool:
        """Whether the layer will be encoded when its weight arrives."""
        return name in self._planned

    def get_quantize_ops(self) -> EncodeOnLoad:
        return EncodeOnLoad(self)

    def encode(self, name: str, weight: Tensor, module: nn.Module) -> tuple[Encoding, dict[str, Tensor]]:
        """Encode one dense weight as the method says."""
        W = weight.T if isinstance(module, Conv1D) else weight
        return find_method(self._stage.method).encode(W, self._planned[name], self._stage.options, keep=None)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        leave_biases(model, False)
        for module in model.modules():
            if isinstance(module, EncodedModule):
                module.follow()
        mark(model, _stored_shapes(model, self.quantization_config))
        return model

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        """What Transformers calls at the end of `dequantize()`: a model of other shapes still needs them stored."""
        super().remove_quantization_config(model)
        mark(model)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        make_dense(model)
        if isinstance(dtype, str):  # Transformers passes `config.dtype`, and saving a model turns that into a word
            dtype = getattr(torch, dtype)
        # a model that has the dtype already is left alone: `.to` would round its float32 buffers (rotary tables) too
        return model if dtype in (None, model.dtype) else model.to(dtype)  # pyright: ignore


def _streaming_problem(method: ModuleType, config: MethodConfig) -> str | None:
    """Why a method cannot encode one weight at a time, as they arrive."""
    if needs := method.needs(config) if hasattr(method, "needs") else method.RULES.needs:
        return f"it needs {' and '.join(needs)} data"
    if not hasattr(method, "encode"):
        return "it does not encode weights"
    return method.streaming_problem(config) if hasattr(method, "streaming_problem") else None


def _stored_layers(model: PreTrainedModel, config: SlimConfig) -> dict[str, str]:
    """Which layers of the model are stored encoded, {name: name in the config}.

    Both need not be the same: as for dense checkpoints, a model may be loaded without the head it was saved with, or
    with another one, and its layers are then called with the base model's prefix or without.

    Raises:
        ArtifactError: a layer that the saved class does not have.
    """
    layers, prefix = find_layers(model), f"{model.base_model_prefix}."
    found: dict[str, str] = {}
    lost: list[str] = []
    for stored in config.modules:
        name = next((n for n in (stored, stored.removeprefix(prefix), prefix + stored) if n in layers), None)
        if name is None:
            lost.append(stored)
        else:
            found[name] = stored
    if lost and type(model).__name__ in (model.config.architectures or ()):
        raise ArtifactError(
            [
                f"quantization_config: the model has no layer {name!r}; {nearest(name, layers)} config.json is damaged"
                for name in lost
            ]
        )
    return found


def _stored_shapes(model: PreTrainedModel, config: SlimConfig) -> Shapes:
    """The stored shapes under the names that the loaded class gives to its tensors; see `_stored_layers`."""
    named = _renaming(model)
    tensors = {named(name, True): shape for name, shape in config.shapes.items()}
    return Shapes(tensors, {named(name, False): numbers for name, numbers in config.numbers.items()})


def _stored_ties(model: PreTrainedModel, config: SlimConfig) -> Ties:
    """The stored ties under the names that the loaded class gives to its tensors."""
    named = _renaming(model)
    return {named(target, True): named(source, True) for target, source in config.tied.items()}


def _renaming(model: PreTrainedModel) -> Callable[[str, bool], str]:
    """What the loaded class calls a stored tensor (`True`) or module."""
    modules, prefix = dict(model.named_modules()), f"{model.base_model_prefix}."

    def renamed(stored: str, tensor: bool) -> str:
        names = (stored, stored.removeprefix(prefix), prefix + stored)
        return next((n for n in names if (n.rpartition(".")[0] if tensor else n) in modules), stored)

    return renamed


def mark(model: PreTrainedModel, shapes: Shapes | None = None) -> None:
    """Give the model the `quantization_config` that describes its encoded layers, shapes and ties: it saves and loads.

    A model that its config says all about is marked as a plain one; one that another quantizer (bitsandbytes) holds is
    left alone. Experts that are all dense and of one size are fused again.

    Args:
        shapes: what its config cannot say about its shapes, where that is known; otherwise it is found out, and the
            config changed where that is enough.
    """
    fuse(model)
    if getattr(model, "quantization_method", QUANT_METHOD) != QUANT_METHOD:
        return
    encodings: list[dict[str, Any]] = []
    modules: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, EncodedModule):
            description = module.encoding.model_dump(mode="json", exclude_defaults=True) | {
                "kind": module.encoding.kind
            }
            if description not in encodings:
                encodings.append(description)
            modules[name] = encodings.index(description)
    shapes = settle(model) if shapes is None else shapes
    ties = declare(model)
    if not modules and not shapes and not ties:
        _unmark(model)
        return
    stored = {"shapes": dict(shapes.tensors), "numbers": dict(shapes.numbers), "tied": ties}
    quantizer = SlimQuantizer(SlimConfig(encodings=encodings, modules=modules, **stored), pre_quantized=True)
    model.hf_quantizer = quantizer  # pyright: ignore
    model.config.quantization_config = quantizer.quantization_config
    model.is_quantized = True  # pyright: ignore
    model.quantization_method = QUANT_METHOD  # pyright: ignore


def make_dense(model: PreTrainedModel) -> None:
    """Replace every encoded layer by a dense one, and let Transformers tie weights again as the class says.

    Raises:
        ModelError: an adapter sits on layers that become Conv1D again; nothing has been changed.
    """
    encoded = {name: module for name, module in model.named_modules() if isinstance(module, EncodedModule)}
    wrapped = [n for n, m in encoded.items() if n.endswith(".base_layer") and getattr(m, "turned", False)]
    if wrapped:  # PEFT took them for linear layers, and would merge the transpose of its product
        raise ModelError(
            f"adapters were attached to {wrapped[0]} and {len(wrapped) - 1} more while encoded, and do not fit the "
            "transposed weights of the dense model: save the adapter, call model.unload() and dequantize() on what it "
            "returns, then load the adapter again"
        )
    for name in encoded:
        densify(model, name)
    if any(isinstance(m, TiedHead | TiedEmbedding) for m in model.modules()):
        raise ArtifactError("a tied head points to an embedding that is not part of the model")
    if any(isinstance(m, Experts) for m in model.modules()):
        model.__dict__.pop(
            "_weight_conversions", None
        )  # those of the artifact: the dense model saves as its class does
    fuse(model)
    model.__dict__.pop("_tied_weights_keys", None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    mark(model)


def _unmark(model: PreTrainedModel) -> None:
    for owner, attribute in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    model.is_quantized = False  # pyright: ignore


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:  # a notebook may import the package twice
    register_quantization_config(QUANT_METHOD)(SlimConfig)
    register_quantizer(QUANT_METHOD)(SlimQuantizer)
