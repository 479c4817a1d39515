"""`minimind-ray runs`: list runs with their states."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

COLUMNS = {
    "run": "path", "stage": "stage", "state": "state", "step": "step", "loss": "loss", "val loss": "val_loss",
    "last checkpoint": "checkpoint",
}  # fmt: skip
# The columns that a narrow terminal leaves out, first to last. The names of runs are never cut.
LEFT_OUT = ("last checkpoint", "stage", "loss", "step", "val loss", "state")
WIDEST_STATE = 15  # A damaged run's state is a sentence, which may take several lines.
DEFAULT = "runs"
HOW = (
    "make one with minimind-ray demo (then: minimind-ray runs demo), minimind-ray train STAGE, or minimind-ray run "
    "RECIPE"
)
NEEDED = ("run.json", "config.yaml", "metrics.jsonl", "writer.json", "sweep.json")


def runs(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="look for runs here and below; or a URL")] = DEFAULT,
    json: Annotated[bool, typer.Option("--json", help="print a JSON list")] = False,
) -> None:
    """List runs, latest first: state, stage, steps, loss, last checkpoint."""
    from minimind_ray.config.errors import UserError
    from minimind_ray.config.paths import input_path
    from minimind_ray.data.storage import copy_of, mirror_of

    given = directory
    directory = directory if Path(directory).exists() else input_path(directory)
    folder = copy_of(directory)
    if mirror := mirror_of(directory):
        mirror.pull(wanted=lambda name: name.endswith(NEEDED))
    if not folder.is_dir() and given != DEFAULT:
        raise UserError(f"{directory} is not a directory; give the directory of the runs")
    found = sorted((_facts(file.parent) for file in folder.rglob("run.json")), key=_updated, reverse=True)
    if json:
        from json import dumps

        print(dumps(found, ensure_ascii=False, indent=2))
        return
    if not found:
        print(f"no runs under {given}; {HOW}")
        return
    _print_table([{title: _cell(run[key]) for title, key in COLUMNS.items()} for run in found])


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value or "")


def _print_table(rows: list[dict[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, widths = Console(highlight=False), column_widths(rows)
    if not console.is_terminal:
        console = Console(highlight=False, width=sum(widths.values()))
    shown = fitting(widths, console.width)
    table = Table(box=None, header_style="dim")
    for title in shown:
        table.add_column(title, overflow="fold", no_wrap=title != "state" and len(shown) > 1)
    for row in rows:
        # Use Text, not markup: texts from files may contain brackets.
        table.add_row(*(Text(row[title]) for title in shown))
    console.print(table)
    if left_out := [title for title in widths if title not in shown]:
        text = f"the terminal is too narrow for {', '.join(left_out)}; --json has all"
        console.print(text, style="dim", soft_wrap=True)


def column_widths(rows: list[dict[str, str]]) -> dict[str, int]:
    """Return the width of each column of the table in terminal cells, with the spaces around it."""
    from rich.cells import cell_len

    return {title: 2 + max(cell_len(text) for text in (title, *(row[title] for row in rows))) for title in COLUMNS}


def fitting(widths: dict[str, int], available: int) -> list[str]:
    """Return the columns that fit beside the runs' complete names, in the table's order."""
    shown = widths | {"state": min(widths["state"], WIDEST_STATE)}
    for title in LEFT_OUT:
        if sum(shown.values()) <= available:
            break
        del shown[title]
    return list(shown)


def _updated(run: dict[str, Any]) -> str:
    return str(run["updated"] or "")


def _facts(path: Path) -> dict[str, Any]:
    from minimind_ray.config.errors import UserError
    from minimind_ray.config.load import read_yaml
    from minimind_ray.train.run import RunDirectory

    run, last, info, stage = RunDirectory(path), {}, {}, None
    try:
        info, stage = {**run.info(), "state": run.state()}, read_yaml(run.path / "config.yaml").get("stage")
        for line in run.metrics():
            last |= line
    except (UserError, OSError) as error:
        info = {**info, "state": f"damaged: {error}"}
    checkpoints = run.checkpoints()
    return {
        "path": run.where, "stage": stage, "state": info.get("state"), "step": last.get("step"),
        "loss": last.get("loss"), "val_loss": last.get("val/loss"), "updated": info.get("updated"),
        "checkpoint": checkpoints[-1].name if checkpoints else None,
    }  # fmt: skip
