"""`minimind-ray compare` and `minimind-ray report`: compare the trials of sweeps, or models, as a table or a page."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind_ray.config.errors import UserError

if TYPE_CHECKING:
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
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,…", help="compare models in these tasks (see eval --help)")
    ] = None,
    task_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="with --tasks: a folder with tasks of your own")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="with --tasks: the most items of a task")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="with --tasks: the number of answered examples before each question")
    ] = None,
) -> None:
    """Compare the points of sweeps, or models, best first, and mark those that are not clearly worse than the best.

    Models are compared in --tasks; without this option, by what they were measured on already.
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
    settings = {"folder": task_path, "limit": limit, "num_fewshot": num_fewshot}
    if tasks is None and (given := [name for name, value in settings.items() if value is not None]):
        option = given[0].replace("folder", "task-path").replace("_", "-")
        raise UserError(f"--{option} needs --tasks: name the tasks to compare the models in")
    names = None if tasks is None else [name.strip() for name in tasks.split(",") if name.strip()]
    _compare_models(compared, names, settings, json=json, csv=csv, metric=metric, margin=margin or 0.0)


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
    compared: Sequence[str], tasks: Sequence[str] | None, settings: Mapping[str, Any], *, json: bool, csv: bool,
    metric: str | None, margin: float,
) -> None:  # fmt: skip
    from minimind_ray.sweep.models import compare_models
    from minimind_ray.sweep.models_export import to_json, to_records

    comparison = compare_models(_measured(compared, tasks, settings, metric), margin=margin)
    if json:
        _print_json(to_json(comparison))
    elif csv:
        _print_csv(to_records(comparison))
    else:
        from minimind_ray.display.models import print_models

        print_models(comparison)


def _measured(
    compared: Sequence[str], tasks: Sequence[str] | None, settings: Mapping[str, Any], metric: str | None
) -> list[list[Measured]]:
    """Return the results of models: of files of items, in tasks, or those that runs have already."""
    from minimind_ray.sweep.measured import distinct_names, measured_items
    from minimind_ray.sweep.runs import read_runs, shared_results
    from minimind_ray.sweep.trials import is_run
    from minimind_ray.tasks.items import read_items

    files = [path for path in compared if path.endswith(".parquet")]
    if tasks is not None or len(files) == len(compared):
        if metric is not None:
            raise UserError("--metric is for sweeps and runs: a task is judged by its own metric")
        if len(files) < len(compared):
            raise UserError("not yet")
        names = distinct_names(compared)
        return [measured_items(name, file, read_items(Path(file)), tasks or ()) for name, file in zip(names, files)]
    if others := [path for path in compared if not is_run(path)]:
        raise UserError(f"{others[0]} holds no sweep.json and is no run: give sweeps, or models with --tasks a,b")
    measured, notes = shared_results(read_runs(compared), metric)
    if not measured:
        raise UserError(f"{notes[0]} Give --tasks a,b to compare the runs in tasks")
    return measured


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
    sweep: Annotated[str, typer.Argument(help="sweep directory made by tune")],
    margin: MarginOption = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="show the page in a browser of this machine and keep it up to date")
    ] = False,
    port: Annotated[int | None, typer.Option(help="with --watch: the port; default: a free one")] = None,
) -> None:
    """Write report.html, one self-contained page, and report.png into the sweep's directory."""
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
