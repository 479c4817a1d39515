"""The report's pictures, drawn by matplotlib once for the page and for report.png.

Drawing functions take matplotlib's axes. `inline_svg` turns a figure into a part of the page that follows dark mode
and shows texts on hover, without script. A picture is 400 units wide. On a phone, the page shrinks it but enlarges its
text, so labels need room for that.
"""

from __future__ import annotations

import io
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import LogLocator, MaxNLocator

from minimind_ray.sweep.axes import short_names
from minimind_ray.sweep.export import standing
from minimind_ray.sweep.metric import trial_metric
from minimind_ray.sweep.table import Comparison, Row
from minimind_ray.sweep.text import count_text, number_text, shorten, value_text
from minimind_ray.sweep.trials import Trial

WIDTH, HEIGHT = 400, 270
LEFT, RIGHT, TOP, BOTTOM = MARGINS = 52, 12, 12, 46
LETTER = 8
"""The width of a label's letter on a phone, in units."""
CURVE_POINTS = 40
LONGEST_LABEL = 90
"""The most letters of a point's label in report.png."""

ON_TOP = ("worse", "open", "tied", "best")
"""The classes in drawing order."""

COLOURS = {
    "best": "#0a7d4f", "tied": "#2470c2", "worse": "#727c86", "open": "#9a6408",
    "ink": "#1a1f24", "soft": "#59636d", "line": "#e2e6ea", "card": "#ffffff",
}  # fmt: skip
"""The light colours of the page and of report.png, by the names of the page's CSS variables."""

LINES: dict[str, dict[str, Any]] = {
    "best": {"linewidth": 2.8}, "tied": {"linewidth": 1.5}, "worse": {"linewidth": 1.5, "alpha": 0.75},
    "open": {"linewidth": 1.5, "linestyle": (0, (3.3, 2))},
}  # fmt: skip

HIT: dict[str, Any] = {"linewidth": 12, "alpha": 0.001}
"""A wide, almost invisible line to hover over. Matplotlib would leave out a line that is wholly invisible."""

STYLE: dict[Any, Any] = {
    "axes.axisbelow": True, "axes.edgecolor": COLOURS["soft"], "axes.facecolor": "none",
    "axes.grid": True, "axes.grid.axis": "y",
    "axes.labelcolor": COLOURS["ink"], "axes.labelpad": 6, "axes.labelweight": "bold",
    "axes.titlecolor": COLOURS["ink"], "axes.titlelocation": "left", "axes.titlesize": 12, "axes.titleweight": "bold",
    "axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False,
    "figure.facecolor": "none", "font.size": 12, "grid.color": COLOURS["line"], "grid.linewidth": 1,
    "text.color": COLOURS["soft"], "xtick.color": COLOURS["soft"], "ytick.color": COLOURS["soft"],
    "xtick.major.pad": 5, "xtick.major.size": 4, "ytick.major.size": 0, "xaxis.labellocation": "right",
    # Do not read users' dollar signs as mathematics. Let browsers draw text. Give the same page for the same sweep.
    "text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "report",
}  # fmt: skip
"""Matplotlib's settings while pictures are drawn and written."""

FONT = re.compile("font-(family|size): [^;]*;? ?")
NUMBER = re.compile(r"-?\d+\.\d+")
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
SVG_SPACE = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"


