"""Reading a layer's weight whatever holds it, and putting an encoded layer in its place."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_slim.encodings import Encoding
from hf_slim.encodings.modules import EncodedEmbedding, EncodedLinear, EncodedModule, TiedHead
from hf_slim.encodings.packing import unpack_mask


def get_weight(module: nn.Module) -> Float[Tensor, "rows cols"]:
    """The dense weight [out_features, in_features] (a view where possible; Conv1D is turned round)."""
    if isinstance(module, EncodedModule):
        return module.decoded(module.compute_dtype).detach()
    weight: Tensor = module.weight.detach()  # pyright: ignore[reportAssignmentType, reportCallIssue]
    return weight.T if isinstance(module, Conv1D) else weight


def get_keep(module: nn.Module) -> Bool[Tensor, "rows cols"] | None:
    """Which weights pruning left, or None when the layer is not stored as a pruned one."""
    if isinstance(module, EncodedModule) and getattr(module.encoding, "survivors", None) is not None:
        return unpack_mask(module.tensors()["mask"], module.cols)
    return None


def empty_like(module: nn.Module, encoding: Encoding, dtype: torch.dtype, device: torch.device | str) -> EncodedModule:
    """An encoded layer of the module's shape, bias taken over, stored tensors not filled in yet."""
    if isinstance(module, nn.Embedding):
        return EncodedEmbedding(
            module.num_embeddings, module.embedding_dim, encoding, module.padding_idx, dtype=dtype, device=device
        )
    turned = isinstance(module, Conv1D) or getattr(module, "turned", False)
    rows, cols = (module.nf, module.nx) if isinstance(module, Conv1D) else (module.out_features, module.in_features)
    encoded = EncodedLinear(cols, rows, encoding, bias=False, dtype=dtype, device=device, turned=turned)
    encoded.bias = module.bias  # pyright: ignore[reportAttributeAccessIssue]
    return encoded


def encode_layer(model: nn.Module, name: str, encoding: Encoding, tensors: dict[str, Tensor]) -> None:
    """Put the encoded weight in the place of the layer called `name`; heads tied to an embedding follow it."""
    module = model.get_submodule(name)
    dtype = module.compute_dtype if isinstance(module, EncodedModule) else module.weight.dtype
    encoded = empty_like(module, encoding, dtype, "meta")  # pyright: ignore[reportArgumentType]
    encoded.put(tensors)
    put_encoded(model, name, encoded)


def put_encoded(model: nn.Module, name: str, encoded: EncodedModule) -> None:
    """Put an encoded layer in the place of the layer called `name`; heads tied to an embedding follow it."""
    encoded.train(model.get_submodule(name).training)
    set_module(model, name, encoded)
    if isinstance(encoded, EncodedEmbedding):
        _tie_heads(model, f"{name}.weight", encoded)


def densify(model: nn.Module, name: str) -> None:
    """Put a plain layer in the place of an encoded one; its weight is what the stored tensors decode to."""
    module = model.get_submodule(name)
    weight = get_weight(module)
    dense: nn.Linear | nn.Embedding | Conv1D
    with torch.device("meta"):
        if isinstance(module, EncodedEmbedding):
            dense = nn.Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx)
        elif module.turned:
            dense, weight = Conv1D(module.rows, module.cols), weight.T.contiguous()  # pyright: ignore
        else:
            dense = nn.Linear(module.cols, module.rows, bias=False)  # pyright: ignore
    if not isinstance(dense, nn.Embedding):
        dense.bias = module.bias  # pyright: ignore
    dense.weight = nn.Parameter(weight)
    dense.train(module.training)
    set_module(model, name, dense)
    for head in tied_heads(model, module):
        tied = model.get_submodule(head)
        linear = nn.Linear(module.cols, module.rows, bias=False, device="meta")  # pyright: ignore
        linear.weight, linear.bias = dense.weight, tied.bias  # pyright: ignore
        set_module(model, head, linear)


def tied_heads(model: nn.Module, embedding: nn.Module) -> list[str]:
    """Names of the heads that share an encoded embedding."""
    return [name for name, m in model.named_modules() if isinstance(m, TiedHead) and m._source[0] is embedding]


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _tie_heads(model: nn.Module, source: str, embedding: EncodedEmbedding) -> None:
    """Replace the heads that share the parameter `source`, and make Transformers forget about that tie.

    Transformers would otherwise tie `weight`s that are no longer there, at the next load or `tie_weights()`.
    """
    keys: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    for target in [t for t, s in keys.items() if s == source]:
        head = target.removesuffix(".weight")
        bias = model.get_submodule(head).bias
        set_module(model, head, TiedHead(embedding, bias))  # pyright: ignore[reportArgumentType]
        del keys[target]
    own: dict[str, str] = dict(getattr(model, "_tied_weights_keys", None) or {})
    model.all_tied_weights_keys = keys  # pyright: ignore[reportAttributeAccessIssue]
    model._tied_weights_keys = {k: v for k, v in own.items() if k in keys}  # pyright: ignore
