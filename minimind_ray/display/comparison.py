"""Print the comparison of sweeps as a table for people."""

from __future__ import annotations

from dataclasses import dataclass
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
class _Column:
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
    rows, columns = comparison.rows, _columns(comparison)
    console = Console(file=file)
    if not console.is_terminal:
        console.width = max(_width(columns), NARROW if sum(c.id == "axis" for c in columns) <= 2 else WIDE)
    shown = _fitting(columns, console.width)
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
    for row, cells in zip(rows, zip(*(column.cells for column in shown))):
        # Use Text, not markup: a path on an axis may contain brackets.
        table.add_row(*(Text(cell) for cell in cells), style=STYLES[standing(row.verdict)])
    console.print(table)
    console.print()
    if left := [column.name if column.id != "value interval" else "the metric's interval" for column in columns
                if column not in shown]:  # fmt: skip
        console.print(
            f"Left out for lack of width: {', '.join(left)}. Use minimind-ray compare with --csv or --json for all.",
            highlight=False, markup=False, soft_wrap=not console.is_terminal,
        )  # fmt: skip
    for sentence in sentences(comparison):
        console.print(sentence, highlight=False, markup=False, soft_wrap=not console.is_terminal)
    for row in rows:
        for trial in row.trials:
            if trial.state == "failed":
                error = trial.error or "no error was recorded"
                console.print(f"failed: {trial.id}: {error}", highlight=False, markup=False, soft_wrap=True)


def _columns(comparison: Comparison) -> list[_Column]:
    """Return all columns of the table."""
    rows, digits = comparison.rows, comparison.digits
    found: list[_Column] = []

    def add(id: str, name: str, cells: list[str], least: int | None = None, tight: int = 0) -> None:
        longest = _longest(name, cells)
        number = least is None
        least = longest if least is None else min(longest, least)
        found.append(_Column(id, name, cells, least, least if number else min(longest, tight), number))

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


def _fitting(columns: list[_Column], width: int) -> list[_Column]:
    """Return the columns without as many of DROPPED as necessary to fit into the width."""
    for id in DROPPED:
        if _width(columns) <= width:
            break
        columns = [column for column in columns if column.id != id]
    return columns


def _width(columns: list[_Column]) -> int:
    return sum(column.least for column in columns) + GAP * (len(columns) - 1)


def _longest(name: str, cells: list[str]) -> int:
    return max(map(cell_len, [name, *cells]))
