"""What a solver learns about the inputs of a block's layers: sums of x xᵀ, gathered while the block runs.

Layers fed by the same tensor (q, k and v; gate and up) share one sum, computed once. Tokens may be weighted, once for
every group of a layer's outputs: the Hessian of GuidedQuant (Kim et al. 2025, arXiv:2505.07004) is that of the loss,
block-diagonal over tokens, averaged over the outputs of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate.utils import reduce
from jaxtyping import Float
from torch import Tensor, nn

from hf_slim.core.parallel import processes

TILE = 384  # columns of a Hessian computed together; a quarter to a half of it need not be computed at all


@dataclass(frozen=True)
class Statistics:
    """What the walk knows about a layer's input.

    Args:
        sums: H = 2/n sum over tokens of x xᵀ, float32, or its diagonal where nothing more was asked for. One object for
            all layers with the same input.
        tokens: n, how many tokens it comes from; 0 for an expert that none was routed to, and H is zero then.
        guided: H_k = 2/n sum over tokens of s_k x xᵀ, [groups, cols, cols], float32, where tokens were weighted; the
            weight's rows fall into that many runs.
    """

    sums: Float[Tensor, "cols cols"] | Float[Tensor, " cols"]
    tokens: int
    guided: Float[Tensor, "groups cols cols"] | None = None

    @property
    def hessian(self) -> Float[Tensor, "cols cols"]:
        """H.

        Raises:
            RuntimeError: only its diagonal was gathered.
        """
        if self.sums.dim() == 1:
            raise RuntimeError("only the diagonal of H was gathered: walk(..., squares=True)")
        return self.sums

    @property
    def squares(self) -> Float[Tensor, " cols"]:
        """The diagonal of H: 2/n sum over tokens of x²."""
        return self.sums if self.sums.dim() == 1 else self.sums.diagonal()


class StopForward(Exception):
    """Ends a forward pass once the wanted input has been seen. Private: nothing else may catch it."""


class Sums:
    """Running sums of x xᵀ for some layers of a block.

    Args:
        names: the layers.
        weights: {name: [tokens, groups] for every batch}, weights of the tokens; None for plain sums.
        squares: sum x² alone, the diagonal of x xᵀ.
    """

    def __init__(
        self, names: Sequence[str], weights: Mapping[str, Sequence[Tensor]] | None = None, squares: bool = False
    ) -> None:
        self.sums: dict[str, Tensor] = {}
        self.guided: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.broken: dict[str, int] = {}  # the first batch in which a layer was fed NaN or infinite values
        self._names, self._weights, self._squares = frozenset(names), weights, squares
        self._pending: set[str] = set()
        self._batch = -1
        self._last: tuple[Tensor, Tensor] | None = None  # input seen last, and the sum it went into

    def begin(self) -> None:
        """A new batch starts."""
        self._pending = set(self._names)
        self._batch += 1

    def add(self, name: str, x: Tensor) -> None:
        """Add the tokens of one batch. Layers that are handed the same tensor share one sum.

        Raises:
            StopForward: this was the last input that the batch was wanted for.
        """
        flat = x.detach().reshape(-1, x.shape[-1])
        self.tokens[name] = self.tokens.get(name, 0) + len(flat)
        if not torch.isfinite(flat).all():
            self.broken.setdefault(name, self._batch)
        shared = self._last is not None and self._last[0] is x
        if name not in self.sums:
            fresh = self._zeros(flat.shape[1], flat.device)
            self.sums[name] = self._last[1] if shared and self._last is not None else fresh
        if not shared and self._squares:
            self.sums[name] += flat.float().square().sum(0)
        elif not shared:
            add_upper(self.sums[name], flat.float())
        if self._weights is not None:
            self._add_weighted(name, flat.float(), self._weights[name][self._batch])
        self._last = (x, self.sums[name])
        self._pending.discard(name)
        if not self._pending:
            raise StopForward

    def finish(self, widths: Mapping[str, int]) -> dict[str, Statistics]:
        """H = 2/n times the sums, over all processes.

        Args:
            widths: columns of every layer; one that no process reached gets a Hessian of zeros.
        """
        counts = torch.tensor([self.tokens.get(name, 0) for name in widths]).to(processes().device)
        counts = reduce(counts, reduction="sum").tolist()  # pyright: ignore
        reduced: dict[int, tuple[Tensor, Tensor]] = {}  # the sum too: its id is not used again while it lives
        found = {}
        for (name, width), count in zip(widths.items(), counts, strict=True):
            total = self.sums.get(name)
            total = self._zeros(width, processes().device) if total is None else total
            share = 2.0 / max(1, count)
            if id(total) not in reduced:
                reduced[id(total)] = total, _over_processes(total) * share
            guided = self.guided.get(name)
            found[name] = Statistics(
                reduced[id(total)][1], int(count), None if guided is None else _over_processes(guided) * share
            )
        return found

    def _zeros(self, width: int, device: torch.device | None) -> Tensor:
        return torch.zeros(width, device=device) if self._squares else torch.zeros(width, width, device=device)

    def _add_weighted(self, name: str, x: Tensor, weights: Tensor) -> None:
        groups = weights.shape[1]
        if name not in self.guided:
            self.guided[name] = torch.zeros(groups, x.shape[1], x.shape[1], device=x.device)
        for k, root in enumerate(weights.float().sqrt().t()):
            add_upper(self.guided[name][k], x * root[:, None])


def _over_processes(upper: Tensor) -> Tensor:
    """The whole symmetric matrix (or stack of them) from its upper half, or a diagonal, summed over all processes."""
    full = upper if upper.dim() == 1 else torch.triu(upper) + torch.triu(upper, 1).mT
    return reduce(full, reduction="sum")  # pyright: ignore


def add_upper(H: Float[Tensor, "cols cols"], x: Float[Tensor, "tokens cols"]) -> None:
    """H += xᵀ x, above the diagonal (and in some tiles below it): the rest is a mirror image, not worth computing."""
    tiles = range(0, H.shape[0], TILE)
    for i in tiles:
        H[i : i + TILE, i:].addmm_(x[:, i : i + TILE].T, x[:, i:])


@contextmanager
def gather(
    model: nn.Module,
    names: Sequence[str],
    weights: Mapping[str, Sequence[Tensor]] | None = None,
    squares: bool = False,
) -> Iterator[Sums]:
    """Sums that fill while the model, or a part of it, runs."""
    sums = Sums(names, weights, squares)
    with watching(model, names, sums.add):
        yield sums


@contextmanager
def watching(model: nn.Module, names: Iterable[str], note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside, whenever one of these layers runs: `note(its name, the tensor that it is handed)`."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args: note(name, args[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
