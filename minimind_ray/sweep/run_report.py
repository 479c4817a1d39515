"""Write the report of single runs: one self-contained page without scripts, in the look of a sweep's report.

It shows learning curves, answers, the settings that differ, and the runs' results on the same examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from minimind_ray.config.reading import dump_yaml
from minimind_ray.config.stages import STAGES
from minimind_ray.sweep import chart
from minimind_ray.sweep.export import standing
from minimind_ray.sweep.models import ModelComparison, compare_models
from minimind_ray.sweep.models_export import sentences
from minimind_ray.sweep.report import PAGE, Figure
from minimind_ray.sweep.runs import Run, shared_results
from minimind_ray.sweep.text import count_text, duration_text, shorten, value_text
from minimind_ray.train.run import RunDirectory, write_atomically

CURVES = {
    "loss": "Training loss", "val/loss": "Validation loss", "lr": "Learning rate", "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
}  # fmt: skip
"""The curves of every stage, by their keys in metrics.jsonl, and their headings."""
UNSEEN = ("out", "track")
"""Settings that do not change what is trained."""
COLOURS = 8
"""The number of colours of curves; with more runs, they repeat."""
MOST_NAMES = 3


def write_run_report(runs: Sequence[Run], out: Path | None = None) -> str:
    """Write the page and return its path or URL.

    It is written to `out`. By default, it is report.html in the directory of a single run, or a file in the current
    folder that is named after the runs.
    """
    page = render_runs(runs)
    if out is None and len(runs) == 1:
        run = RunDirectory(runs[0].where)
        run.write(PAGE, page)
        return f"{run.where.rstrip('/')}/{PAGE}"
    out = out or Path(f"report-{_joined([run.name for run in runs])}.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page)
    return str(out)


def _joined(names: Sequence[str]) -> str:
    more = f"-and-{len(names) - MOST_NAMES}-more" if len(names) > MOST_NAMES else ""
    return "-".join(name.replace("/", "-") for name in names[:MOST_NAMES]) + more


@rc_context(chart.STYLE)
def render_runs(runs: Sequence[Run]) -> str:
    """The page as HTML. Answers, errors and paths are untrusted texts: the template escapes them."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    filters: dict[str, Callable[..., Any]] = {
        "count": count_text, "duration": duration_text, "value": value_text, "shorten": shorten, "standing": standing,
    }  # fmt: skip
    environment.filters.update(filters)
    comparison, notes = results(runs)
    return environment.get_template("runs.html.j2").render(
        runs=runs,
        colours=chart.COLOURS,
        hues=COLOURS,
        facts=[facts(run) for run in runs],
        comparison=comparison,
        notes=notes,
        sentences=sentences(comparison) if comparison and len(runs) > 1 else [],
        curves=curves(runs),
        answers=answers(runs),
        settings=different_settings([run.config for run in runs]),
        failed=[run for run in runs if run.files.error],
        configs=[(run.name, dump_yaml(run.config)) for run in runs],
    )


def results(runs: Sequence[Run]) -> tuple[ModelComparison | None, list[str]]:
    """Return the comparison of the runs on the same examples, None if there are no such; and notes on what is lacking.

    Each run has one seed, so that a difference may be due to the seed.
    """
    measured, notes = shared_results(runs)
    return (compare_models(measured, why="one seed") if measured else None), notes if len(runs) > 1 else []


def facts(run: Run) -> dict[str, str]:
    """Return what a table says of a run, by column."""
    files = run.files
    trained = sum(line["tokens"] for line in files.metrics[-1:])
    judged = STAGES[run.stage].judged_by if run.stage in STAGES else "val/loss"
    found = {
        "stage": run.stage,
        "state": files.status,
        "steps": f"{files.steps:,}" + (f" of {files.length:,}" if files.length else ""),
        "tokens": count_text(files.tokens),
        "time": duration_text(files.seconds),
        "tokens/s": count_text(trained / files.seconds) if files.seconds else "",
        "seed": str(files.seed),
    }
    for metric in dict.fromkeys((judged, "val/loss")):
        value = files.best(metric)
        found[metric] = "" if value is None else f"{value:.4f}"
    return {**found, "best checkpoint": files.result.name if files.result else ""}


