"""Print the comparison of models as a table for people."""

from __future__ import annotations

from functools import partial
from typing import IO

from rich.console import Console

from minimind_ray.display.comparison import NARROW, STYLES, Column, add_column, print_columns
from minimind_ray.sweep.export import standing
from minimind_ray.sweep.models import Contest, ModelComparison, Standing
from minimind_ray.sweep.models_export import sentences
from minimind_ray.sweep.statistics import Interval

DROPPED = ("items", "value interval", "metric", "difference interval")
"""The columns that a narrow window leaves out, in this order."""


def print_models(comparison: ModelComparison, file: IO[str] | None = None) -> None:
    """Print each task with its models, best first, and sentences about all of them.

    A narrow window shows fewer columns. A file or a pipe always gets all of them.
    """
    console, rows = Console(file=file), [(c, s) for c in comparison.all for s in c.standings]
    styles = [STYLES[standing(s.verdict)] for _, s in rows]
    print_columns(console, _columns(rows), styles, DROPPED, NARROW)
    for sentence in sentences(comparison):
        console.print(sentence, highlight=False, markup=False, soft_wrap=not console.is_terminal)


def _columns(rows: list[tuple[Contest, Standing]]) -> list[Column]:
    """Return all columns of the table. A task is named in its first row only."""
    found: list[Column] = []
    add = partial(add_column, found)
    first = [standing is contest.standings[0] for contest, standing in rows]
    digits = [contest.digits for contest, _ in rows]

    def bounds(intervals: list[Interval | None]) -> list[str]:
        return [i.text(d) if i else "" for i, d in zip(intervals, digits)]

    values, differences = [s.value for _, s in rows], [s.difference for _, s in rows]
    add("task", "task", [c.task if top else "" for (c, _), top in zip(rows, first)], 24, 8)
    metrics = [c.metric if top and c.metric != c.task else "" for (c, _), top in zip(rows, first)]
    add("metric", "metric", metrics, 16, 8)
    add("items", "items", [f"{c.items:,}" if top else "" for (c, _), top in zip(rows, first)])
    add("model", "model", [s.model for _, s in rows], 27, 8)
    add("value", "value", [f"{i.value:.{d}f}" for i, d in zip(values, digits)])
    add("value interval", "95 % interval", bounds([*values]))
    add("difference", "to best", [f"{i.value:+.{d}f}" if i else "" for i, d in zip(differences, digits)])
    add("difference interval", "95 % interval", bounds(differences))
    add("verdict", "verdict", [s.verdict for _, s in rows], len("not distinguishable"), 15)
    return found
