"""Progress bars on standard error, for work that takes longer than a breath."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

T = TypeVar("T")


class Progress:
    """Shows how far loops are.

    Args:
        show: False shows nothing, True everything; by default lines always and bars on a terminal.
    """

    def __init__(self, show: bool | None = None):
        self.console = Console(stderr=True)
        self.lines = show is not False
        self.show = self.console.is_terminal if show is None else show

    def track(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Yield `items`, with a bar that says `what`."""
        if not self.show:
            yield from items
            return
        if total is None and isinstance(items, Sized):
            total = len(items)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Bars(*columns, TimeRemainingColumn(), console=self.console, transient=True) as bars:
            yield from bars.track(items, total=total, description=what)

    def say(self, text: str) -> None:
        """A line for the user."""
        if self.lines:
            self.console.print(text, highlight=False)
