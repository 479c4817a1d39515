"""Print the comparison of sweeps as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minimind_ray.sweep.axes import short_names
from minimind_ray.sweep.export import seeds_text, sentences, standing
from minimind_ray.sweep.table import Comparison
from minimind_ray.sweep.text import duration_text, value_text

STYLES = {"best": "bold green", "tied": "green", "worse": "dim", "open": ""}
NARROW, WIDE = 120, 240
"""The least width of the table in a file or a pipe: narrow with up to two axes."""
DROPPED = ("time", "cost", "status", "value interval", "seeds")
"""The columns that a narrow window leaves out, in this order."""
GAP = 2
"""The number of spaces between columns."""


@dataclass(frozen=True)
class Column:
    """A column of the table. It is readable from `least` characters on, and only just from `tight` characters on."""

    id: str
    name: str
    cells: list[str]
    least: int
    tight: int
    number: bool = False


def print_comparison(comparison: Comparison, file: IO[str] | None = None) -> None:
    """Print the table, best first, and sentences about it, to the terminal or into `file`.

    A narrow window shows fewer columns. A file or a pipe always gets all of them.
    """
    rows, columns, console = comparison.rows, _columns(comparison), Console(file=file)
    narrow = NARROW if sum(c.id == "axis" for c in columns) <= 2 else WIDE
    print_columns(console, columns, [STYLES[standing(row.verdict)] for row in rows], DROPPED, narrow)
    for sentence in sentences(comparison):
        console.print(sentence, highlight=False, markup=False, soft_wrap=not console.is_terminal)
    for row in rows:
        for trial in row.trials:
            if trial.state == "failed":
                error = trial.error or "no error was recorded"
                console.print(f"failed: {trial.id}: {error}", highlight=False, markup=False, soft_wrap=True)


def print_columns(
    console: Console, columns: list[Column], styles: Sequence[str], dropped: Sequence[str], narrow: int
) -> None:
    """Print a table with a style for each row. A narrow window shows it without some of the columns `dropped`.

    A file or a pipe gets all columns, in a width of at least `narrow`.
    """
    if not console.is_terminal:
        console.width = max(_width(columns), narrow)
    shown = _fitting(columns, console.width, dropped)
    fits = _width(shown) <= console.width
    table = Table(header_style="bold", box=None, pad_edge=False)
    for column in shown:
        whole = column.number or (fits and column.least == _longest(column.name, column.cells))
        table.add_column(
            column.name,
            justify="right" if column.number else "left",
            overflow="fold",
            no_wrap=whole,
            min_width=column.least if fits else column.tight,
        )
    for style, cells in zip(styles, zip(*(column.cells for column in shown))):
        # Use Text, not markup: a path on an axis may contain brackets.
        table.add_row(*(Text(cell) for cell in cells), style=style)
    console.print(table)
    console.print()
    if left := [column.name if column.id != "value interval" else "the metric's interval" for column in columns
                if column not in shown]:  # fmt: skip
        console.print(
            f"Left out for lack of width: {', '.join(left)}. Use minimind-ray compare with --csv or --json for all.",
            highlight=False, markup=False, soft_wrap=not console.is_terminal,
        )  # fmt: skip


def add_column(
    columns: list[Column], id: str, name: str, cells: list[str], least: int | None = None, tight: int = 0
) -> None:
    """Add a column, of numbers if there is no `least` width."""
    longest = _longest(name, cells)
    number = least is None
    least = longest if least is None else min(longest, least)
    columns.append(Column(id, name, cells, least, least if number else min(longest, tight), number))


def _columns(comparison: Comparison) -> list[Column]:
    """Return all columns of the table."""
    rows, digits = comparison.rows, comparison.digits
    found: list[Column] = []
    add = partial(add_column, found)
    if len({row.sweep for row in rows}) > 1:
        add("axis", "sweep", [row.sweep for row in rows], 27, 8)
    for key, name in short_names(comparison.keys).items():
        add("axis", name, [value_text(row.point[key]) for row in rows], 27, 8)
    add("seeds", "seeds", [seeds_text(row) for row in rows])
    values, differences = [row.metric for row in rows], [row.difference for row in rows]
    add("value", comparison.metric, [f"{i.value:.{digits}f}" if i else "" for i in values])
    add("value interval", "95 % interval", [i.text(digits) if i else "" for i in values])
    add("difference", "to best", [f"{i.value:+.{digits}f}" if i else "" for i in differences])
    add("difference interval", "95 % interval", [i.text(digits) if i else "" for i in differences])
    add("time", "time", [duration_text(row.seconds) for row in rows])
    if any(row.cost is not None for row in rows):
        add("cost", "cost", ["" if row.cost is None else f"{row.cost:.2f}" for row in rows])
    # The number of seeds says enough about points whose trials have all finished.
    if any(row.status != "finished" for row in rows):
        add("status", "status", [row.status for row in rows], 12, 12)
    add("verdict", "verdict", [row.verdict or "not compared" for row in rows], len("not distinguishable"), 15)
    return found


def _fitting(columns: list[Column], width: int, dropped: Sequence[str]) -> list[Column]:
    """Return the columns without as many of `dropped` as necessary to fit into the width."""
    for id in dropped:
        if _width(columns) <= width:
            break
        columns = [column for column in columns if column.id != id]
    return columns


def _width(columns: list[Column]) -> int:
    return sum(column.least for column in columns) + GAP * (len(columns) - 1)


def _longest(name: str, cells: list[str]) -> int:
    return max(map(cell_len, [name, *cells]))
