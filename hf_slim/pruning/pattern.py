"""How pruned weights lie: anywhere ("unstructured"), or "n:m", n survivors in every m consecutive columns of a row."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from hf_slim.core.errors import SlimError


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """n and m of "n:m", None for "unstructured".

    Raises:
        SlimError: neither of the two, or not 0 < n < m.
    """
    if pattern == "unstructured":
        return None
    n, colon, m = pattern.partition(":")
    if not (colon and n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)):
        raise SlimError(f"pattern is 'unstructured' or 'n:m' with 0 < n < m, such as '2:4'; got {pattern!r}")
    return int(n), int(m)


def _checked(pattern: str) -> str:
    try:
        parse_pattern(pattern)
    except SlimError as error:
        raise ValueError(str(error)) from None
    return pattern


Pattern = Annotated[str, AfterValidator(_checked)]
"""Field type of a pattern."""


def survivors(rows: int, cols: int, pattern: str, sparsity: float) -> int:
    """How many of rows x cols weights remain; an n:m pattern sets the sparsity itself."""
    n_m = parse_pattern(pattern)
    if n_m is None:
        return rows * cols - round(sparsity * rows * cols)
    return rows * (cols // n_m[1]) * n_m[0]


def column_problems(name: str, cols: int, pattern: str) -> list[str]:
    """Why a layer of `cols` columns cannot take the pattern."""
    n_m = parse_pattern(pattern)
    if n_m is None or cols % n_m[1] == 0:
        return []
    return [f"{name} has {cols} columns, no multiple of {n_m[1]}, so {pattern} does not fit; name it in layers.exclude"]
