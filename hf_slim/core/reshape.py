"""Making layers really smaller: rows and columns that go, and the numbers that a module keeps about itself.

A unit (`core/units.py`) is removed with the rows of the layers that write it, their biases, and the columns of the
layer that reads it. Modules keep counts, `num_heads` or `split_size`; those that follow the number of units are known
from the search that found the units. Some modules look their counts up in the model's config (Phi-3): such a module
gets a view of the config of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from hf_slim.core.errors import ModelError
from hf_slim.core.swap import get_keep, get_weight, set_module
from hf_slim.encodings import Sparse
from hf_slim.encodings.modules import EncodedLinear, EncodedModule
from hf_slim.encodings.places import follows

if TYPE_CHECKING:
    from hf_slim.core.units import Units


class OwnConfig:
    """A model's config as one module sees it: some numbers are the module's own, the rest is the model's.

    Args:
        shared: the model's config.
        own: what differs.
    """

    def __init__(self, shared: Any, **own: Any):
        self.__dict__ |= {"shared": shared} | own

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "shared":  # asked for while a copy is being made
            raise AttributeError(name)
        return getattr(self.shared, name)

    def copied(self) -> Any:
        """A config that has all of it."""
        made = copy.copy(self.shared)
        for name, value in vars(self).items():
            if name != "shared":
                setattr(made, name, value)
        return made


def set_count(module: Any, name: str, value: Any) -> None:
    """Change one of the numbers that `countable` names; "config.x" is x in the module's own view of the config."""
    place, _, attribute = name.rpartition(".")
    if not place:
        setattr(module, attribute, value)
        return
    config: Any = module.config
    own = vars(config) if isinstance(config, OwnConfig) else {"shared": config}
    module.config = OwnConfig(**own | {attribute: value})


def countable(module: nn.Module) -> dict[str, int]:
    """The whole numbers that a module keeps: its own by name, those of the config that it holds as "config.name"."""
    config = vars(module).get("config")
    config = config.copied() if isinstance(config, OwnConfig) else config
    known = _numbers(config) if isinstance(config, PretrainedConfig) else {}
    return {f"config.{name}": value for name, value in known.items()} | _numbers(module)


def split_count(path: str) -> tuple[str, str]:
    """Module and number that a full name such as "layers.0.attn.num_heads" stands for."""
    place, _, name = path.rpartition(".")
    if place == "config" or place.endswith(".config"):
        return place.removesuffix("config").removesuffix("."), f"config.{name}"
    return place, name