def picture(width: float, height: float, margins: Sequence[float] = MARGINS) -> tuple[Figure, Axes]:
    """An empty figure for the page, of so many units, and its axes; margins are left, right, top and bottom."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    left, right, top, bottom = margins
    place = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    return figure, figure.add_axes(place)


def inline_svg(figure: Figure, label: str, least: float = 0) -> Markup:
    """The figure as an <svg> without web addresses, fonts, clip paths and numbered ids; all text is escaped.

    `COLOURS` become the page's CSS variables, those of a verdict `--colour`, which the mark's class sets. What
    `marked` wrote becomes classes and a <title>, one <g> for all parts of a mark.

    Args:
        figure: drawn under `STYLE`.
        label: for screen readers.
        least: the smallest scale, in pixels per unit. The largest is 1.3.
    """
    written = io.StringIO()
    with warnings.catch_warnings():
        # The browser draws the text, with its own fonts.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(written, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(NOT_XML.sub("\ufffd", written.getvalue()))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{SVG_SPACE}style", f"{SVG_SPACE}clipPath"):
                parent.remove(child)
        gather_marks(parent)
    for node in root.iter():
        node.tag = node.tag.removeprefix(SVG_SPACE)
        node.text, node.tail = (node.text or "").strip(), None
        node.attrib.pop("clip-path", None)
        if target := node.attrib.pop(LINK, None):
            node.set("xlink:href", target)
        if style := node.get("style"):
            node.set("style", with_variables(FONT.sub("", style)))
        for name in {"d", "x", "y", "transform"} & node.attrib.keys():
            node.set(name, " ".join(NUMBER.sub(lambda found: f"{float(found[0]):.4g}", node.attrib[name]).split()))
    view, width = root.attrib["viewBox"], 72 * figure.get_figwidth()
    style = f"min-width: {least * width:.0f}px; max-width: {1.3 * width:.0f}px"
    root.attrib = {"viewBox": view, "role": "img", "aria-label": label, "style": style}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def gather_marks(parent: ElementTree.Element) -> None:
    """Merge a parent's groups that are parts of one mark; drop the ids that matplotlib numbers."""
    last, mark = "", parent
    for child in list(parent):
        name = child.attrib.pop("id", "") if child.tag == f"{SVG_SPACE}g" else ""
        classes, colon, title = name.partition(": ")
        if name == last and colon:
            mark.extend(child)
            parent.remove(child)
        elif colon:
            mark = child
            child.set("class", classes)
            heading = ElementTree.Element("title")
            heading.text = title
            child[:0] = [heading] if title else []
        last = name


def with_variables(style: str) -> str:
    """A style with the page's CSS variables instead of `COLOURS`."""
    for name, colour in COLOURS.items():
        style = style.replace(colour, "var(--colour)" if name in ON_TOP else f"var(--{name})")
    return style


def marked(kind: str, row: Row, title: str) -> dict[str, Any]:
    """Matplotlib's arguments for parts of the mark of a row: its colour, and what `inline_svg` reads."""
    kind_of_row = standing(row.verdict)
    return {"color": COLOURS[kind_of_row], "gid": f"{kind} {kind_of_row}: {title}", "clip_on": False}


def drawing_order(row: Row) -> int:
    """The best is drawn last, on top."""
    return ON_TOP.index(standing(row.verdict))


def robust_range(values: Iterable[float]) -> tuple[float, float]:
    """The range of the values without outliers (by Tukey's outer fences), and a margin."""
    known = np.array([v for v in values if math.isfinite(v)])
    if not len(known):
        return full_range(())
    q25, q75 = np.quantile(known, (0.25, 0.75))
    return full_range(np.clip(known, q25 - 3 * (q75 - q25), q75 + 3 * (q75 - q25)))


def full_range(values: Iterable[float]) -> tuple[float, float]:
    """The range of the finite values, and a margin."""
    known = [v for v in values if math.isfinite(v)]
    if not known:
        return 0.0, 1.0
    low, high = min(known), max(known)
    room = 0.04 * (high - low) or 0.05 * abs(high) or 0.5
    return float(low - room), float(high + room)


@dataclass(frozen=True)
class Dimension:
    """An axis or a metric as numbers. Values without an order count as 0, 1, 2, …"""

    name: str
    number: Callable[[Any], float]
    low: float
    high: float
    log: bool = False
    marks: list[tuple[float, str]] | None = None

    def clip(self, number: float) -> float:
        """Numbers outside land on the edge."""
        return min(max(number, self.low), self.high)

    def share(self, number: float) -> float:
        """Where a number lies between `low` (0) and `high` (1)."""
        low, high, x = (math.log(v) if self.log else v for v in (self.low, self.high, self.clip(number)))
        return (x - low) / (high - low)

    def ticks(self, apart: float = 0) -> list[tuple[float, str]]:
        """(share, text) of the varied values, or of round ones where those are drawn; at least `apart` apart."""
        kept: list[tuple[float, str]] = []
        for number, text in self.marks or round_values(self.low, self.high, self.log):
            share = self.share(number)
            if not kept or share - kept[-1][0] >= apart:
                kept.append((share, text))
        return kept


