"""`minimind-ray compare` and `minimind-ray report`: compare the trials of sweeps, or models, as a table or a page."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind_ray.cli.evaluate import Chat, Limit, Shots, TaskPath, Tasks
from minimind_ray.config.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

    from minimind_ray.sweep.measured import Measured

MarginOption = Annotated[
    float | None,
    typer.Option(metavar="M", help="call points equal that differ by less than M, 0: none; default: the sweep's own"),
]


def compare(
    compared: Annotated[
        list[str],
        typer.Argument(
            metavar="SWEEP… or MODEL…",
            help="sweep directories made by tune; or models: runs, model and adapter directories, models of the hub, "
            "and files of eval --tasks --out",
        ),
    ],
    json: Annotated[bool, typer.Option("--json", help="print JSON with all details")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="print CSV with one line per point")] = False,
    metric: Annotated[
        str | None, typer.Option(metavar="NAME", help="judge by this metric, or a column of validation.parquet")
    ] = None,
    mode: Annotated[
        str | None, typer.Option(metavar="min|max", help="whether less or more of --metric is better")
    ] = None,
    margin: MarginOption = None,
    tasks: Tasks = None,
    task_path: TaskPath = None,
    limit: Limit = None,
    num_fewshot: Shots = None,
    chat: Chat = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="with --tasks: keep each model's items in this folder")
    ] = None,
) -> None:
    """Compare the points of sweeps, or models, best first, and mark those that are not clearly worse than the best.

    Models are compared in --tasks. Without this option, runs are compared by their validations and by the tasks that
    they were measured in.
    """
    if json and csv:
        raise UserError("--json and --csv cannot be combined: give one of them")
    if _are_sweeps(compared):
        if tasks is not None:
            raise UserError("--tasks compares models: to compare a sweep's points in a task, give --metric task/NAME")
        _compare_sweeps(compared, json=json, csv=csv, metric=metric, mode=mode, margin=margin)
        return
    if mode is not None:
        raise UserError("--mode is for sweeps: the metrics of models know whether less or more is better")
    if tasks is None and (task_path or limit or num_fewshot is not None or chat or out):
        raise UserError("--task-path, --limit, --num-fewshot, --chat and --out belong to tasks: give --tasks, too")
    asked = None
    if tasks is not None:
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        asked = _Asked(names, task_path, num_fewshot, {"limit": limit, "chat": chat}, out)
    _compare_models(compared, asked, json=json, csv=csv, metric=metric, margin=margin or 0.0)


@dataclass(frozen=True)
class _Asked:
    """The tasks for a comparison of models. `settings` are arguments of `run_benchmark`."""

    tasks: list[str]
    folder: Path | None
    shots: int | None
    settings: Mapping[str, Any]
    out: Path | None


def _are_sweeps(compared: Sequence[str]) -> bool:
    """Whether all arguments are sweeps. Raises UserError if only some of them are."""
    from minimind_ray.sweep.trials import is_sweep

    sweeps = [path for path in compared if is_sweep(path)]
    if sweeps and len(sweeps) < len(compared):
        other = next(path for path in compared if path not in sweeps)
        raise UserError(
            f"{sweeps[0]} is a sweep and {other} is not: compare sweeps with sweeps, or models with models, such as "
            f"a trial of the sweep, {sweeps[0].rstrip('/')}/trials/…"
        )
    return bool(sweeps)


def _compare_models(
    compared: Sequence[str], asked: _Asked | None, *, json: bool, csv: bool, metric: str | None, margin: float
) -> None:
    from minimind_ray.sweep.models import compare_models
    from minimind_ray.sweep.models_export import to_json, to_records

    comparison = compare_models(_measured(compared, asked, metric), margin=margin)
    if json:
        _print_json(to_json(comparison))
    elif csv:
        _print_csv(to_records(comparison))
    else:
        from minimind_ray.display.models import print_models

        print_models(comparison)


def _measured(compared: Sequence[str], asked: _Asked | None, metric: str | None) -> list[list[Measured]]:
    """Return each model's results. They come from tasks run now, files of items, or earlier results of runs."""
    from minimind_ray.sweep.measured import distinct_names, measured_items
    from minimind_ray.sweep.runs import read_runs, shared_results
    from minimind_ray.sweep.trials import is_run

    if len(compared) < 2:
        raise UserError("give at least two models to compare; minimind-ray eval measures a single one")
    files = [path for path in compared if path.endswith(".parquet")]
    if asked or len(files) == len(compared):
        if metric is not None:
            raise UserError("--metric is for sweeps and runs: a task is judged by its own metric")
        names, tables = distinct_names(compared), _items(compared, asked)
        tasks = asked.tasks if asked else []
        # Models that are asked here have the same questions, though maybe in the words of other chat templates.
        return [
            measured_items(name, path, table, tasks, same_words=bool(files))
            for name, path, table in zip(names, compared, tables)
        ]
    if others := [path for path in compared if not is_run(path)]:
        raise UserError(f"{others[0]} holds no sweep.json and is no run: give sweeps, or models with --tasks a,b")
    measured, notes = shared_results(read_runs(compared), metric)
    if not measured:
        raise UserError(f"{notes[0]} Give --tasks a,b to compare the runs in tasks")
    return measured


