"""Mixture-of-experts weights as ordinary linear layers.

Transformers stores the experts of a layer fused: one parameter [experts, rows, cols] for all up projections (with their
gates) and one for all down projections. Nothing that looks for linear layers finds them, though they are most of the
model. `unfuse` gives every expert linear layers of its own, which are views of the fused weights and take no memory;
`fuse` goes back, for free where the views are untouched. In between, experts are layers like any other.

    h = W_up x;   y = W_down gate(h);   out[token] = sum over its experts of weight * y

No list of architectures: a module is taken for fused experts when it says how it is built, as Transformers' decorator
`use_experts_implementation` makes it do, when its parameters have the shapes that follow from that, and when its own
forward, run on small numbers, puts out what ours does. What is not understood is left alone and named by `unseen`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hf_slim.core.probe import FAILURES, numbers, trying

Made = dict[Any, Any]
"""What tensors have become, by their ids: a tensor that is shared stays shared."""

_FLAGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


@dataclass(frozen=True)
class Layout:
    """How a fused module stores its experts.

    Args:
        up: name of the first matrix, "gate_up_proj" or "up_proj"; the second is always "down_proj".
        transposed: matrices are [experts, cols, rows] instead of [experts, rows, cols].
        bias: there are `{name}_bias` [experts, rows].
    """

    up: str
    experts: int
    width: int
    transposed: bool
    bias: bool

    @property
    def matrices(self) -> tuple[str, str]:
        return self.up, "down_proj"

    def parameters(self) -> list[str]:
        """Names of all fused parameters."""
        return [name + suffix for name in self.matrices for suffix in (("", "_bias") if self.bias else ("",))]

    def weight(self, fused: Float[Tensor, "experts a b"], number: int) -> Float[Tensor, "rows cols"]:
        """One expert's matrix, a view."""
        return fused[number].T if self.transposed else fused[number]


class Expert(nn.Module):
    """The two linear layers of one expert. `Experts` runs them."""

    def __init__(self, layers: dict[str, nn.Module]):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


