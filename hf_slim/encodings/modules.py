"""Layers that hold an encoded weight. Their state dict is the layout on disk.

`EncodedLinear` stands in for `nn.Linear` and GPT-2's `Conv1D`, `EncodedEmbedding` for `nn.Embedding`, and `TiedHead`
for an output head that shares an encoded embedding. All are subclasses of what they replace, so PEFT and Transformers
treat them as such; `.weight` decodes on demand and is no parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_slim.core.arithmetic import fast_dtype
from hf_slim.encodings.activations import quantize_tokens
from hf_slim.encodings.affine import row_runs
from hf_slim.encodings.base import Encoding
from hf_slim.encodings.decoded import DecodedWeight
from hf_slim.encodings.kernels import FEW_ROWS, Packed, PackedCodes, kernel_for


class EncodedModule(nn.Module):
    """The stored tensors of one weight [rows, cols], and what it takes to decode them.

    Buffers keep their stored dtype through `.to(dtype)`, `.half()` and the like: codes and scales were chosen for it.
    Trainable tensors (the survivors of a sparse weight, centroids) are parameters and follow the model's dtype, in
    which they learn. Where an encoding stores them in another one (float16 centroids of a float32 model), every product
    rounds them to that, straight-through, and so does the state dict: what is saved is what was computed with. The
    digits beyond are an optimizer's memory of small steps; `settle` gives them up.

    A packed kernel wants the codes in a layout of its own. The first product of a few rows brings them into it, and
    the stored codes are dropped; whoever asks for these (state dict, copy, pickle, move, `tensors()`) gets them back
    bit for bit, and the packed form goes. Embeddings whose rows cannot be read from the packed form keep both forms; so
    do weights that pruning left little of, which are multiplied as sparse rows.
    """

    _is_hf_initialized = True  # Transformers must not draw these at random
    encoding: Encoding
    rows: int
    cols: int
    compute_dtype: torch.dtype
    _cache: Tensor | None
    _cached_versions: list[int]
    _packed: Packed | None = None
    _packed_stamp: tuple[tuple[int, int], ...]

    def _hold(self, encoding: Encoding, rows: int, cols: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.encoding, self.rows, self.cols, self.compute_dtype = encoding, rows, cols, dtype
        self._cache = None
        for name, spec in encoding.layout(rows, cols, dtype).items():
            if name in encoding.trainable:
                self.register_parameter(name, nn.Parameter(torch.empty(spec.shape, dtype=dtype, device=device)))
            else:
                self.register_buffer(name, torch.empty(spec.shape, dtype=spec.dtype, device=device))

    def tensors(self) -> dict[str, Tensor]:
        """Stored tensors by name, in the dtypes they are stored in.

        Where gradients are wanted, trainable ones are numbers of that dtype in the parameter's.
        """
        layout = self.encoding.layout(self.rows, self.cols, self.compute_dtype)
        return {name: _stored(getattr(self, name), spec.dtype) for name, spec in layout.items()}

    def settle(self) -> None:
        """Leave trainable tensors as they are stored."""
        with torch.no_grad():
            for name, dtype in self._rounded().items():
                parameter = self.get_parameter(name)
                stored = parameter.to(dtype).to(parameter.dtype)
                if not torch.equal(parameter, stored):  # a kept decoded weight would have to be made anew
                    parameter.copy_(stored)

    def follow(self) -> None:
        """Bring trainable tensors, which may have arrived as they are stored, into the model's dtype."""
        for name in self.encoding.trainable:
            parameter = self._parameters.get(name)
            if parameter is not None and parameter.dtype != self.compute_dtype:
                parameter.data = parameter.data.to(self.compute_dtype)

    def _rounded(self) -> dict[str, torch.dtype]:
        """Trainable tensors that are stored in another dtype than they have, and that dtype."""
        layout = self.encoding.layout(self.rows, self.cols, self.compute_dtype)
        own = {name: self._parameters.get(name) for name in self.encoding.trainable}
        return {name: layout[name].dtype for name, p in own.items() if p is not None and p.dtype != layout[name].dtype}

    def put(self, tensors: dict[str, Tensor]) -> None:
        """Take over stored tensors, which must have the layout that the encoding announces.

        A trainable one may be narrower than the model computes in for the moment (`core/precision.py`).
        """
        self.unpack()
        for name, spec in self.encoding.layout(self.rows, self.cols, self.compute_dtype).items():
            got = tensors[name]
            narrower = name in self.encoding.trainable and torch.promote_types(got.dtype, spec.dtype) == spec.dtype
            if tuple(got.shape) != spec.shape or (got.dtype != spec.dtype and not narrower):
                raise ValueError(f"{name}: got {tuple(got.shape)} {got.dtype}, the encoding stores {spec}")
            setattr(self, name, nn.Parameter(got.to(self.compute_dtype)) if name in self.encoding.trainable else got)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """The weight [rows, cols] in `dtype`."""
        kept = self._kept(dtype)
        if kept is not None:
            return kept
        if self._trains():
            return self.encoding.decode(self.tensors(), self.rows, self.cols).to(dtype)
        runs = self._runs()
        place, run = next(runs)
        if len(run) == self.rows:
            return run.to(dtype)
        W = run.new_empty(self.rows, self.cols, dtype=dtype)
        W[place] = run
        for place, run in runs:
            W[place] = run
        return W

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + b for x [..., cols]."""
        if self._integer_activations:
            q, scale = quantize_tokens(x)
            y = self._multiply(q, None, x.dtype) * scale
            return (y if bias is None else y + bias).to(x.dtype)
        return self._multiply(x, bias, x.dtype)

    def _multiply(self, x: Tensor, bias: Tensor | None, precision: torch.dtype) -> Tensor:
        """x Wᵀ + b, as plainly as dense layers do it where Autograd or autocast have to see it. Else by a packed kernel
        for a few rows; for many, with runs of decoded rows, in a dtype that the processor is fast in. Numbers may be
        rounded to `precision`.
        """
        plainly = torch.is_autocast_enabled(x.device.type) or (
            torch.is_grad_enabled() and (x.requires_grad or self._trains())
        )
        if self.encoding.multiplies(x.numel() // self.cols, self.rows, self.cols) and self._kept(precision) is None:
            dtype = x.dtype if plainly else fast_dtype(precision, x.device)
            b = None if bias is None else bias.to(dtype)
            y = self.encoding.multiply(x.to(dtype), self.tensors(), self.rows, self.cols, b)
            return y if plainly else y.to(x.dtype)
        if plainly:
            return F.linear(x, self.decoded(x.dtype), bias)
        flat = x.reshape(-1, self.cols)
        kept = self._kept(precision)
        if kept is not None:
            y = F.linear(flat.to(precision), kept, bias)
        elif len(flat) <= FEW_ROWS and (packed := self._pack(precision, x.device)) is not None:
            y = packed.product(flat) if bias is None else packed.product(flat) + bias
        else:
            dtype = fast_dtype(precision, x.device)
            y, wide, b = x.new_empty(len(flat), self.rows), flat.to(dtype), None if bias is None else bias.to(dtype)
            for place, run in self._runs():
                y[:, place] = F.linear(wide, run.to(dtype), None if b is None else b[place])
        return y.view(*x.shape[:-1], self.rows)

    @property
    def _integer_activations(self) -> bool:
        return getattr(self.encoding, "activations", None) is not None

    def _pack(self, dtype: torch.dtype, device: torch.device) -> Packed | None:
        """The packed form, if there is a kernel for activations of `dtype`; it is made once."""
        if self._packed is not None and self._packed_stamp == self._stamp() and dtype in self._packed.dtypes:
            return self._packed
        kernel = kernel_for(self.encoding, self.cols, dtype, device, self.rows)
        if kernel is None:
            return None
        self.unpack()
        with torch.inference_mode(False), torch.no_grad():  # what is kept must outlive inference mode
            packed = kernel(self.encoding, self.tensors(), self.rows, self.cols)  # pyright: ignore[reportArgumentType]
        codes = isinstance(packed, PackedCodes) and packed.reversible
        if codes and (packed.by_row or not isinstance(self, nn.Embedding)):
            del self._buffers["codes"]
        self.register_buffer("packed", packed.weight, persistent=False)
        self._packed, self._packed_stamp = packed, self._stamp()
        return packed

    @property
    def _alone(self) -> PackedCodes | None:
        """The packed form, if the stored codes were dropped for it."""
        packed = self._packed
        return packed if isinstance(packed, PackedCodes) and "codes" not in self._buffers else None

    def unpack(self) -> None:
        """Bring the stored codes back, and drop the packed form."""
        if self._packed is None:
            return
        packed, self._packed = self._alone, None
        del self._buffers["packed"]
        if packed is not None:
            with torch.inference_mode(False), torch.no_grad():
                stored = {"codes": packed.stored_codes(), **self._buffers}
            self._buffers.clear()
            self._buffers.update(stored)

    def __getattr__(self, name: str) -> Any:
        if name == "codes" and name not in self._buffers:
            self.unpack()
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        self.unpack()  # the layout is this processor's
        return self.__dict__.copy()

    def _runs(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in runs of rows, from whichever form the codes are in."""
        packed = self._alone
        if packed is None:
            yield from self.encoding.runs(self.tensors(), self.rows, self.cols)
            return
        for place in row_runs(self.rows, self.cols):
            yield place, packed.encoding.dequantize(packed.codes(place), self._grid(place))

    def _grid(self, rows: slice | Tensor) -> dict[str, Tensor]:
        return {name: tensor[rows] for name, tensor in self._buffers.items() if name in ("scales", "zeros")}  # pyright: ignore

    def _stamp(self) -> tuple[tuple[int, int], ...]:
        """Changes when a stored tensor does."""
        stored = [*self._buffers.values(), *(self._parameters.get(name) for name in self.encoding.trainable)]
        return tuple((id(t), 0 if t.is_inference() else t._version) for t in stored if t is not None)

    def _trains(self) -> bool:
        """Whether gradients are wanted for what is stored."""
        if not torch.is_grad_enabled():
            return False
        stored = [*self._parameters.items(), *self._buffers.items()]
        return any(t is not None and t.requires_grad for name, t in stored if name != "bias")

    def cache_decoded(self, on: bool = True) -> None:
        """Decode once and keep the dense weight (dense speed, dense memory), or drop it again."""
        self._cache = None
        if on:
            with torch.no_grad():
                self._cache, self._cached_versions = self.decoded(self.compute_dtype), self._versions()

    def compute_in(self, dtype: torch.dtype) -> None:
        """Decode to `dtype` from now on; a kept weight is decoded anew, because widening a rounded one loses digits."""
        changed, self.compute_dtype = dtype != self.compute_dtype, dtype
        if changed and self._cache is not None:
            self.cache_decoded()

    def _kept(self, dtype: torch.dtype) -> Tensor | None:
        """The weight that `cache_decoded` kept, unless it is not what is stored: other dtype, or trained since."""
        if self._cache is None or self._cache.dtype != dtype or self._cached_versions != self._versions():
            return None
        return None if self._trains() else self._cache

    def _versions(self) -> list[int]:
        trainable = [self._parameters.get(name) for name in self.encoding.trainable]
        return [0 if tensor.is_inference() else tensor._version for tensor in trainable if tensor is not None]

    @property
    def weight(self) -> Tensor:
        with torch.no_grad():
            return self.decoded(self.compute_dtype).as_subclass(DecodedWeight)

    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.encoding.nbytes(self.rows, self.cols, self.compute_dtype)

    def resident_bytes(self) -> int:
        """Bytes that a product reads in the present form: packed, once a kernel has been used."""
        return self.nbytes() if self._packed is None else self._packed.nbytes()

    def extra_repr(self) -> str:
        return f"{self.rows} x {self.cols}, {self.encoding.describe()}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        self.unpack()
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        if self._cache is not None:
            self._cache = fn(self._cache)  # to another device, perhaps
        self.compute_in(fn(torch.empty(0, dtype=self.compute_dtype)).dtype)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self.unpack()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, dtype in self._rounded().items():
            destination[prefix + name] = destination[prefix + name].detach().to(dtype)

    def _load_from_state_dict(self, *args, **kwargs):
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)
        self.follow()
        if self._cache is not None:
            self.cache_decoded()


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as it is stored; where it learns, rounded straight-through."""
    if tensor.dtype == dtype:
        return tensor
    rounded = tensor.detach().to(dtype)
    if not (tensor.requires_grad and torch.is_grad_enabled()):
        return rounded
    return rounded.to(tensor.dtype) + (tensor - tensor.detach())


class EncodedLinear(EncodedModule, nn.Linear):
    """y = x Wᵀ + b with an encoded W [out_features, in_features].

    Args:
        turned: it stands in for a Conv1D, and must become one again when made dense.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        encoding: Encoding,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        turned: bool = False,
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.turned = in_features, out_features, turned
        self._hold(encoding, out_features, in_features, dtype, device)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)

    def reset_parameters(self) -> None:
        """Nothing to draw at random: the weight arrives encoded."""