def curves(runs: Sequence[Run]) -> list[Figure]:
    """Return a picture for each curve that a run has."""
    found: list[Figure] = []
    judged = {STAGES[run.stage].judged_by for run in runs if run.stage in STAGES}
    for key in dict.fromkeys((*list(CURVES)[:2], *sorted(judged), *CURVES)):
        canvas, axes = chart.picture(chart.WIDTH, chart.HEIGHT)
        heading = CURVES.get(key, key)
        if draw_curves(axes, runs, key):
            found.append(Figure(heading, chart.inline_svg(canvas, f"{heading} over tokens")))
    return found


def draw_curves(axes: Axes, runs: Sequence[Run], key: str) -> bool:
    """Draw a line per run over its tokens. Return False if no run has a value."""
    lines = [(i, run, chart.curve_points(with_timing(run), key)) for i, run in enumerate(runs)]
    lines = [line for line in lines if line[2]]
    values_of_all = [value for *_, points in lines for _, value in points]
    # A schedule has no outliers: a rate outside the picture would be read as a lower one.
    low, high = chart.full_range(values_of_all) if key == "lr" else chart.robust_range(values_of_all)
    for i, run, points in lines:
        tokens, values = zip(*points)
        shown = np.clip(values, low, high)
        arguments: dict[str, Any] = {
            "color": chart.COLOURS["best"], "gid": f"curve run{i % COLOURS}: {run.name}: {values[-1]:.4g}",
            "clip_on": False,
        }  # fmt: skip
        axes.plot(tokens, shown, **chart.HIT, **arguments)
        axes.plot(tokens, shown, linewidth=1.8, **arguments)
        axes.plot(tokens[-1], shown[-1], marker="x" if run.files.state == "failed" else "o", markersize=5, **arguments)
    axes.set_xlabel("tokens")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(lambda tokens, _: count_text(tokens))
    chart.set_round_ticks(axes, "y", low, high)
    return bool(lines)


def with_timing(run: Run) -> Any:
    """Return a run's files with the speed of each step among the metrics."""
    lines = [{**line, **line.get("timing", {})} for line in run.files.metrics]
    return replace(run.files, metrics=lines)


def answers(runs: Sequence[Run]) -> list[tuple[str, list[tuple[int, str]]]]:
    """Return each prompt of the runs' last answers, with the number of each run that answered it, and its answer.

    Runs of earlier versions did not note their prompts: then the prompt is empty, and an answer begins with it.
    """
    found: dict[tuple[str, int], list[tuple[int, str]]] = {}
    for i, run in enumerate(runs):
        for line in run.files.samples[-1:]:
            texts, prompts = line["samples"], line.get("prompts") or [""] * len(line["samples"])
            for place, (prompt, text) in enumerate(zip(prompts, texts)):
                key = (prompt, 0 if prompt else place)
                found.setdefault(key, []).append((i, text.removeprefix(prompt)))
    return [(prompt, texts) for (prompt, _), texts in found.items()]


def different_settings(configs: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Return the keys whose values differ between runs, with the value of each run as text."""
    flat = [dict(_flat(config)) for config in configs]
    keys = sorted({key for config in flat for key in config if key.partition(".")[0] not in UNSEEN})
    values = {key: [value_text(config.get(key)) for config in flat] for key in keys}
    return {key: texts for key, texts in values.items() if len(set(texts)) > 1}


def _flat(value: Any, at: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict) or not value:
        return [(at, value)]
    return [pair for key, each in value.items() for pair in _flat(each, f"{at}.{key}" if at else str(key))]
