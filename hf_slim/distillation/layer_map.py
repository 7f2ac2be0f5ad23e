"""Which block of the teacher teaches which block of the student.

uniform   student block m of M learns from teacher block ⌈(m+1) N/M⌉ - 1 of N: evenly spread, the last with the
          last (TinyBERT, arXiv:1909.10351, whose M divides N)
last      the last learns from the last (MiniLMv2, arXiv:2012.15828)
pairs     [[student, teacher], ...], counted from 0, or from the end: -1 is the last block
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

LayerMap: TypeAlias = Literal["uniform", "last"] | tuple[tuple[int, int], ...]


def pair_layers(layers: LayerMap, student: int, teacher: int) -> list[tuple[int, int]]:
    """(student block, teacher block), by a map that fits; see `map_problems`.

    Args:
        layers: the map.
        student: number of the student's blocks.
        teacher: number of the teacher's blocks.
    """
    if layers == "last":
        return [(student - 1, teacher - 1)]
    if layers == "uniform":
        return [(m, -(-(m + 1) * teacher // student) - 1) for m in range(student)]
    return [(m % student, n % teacher) for m, n in layers]


def map_problems(layers: LayerMap, student: int, teacher: int) -> list[str]:
    """Why a map does not fit two models of so many blocks; empty if it does."""
    if layers == "last":
        return []
    if layers == "uniform":
        return _too_few(student, teacher)
    return _beyond("student", [m for m, _ in layers], student) + _beyond("teacher", [n for _, n in layers], teacher)


def _too_few(student: int, teacher: int) -> list[str]:
    if teacher >= student:
        return []
    return [
        f"layers: uniform gives every block of the student one of the teacher's, but the teacher has {teacher} blocks "
        f"and the student {student}; use layers: last, or name pairs such as [[{student - 1}, {teacher - 1}]]"
    ]


def _beyond(whose: str, numbers: Sequence[int], count: int) -> list[str]:
    wrong = sorted({number for number in numbers if not -count <= number < count})
    if not wrong:
        return []
    named = ", ".join(map(str, wrong))
    return [f"layers: the {whose} has {count} blocks, numbered 0 to {count - 1}, and the pairs name {named}"]