def round_values(low: float, high: float, log: bool = False) -> list[tuple[float, str]]:
    """About five round values from `low` to `high` with their text."""
    # Up to 6 steps may leave fewer than 3 values inside; up to 9 steps do not.
    linear = [MaxNLocator(steps, steps=[1, 2, 5, 10]) for steps in (6, 9)]
    locators = [LogLocator(), LogLocator(subs=(1, 2, 5)), *linear] if log else linear
    found = [[float(f"{v:.6g}") for v in locator.tick_values(low, high)] for locator in locators]
    inside = [[v for v in values if low <= v <= high] for values in found]
    # Of values that differ after 6 digits alone, the ends remain.
    ends = [float(f"{v:.6g}") for v in (low, high)]
    return [(v, number_text(v)) for v in next((values for values in inside if len(values) >= 3), ends)]


def is_logarithmic(spec: list[Any] | str | None, values: Sequence[Any]) -> bool:
    """Whether an axis of the sweep is logarithmic: it was drawn by log(), or a grid spans a factor of 8 or more."""
    if isinstance(spec, str):
        return spec.startswith("log")
    numeric = bool(values) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return numeric and min(values) > 0 and max(values) / min(values) >= 8


def axis_dimension(name: str, spec: list[Any] | str | None, values: Sequence[Any]) -> Dimension:
    """An axis of the sweep."""
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not numeric:
        texts = list(dict.fromkeys(value_text(v) for v in values))
        # Show the ends of paths: paths mostly differ in their file names.
        folder = os.path.commonprefix(texts).rpartition("/")[0] if len(texts) > 1 else ""
        labels = distinct_labels([text[len(folder) :].lstrip("/") for text in texts])
        marks = [(float(i), label) for i, label in enumerate(labels)]
        return Dimension(name, lambda v: float(texts.index(value_text(v))), -0.4, len(texts) - 0.6, False, marks)
    distinct = sorted({float(v) for v in values})
    low, high = distinct[0], distinct[-1]
    log = is_logarithmic(spec, values)
    marks = None if isinstance(spec, str) else [(v, number_text(v)) for v in distinct]
    if log:
        room = (high / low) ** 0.07 if high > low else 2.0
        return Dimension(name, float, low / room, high * room, True, marks)
    room = 0.07 * (high - low) or abs(high) / 2 or 1.0
    return Dimension(name, float, low - room, high + room, False, marks)


