"""Print the README's table of methods, or write it there.

python scripts/methods_table.py            # print
python scripts/methods_table.py --write    # put it between the markers in README.md
"""

from __future__ import annotations

import sys
from pathlib import Path

from hf_slim.methods import addresses, find_method, summary

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"


def table() -> str:
    """Markdown, from what the methods say of themselves."""
    lines = ["| method | what it does | needs | paper |", "|---|---|---|---|"]
    for address in addresses():
        method = find_method(address)
        needs = ", ".join(method.RULES.needs).replace("_", "-") or "nothing"
        lines.append(f"| `{address}` | {summary(method)} | {needs} | {method.RULES.paper or '-'} |")
    return "\n".join(lines)


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