class Experts(nn.Module):
    """Experts 0, 1, ... as children; computes what the fused module computes.

    Args:
        stock: the fused module. It is kept, without its weights: its activation and gating are used, and `fuse` gives
            it the weights back.
        made: what other experts' weights have become; experts that are tied stay so.
    """

    _is_hf_initialized = True  # nothing of its own to draw at random

    def __init__(self, stock: nn.Module, layout: Layout, made: Made | None = None):
        super().__init__()
        self.layout = layout
        self._stock = (stock,)  # in a tuple, so that it is no submodule
        fused = {name: stock.get_parameter(name) for name in layout.parameters()}
        for number in range(layout.experts):
            layers = {
                name: _linear(fused, name, layout, number, {} if made is None else made) for name in layout.matrices
            }
            self.add_module(str(number), Expert(layers))
        self._modules |= stock._modules
        for name, parameter in fused.items():
            stock._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        self.train(stock.training)

    def __getattr__(self, name: str) -> Any:
        """What the fused module has (`num_experts`, `config`), this one has too."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_stock"][0], name)

    def expert(self, number: int) -> Expert:
        return self._modules[str(number)]  # pyright: ignore[reportReturnType]

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens width"],
        top_k_index: Int[Tensor, "tokens k"],
        top_k_weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens width"]:
        out = torch.zeros_like(hidden_states)
        chosen = top_k_index.T
        for number in chosen.unique().tolist():
            if number >= self.layout.experts:  # no expert of this process
                continue
            place, token = torch.where(chosen == number)
            y = self._run(self.expert(number), hidden_states[token]) * top_k_weights[token, place, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out

    def _run(self, expert: Expert, x: Tensor) -> Tensor:
        stock: Any = self._stock[0]
        h = getattr(expert, self.layout.up)(x)
        y = expert.down_proj(stock._apply_gate(h) if stock.has_gate else stock.act_fn(h))
        return stock.post_expert_norm(y) if stock.has_post_expert_norm else y

    def is_dense(self) -> bool:
        """Whether every expert's layers are plain ones of the same shapes, so that it can be fused again."""
        layers = [layer for n in range(self.layout.experts) for layer in self.expert(n).children()]
        return all(type(layer) is nn.Linear for layer in layers) and self.is_even()

    def is_even(self) -> bool:
        """Whether the experts are all of one size."""
        return len({self._widths(number) for number in range(self.layout.experts)}) == 1

    def _widths(self, number: int) -> tuple[tuple[int, int], ...]:
        layers: list[Any] = [getattr(self.expert(number), name) for name in self.layout.matrices]
        return tuple((layer.out_features, layer.in_features) for layer in layers)

    def fused_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the fused parameters; of experts of different sizes, those that they once had."""
        count, stock = self.layout.experts, self._stock[0]
        if not self.is_even():
            return {name: (count, *stock.get_parameter(name).shape[1:]) for name in self.layout.parameters()}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (rows, cols) in zip(self.layout.matrices, self._widths(0), strict=True):
            shapes[name] = (count, cols, rows) if self.layout.transposed else (count, rows, cols)
            if self.layout.bias:
                shapes[f"{name}_bias"] = (count, rows)
        return shapes

    def settle(self) -> None:
        """Give the layers that are still dense weights of their own: a view would keep the fused tensor in memory."""
        for number in range(self.layout.experts):
            for parameter in self.expert(number).parameters():
                if parameter.untyped_storage().nbytes() != parameter.nbytes or not parameter.is_contiguous():
                    parameter.data = parameter.data.contiguous().clone()

    def fused(self, made: Made) -> nn.Module:
        """The stock module with the experts' weights.

        Only for dense experts. Weights that are still views of one tensor are not copied.

        Args:
            made: what other experts' weights have become.
        """
        stock, layout = self._stock[0], self.layout
        for name in layout.matrices:
            layers: list[Any] = [getattr(self.expert(n), name) for n in range(layout.experts)]
            stock._parameters[name] = _joined([layer.weight for layer in layers], layout.transposed, made)
            if layout.bias:
                stock._parameters[f"{name}_bias"] = _joined([layer.bias for layer in layers], False, made)
        return stock.train(self.training)


def unfuse(model: nn.Module) -> list[str]:
    """Replace every fused experts module that is understood, in place; works on the meta device too.

    Returns:
        Names of the modules that were replaced.
    """
    found = {name: (module, layout) for name, module in model.named_modules() if (layout := read_layout(module))}
    made: Made = {}
    for name, (module, layout) in found.items():
        _put(model, name, Experts(module, layout, made))
    return list(found)


def fuse(model: nn.Module) -> None:
    """Put the stock module back wherever all of its experts are dense; elsewhere, let go of what was fused."""
    made: Made = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts):
            if module.is_dense():
                _put(model, name, module.fused(made))
            else:
                module.settle()


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Experts are layers like any other inside; afterwards those that are all dense are stock modules again."""
    unfuse(model)
    try:
        yield
    finally:
        fuse(model)


def unseen(model: nn.Module) -> list[str]:
    """What no method will see: weights of three dimensions that belong to no layer, one sentence a kind."""
    kinds: dict[str, list[tuple[str, int]]] = {}
    for name, module in model.named_modules():
        own = [p.numel() for p in module.parameters(recurse=False) if p.dim() == 3]
        if own and not type(module).__module__.startswith("torch.nn") and read_layout(module) is None:
            kinds.setdefault(type(module).__name__, []).append((name, sum(own)))
    return [
        f"{sum(size for _, size in found):,} weights of {found[0][0]}"
        + (f" and {len(found) - 1} more like it" if len(found) > 1 else "")
        + f" ({kind}) stay as they are: hf_slim does not understand how they are stored"
        for kind, found in kinds.items()
    ]


def read_layout(module: nn.Module) -> Layout | None:
    """How a fused experts module is stored; None when it is none, or not one that is understood."""
    flags: Any = module
    if not all(hasattr(module, name) for name in (*_FLAGS, "_apply_gate")) or isinstance(module, Experts):
        return None
    up = module._parameters.get("gate_up_proj" if flags.has_gate else "up_proj")
    down = module._parameters.get("down_proj")
    if up is None or down is None or up.dim() != 3 or down.dim() != 3:
        return None
    experts, width = down.shape[0], down.shape[2 if flags.is_transposed else 1]
    name = "gate_up_proj" if flags.has_gate else "up_proj"
    layout = Layout(name, experts, width, flags.is_transposed, flags.has_bias)
    inner = down.shape[1 if flags.is_transposed else 2]
    expected = _shapes(layout, inner, flags.has_gate)
    own = {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None}
    return layout if own == expected and not module._buffers and _agrees(module, layout) else None


