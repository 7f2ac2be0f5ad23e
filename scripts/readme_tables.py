"""What the scripts share that keep a table of the README up to date: its place between two markers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def between(text: str, name: str, table: str) -> str:
    """The README's text with this table between the markers called `name`."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{table}\n{end}{after}"


def main(table: Callable[[], str], replaced: Callable[[str], str]) -> None:
    """Print the table, or with --write put it into the README."""
    if "--write" in sys.argv:
        README.write_text(replaced(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table())
