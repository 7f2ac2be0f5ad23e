"""Print the README's table of methods and architectures, or write it there.

python scripts/architectures_table.py            # print
python scripts/architectures_table.py --write    # put it between the markers in README.md

The table is made from the cells that tests/contract/test_architectures.py runs, one by one.
"""

from __future__ import annotations

import sys

from readme_tables import README, between, main

ROOT = README.parent


def table() -> str:
    """Markdown, from the tests' cells."""
    if str(ROOT / "tests") not in sys.path:
        sys.path.insert(0, str(ROOT / "tests"))
    import cells

    return cells.table()


def replaced(text: str) -> str:
    """The README's text with the table of today."""
    return between(text, "architectures", table())


if __name__ == "__main__":
    main(table, replaced)
