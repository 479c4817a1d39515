"""Draw the pictures of a sweep's report as inline SVG. They need no script, and follow the page's dark mode by CSS.

Every mark has a class for its point's verdict (best, tied, worse, open) and a <title>, which a browser shows on hover.
A picture is 400 units wide, so that its text stays readable on a phone. `report.py` puts the pictures on the page.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from minimind_ray.sweep.axes import short_names
from minimind_ray.sweep.compare import Comparison, Row, Verdict, trial_metric
from minimind_ray.sweep.text import count_text, number_text, shorten, value_text
from minimind_ray.sweep.trials import Trial

WIDTH, HEIGHT = 400, 270
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 40
CURVE_POINTS = 40

STANDING: dict[Verdict | None, str] = {
    "best": "best", "not distinguishable": "tied", "better": "tied", "worse": "worse", None: "open",
}  # fmt: skip
"""A row's verdict as a CSS class."""

ON_TOP = ("worse", "open", "tied", "best")
"""The classes in drawing order."""


def element(name: str, *children: Any, **attributes: Any) -> Markup:
    """An SVG element; text and attributes are escaped, numbers rounded, `class_` and `text_anchor` spelled right."""
    parts = [Markup("<{}").format(Markup(name))]
    for key, value in attributes.items():
        text = f"{value:.5g}" if isinstance(value, float) else value
        parts.append(Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), text))
    return Markup("").join([*parts, Markup(">"), *children, Markup("</{}>").format(Markup(name))])


def picture(*children: Any, label: str, width: float = WIDTH, height: float = HEIGHT, least: float = 0) -> Markup:
    """An <svg> with these children, at least `least` pixels wide. `label` is for screen readers."""
    style = f"min-width: {least:.0f}px"
    return element("svg", *children, viewBox=f"0 0 {width} {height}", role="img", aria_label=label, style=style)


@dataclass(frozen=True)
class Scale:
    """Maps values from `low` to `high` to pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value. A value outside of the range gets the pixel at the edge."""
        low, high, x = (math.log(v) if self.log else v for v in (self.low, self.high, self._clip(value)))
        return self.start + (x - low) / (high - low) * (self.end - self.start)

    def holds(self, value: float) -> bool:
        """Whether the value is in range."""
        return self._clip(value) == value

    def _clip(self, value: float) -> float:
        return min(max(value, self.low), self.high)

    def ticks(self) -> list[tuple[float, str]]:
        """About five round values with their text."""
        values = log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high)
        return [(v, number_text(float(f"{v:.6g}"))) for v in values]


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, about `count` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= 0.8 * rough)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten; if there are few, also 2 and 5 times these."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 2, 5)):
        values = [d * 10.0**e for e in exponents for d in digits if low * 0.999 <= d * 10.0**e <= high * 1.001]
        if len(values) >= 3:
            return values
    return [low, high]


def robust_range(values: Iterable[float]) -> tuple[float, float]:
    """The range of the values without outliers (by Tukey's outer fences), and a margin."""
    known = np.array([v for v in values if math.isfinite(v)])
    if not len(known):
        return 0.0, 1.0
    q25, q75 = np.quantile(known, (0.25, 0.75))
    low, high = max(known.min(), q25 - 3 * (q75 - q25)), min(known.max(), q75 + 3 * (q75 - q25))
    room = 0.04 * (high - low) or 0.05 * abs(high) or 0.5
    return float(low - room), float(high + room)


@dataclass(frozen=True)
class Dimension:
    """An axis or a metric as numbers. Values without an order count as 0, 1, 2, …"""

    name: str
    number: Callable[[Any], float]
    low: float
    high: float
    log: bool
    marks: list[tuple[float, str]] | None

    def scale(self, start: float, end: float) -> Scale:
        """Onto pixels."""
        return Scale(self.low, self.high, start, end, self.log)

    def ticks(self, scale: Scale, apart: float) -> list[tuple[float, str]]:
        """Ticks at the varied values, or at round values if there are too many; at least `apart` pixels apart."""
        kept: list[tuple[float, str]] = []
        for value, text in self.marks or scale.ticks():
            if not kept or abs(scale(value) - scale(kept[-1][0])) >= apart:
                kept.append((value, text))
        return kept


