"""`minimind-ray compare SWEEP…` and `minimind-ray report SWEEP`: compare trials in a table or on a page."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from minimind_ray.config.errors import UserError

MarginOption = Annotated[
    float | None,
    typer.Option(metavar="M", help="call points equal that differ by less than M, 0: none; default: the sweep's own"),
]


def compare(
    sweeps: Annotated[list[str], typer.Argument(metavar="SWEEP…", help="sweep directories made by tune")],
    json: Annotated[bool, typer.Option("--json", help="print JSON with all details")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="print CSV with one line per point")] = False,
    metric: Annotated[
        str | None, typer.Option(metavar="NAME", help="judge by this metric, or a column of validation.parquet")
    ] = None,
    mode: Annotated[
        str | None, typer.Option(metavar="min|max", help="whether less or more of --metric is better")
    ] = None,
    margin: MarginOption = None,
) -> None:
    """Compare the points of sweeps, best first, and mark points that are not clearly worse than the best."""
    if json and csv:
        raise UserError("--json and --csv cannot be combined: give one of them")
    from minimind_ray.sweep.compare import compare as compare_sweeps
    from minimind_ray.sweep.export import to_json, to_records
    from minimind_ray.sweep.trials import read_sweeps

    opened = read_sweeps(sweeps)
    comparison = compare_sweeps(opened, metric=metric, mode=mode, margin=margin)
    if json:
        import json as json_

        print(json_.dumps(to_json(comparison), indent=2, ensure_ascii=False))
    elif csv:
        import csv as csv_

        records = to_records(comparison)
        writer = csv_.DictWriter(sys.stdout, fieldnames=list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
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
) -> None:
    """Write report.html, one self-contained page, and report.png into the sweep's directory."""
    from minimind_ray.data.storage import url_of
    from minimind_ray.sweep.compare import compare as compare_sweeps
    from minimind_ray.sweep.report import write_report
    from minimind_ray.sweep.trials import read_sweep

    opened = read_sweep(sweep)
    print(url_of(write_report(opened, compare_sweeps([opened], margin=margin))))
