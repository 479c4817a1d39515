"""`minimind-ray runs`: what has been trained, and how far."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def runs(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="look for runs here and below; or a URL")] = "runs",
    json: Annotated[bool, typer.Option("--json", help="a JSON list")] = False,
) -> None:
    """List runs, latest first: state, stage, steps, loss, last checkpoint."""
    from minimind_ray.config.errors import UserError
    from minimind_ray.config.paths import input_path
    from minimind_ray.data.storage import copy_of, mirror_of

    directory = directory if Path(directory).exists() else input_path(directory)
    folder = copy_of(directory)
    if mirror := mirror_of(directory):
        mirror.pull(wanted=lambda name: name.endswith(("run.json", "config.yaml", "metrics.jsonl")))
    if not folder.is_dir():
        raise UserError(f"{directory} is no directory; name the one that holds the runs")
    found = sorted((_facts(file.parent) for file in folder.rglob("run.json")), key=_updated, reverse=True)
    if json:
        from json import dumps

        print(dumps(found, ensure_ascii=False, indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("run", "stage", "state", "step", "loss", "val loss", "last checkpoint", box=None, header_style="dim")
    for run in found:
        cells = [run[key] for key in ("path", "stage", "state", "step", "loss", "val_loss", "checkpoint")]
        # Text, not markup: what the files say may hold brackets.
        table.add_row(*(Text(f"{cell:.4f}" if isinstance(cell, float) else str(cell or "")) for cell in cells))
    Console(highlight=False).print(table if found else f"no runs under {directory}")


def _updated(run: dict[str, Any]) -> str:
    return str(run["updated"] or "")


def _facts(path: Path) -> dict[str, Any]:
    from minimind_ray.config.errors import UserError
    from minimind_ray.config.load import read_yaml
    from minimind_ray.train.run import RunDirectory

    run, last, info, stage = RunDirectory(path), {}, {}, None
    try:
        info, stage = run.info(), read_yaml(run.path / "config.yaml").get("stage")
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