def _items(compared: Sequence[str], asked: _Asked | None) -> list[pa.Table]:
    """Return the items of each model: read from its file, or answered by it now."""
    from minimind_ray.tasks.items import items_table, read_items, write_items

    if all(path.endswith(".parquet") for path in compared) or not asked:
        return [read_items(Path(path)) for path in compared]
    from rich.console import Console

    from minimind_ray.display.tasks import task_progress
    from minimind_ray.stages.benchmark import load_suite, run_benchmark
    from minimind_ray.sweep.measured import distinct_names
    from minimind_ray.train.run import resolve_model

    for path in compared:  # Find a mistake before the first model has answered for an hour.
        if not path.endswith(".parquet"):
            resolve_model(path)
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
    suite = load_suite(asked.tasks, asked.folder, asked.shots)
    found: list[pa.Table] = []
    for name, path in zip(distinct_names(compared), compared):
        if path.endswith(".parquet"):
            found.append(read_items(Path(path)))
            continue
        with task_progress(Console(stderr=True)) as progress:
            items = run_benchmark(path, suite, progress=partial(_shown, progress, name), **asked.settings).items
        found.append(items_table(items))
        if asked.out:
            write_items(asked.out / f"{name.replace('/', '-')}.parquet", items)
    return found


def _shown(progress: Callable[[str, int, int], None], model: str, task: str, done: int, total: int) -> None:
    progress(f"{model}: {task}", done, total)


def _print_json(content: dict[str, Any]) -> None:
    import json

    print(json.dumps(content, indent=2, ensure_ascii=False))


def _print_csv(records: Sequence[Mapping[str, Any]]) -> None:
    import csv

    writer = csv.DictWriter(sys.stdout, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)


def _compare_sweeps(
    sweeps: list[str], *, json: bool, csv: bool, metric: str | None, mode: str | None, margin: float | None
) -> None:
    from minimind_ray.sweep.compare import compare as compare_sweeps
    from minimind_ray.sweep.export import to_json, to_records
    from minimind_ray.sweep.trials import read_sweeps

    opened = read_sweeps(sweeps)
    comparison = compare_sweeps(opened, metric=metric, mode=mode, margin=margin)
    if json:
        _print_json(to_json(comparison))
    elif csv:
        _print_csv(to_records(comparison))
    else:
        from minimind_ray.data.storage import url_of
        from minimind_ray.display.comparison import print_comparison
        from minimind_ray.sweep.resume import seeds_commands

        print_comparison(comparison)
        if len(opened) == 1:
            own = comparison.metric == opened[0].info.metric
            for command in seeds_commands(comparison, url_of(opened[0].path), ranked=own):
                print(command)


def report(
    reported: Annotated[
        list[str], typer.Argument(metavar="SWEEP or RUN…", help="sweep directory made by tune, or run directories")
    ],
    margin: MarginOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="of runs: the page; default: report.html in a run's directory, or a file here for several runs",
            show_default=False,
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="show the page in a browser of this machine and keep it up to date")
    ] = False,
    port: Annotated[int | None, typer.Option(help="the port, with --watch; default: a free one")] = None,
) -> None:
    """Write a report, one self-contained page: report.html (and report.png) of a sweep, or a page of runs."""
    sweep = _one_sweep(reported)
    if sweep is None:
        if watch or margin is not None or port is not None:
            raise UserError("--watch, --port and --margin are for sweeps: leave them out for runs")
        from minimind_ray.sweep.run_report import write_run_report
        from minimind_ray.sweep.runs import read_runs

        print(write_run_report(read_runs(reported), out))
        return
    if out is not None:
        raise UserError("--out is for runs: the report of a sweep is written into its directory")
    if watch:
        _watch(sweep, margin, port or 0)
        return
    if port is not None:
        raise UserError("--port needs --watch")
    from minimind_ray.data.storage import url_of
    from minimind_ray.sweep.compare import compare as compare_sweeps
    from minimind_ray.sweep.report import write_report
    from minimind_ray.sweep.trials import read_sweep

    opened = read_sweep(sweep)
    print(url_of(write_report(opened, compare_sweeps([opened], margin=margin))))


def _one_sweep(reported: Sequence[str]) -> str | None:
    """Return the sweep to report; None for runs. Raises UserError for mixtures, and for what is neither."""
    from minimind_ray.sweep.trials import is_run, is_sweep

    others = [path for path in reported if not is_run(path)]
    if not others:
        return None
    for path in others:
        if not is_sweep(path):
            raise UserError(f"{path} holds neither a run nor a sweep: give a directory of minimind-ray train or tune")
    if len(reported) > 1:
        raise UserError(f"{others[0]} is a sweep: a report is of one sweep, or of one or several runs")
    return others[0]


def _watch(sweep: str, margin: float | None, port: int) -> None:
    """Serve the report and keep it up to date, until Ctrl-C."""
    from minimind_ray.sweep.watch import WatchedReport, serving

    if margin is not None:
        raise UserError("--watch shows the report as the sweep keeps it: leave --margin out")
    report = WatchedReport(sweep)
    report.look()
    with serving(report, port) as url, suppress(KeyboardInterrupt):
        print(f"open {url} in a browser of this machine; the page follows the sweep. End with Ctrl-C", flush=True)
        report.follow()
