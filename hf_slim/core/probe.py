"""What a module computes, found out by trying it on small numbers, for subclasses of PyTorch's layers.

Transformers subclasses `nn.Linear` and `nn.Embedding`: some compute the same (Falcon's), some multiply the rows they
look up by a constant (Gemma's, BART's), some do something else altogether (routers, grouped layers). Their names decide
nothing: an instance with a tiny weight is run, and what it puts out is compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

FAILURES = (
    *(ArithmeticError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError),
    StrictDataclassError,
)
"""What a module or a config may raise when it is tried with what it was not written for."""


def is_plain_linear(module: nn.Module) -> bool:
    """Whether it computes x Wᵀ + b with a dense weight of its own, a subclass of `nn.Linear` included.

    PyTorch's own subclasses do not count: the attention that owns them reads their weight and never calls them.
    """
    cls = type(module)
    if cls is nn.Linear:
        return True
    if not isinstance(module, nn.Linear) or cls.__module__.startswith("torch."):
        return False
    weight = module._parameters.get("weight")
    return type(weight) is nn.Parameter and weight.is_floating_point() and _computes_linear(cls)


def embedding_scale(module: nn.Module) -> float | None:
    """What the rows of a dense embedding are multiplied by when they are looked up; None for anything else."""
    if not isinstance(module, nn.Embedding) or type(module._parameters.get("weight")) is not nn.Parameter:
        return None
    if module.max_norm is not None:
        return None
    if type(module) is nn.Embedding:
        return 1.0
    scale = next((getattr(module, name) for name in SCALES if getattr(module, name, None) is not None), 1.0)
    return float(scale) if _computes_scaled(type(module)) else None


SCALES = ("scalar_embed_scale", "embed_scale")  # the number comes first: a buffer on the meta device has no value


def numbers(*shape: int) -> Float[Tensor, "..."]:
    """The same small numbers every time."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)


@contextmanager
def trying() -> Iterator[None]:
    """Real numbers and no gradients inside, also while Transformers builds a model on the meta device."""
    with torch.device("cpu"), torch.no_grad():
        yield


@cache
@trying()
def _computes_linear(cls: type[nn.Linear]) -> bool:
    probe = cls.__new__(cls)
    nn.Module.__init__(probe)
    probe.in_features, probe.out_features = 3, 2
    probe.weight, probe.bias = nn.Parameter(numbers(2, 3)), nn.Parameter(numbers(2))
    x = numbers(2, 5, 3)
    return _same(probe, x, F.linear(x, probe.weight, probe.bias))


@cache
@trying()
def _computes_scaled(cls: type[nn.Embedding]) -> bool:
    probe = cls.__new__(cls)
    nn.Module.__init__(probe)
    probe.__dict__ |= {"num_embeddings": 4, "embedding_dim": 3, "padding_idx": None, "max_norm": None}
    probe.__dict__ |= {"norm_type": 2.0, "scale_grad_by_freq": False, "sparse": False}
    probe.weight = nn.Parameter(numbers(4, 3))
    probe.__dict__ |= dict.fromkeys(SCALES, torch.tensor(3.0))
    ids = torch.tensor([[0, 3, 1]])
    return _same(probe, ids, 3.0 * probe.weight[ids])


def _same(module: nn.Module, x: Tensor, expected: Tensor) -> bool:
    try:
        out = module(x)
    except FAILURES:
        return False
    return isinstance(out, Tensor) and out.shape == expected.shape and torch.allclose(out, expected, atol=1e-5)