def scale_counts(model: nn.Module, paths: Iterable[str], keep: Bool[Tensor, " units"]) -> None:
    """Change numbers in proportion to the units that are kept."""
    for path in paths:
        place, name = split_count(path)
        module = model.get_submodule(place)
        set_count(module, name, countable(module)[name] * int(keep.sum()) // len(keep))


def _numbers(holder: Any) -> dict[str, int]:
    return {name: value for name, value in vars(holder).items() if type(value) is int and not name.startswith("_")}


def remove_units(model: nn.Module, units: Units, keep: Bool[Tensor, " units"]) -> None:
    """Remove the units that `keep` does not mark: smaller writers and reader, and counts that say so.

    Indices of other units of the same layers do not hold any more: find them again.

    Args:
        model: or any module that the names of `units` are below. Experts must be unfused.

    Raises:
        ModelError: nothing would be left, layers are stored as codes, or the units are not this model's. Nothing has
            been changed.
    """
    _check(model, units, keep)
    if keep.all():
        return
    cut_layer(model, units.reader, None, staying(model, units.reader, units.columns[~keep], 1))
    for name, rows in units.writers.items():
        cut_layer(model, name, staying(model, name, rows[~keep], 0), None)
    scale_counts(model, units.counts, keep)


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Layers that are made smaller inside are whole again if an error leaves: the very tensors, and all counts.

    What is replaced stays in memory until then. Values written into tensors that stay are not brought back.
    """
    before = [(module, _inside_of(module)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, state in before:
            vars(module).clear()
            vars(module).update(state)
        raise


def _inside_of(module: nn.Module) -> dict[str, Any]:
    """All that a module holds: its numbers, and which tensors and modules; none of them copied."""
    return {key: copy.copy(value) if type(value) is dict else value for key, value in vars(module).items()}


def zero_units(model: nn.Module, units: Units, keep: Bool[Tensor, " units"]) -> None:
    """Set the units that `keep` does not mark to zero: rows of their writers, biases, and columns of the reader.

    Raises:
        ModelError: as for `remove_units`.
    """
    _check(model, units, keep)
    if keep.all():
        return
    _zero(model, units.reader, None, units.columns[~keep].flatten())
    for name, rows in units.writers.items():
        _zero(model, name, rows[~keep].flatten(), None)


def cut_layer(model: nn.Module, name: str, rows: Int[Tensor, " n"] | None, cols: Int[Tensor, " m"] | None) -> None:
    """Keep these rows and columns of a linear layer, with its bias; a sparse layer stays sparse.

    Args:
        rows, cols: indices that stay, in the order that they will have; None for all.

    Raises:
        ModelError: the layer is stored as codes.
    """
    module: Any = model.get_submodule(name)
    _check_storage(module, name)
    bias = getattr(module, "bias", None)
    if rows is not None and bias is not None:
        module.bias = nn.Parameter(bias.detach()[rows.to(bias.device)], requires_grad=bias.requires_grad)
    if isinstance(module, EncodedModule):
        W, keep = (_taken(tensor, rows, cols) for tensor in (get_weight(module), _survivors(module)))
        set_module(model, name, _sparse(module, W, keep))
        return
    W = _taken(get_weight(module), rows, cols)
    turned = isinstance(module, Conv1D)
    module.weight = nn.Parameter((W.T if turned else W).contiguous(), requires_grad=module.weight.requires_grad)
    if turned:
        module.nf, module.nx = W.shape
    else:
        module.out_features, module.in_features = W.shape


def shape_of(module: nn.Module) -> tuple[int, int]:
    """Rows and columns of a linear layer, however it is stored."""
    if isinstance(module, EncodedModule):
        return module.rows, module.cols
    shape: Any = module.weight.shape  # pyright: ignore[reportAttributeAccessIssue]
    return (shape[1], shape[0]) if isinstance(module, Conv1D) else (shape[0], shape[1])


def staying(model: nn.Module, name: str, gone: Int[Tensor, "..."], axis: int) -> Int[Tensor, " n"]:
    """Indices of a layer's rows (axis 0) or columns (axis 1) other than `gone`."""
    stays = torch.ones(shape_of(model.get_submodule(name))[axis], dtype=torch.bool)
    stays[gone.flatten().cpu()] = False
    return stays.nonzero().flatten()


def _taken(W: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    W = W if rows is None else W[rows.to(W.device)]
    return W if cols is None else W[:, cols.to(W.device)]


@torch.no_grad()
def _zero(model: nn.Module, name: str, rows: Tensor | None, cols: Tensor | None) -> None:
    module: Any = model.get_submodule(name)
    if rows is not None and getattr(module, "bias", None) is not None:
        module.bias[rows.to(module.bias.device)] = 0
    sparse = isinstance(module, EncodedModule)
    W = get_weight(module)
    keep = _survivors(module) if sparse else None
    for tensor in (W, keep):
        if tensor is not None and rows is not None:
            tensor[rows.to(W.device)] = 0
        if tensor is not None and cols is not None:
            tensor[:, cols.to(W.device)] = 0
    if keep is not None:
        set_module(model, name, _sparse(module, W, keep))


def _survivors(module: EncodedModule) -> Bool[Tensor, "rows cols"]:
    keep = get_keep(module)
    return get_weight(module) != 0 if keep is None else keep


def _sparse(module: Any, W: Tensor, keep: Bool[Tensor, "rows cols"]) -> EncodedLinear:
    """A sparse layer in the place of another one, with that one's bias."""
    pattern: str | None = module.encoding.pattern
    kept = pattern if pattern is not None and follows(keep, pattern) else None
    encoding = Sparse(survivors=int(keep.sum()), pattern=kept)
    made = EncodedLinear(*W.shape[::-1], encoding, False, module.compute_dtype, W.device, module.turned)
    made.put(encoding.pack(W, keep))
    made.bias = module.bias
    trained = any(parameter.requires_grad for name, parameter in module.named_parameters() if name != "bias")
    for name in encoding.trainable:
        getattr(made, name).requires_grad_(trained)
    return made.train(module.training)


def _check(model: nn.Module, units: Units, keep: Tensor) -> None:
    problems = []
    if keep.shape != units.columns.shape[:1]:
        problems.append(f"{units.block}: keep marks {len(keep)} units, but there are {len(units.columns)}")
    if not keep.any():
        problems.append(
            f"{units.block}: all {len(keep)} {units.kind}s that {units.reader} reads would go; keep at least one"
        )
    for name, axis, indices in [(units.reader, 1, units.columns), *((n, 0, r) for n, r in units.writers.items())]:
        module = model.get_submodule(name)
        if int(indices.max()) >= shape_of(module)[axis]:
            problems.append(f"{units.block}: {name} has changed since its units were found; find them again")
        problems += _storage_problems(module, name)
    if problems:
        raise ModelError(problems)


def _check_storage(module: nn.Module, name: str) -> None:
    if problems := _storage_problems(module, name):
        raise ModelError(problems)


def _storage_problems(module: nn.Module, name: str) -> list[str]:
    if not isinstance(module, EncodedModule) or isinstance(module.encoding, Sparse):
        return []
    return [
        f"{name} is stored as {module.encoding.describe()}, whose rows and columns cannot be taken out; "
        "make it smaller before it is encoded"
    ]
