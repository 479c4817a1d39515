"""Show how far a model is with its benchmarks: one moving line on a terminal, nothing elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def task_progress(console: Console) -> Generator[Callable[[str, int, int], None]]:
    """Yield a function that shows the name of a task, and how many of how many requests are answered."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        shown = bar.add_task("reading tasks", total=None)

        def show(name: str, done: int, total: int) -> None:
            bar.update(shown, description=name, completed=done, total=total)

        yield show
