"""`minimind-ray compare SWEEP…` and `minimind-ray report SWEEP`."""

from __future__ import annotations

import sys
from typing import IO, TYPE_CHECKING, Annotated

import typer

from minimind_ray.config.errors import UserError

if TYPE_CHECKING:
    from minimind_ray.sweep.compare import Comparison


def compare(
    sweeps: Annotated[list[str], typer.Argument(metavar="SWEEP…", help="sweep directories made by tune")],
    json: Annotated[bool, typer.Option("--json", help="machine-readable, with all details")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="machine-readable, one line per point")] = False,
) -> None:
    """Compare the points of sweeps, best first, and mark points that are not clearly worse than the best."""
    if json and csv:
        raise UserError("--json and --csv cannot be combined: give one of them")
    from minimind_ray.sweep.compare import compare as compare_sweeps
    from minimind_ray.sweep.compare import to_json, to_records
    from minimind_ray.sweep.trials import read_sweep

    comparison = compare_sweeps([read_sweep(path) for path in dict.fromkeys(sweeps)])
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
        print_comparison(comparison)


def report(
    sweep: Annotated[str, typer.Argument(help="sweep directory made by tune")],
) -> None:
    """Write report.html, one self-contained page, and report.png into the sweep's directory."""
    from minimind_ray.data.storage import url_of
    from minimind_ray.sweep.report import write_report

    print(url_of(write_report(sweep)))


def print_comparison(comparison: Comparison, file: IO[str] | None = None) -> None:
    """Print the table, best first, and notes about it, to the terminal or into `file`."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from minimind_ray.sweep.axes import short_names
    from minimind_ray.sweep.compare import METHOD
    from minimind_ray.sweep.text import duration_text, value_text

    rows, digits = comparison.rows, comparison.digits
    several, priced = len({row.sweep for row in rows}) > 1, any(row.cost is not None for row in rows)
    names = short_names(comparison.keys)
    table = Table(header_style="bold", box=None, pad_edge=False)
    for name in [*(["sweep"] if several else []), *(names[key] for key in comparison.keys)]:
        table.add_column(name, overflow="fold")
    for name in (comparison.metric, "95 % interval", "to the best", "tokens", "time", *(["cost"] if priced else [])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("status", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    styles = {"best": "bold green", "not distinguishable": "green", "better": "green", "worse": "dim"}
    for row in rows:
        metric, difference = row.metric, row.difference
        cells = [
            *([row.sweep] if several else []),
            *(value_text(row.point[key]) for key in comparison.keys),
            f"{metric.value:.{digits}f}" if metric else "",
            metric.text(digits) if metric else "",
            f"{difference.value:+.{digits}f}" if difference else "",
            f"{row.tokens:,}",
            duration_text(row.seconds),
            *([f"{row.cost:.2f}" if row.cost is not None else ""] if priced else []),
            row.status,
            row.verdict or "not compared",
        ]
        # Use Text, not markup: a path on an axis may contain brackets.
        table.add_row(*(Text(cell) for cell in cells), style=styles.get(row.verdict or "", ""))
    console = Console(file=file)
    if not console.is_terminal:
        console.width = 240
    console.print(table)
    console.print(f"\n{comparison.examples:,} validation examples. {METHOD}", highlight=False)
    for note in comparison.notes:
        console.print(note, highlight=False, markup=False)
    for row in rows:
        for trial in row.trials:
            if trial.state == "failed":
                error = trial.error or "no error was recorded"
                console.print(f"failed: {trial.id}: {error}", highlight=False, markup=False, soft_wrap=True)
