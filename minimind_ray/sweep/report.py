"""Write a sweep's report: report.html, a self-contained page without scripts, and report.png, its main picture.

`compare.py` computes the numbers, `chart.py` draws the pictures.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from minimind_ray.config.reading import dump_yaml
from minimind_ray.data.storage import mirror_of
from minimind_ray.sweep import chart
from minimind_ray.sweep.axes import short_names
from minimind_ray.sweep.compare import LEAST_EXAMPLES, METHOD, Comparison, Row, compare
from minimind_ray.sweep.text import count_text, duration_text, shorten, value_text
from minimind_ray.sweep.trials import Sweep, read_sweep
from minimind_ray.train.run import write_atomically

MATRIX_POINTS = 24
"""With more points, the matrix of all pairs would be unreadable and is left out."""

COLOURS = {"best": "#0a7d4f", "tied": "#2f7fd1", "worse": "#98a1aa", "open": "#c07f12"}
"""The page's light colours, for the PNG."""


@dataclass(frozen=True)
class Figure:
    """A picture with its heading, and a caption that may be empty."""

    heading: str
    svg: str
    caption: str = ""


def write_report(path: str | Path) -> Path:
    """Write report.html and report.png into the sweep's directory. Returns the page's path (a local copy for a URL).

    Raises:
        UserError: as `read_sweep` and `compare`.
    """
    sweep = read_sweep(path)
    comparison = compare([sweep])
    write_png(comparison, sweep.path / "report.png")
    page = sweep.path / "report.html"
    write_atomically(page, render(sweep, comparison))
    if mirror := mirror_of(sweep.path):
        mirror.put("report.html", "report.png")
    return page


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
        "standing": chart.STANDING.__getitem__,
        "bar": partial(chart.small_interval, comparison),
        "difference_bar": partial(chart.difference_bar, comparison),
    }
    environment.filters.update(filters)
    rows, info = comparison.rows, sweep.info
    measured = [row for row in rows if row.verdict]
    judged, worse = comparison.examples >= LEAST_EXAMPLES, [row for row in measured if row.verdict == "worse"]
    return environment.get_template("report.html.j2").render(
        sweep=sweep,
        info=info,
        comparison=comparison,
        names=short_names(comparison.keys),
        method=METHOD,
        measured=measured,
        by_verdict={verdict: [row for row in measured if row.verdict == verdict] for verdict in chart.STANDING},
        failed=[trial for trial in sweep.trials if trial.state == "failed"],
        curves=learning_curves(comparison),
        axes=[
            Figure(f"{info.metric} against {key}", chart.metric_against_axis(comparison, key, spec))
            for key, spec in info.axes.items()
            if any(row.metric for row in rows)
        ],
        parallel=chart.parallel_coordinates(comparison, info.axes) if len(info.axes) > 1 and measured else None,
        ticks=chart.difference_ticks(comparison) if len(measured) > 1 and judged else None,
        matrix=matrix(comparison, measured) if 2 < len(measured) <= MATRIX_POINTS and judged else None,
        samples=samples(measured[0], worse[-1]) if worse else None,
        config=dump_yaml(info.config),
    )


def learning_curves(comparison: Comparison) -> list[Figure]:
    """Figures of the sweep's metric, the validation loss, and the training loss."""
    captions = {"loss": "In training."}
    return [
        Figure(f"{metric} over tokens", svg, captions.get(metric, ""))
        for metric in dict.fromkeys((comparison.metric, "val/loss", "loss"))
        if (svg := chart.learning_curves(comparison.rows, metric))
    ]


def matrix(comparison: Comparison, measured: list[Row]) -> list[list[tuple[str, str]]]:
    """For every pair of measured points (row, column): whether the row is better, worse or neither, and hover text."""
    sign = 1.0 if comparison.mode == "min" else -1.0
    digits = comparison.digits
    cells: list[list[tuple[str, str]]] = []
    for i, row in enumerate(measured):
        line: list[tuple[str, str]] = []
        for j, other in enumerate(measured):
            low, high = float(comparison.low_PP[i, j]), float(comparison.high_PP[i, j])
            worse, better = (low > 0, high < 0) if sign > 0 else (high < 0, low > 0)
            kind = "self" if i == j else "worse" if worse else "better" if better else "tied"
            line.append((kind, f"{row.label} minus {other.label}: {low:+.{digits}f} to {high:+.{digits}f}"))
        cells.append(line)
    return cells


def samples(best: Row, worst: Row) -> dict[str, Any] | None:
    """The last samples of the first seeds of two points, side by side; None if a point has no samples."""
    written = [row.compared[0].samples[-1:] for row in (best, worst)]
    if not all(written):
        return None
    return {
        "rows": (best, worst),
        "steps": [lines[0]["step"] for lines in written],
        "pairs": list(zip(*(lines[0]["samples"] for lines in written))),
    }


def fact_text(value: Any) -> str:
    """A value of sweep.json's `shared` as text."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value_text(value) if isinstance(value, int | float | str) else json.dumps(value, ensure_ascii=False)


def write_png(comparison: Comparison, path: Path) -> None:
    """Write the main picture: every point's metric with its interval, best first, and the learning curves."""
    from matplotlib.figure import Figure as Canvas

    rows = [row for row in comparison.rows if row.metric]
    canvas = Canvas(figsize=(12, max(3.6, 0.32 * len(rows) + 1.4)), layout="constrained")
    points, curves = canvas.subplots(1, 2)
    for place, row in enumerate(rows):
        assert row.metric
        colour = COLOURS[chart.STANDING[row.verdict]]
        if row.metric.low is not None:
            points.plot([row.metric.low, row.metric.high], [place, place], color=colour, linewidth=2.5, alpha=0.55)
        points.plot(row.metric.value, place, "o", color=colour, markersize=6)
    # Matplotlib would read text between dollar signs as mathematics.
    points.set_yticks(range(len(rows)), [shorten(row.label, 60).replace("$", r"\$") for row in rows])
    points.invert_yaxis()
    points.set_xlabel(f"{comparison.metric} with 95 % interval")
    points.grid(axis="x", alpha=0.3)
    drawn = [(row, trial, chart.curve_points(trial, comparison.metric)) for row in rows for trial in row.trials]
    for row, _, curve in sorted(drawn, key=lambda c: chart.ON_TOP.index(chart.STANDING[c[0].verdict])):
        standing = chart.STANDING[row.verdict]
        curves.plot(*zip(*curve), color=COLOURS[standing], linewidth=2 if standing == "best" else 1)
    curves.set_ylim(*chart.robust_range([value for *_, curve in drawn for _, value in curve]))
    curves.set_xlabel("tokens")
    curves.xaxis.set_major_formatter(lambda tokens, _: count_text(tokens))
    curves.locator_params(axis="x", nbins=5)
    curves.set_ylabel(comparison.metric)
    curves.grid(alpha=0.3)
    for axes in (points, curves):
        axes.spines[["top", "right"]].set_visible(False)
    labels = {"best": "best", "tied": "not distinguishable from it", "worse": "worse", "open": "not compared"}
    for standing in dict.fromkeys(chart.STANDING[row.verdict] for row in rows):
        curves.plot([], [], color=COLOURS[standing], label=labels[standing])
    if rows:
        curves.legend(frameon=False)
    # Replace an existing link; do not write through it.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    canvas.savefig(temporary, dpi=150, format="png")
    temporary.replace(path)
