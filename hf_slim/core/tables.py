"""Tables for people, drawn by rich."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table


def make_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table without lines; columns of numbers, the first one apart, stand at the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for position, column in enumerate(columns):
        number = position > 0 and all(_is_number(row[position]) for row in rows)
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def short_count(count: int) -> str:
    """Three figures at most: 288, 9.6k, 1.2M, 70B."""
    size, unit = next((pair for pair in _UNITS if count >= pair[0]), (1, ""))
    return f"{count / size:.{1 if unit and count < 9.95 * size else 0}f}{unit}"


_UNITS = ((1e9, "B"), (1e6, "M"), (1e3, "k"))


def short_share(value: float) -> str:
    """A share in four characters: .123, or 1.00."""
    return f"{value:.3f}"[1:] if value < 0.9995 else f"{value:.2f}"


def _is_number(text: str) -> bool:
    return text == "" or text.lstrip("<+-. ")[:1].isdigit()
