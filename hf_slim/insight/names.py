"""Short names: of kinds of layers, and of layers that stand in one table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hf_slim.core.select import Layer


def kind_names(layers: Iterable[Layer]) -> dict[str, str]:
    """A short name of every layer's kind: the end of its name, long enough to tell the kinds apart.

    `model.layers.3.mlp.down_proj` is a "down_proj". GPT-2 has a `c_proj` in its attention and one in its MLP, so there
    the kinds are "attn.c_proj" and "mlp.c_proj". The experts of a block, and blocks of several stacks, count together.
    """
    paths = {layer.name: _path(layer) for layer in layers}
    short = {path: _shortest_end(path, set(paths.values())) for path in set(paths.values())}
    return {name: short[path] for name, path in paths.items()}


def told_apart(names: Sequence[str]) -> tuple[list[str], str]:
    """What names differ in, and what they have in common.

    >>> told_apart(["h.0.mlp.down", "h.1.mlp.down"])
    (['0', '1'], 'h.*.mlp.down')
    """
    parts = [name.split(".") for name in names]
    most = min(map(len, parts)) - 1
    head = next((i for i in range(most) if len({p[i] for p in parts}) > 1), most)
    tail = next((i for i in range(most - head) if len({p[-1 - i] for p in parts}) > 1), most - head)
    end = parts[0][len(parts[0]) - tail :]
    return [".".join(p[head : len(p) - tail]) for p in parts], ".".join([*parts[0][:head], "*", *end])


def _path(layer: Layer) -> str:
    """The name below its block, numbers left out."""
    below = layer.name if layer.block is None else layer.name.removeprefix(f"{layer.block}.")
    return ".".join(part for part in below.split(".") if not part.isdigit()) or layer.name


def _shortest_end(path: str, paths: set[str]) -> str:
    parts = path.split(".")
    ends = (".".join(parts[-count:]) for count in range(1, len(parts)))
    return next((end for end in ends if sum(f".{p}".endswith(f".{end}") for p in paths) == 1), path)
