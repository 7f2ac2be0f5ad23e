"""Errors that a user can act on: each says what is wrong, what was found and how to mend it.

Every error raised on purpose by hf_slim is a `SlimError`. It carries a list of problems, because a check reports
everything that is wrong at once instead of one thing a run.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence


class SlimError(Exception):
    """One or more problems in the user's input.

    Args:
        problems: one message, or several; each says what, what was found, and the fix.
    """

    def __init__(self, problems: str | Sequence[str]):
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__(str(self))

    def __reduce__(self):
        return type(self), (self.problems,)

    def __str__(self) -> str:
        lines = _merged(self.problems)
        return lines[0] if len(lines) == 1 else f"{len(lines)} problems:\n" + "\n".join(f"  - {p}" for p in lines)


class RecipeError(SlimError):
    """The recipe's text is not a valid recipe."""


class PlanError(SlimError):
    """The recipe is valid, but cannot be carried out on this model."""


class DataError(SlimError):
    """Text or tokens that cannot be used: missing, empty, too short, of the wrong kind."""


class ModelError(SlimError):
    """A model that cannot be used: missing, corrupt, NaN weights, no layers to compress."""


class ArtifactError(SlimError):
    """An output folder that cannot be written, or an artifact that cannot be read."""


class ResumeError(SlimError):
    """An unfinished run in the output folder was made from other inputs than this one."""


def _merged(problems: Sequence[str]) -> list[str]:
    """The problems, those that differ only in the numbers of blocks said once: a model may have hundreds of layers."""
    alike: dict[str, list[str]] = {}
    for problem in problems:
        alike.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", problem), []).append(problem)
    return [
        first if not more else f"{first} (and {len(more)} more like it, in other blocks)"
        for first, *more in alike.values()
    ]


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the known word closest to `name`, or lists all of them when none is close.

    >>> nearest("bitz", ["bits", "group_size"])
    "did you mean 'bits'?"
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + ", ".join(known)
