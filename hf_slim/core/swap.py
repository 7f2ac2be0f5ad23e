"""Reading a layer's weight whatever holds it, and putting an encoded layer in its place."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_slim.core.probe import embedding_scale
from hf_slim.encodings import Encoding
from hf_slim.encodings.embeddings import EncodedScaledEmbedding, TiedEmbedding, dense_embedding
from hf_slim.encodings.modules import EncodedEmbedding, EncodedLinear, EncodedModule, TiedHead
from hf_slim.encodings.places import load_places
from hf_slim.encodings.tied import TiedLinear


def get_weight(module: nn.Module) -> Float[Tensor, "rows cols"]:
    """The dense weight [out_features, in_features] (a view where possible; Conv1D is turned round)."""
    if isinstance(module, EncodedModule):
        return module.decoded(module.compute_dtype).detach()
    weight: Tensor = module.weight.detach()  # pyright: ignore[reportAssignmentType, reportCallIssue]
    return weight.T if isinstance(module, Conv1D) else weight


def get_keep(module: nn.Module) -> Bool[Tensor, "rows cols"] | None:
    """Which weights pruning left, or None when the layer is not stored as a pruned one."""
    if isinstance(module, EncodedModule) and getattr(module.encoding, "survivors", None) is not None:
        return load_places(module.tensors(), module.rows, module.cols, module.encoding.pattern)  # pyright: ignore
    return None


def empty_like(module: nn.Module, encoding: Encoding, dtype: torch.dtype, device: torch.device | str) -> EncodedModule:
    """An encoded layer of the module's shape, bias taken over, stored tensors not filled in yet."""
    if isinstance(module, nn.Embedding):
        return _empty_embedding(module, encoding, dtype, device)
    turned = isinstance(module, Conv1D) or getattr(module, "turned", False)
    rows, cols = (module.nf, module.nx) if isinstance(module, Conv1D) else (module.out_features, module.in_features)
    encoded = EncodedLinear(cols, rows, encoding, bias=False, dtype=dtype, device=device, turned=turned)
    encoded.bias = module.bias  # pyright: ignore[reportAttributeAccessIssue]
    return encoded


def _empty_embedding(
    module: nn.Embedding, encoding: Encoding, dtype: torch.dtype, device: torch.device | str
) -> EncodedEmbedding:
    shape, padding = (module.num_embeddings, module.embedding_dim), module.padding_idx
    scale, stock = _look_up(module)
    if stock is nn.Embedding:
        return EncodedEmbedding(*shape, encoding, padding, dtype=dtype, device=device)
    return EncodedScaledEmbedding(*shape, encoding, padding, scale, stock, dtype=dtype, device=device)


def _look_up(module: nn.Embedding) -> tuple[float, type[nn.Embedding]]:
    """The constant that an embedding scales its rows by, and the class that it has when dense."""
    if isinstance(module, EncodedScaledEmbedding | TiedEmbedding):
        return module.scale, module.stock
    if isinstance(module, EncodedEmbedding):
        return 1.0, nn.Embedding
    return embedding_scale(module) or 1.0, type(module)


def encode_layer(model: nn.Module, name: str, encoding: Encoding, tensors: dict[str, Tensor]) -> None:
    """Put the encoded weight in the place of the layer called `name`; what is tied to an embedding follows it."""
    module = model.get_submodule(name)
    dtype = module.compute_dtype if isinstance(module, EncodedModule) else module.weight.dtype
    encoded = empty_like(module, encoding, dtype, "meta")  # pyright: ignore[reportArgumentType]
    encoded.put(tensors)
    put_encoded(model, name, encoded)


def put_encoded(model: nn.Module, name: str, encoded: EncodedModule) -> None:
    """Put an encoded layer in the place of the layer called `name`; what shares its weight follows it."""
    module = model.get_submodule(name)
    encoded.train(module.training)
    if isinstance(encoded, EncodedLinear):
        for sharer in _sharers(model, module):
            tied = model.get_submodule(sharer)
            turned = isinstance(tied, Conv1D) or getattr(tied, "turned", False)
            set_module(model, sharer, TiedLinear(encoded, tied.bias, turned).train(tied.training))  # pyright: ignore
    set_module(model, name, encoded)
    if isinstance(encoded, EncodedEmbedding):
        _tie(model, f"{name}.weight", encoded)


def _sharers(model: nn.Module, module: nn.Module) -> list[str]:
    """Names of the other layers that have the weight of a layer, dense or encoded."""
    if isinstance(module, EncodedModule):
        return followers(model, module)
    weight = module._parameters["weight"]
    return [n for n, m in model.named_modules() if m is not module and m._parameters.get("weight") is weight]


def densify(model: nn.Module, name: str) -> None:
    """Put a plain layer in the place of an encoded one; its weight is what the stored tensors decode to."""
    module = model.get_submodule(name)
    weight = get_weight(module)
    dense: nn.Linear | nn.Embedding | Conv1D
    if isinstance(module, EncodedEmbedding):
        dense = dense_embedding(weight, module.padding_idx, *_look_up(module))
    elif module.turned:
        dense = _conv1d(nn.Parameter(weight.T.contiguous()), module.bias)  # pyright: ignore
    else:
        dense = _linear(nn.Parameter(weight), module.bias)  # pyright: ignore
    dense.train(module.training)
    set_module(model, name, dense)
    for follower in followers(model, module):
        tied = model.get_submodule(follower)
        if isinstance(tied, TiedEmbedding):
            again: nn.Module = dense_embedding(weight, tied.padding_idx, tied.scale, tied.stock)
            again.weight = dense.weight
        elif getattr(tied, "turned", False):
            again = _conv1d(dense.weight, tied.bias)  # pyright: ignore
        else:
            again = _linear(dense.weight, tied.bias)  # pyright: ignore
        set_module(model, follower, again.train(tied.training))


def _conv1d(weight: nn.Parameter, bias: nn.Parameter) -> Conv1D:
    with torch.device("meta"):
        turned = Conv1D(weight.shape[1], weight.shape[0])
    turned.weight, turned.bias = weight, bias
    return turned


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight, linear.bias = weight, bias  # pyright: ignore[reportAttributeAccessIssue]
    return linear


def followers(model: nn.Module, embedding: nn.Module) -> list[str]:
    """Names of the heads, embeddings and layers that share the weight of an encoded one."""
    return [
        name
        for name, m in model.named_modules()
        if isinstance(m, TiedHead | TiedEmbedding) and m._source[0] is embedding
    ]


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _tie(model: nn.Module, source: str, embedding: EncodedEmbedding) -> None:
    """Replace what shares the parameter `source`, and make Transformers forget about that tie.

    Transformers would otherwise tie `weight`s that are no longer there, at the next load or `tie_weights()`.
    """
    keys: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    for target in [t for t, s in keys.items() if s == source]:
        name = target.removesuffix(".weight")
        tied = model.get_submodule(name)
        if isinstance(tied, nn.Embedding):
            follower: nn.Module = TiedEmbedding(embedding, *_look_up(tied))
        else:
            follower = TiedHead(embedding, tied.bias)  # pyright: ignore[reportArgumentType]
        set_module(model, name, follower.train(tied.training))
        del keys[target]
    own: dict[str, str] = dict(getattr(model, "_tied_weights_keys", None) or {})
    model.all_tied_weights_keys = keys  # pyright: ignore[reportAttributeAccessIssue]
    model._tied_weights_keys = {k: v for k, v in own.items() if k in keys}  # pyright: ignore