class EncodedEmbedding(EncodedModule, nn.Embedding):
    """Rows of an encoded table [num_embeddings, embedding_dim]."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        encoding: Encoding,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self._hold(encoding, num_embeddings, embedding_dim, dtype, device)

    def forward(self, ids: Tensor) -> Tensor:
        kept = self._kept(self.compute_dtype)
        if kept is not None:
            return kept[ids]
        rows = self._take(ids.flatten())
        return rows.to(self.compute_dtype).view(*ids.shape, self.cols)

    def _take(self, ids: Tensor) -> Tensor:
        packed = self._alone
        if packed is None:
            return self.encoding.take(self.tensors(), ids, self.rows, self.cols)
        return packed.encoding.dequantize(packed.codes(ids), self._grid(ids))

    def reset_parameters(self) -> None:
        """Nothing to draw at random: the weight arrives encoded."""


class TiedHead(nn.Linear):
    """An output head whose weight is an encoded embedding; it stores its bias only."""

    _is_hf_initialized = True

    def __init__(self, source: EncodedModule, bias: Tensor | None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = source.cols, source.rows
        self._source = (source,)  # in a tuple, so that it is no submodule: the tensors are stored once
        self.bias = bias  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._source[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return self._source[0].product(x, self.bias)

    def reset_parameters(self) -> None:
        """Nothing to draw at random: the weight arrives encoded."""

    def extra_repr(self) -> str:
        return f"tied to an encoded {self.out_features} x {self.in_features} embedding"


def cache_decoded(model: nn.Module, on: bool = True) -> None:
    """Decode every encoded layer once and keep the dense weights (`on`), or drop them.

    A decoded model runs at the dense model's speed and takes the dense model's memory; what is saved stays encoded.
    """
    for module in model.modules():
        if isinstance(module, EncodedModule):
            module.cache_decoded(on)
