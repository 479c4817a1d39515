"""Print the comparison of sweeps as a table for people."""

from __future__ import annotations

from typing import IO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from minimind_ray.sweep.axes import short_names
from minimind_ray.sweep.compare import METHOD, Comparison
from minimind_ray.sweep.text import duration_text, value_text


def print_comparison(comparison: Comparison, file: IO[str] | None = None) -> None:
    """Print the table, best first, and notes about it, to the terminal or into `file`."""
    rows, digits = comparison.rows, comparison.digits
    several, priced = len({row.sweep for row in rows}) > 1, any(row.cost is not None for row in rows)
    names = short_names(comparison.keys)
    table = Table(header_style="bold", box=None, pad_edge=False)
    for name in [*(["sweep"] if several else []), *(names[key] for key in comparison.keys)]:
        table.add_column(name, overflow="fold")
    for name in (comparison.metric, "95 % interval", "to the best", "tokens", "time", *(["cost"] if priced else [])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("status", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    styles = {"best": "bold green", "not distinguishable": "green", "better": "green", "worse": "dim"}
    for row in rows:
        metric, difference = row.metric, row.difference
        cells = [
            *([row.sweep] if several else []),
            *(value_text(row.point[key]) for key in comparison.keys),
            f"{metric.value:.{digits}f}" if metric else "",
            metric.text(digits) if metric else "",
            f"{difference.value:+.{digits}f}" if difference else "",
            f"{row.tokens:,}",
            duration_text(row.seconds),
            *([f"{row.cost:.2f}" if row.cost is not None else ""] if priced else []),
            row.status,
            row.verdict or "not compared",
        ]
        # Use Text, not markup: a path on an axis may contain brackets.
        table.add_row(*(Text(cell) for cell in cells), style=styles.get(row.verdict or "", ""))
    console = Console(file=file)
    if not console.is_terminal:
        console.width = 240
    console.print(table)
    console.print(f"\n{comparison.examples:,} validation examples. {METHOD}", highlight=False)
    for note in comparison.notes:
        console.print(note, highlight=False, markup=False)
    for row in rows:
        for trial in row.trials:
            if trial.state == "failed":
                error = trial.error or "no error was recorded"
                console.print(f"failed: {trial.id}: {error}", highlight=False, markup=False, soft_wrap=True)
