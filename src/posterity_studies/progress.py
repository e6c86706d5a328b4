"""A progress bar with the time left."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from posterity_studies import ranks

T = TypeVar("T")


def bar(items: Iterable[T], total: int, label: str) -> Iterable[T]:
    """A progress bar with the time left, on a terminal only."""
    console = Console(stderr=True)
    if not console.is_terminal or not ranks.first():
        yield from items
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as shown:
        yield from shown.track(items, total, description=label)