def distinct_labels(texts: list[str]) -> list[str]:
    """The texts, short enough to stand side by side below a picture. What they have in common is left out first."""
    longest = min(14, max(6, (WIDTH - LEFT - RIGHT) // LETTER // len(texts)))
    if len(texts) > 1 and max(map(len, texts)) > longest:
        start = len(os.path.commonprefix(texts))
        rest = [text[start:] for text in texts]
        end = len(os.path.commonprefix([text[::-1] for text in rest]))
        texts = ["…" * (start > 0) + text[: len(text) - end] + "…" * (end > 0) for text in rest]
    return [shorten(text, longest) for text in texts]


def metric_dimension(comparison: Comparison) -> Dimension:
    """The scale of the metric, which includes the intervals."""
    intervals = [row.metric for row in comparison.rows if row.metric]
    values = [v for i in intervals for v in (i.value, i.low, i.high) if v is not None]
    return Dimension(comparison.metric, float, *robust_range(values))


def difference_dimension(comparison: Comparison) -> Dimension:
    """The scale of the differences to the best, which includes zero and the intervals."""
    known = [row.difference for row in comparison.rows if row.difference]
    values = [v for d in known for v in (d.value, d.low, d.high, 0.0) if v is not None]
    return Dimension("difference", float, *robust_range(values))


def set_round_ticks(axes: Axes, way: Literal["x", "y"], low: float, high: float) -> None:
    """Let an axis of a picture go from `low` to `high`, with round values on it."""
    values, texts = zip(*round_values(low, high))
    # The limits last, since ticks may widen them.
    axes.set(**{f"{way}ticks": values, f"{way}ticklabels": texts, f"{way}lim": (low, high)})


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


def learning_curves(axes: Axes, rows: Sequence[Row], metric: str) -> bool:
    """Draw the metric over tokens, a line per trial; a cross ends a failed one. Return False if no trial logged it."""
    curves = [(row, trial, curve_points(trial, metric)) for row in rows for trial in row.trials]
    curves = sorted((curve for curve in curves if curve[2]), key=lambda curve: drawing_order(curve[0]))
    low, high = robust_range(value for *_, points in curves for _, value in points)
    for row, trial, points in curves:
        title = f"{row.label}, seed {trial.seed}: {points[-1][1]:.4g} ({trial.state})"
        tokens, values = zip(*points)
        shown = np.clip(values, low, high)
        marker, size, edge = ("x", 8, 2) if trial.state == "failed" else ("o", 5, 0)
        arguments = marked("curve", row, title)
        axes.plot(tokens, shown, **HIT, **arguments)
        axes.plot(tokens, shown, **LINES[standing(row.verdict)], **arguments)
        axes.plot(tokens[-1], shown[-1], marker=marker, markersize=size, markeredgewidth=edge, **arguments)
    axes.set_xlabel("tokens")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(lambda tokens, _: count_text(tokens))
    set_round_ticks(axes, "y", low, high)
    return bool(curves)


def draw_point(axes: Axes, comparison: Comparison, row: Row, at: float, *, flat: bool) -> None:
    """Draw a point's metric with its interval and its seeds, `flat` along x or else along y, at `at` of the other.

    Hollow dots are single seeds; triangles lie outside.
    """
    assert row.metric
    metric, arguments = metric_dimension(comparison), marked("point", row, describe(comparison, row))

    def draw(values: Sequence[float], **options: Any) -> None:
        places, shown = [at] * len(values), [metric.clip(v) for v in values]
        axes.plot(*((shown, places) if flat else (places, shown)), **options, **arguments)

    value, low, high = row.metric.value, row.metric.low, row.metric.high
    if low is not None and high is not None:
        draw((low, high), linewidth=3, alpha=0.5, solid_capstyle="round")
    seeds = [v for t in row.compared if metric.clip(v := trial_metric(t, comparison.metric)) == v]
    if seeds:
        small = {"markersize": 4.8, "markeredgewidth": 1.2, "markerfacecolor": COLOURS["card"]}
        draw(seeds, linestyle="", marker="o", **small)
    outside = "<>" if flat else "v^"
    shape = outside[value > metric.high] if metric.clip(value) != value else "o"
    draw([value], linestyle="", marker=shape, markersize=9, markeredgewidth=0)


def all_points(axes: Axes, comparison: Comparison) -> None:
    """Draw every point's metric with its interval, best first."""
    rows, metric = [row for row in comparison.rows if row.metric], metric_dimension(comparison)
    for place, row in enumerate(rows):
        draw_point(axes, comparison, row, place, flat=True)
    axes.set_yticks(range(len(rows)), [shorten(row.label, LONGEST_LABEL) for row in rows])
    set_round_ticks(axes, "x", metric.low, metric.high)
    # Leave the title room to the left, above the labels.
    axes.set_title("95 % intervals; hollow dots are single seeds", loc="right")
    axes.set_xlabel(comparison.metric)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x")


def metric_against_axis(axes: Axes, comparison: Comparison, key: str, spec: list[Any] | str | None) -> None:
    """Draw the metric of every point over one axis; lines join points that differ in this axis alone."""
    rows = [row for row in comparison.rows if row.metric]
    dimension = axis_dimension(short_names(comparison.keys)[key], spec, [row.point[key] for row in comparison.rows])
    metric, width = metric_dimension(comparison), WIDTH - LEFT - RIGHT
    at = [dimension.share(dimension.number(row.point[key])) for row in rows]
    at = dodge(at, 12 / width, 0.5 / len(set(at)))
    lines: dict[str, list[tuple[float, float]]] = {}
    for row, x in zip(rows, at):
        assert row.metric
        others = repr([(row.sweep, row.point[k]) for k in comparison.keys if k != key])
        lines.setdefault(others, []).append((x, metric.clip(row.metric.value)))
    for points in lines.values():
        axes.plot(*zip(*sorted(points)), color=COLOURS["soft"], alpha=0.28, linewidth=1)
    for row, x in sorted(zip(rows, at), key=lambda pair: drawing_order(pair[0])):
        draw_point(axes, comparison, row, x, flat=False)
    longest = max(len(text) for _, text in dimension.ticks())
    axes.set_xticks(*zip(*dimension.ticks(LETTER * (longest + 0.5) / width)))
    set_round_ticks(axes, "y", metric.low, metric.high)
    axes.set(xlabel=dimension.name, xlim=(0, 1))


def dodge(at: Sequence[float], most: float, room: float) -> list[float]:
    """Move marks at the same place apart, each by at most `most`, within `room` and within 0 to 1."""
    places: dict[float, list[int]] = {}
    for i, x in enumerate(at):
        places.setdefault(round(x, 3), []).append(i)
    moved = list(at)
    for x, indices in places.items():
        step = min(most, min(room, 2 * x, 2 * (1 - x)) / len(indices))
        for rank, i in enumerate(indices):
            moved[i] = x + step * (rank - (len(indices) - 1) / 2)
    return moved


def describe(comparison: Comparison, row: Row) -> str:
    """A point's hover text."""
    digits = comparison.digits
    value = f"{row.metric.value:.{digits}f}" if row.metric else "no value"
    interval = f" ({row.metric.text(digits)})" if row.metric and row.metric.low is not None else ""
    return f"{row.label}: {comparison.metric} {value}{interval}, {row.verdict or row.status}"


def parallel_coordinates(comparison: Comparison, specs: dict[str, list[Any] | str]) -> Figure:
    """A figure of one line per point through its value on every axis and its metric, the better the higher.

    Many axes need more width, as do long texts beside the first and the last one.
    """
    rows = [row for row in comparison.rows if row.metric]
    names, metric = short_names(comparison.keys), metric_dimension(comparison)
    dimensions = [axis_dimension(names[k], specs.get(k), [row.point[k] for row in rows]) for k in comparison.keys]
    ticks, last = [dimension.ticks(0.08) for dimension in (*dimensions, metric)], len(dimensions)
    left, right = (22 + LETTER * max(len(text) for _, text in ticks[x]) for x in (0, last))
    figure, axes = picture(left + max(120 * last, 280) + right, 280, margins=(left, right, 36, 16))
    for row in sorted(rows, key=drawing_order):
        assert row.metric
        quality = metric.share(row.metric.value)
        ys = [d.share(d.number(row.point[k])) for k, d in zip(comparison.keys, dimensions)]
        ys.append(quality if comparison.mode == "max" else 1 - quality)
        bends = [p for x in range(last) for p in ((x + 0.5, ys[x]), (x + 0.5, ys[x + 1]), (x + 1, ys[x + 1]))]
        path = Path([(0, ys[0]), *bends], [Path.MOVETO] + [Path.CURVE4] * len(bends))
        arguments = marked("curve", row, describe(comparison, row))
        axes.add_patch(PathPatch(path, fill=False, **HIT, **arguments))
        axes.add_patch(PathPatch(path, fill=False, **LINES[standing(row.verdict)], **arguments))
    for x, dimension in enumerate([*dimensions, metric]):
        axes.axvline(x, color=COLOURS["soft"], alpha=0.6, linewidth=1)
        side, anchor = (7, "left") if x == last else (-7, "right")
        beside: dict[str, Any] = {"xytext": (side, 0), "ha": anchor, "va": "center_baseline", "gid": "halo: "}
        for share, text in ticks[x]:
            y = 1 - share if dimension is metric and comparison.mode == "min" else share
            axes.annotate(text, (x, y), textcoords="offset points", **beside)
        at, anchor = ((right - 2, 16), "right") if x == last else ((0, 16), "center")
        above: dict[str, Any] = {"xytext": at, "color": COLOURS["ink"], "weight": "bold", "ha": anchor}
        axes.annotate(shorten(dimension.name, 12), (x, 1), textcoords="offset points", **above)
    axes.set(xlim=(0, last), ylim=(0, 1))
    axes.set_axis_off()
    return figure
