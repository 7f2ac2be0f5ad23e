"""Which rows of which layers feed which input columns of another layer, found out with gradients on small numbers.

A block, or one expert, is copied with small random weights in float32, and run once. To every linear layer's output
y [tokens, rows] a zero is added that remembers its gradient. For a random sum over some input columns of a layer,

    f = Σ_t Σ_(c in columns) w[t, c] x[t, c],        df / dy[t, r] != 0 for some token t

tells which rows feed these columns, of all layers in one backward pass. What does not reach a column has a gradient
that is zero exactly: nothing is estimated, and no threshold is needed. Which of many units a row feeds takes two passes
a bit of the unit's number: with the units whose bit is set, and with the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from hf_slim.core.probe import numbers

Run = Callable[[nn.Module], Any]


def with_small_weights(module: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> nn.Module:
    """A float32 copy whose linear layers are plain ones with small random weights; the original may be on meta.

    Args:
        shapes: rows and columns of the linear layers, by their names below the module.
    """
    layers = {id(module.get_submodule(name)): _small(module.get_submodule(name), *s) for name, s in shapes.items()}
    made = copy.deepcopy(module, dict(layers))
    _fill(made)
    return made.float().eval().requires_grad_(False)


def _small(layer: nn.Module, rows: int, cols: int) -> nn.Linear:
    made = nn.Linear(cols, rows, bias=False, device="meta")
    device = next((p.device for p in layer.parameters() if not p.is_meta), torch.device("cpu"))
    made.weight = nn.Parameter(numbers(rows, cols).div_(cols**0.5).to(device))
    if getattr(layer, "bias", None) is not None:
        made.bias = nn.Parameter(0.1 * numbers(rows).to(device))
    return made


def _fill(module: nn.Module) -> None:
    """Give norms and what is on the meta device small numbers: a trained bias may keep a ReLU shut for all tokens."""
    for name, parameter in list(module.named_parameters()):
        if parameter.dim() == 1 or parameter.is_meta:
            around = 1.0 if name.endswith("weight") and parameter.dim() == 1 else 0.0
            device = None if parameter.is_meta else parameter.device
            owner = module.get_submodule(name.rpartition(".")[0])
            owner._parameters[name.rpartition(".")[2]] = nn.Parameter(
                (around + 0.1 * numbers(*parameter.shape)).to(device)
            )
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            owner = module.get_submodule(name.rpartition(".")[0])
            owner._buffers[name.rpartition(".")[2]] = (0.1 * numbers(*buffer.shape)).to(buffer.dtype)


class Wiring:
    """One run of a module, ready to be asked what feeds what.

    Args:
        module: as `with_small_weights` makes it.
        layers: names of its linear layers.
        run: runs it on something.

    Attributes:
        inputs: what each layer was handed, [..., cols]; a layer that ran twice, or never, is left out.
    """

    def __init__(self, module: nn.Module, layers: Sequence[str], run: Run):
        self.inputs: dict[str, Tensor] = {}
        self._taps: dict[str, Tensor] = {}
        twice: set[str] = set()

        def hook(name: str) -> Callable[..., Tensor]:
            def tap(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
                if name in self._taps:
                    twice.add(name)
                self.inputs[name], self._taps[name] = args[0], torch.zeros_like(out, requires_grad=True)
                return out + self._taps[name]

            return tap

        handles = [module.get_submodule(name).register_forward_hook(hook(name)) for name in layers]
        try:
            with torch.enable_grad():
                run(module)
        finally:
            for handle in handles:
                handle.remove()
        for name in twice:
            del self.inputs[name], self._taps[name]

    def feeds(self, reader: str, columns: Int[Tensor, " n"]) -> dict[str, Bool[Tensor, " rows"]]:
        """Which rows of the other layers feed any of these input columns of `reader`; layers without any are left out.

        All on the CPU.
        """
        x = self.inputs[reader]
        if not x.requires_grad:
            return {}
        with torch.enable_grad():
            target = (x * numbers(*x.shape).to(x.device))[..., columns.to(x.device)].sum()
        gradients = torch.autograd.grad(target, list(self._taps.values()), retain_graph=True, allow_unused=True)
        rows = {
            name: (gradient != 0).flatten(0, -2).any(0).cpu()
            for name, gradient in zip(self._taps, gradients, strict=True)
            if gradient is not None
        }
        return {name: fed for name, fed in rows.items() if fed.any()}

    def separates(self, reader: str, size: int) -> bool | None:
        """Whether runs of `size` columns are fed apart, as far as a few of them tell: no row feeds two and not all.

        Returns:
            None where rows feed all or none of them, and so will those of any other size.
        """
        units = self.inputs[reader].shape[-1] // size
        sample = sorted({0, 1, units // 2, units - 1})
        hits: dict[str, Tensor] = {}
        for unit in sample:
            for name, fed in self.feeds(reader, torch.arange(unit * size, (unit + 1) * size)).items():
                hits[name] = hits.get(name, 0) + fed.long()
        if not any(((count > 0) & (count < len(sample))).any() for count in hits.values()):
            return None
        return not any(((count > 1) & (count < len(sample))).any() for count in hits.values())

    def writers(self, reader: str, size: int) -> dict[str, Int[Tensor, "units rows"]]:
        """Rows that feed one run of `size` columns of the reader and no other; layers where every run has as many."""
        cols = self.inputs[reader].shape[-1]
        units = cols // size
        unit_of = torch.arange(cols) // size
        number: dict[str, Tensor] = {}
        alone: dict[str, Tensor] = {}
        for bit in range(max(1, (units - 1).bit_length())):
            is_set = (unit_of >> bit) % 2 == 1
            ones = self.feeds(reader, is_set.nonzero().flatten())
            zeros = self.feeds(reader, (~is_set).nonzero().flatten())
            for name in ones.keys() | zeros.keys():
                none = torch.zeros(self._taps[name].shape[-1], dtype=torch.bool)
                one, zero = ones.get(name, none), zeros.get(name, none)
                alone[name] = alone.get(name, ~none) & (one ^ zero)
                number[name] = number.get(name, none.long()) + (one.long() << bit)
        found = {name: _gathered(number[name], alone[name], units) for name in self._taps if name in number}
        return {name: rows for name, rows in found.items() if rows is not None}


def _gathered(
    number: Int[Tensor, " rows"], alone: Bool[Tensor, " rows"], units: int
) -> Int[Tensor, "units rows_of_one"] | None:
    """Rows by unit, of those that feed one alone; None where units have different numbers of rows, or none."""
    rows = alone.nonzero().flatten()
    counts = torch.bincount(number[rows], minlength=units)
    if len(counts) != units or int(counts.min()) == 0 or int(counts.min()) != int(counts.max()):
        return None
    return rows[number[rows].argsort(stable=True)].view(units, -1)
