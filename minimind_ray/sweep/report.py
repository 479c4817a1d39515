"""Write a sweep's report: report.html, a self-contained page without scripts, and report.png, its main picture.

`compare.py` computes the numbers, `chart.py` draws the pictures.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from minimind_ray.config.reading import dump_yaml
from minimind_ray.data.storage import mirror_of
from minimind_ray.sweep import chart
from minimind_ray.sweep.answers import answers_of
from minimind_ray.sweep.axes import short_names
from minimind_ray.sweep.export import (
    best_set_text,
    headline_text,
    importance_name,
    importance_value,
    seeds_text,
    sentences,
    standing,
)
from minimind_ray.sweep.table import DIFFERS, LEAST_CLUSTERS, Comparison, Row, only_models, verdict_of
from minimind_ray.sweep.text import count_text, duration_text, shorten, value_text
from minimind_ray.sweep.trials import Sweep
from minimind_ray.train.run import RunDirectory

PAGE = "report.html"
MATRIX_POINTS = 24
"""With more points, the matrix of all pairs would be unreadable and is left out."""
MOST_ANSWERS = 8
"""The report shows the answers of at most this many points side by side. A click opens the other points' answers."""


MARKS = {"better": "+", "worse": "−", "not distinguishable": "·", "equal within": "=", DIFFERS: "≠"}
"""The marks of verdicts in the matrix, by the beginnings of the verdicts."""


@dataclass(frozen=True)
class Figure:
    """A picture with its heading, and a caption that may be empty."""

    heading: str
    svg: str
    caption: str = ""


def write_report(sweep: Sweep, comparison: Comparison) -> Path:
    """Write report.html and report.png into the sweep's directory. Returns the page's path (a local copy for a URL)."""
    write_png(comparison, sweep.path / "report.png")
    if mirror := mirror_of(sweep.path):
        mirror.put("report.png")
    return write_page(sweep, comparison, sweep.path)


def write_page(sweep: Sweep, comparison: Comparison, directory: Path) -> Path:
    """Write report.html into the sweep's `directory`. Returns the page's path (a local copy for a URL)."""
    run = RunDirectory(directory)
    run.write(PAGE, render(sweep, comparison))
    return run.path / PAGE


@rc_context(chart.STYLE)
def render(sweep: Sweep, comparison: Comparison) -> str:
    """The page as HTML. Samples, errors and paths are untrusted texts: the template escapes them."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    filters: dict[str, Callable[..., Any]] = {
        "count": count_text,
        "duration": duration_text,
        "value": value_text,
        "shorten": shorten,
        "fact": fact_text,
        "percent": "{:.2%}".format,
        "standing": standing,
        "seeds": seeds_text,
        "describe": partial(chart.describe, comparison),
        "axes": partial(importance_name, comparison),
        "importance": importance_value,
    }
    environment.filters.update(filters)
    rows, info = comparison.rows, sweep.info
    measured = [row for row in rows if row.verdict]
    judged = comparison.clusters >= LEAST_CLUSTERS
    pairs = matrix(comparison, measured) if 2 < len(measured) <= MATRIX_POINTS and judged else None
    return environment.get_template("report.html.j2").render(
        sweep=sweep,
        info=info,
        comparison=comparison,
        names=short_names(comparison.keys),
        headlines=[text for text in (headline_text(comparison), best_set_text(comparison)) if text],
        sentences=sentences(comparison),
        # The number of seeds says enough about points whose trials have all finished.
        eventful=any(row.status != "finished" for row in rows),
        measured=measured,
        most_seeds=max([info.seeds, *(more.seeds for more in info.more_seeds)]),
        by_verdict=by_verdict(comparison.rows),
        failed=[trial for trial in sweep.trials if trial.state == "failed"],
        curves=learning_curves(comparison),
        axes=[axis_figure(comparison, key, spec) for key, spec in info.axes.items() if any(row.metric for row in rows)],
        parallel=parallel_coordinates(comparison, info.axes) if len(info.axes) > 1 and measured else None,
        colours=chart.COLOURS,
        metric_dimension=chart.metric_dimension(comparison),
        difference_dimension=chart.difference_dimension(comparison) if len(measured) > 1 and judged else None,
        matrix=pairs,
        marks={
            f"{start}; {only_models(rows)}" if start == DIFFERS else start: mark
            for start, mark in MARKS.items()
            if any(mark == shown for line in pairs or [] for shown, _ in line)
        },
        answers=answers_of(comparison),
        most_answers=MOST_ANSWERS,
        config=dump_yaml(info.config),
    )


def by_verdict(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each verdict, in the order of the table."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.verdict or "not compared", []).append(row)
    return found


def axis_figure(comparison: Comparison, key: str, spec: list[Any] | str) -> Figure:
    """The metric against one axis."""
    canvas, axes = chart.picture(chart.WIDTH, chart.HEIGHT)
    chart.metric_against_axis(axes, comparison, key, spec)
    heading = f"{comparison.metric} against {key}"
    return Figure(heading, chart.inline_svg(canvas, heading))


def parallel_coordinates(comparison: Comparison, specs: dict[str, list[Any] | str]) -> str:
    """All axes at once. The page lets a wide picture scroll rather than shrink."""
    canvas = chart.parallel_coordinates(comparison, specs)
    return chart.inline_svg(canvas, "parallel coordinates", least=0.8)


def learning_curves(comparison: Comparison) -> list[Figure]:
    """Figures of the sweep's metric, the validation loss, and the training loss."""
    captions, figures = {"loss": "In training."}, list[Figure]()
    for metric in dict.fromkeys((comparison.metric, "val/loss", "loss")):
        canvas, axes = chart.picture(chart.WIDTH, chart.HEIGHT)
        heading = f"{metric} over tokens"
        if chart.learning_curves(axes, comparison.rows, metric):
            figures.append(Figure(heading, chart.inline_svg(canvas, heading), captions.get(metric, "")))
    return figures