def axis_dimension(name: str, spec: list[Any] | str | None, values: Sequence[Any]) -> Dimension:
    """An axis of the sweep. It is logarithmic if it was drawn by log(), or a grid spans a factor of 8 or more."""
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not numeric:
        texts = list(dict.fromkeys(value_text(v) for v in values))
        # Show the ends of paths: paths mostly differ in their file names.
        folder = os.path.commonprefix(texts).rpartition("/")[0] if len(texts) > 1 else ""
        marks = [(float(i), text[len(folder) :].lstrip("/")) for i, text in enumerate(texts)]
        return Dimension(name, lambda v: float(texts.index(value_text(v))), -0.4, len(texts) - 0.6, False, marks)
    distinct = sorted({float(v) for v in values})
    low, high = distinct[0], distinct[-1]
    log = spec.startswith("log") if isinstance(spec, str) else low > 0 and high / low >= 8
    marks = None if isinstance(spec, str) else [(v, number_text(v)) for v in distinct]
    if log:
        room = (high / low) ** 0.07 if high > low else 2.0
        return Dimension(name, float, low / room, high * room, True, marks)
    room = 0.07 * (high - low) or abs(high) / 2 or 1.0
    return Dimension(name, float, low - room, high + room, False, marks)


def frame(
    x: Scale, y: Scale, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]], x_name: str
) -> Markup:
    """Grid lines, tick texts, and the name of x below. The name of y is the picture's heading."""
    marks: list[Markup] = []
    for value, text in y_ticks:
        at = y(value)
        marks.append(element("line", x1=x.start, x2=x.end, y1=at, y2=at, class_="grid"))
        marks.append(element("text", text, x=x.start - 7, y=at + 4, text_anchor="end"))
    for value, text in x_ticks:
        marks.append(element("line", x1=x(value), x2=x(value), y1=y.start, y2=y.start + 4, class_="tick"))
        marks.append(element("text", shorten(text, 14), x=x(value), y=y.start + 17, text_anchor="middle"))
    marks.append(element("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="tick"))
    marks.append(element("text", x_name, x=x.end, y=y.start + 34, text_anchor="end", class_="name"))
    return Markup("").join(marks)


def curve_points(trial: Trial, metric: str) -> list[tuple[float, float]]:
    """The points (tokens, value) at which the metric was logged. Many points are averaged over neighbours."""
    points = [
        (float(m["tokens"]), float(m[metric]))
        for m in trial.metrics
        if m.get(metric) is not None and math.isfinite(m[metric])
    ]
    if len(points) <= CURVE_POINTS:
        return points
    return [(float(b[:, 0].mean()), float(b[:, 1].mean())) for b in np.array_split(np.array(points), CURVE_POINTS)]


def learning_curves(rows: Sequence[Row], metric: str) -> Markup | None:
    """The metric over tokens, one line per trial. A cross ends a failed trial. None if no trial logged the metric."""
    curves = [(row, trial, curve_points(trial, metric)) for row in rows for trial in row.trials]
    curves = [curve for curve in curves if curve[2]]
    if not curves:
        return None
    values = [value for *_, points in curves for _, value in points]
    x = Scale(0, max(tokens for *_, points in curves for tokens, _ in points), LEFT, WIDTH - RIGHT - 6)
    low, high = robust_range(values)
    y = Scale(low, high, HEIGHT - BOTTOM, TOP)
    lines: list[Markup] = []
    for row, trial, points in sorted(curves, key=lambda curve: ON_TOP.index(STANDING[curve[0].verdict])):
        d = "M" + "L".join(f"{x(tokens):.1f},{y(value):.1f}" for tokens, value in points)
        at_x, at_y = x(points[-1][0]), y(points[-1][1])
        end = element("circle", cx=at_x, cy=at_y, r=2.5, class_="end")
        if trial.state == "failed":
            end = element("path", d=f"M{at_x - 4:.1f},{at_y - 4:.1f}l8,8m0,-8l-8,8", class_="cross")
        title = f"{row.label}, seed {trial.seed}: {points[-1][1]:.4g} ({trial.state})"
        lines.append(
            element(
                "g", element("title", title), element("path", d=d, class_="hit"), element("path", d=d), end,
                class_=f"curve {STANDING[row.verdict]}",
            )
        )  # fmt: skip
    x_ticks = [(tokens, count_text(tokens)) for tokens in linear_ticks(x.low, x.high, 4)]
    return picture(frame(x, y, x_ticks, y.ticks(), "tokens"), *lines, label=f"{metric} over tokens")


def metric_against_axis(comparison: Comparison, key: str, spec: list[Any] | str | None) -> Markup:
    """The metric of every point over an axis, with intervals. Hollow dots are single seeds.

    Lines join points that differ only in this axis.
    """
    rows = [row for row in comparison.rows if row.metric]
    name = short_names(comparison.keys)[key]
    dimension = axis_dimension(name, spec, [row.point[key] for row in comparison.rows])
    x = dimension.scale(LEFT, WIDTH - RIGHT)
    y = metric_scale(comparison, HEIGHT - BOTTOM, TOP)
    at = [x(dimension.number(row.point[key])) for row in rows]
    at = dodge(at, 0.5 * (x.end - x.start) / len(set(at)))

    lines: dict[str, list[tuple[float, float]]] = {}
    marks: list[Markup] = []
    for row, at_x in sorted(zip(rows, at), key=lambda pair: ON_TOP.index(STANDING[pair[0].verdict])):
        assert row.metric
        others = repr([(row.sweep, row.point[k]) for k in comparison.keys if k != key])
        lines.setdefault(others, []).append((at_x, y(row.metric.value)))
        seeds = [trial_metric(t, comparison.metric) for t in row.compared]
        inside: list[Markup] = [element("title", describe(comparison, row))]
        if row.metric.low is not None and row.metric.high is not None:
            inside.append(
                element("line", x1=at_x, x2=at_x, y1=y(row.metric.low), y2=y(row.metric.high), class_="interval")
            )
        inside += [element("circle", cx=at_x, cy=y(v), r=2.4, class_="seed") for v in seeds if y.holds(v)]
        inside.append(dot(at_x, row.metric.value, y))
        marks.append(element("g", *inside, class_=f"point {STANDING[row.verdict]}"))
    joined = [
        element("path", d="M" + "L".join(f"{a:.1f},{b:.1f}" for a, b in sorted(points)), class_="join")
        for points in lines.values()
        if len(points) > 1
    ]
    ticks = dimension.ticks(x, 34 if len(dimension.marks or []) < 8 else 44)
    return picture(frame(x, y, ticks, y.ticks(), name), *joined, *marks, label=f"{comparison.metric} against {name}")


def dodge(at: Sequence[float], room: float) -> list[float]:
    """Move marks with the same position apart, within `room` pixels."""
    places: dict[float, list[int]] = {}
    for i, x in enumerate(at):
        places.setdefault(round(x, 1), []).append(i)
    moved = list(at)
    for x, indices in places.items():
        step = min(12.0, room / len(indices))
        for rank, i in enumerate(indices):
            moved[i] = x + step * (rank - (len(indices) - 1) / 2)
    return moved


def dot(x: float, value: float, y: Scale) -> Markup:
    """A dot for a value, or a triangle at the edge if the value is outside of the scale."""
    if y.holds(value):
        return element("circle", cx=x, cy=y(value), r=4.5, class_="dot")
    way = 1 if value > y.high else -1
    return element("path", d=f"M{x:.1f},{y(value):.1f}l5,{8 * way}h-10z", class_="dot")


def metric_scale(comparison: Comparison, start: float, end: float) -> Scale:
    """The scale of the metric, which includes the intervals."""
    intervals = [row.metric for row in comparison.rows if row.metric]
    values = [v for i in intervals for v in (i.value, i.low, i.high) if v is not None]
    low, high = robust_range(values)
    return Scale(low, high, start, end)


def describe(comparison: Comparison, row: Row) -> str:
    """A point's hover text."""
    digits = comparison.digits
    value = f"{row.metric.value:.{digits}f}" if row.metric else "no value"
    interval = f" ({row.metric.text(digits)})" if row.metric and row.metric.low is not None else ""
    return f"{row.label}: {comparison.metric} {value}{interval}, {row.verdict or row.status}"


def parallel_coordinates(comparison: Comparison, specs: dict[str, list[Any] | str]) -> Markup:
    """One line per point through its value on every axis and its metric. A better metric is higher."""
    rows = [row for row in comparison.rows if row.metric]
    names = short_names(comparison.keys)
    dimensions = [axis_dimension(names[k], specs.get(k), [row.point[k] for row in rows]) for k in comparison.keys]
    height, top, bottom = 280, 36, 264
    width = max(WIDTH, 110 * len(dimensions) + 80)
    xs = np.linspace(44, width - 40, len(dimensions) + 1).tolist()
    scales = [dimension.scale(bottom, top) for dimension in dimensions]
    better_up = (bottom, top) if comparison.mode == "max" else (top, bottom)
    metric = metric_scale(comparison, *better_up)
    marks: list[Markup] = []
    for row in sorted(rows, key=lambda row: ON_TOP.index(STANDING[row.verdict])):
        assert row.metric
        ys = [scale(d.number(row.point[k])) for k, d, scale in zip(comparison.keys, dimensions, scales)]
        points = list(zip(xs, [*ys, metric(row.metric.value)]))
        d = f"M{points[0][0]:.1f},{points[0][1]:.1f}" + "".join(
            f"C{(a + c) / 2:.1f},{b:.1f} {(a + c) / 2:.1f},{e:.1f} {c:.1f},{e:.1f}"
            for (a, b), (c, e) in zip(points, points[1:])
        )
        title = element("title", describe(comparison, row))
        hit, line = element("path", d=d, class_="hit"), element("path", d=d)
        marks.append(element("g", title, hit, line, class_=f"curve {STANDING[row.verdict]}"))
    ticks = [(d.name, d.ticks(scale, 18), scale) for d, scale in zip(dimensions, scales)]
    for x, (name, values, scale) in zip(xs, [*ticks, (comparison.metric, metric.ticks(), metric)]):
        side, anchor = (7, "start") if x == xs[-1] else (-7, "end")
        marks.append(element("line", x1=x, x2=x, y1=top, y2=bottom, class_="tick"))
        name_x, name_anchor = (width - 4, "end") if x == xs[-1] else (x, "middle")
        marks.append(element("text", name, x=name_x, y=top - 16, text_anchor=name_anchor, class_="name"))
        marks += [
            element("text", shorten(text, 14), x=x + side, y=scale(value) + 4, text_anchor=anchor, class_="halo")
            for value, text in values
        ]
    # Do not shrink a picture with many axes: the page lets it scroll.
    return picture(*marks, label="parallel coordinates", width=width, height=height, least=0.8 * width)


def difference_scale(comparison: Comparison) -> Scale:
    """The scale of the differences to the best, which includes zero and the intervals."""
    known = [row.difference for row in comparison.rows if row.difference]
    low, high = robust_range([b for d in known for b in (d.value, d.low, d.high, 0.0) if b is not None])
    return Scale(low, high, 4, WIDTH - 4)


def difference_bar(comparison: Comparison, row: Row) -> Markup:
    """A point's paired difference to the best with its simultaneous interval. The vertical line is zero."""
    assert row.difference and row.difference.low is not None and row.difference.high is not None
    x, digits = difference_scale(comparison), comparison.digits
    title = f"{row.label}: {row.difference.value:+.{digits}f} ({row.difference.text(digits)}), {row.verdict}"
    return picture(
        element("line", x1=x(0.0), x2=x(0.0), y1=0, y2=14, class_="zero"),
        element(
            "g",
            element("title", title),
            element("line", x1=x(row.difference.low), x2=x(row.difference.high), y1=7, y2=7, class_="interval"),
            element("circle", cx=x(row.difference.value), cy=7, r=4.5, class_="dot"),
            class_=f"point {STANDING[row.verdict]}",
        ),
        label=title,
        height=14,
    )


def difference_ticks(comparison: Comparison) -> Markup:
    """The scale under the bars."""
    x = difference_scale(comparison)
    marks = [element("line", x1=x.start, x2=x.end, y1=1, y2=1, class_="tick")]
    for value, text in x.ticks():
        marks.append(element("line", x1=x(value), x2=x(value), y1=1, y2=5, class_="tick"))
        marks.append(element("text", text, x=x(value), y=19, text_anchor="middle"))
    return picture(*marks, label="scale of the differences", height=24)


def small_interval(comparison: Comparison, row: Row) -> Markup:
    """The metric with its interval, for a cell of the table."""
    assert row.metric
    x = metric_scale(comparison, 4, 116)
    low, high = row.metric.low, row.metric.high
    line = "" if low is None or high is None else element(
        "line", x1=x(low), x2=x(high), y1=7, y2=7, class_="interval"
    )  # fmt: skip
    mark = element("circle", cx=x(row.metric.value), cy=7, r=3.5, class_="dot")
    title = element("title", describe(comparison, row))
    return picture(
        element("g", title, line, mark, class_=f"point {STANDING[row.verdict]}"),
        label=describe(comparison, row), width=120, height=14,
    )  # fmt: skip
