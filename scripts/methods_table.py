"""Print the README's table of methods, or write it there.

python scripts/methods_table.py            # print
python scripts/methods_table.py --write    # put it between the markers in README.md
"""

from __future__ import annotations

from readme_tables import between, main

from hf_slim.methods import addresses, find_method, summary


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
    return between(text, "methods", table())


if __name__ == "__main__":
    main(table, replaced)