def matrix(comparison: Comparison, measured: list[Row]) -> list[list[tuple[str, str]]]:
    """For every pair of measured points (row, column): the sign and class of the row's verdict, and hover text."""
    sign, digits = 1.0 if comparison.mode == "min" else -1.0, comparison.digits
    reason = only_models(comparison.rows)
    cells: list[list[tuple[str, str]]] = []
    for i, row in enumerate(measured):
        line: list[tuple[str, str]] = []
        for j, other in enumerate(measured):
            low, high = float(comparison.low_PP[i, j]), float(comparison.high_PP[i, j])
            verdict = verdict_of(*sorted((sign * low, sign * high)), margin=comparison.margin, only_models=reason)
            mark = "" if i == j else next(mark for start, mark in MARKS.items() if verdict.startswith(start))
            interval = "no interval" if comparison.hidden_PP[i, j] else f"{low:+.{digits}f} to {high:+.{digits}f}"
            hover = f"{row.label} minus {other.label}: {interval}, {verdict}"
            line.append((mark, hover if mark else row.label))
        cells.append(line)
    return cells


def fact_text(value: Any) -> str:
    """A value of sweep.json's `shared` as text."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value_text(value) if isinstance(value, int | float | str) else json.dumps(value, ensure_ascii=False)


@rc_context(chart.STYLE)
def write_png(comparison: Comparison, path: Path) -> None:
    """Write the main picture: every point's metric with its interval, best first, and the learning curves."""
    rows = [row for row in comparison.rows if row.metric]
    # Long labels widen the picture instead of narrowing its axes.
    longest = max((len(row.label) for row in rows), default=0)
    size = 10 + 0.1 * min(longest, chart.LONGEST_LABEL), max(3.6, 0.32 * len(rows) + 1.4)
    canvas = Canvas(figsize=size, layout="constrained", facecolor=chart.COLOURS["card"])
    points, curves = canvas.subplots(1, 2)
    chart.all_points(points, comparison)
    chart.learning_curves(curves, rows, comparison.metric)
    curves.set_title(f"{comparison.metric} over tokens")
    colours = {verdict: chart.COLOURS[standing(found[0].verdict)] for verdict, found in by_verdict(rows).items()}
    lines = [Line2D([], [], color=colour, label=verdict) for verdict, colour in colours.items()]
    if lines:
        curves.legend(handles=lines, frameon=False)
    # Replace an existing link; do not write through it.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    canvas.savefig(temporary, dpi=150, format="png")
    temporary.replace(path)
