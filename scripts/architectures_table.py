"""Print the README's table of methods and architectures, or write it there.

python scripts/architectures_table.py            # print
python scripts/architectures_table.py --write    # put it between the markers in README.md

The table is made from the cells that tests/contract/test_architectures.py runs, one by one.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- architectures: begin -->", "<!-- architectures: end -->"


def table() -> str:
    """Markdown, from the tests' cells."""
    if str(ROOT / "tests") not in sys.path:
        sys.path.insert(0, str(ROOT / "tests"))
    import cells

    return cells.table()


def replaced(text: str) -> str:
    """The README's text with the table of today."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    if "--write" in sys.argv:
        README.write_text(replaced(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table())