def _shapes(layout: Layout, inner: int, gate: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of the fused parameters of experts with `inner` hidden units."""
    rows = {layout.up: (1 + gate) * inner, "down_proj": layout.width}
    cols = {layout.up: layout.width, "down_proj": inner}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in layout.matrices:
        matrix = (cols[name], rows[name]) if layout.transposed else (rows[name], cols[name])
        shapes[name] = (layout.experts, *matrix)
        if layout.bias:
            shapes[f"{name}_bias"] = (layout.experts, rows[name])
    return shapes


@trying()
def _agrees(module: nn.Module, layout: Layout) -> bool:
    """Whether the module's own forward, on two experts of four hidden units, puts out what ours does."""
    forward = getattr(type(module).forward, "__wrapped__", None)
    if forward is None:
        return False
    small = Layout(layout.up, 2, layout.width, layout.transposed, layout.bias)
    probe = copy.copy(module)
    probe._modules = {name: _anew(child) for name, child in module._modules.items() if child is not None}
    shapes = _shapes(small, 4, bool(module.has_gate))
    probe._parameters = {name: nn.Parameter(0.5 * numbers(*shape)) for name, shape in shapes.items()}
    x, index = numbers(5, layout.width), torch.tensor([[0, 1], [1, 0], [1, 0], [0, 1], [1, 0]])
    weights = numbers(5, 2)
    try:
        theirs = forward(probe, x, index, weights)
    except FAILURES:
        return False
    ours = Experts(probe, small)(x, index, weights)
    return isinstance(theirs, Tensor) and theirs.shape == ours.shape and torch.allclose(theirs, ours, atol=1e-5)


def _anew(module: nn.Module) -> nn.Module:
    """A copy on the CPU whose parameters are all one: the original's may be on the meta device."""
    made = copy.deepcopy(module).to_empty(device="cpu").float() if any(True for _ in module.parameters()) else module
    for parameter in made.parameters():
        if made is not module:
            parameter.fill_(1.0)
    return made


def _linear(fused: dict[str, Any], name: str, layout: Layout, number: int, made: Made) -> nn.Linear:
    """One expert's layer, whose weight is a view of the fused one."""
    weight = layout.weight(fused[name].detach(), number)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=layout.bias, device="meta")
    layer.weight = _view(fused[name], weight, number, made)
    if layout.bias:
        bias = fused[f"{name}_bias"]
        layer.bias = _view(bias, bias.detach()[number], number, made)
    return layer


def _view(whole: nn.Parameter, part: Tensor, number: int, made: Made) -> nn.Parameter:
    """An expert's part of a fused parameter; the very one that it has become elsewhere."""
    key = (id(whole), number)
    if key not in made:
        made[key] = nn.Parameter(part, requires_grad=whole.requires_grad), whole  # so that its id is not used again
    return made[key][0]


def _joined(parts: Sequence[nn.Parameter], transposed: bool, made: Made) -> nn.Parameter:
    """All experts' parts of a parameter as one; the very one that they have become elsewhere."""
    key = tuple(map(id, parts))
    if key not in made:
        tensors = [part.detach() for part in parts]
        joined = _join([tensor.T for tensor in tensors] if transposed else tensors)
        made[key] = nn.Parameter(joined, requires_grad=parts[0].requires_grad), parts
    return made[key][0]


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Stack tensors of one shape; the tensor they are views of, where they follow each other in it."""
    first, step = parts[0], parts[0].numel()
    neighbours = all(
        a.untyped_storage()._cdata == b.untyped_storage()._cdata
        and b.storage_offset() - a.storage_offset() == step
        and a.stride() == b.stride()
        for a, b in pairwise(parts)
    )
    if not neighbours:
        return torch.stack(list(parts))
    return first.as_strided((len(parts), *first.shape), (step, *first.stride()), first.storage_offset())


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent).add_module(child, module)
