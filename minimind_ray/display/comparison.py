"""Print the comparison of sweeps as a table for people."""

from __future__ import annotations

from typing import IO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from minimind_ray.sweep.axes import short_names
from minimind_ray.sweep.export import seeds_text, sentences, standing
from minimind_ray.sweep.table import Comparison, Row
from minimind_ray.sweep.text import duration_text, value_text

STYLES = {"best": "bold green", "tied": "green", "worse": "dim", "open": ""}
NARROW, WIDE = 120, 240
"""The width of the table in a file or a pipe: narrow with up to two axes."""


def print_comparison(comparison: Comparison, file: IO[str] | None = None) -> None:
    """Print the table, best first, and sentences about it, to the terminal or into `file`."""
    rows, digits = comparison.rows, comparison.digits
    several, priced = len({row.sweep for row in rows}) > 1, any(row.cost is not None for row in rows)
    # The number of seeds says enough about points whose trials have all finished.
    eventful = any(row.status != "finished" for row in rows)
    names = [*(["sweep"] if several else []), *short_names(comparison.keys).values()]
    table = Table(header_style="bold", box=None, pad_edge=False)
    for name in names:
        table.add_column(name, overflow="fold")
    for name in ("seeds", comparison.metric, "95 % interval", "to best", "95 % interval", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    if priced:
        table.add_column("cost", justify="right", no_wrap=True)
    if eventful:
        table.add_column("status", overflow="fold")
    # In a narrow window, break the status and long verdicts, but not the common verdicts.
    table.add_column("verdict", no_wrap=all(len(row.verdict or "") <= len("not distinguishable") for row in rows))
    for row in rows:
        cells = [
            *([row.sweep] if several else []),
            *(value_text(row.point[key]) for key in comparison.keys),
            *_numbers(row, digits),
            duration_text(row.seconds),
            *([f"{row.cost:.2f}" if row.cost is not None else ""] if priced else []),
            *([row.status] if eventful else []),
            row.verdict or "not compared",
        ]
        # Use Text, not markup: a path on an axis may contain brackets.
        table.add_row(*(Text(cell) for cell in cells), style=STYLES[standing(row.verdict)])
    console = Console(file=file)
    if not console.is_terminal:
        console.width = NARROW if len(names) <= 2 else WIDE
    console.print(table)
    console.print()
    for sentence in sentences(comparison):
        console.print(sentence, highlight=False, markup=False, soft_wrap=not console.is_terminal)
    for row in rows:
        for trial in row.trials:
            if trial.state == "failed":
                error = trial.error or "no error was recorded"
                console.print(f"failed: {trial.id}: {error}", highlight=False, markup=False, soft_wrap=True)


def _numbers(row: Row, digits: int) -> list[str]:
    """Return the number of seeds, the value and the difference to the best, each with its interval."""
    metric, difference = row.metric, row.difference
    return [
        seeds_text(row),
        f"{metric.value:.{digits}f}" if metric else "",
        metric.text(digits) if metric else "",
        f"{difference.value:+.{digits}f}" if difference else "",
        difference.text(digits) if difference else "",
    ]
