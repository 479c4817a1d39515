"""`minimind-ray cluster`: check a cluster file before starting machines that cost money."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Cluster files: Ray's (`ray up`) and KubeRay's.", no_args_is_help=True)


@app.callback()
def main() -> None:
    """Make Typer treat `cluster` as a group, although it has only one command."""


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="cluster file for `ray up` or kubectl")] = Path(
        "cluster.yaml"
    ),
    config: Annotated[
        list[Path] | None, typer.Option(help="an experiment to check against it: a stage's YAML, a sweep, a recipe")
    ] = None,
) -> None:
    """Print a cluster file's errors, how to correct them, and the cluster's cost. Exit code 1 if there are errors."""
    from rich.console import Console
    from rich.markup import escape

    from minimind_ray.config.cluster import read_cluster, scales
    from minimind_ray.on_ray.cluster.check import check_cluster

    cluster = read_cluster(file)
    findings = check_cluster(cluster, [scale for path in config or () for scale in scales(path)])
    console = Console(highlight=False, soft_wrap=True)
    for finding in findings:
        mark = "[yellow]note[/] " if finding.note else "[red]error[/]"
        console.print(f"{mark} {escape(finding.what)}\n      -> {escape(finding.fix)}")
    most = sum(min(node.most, cluster.max_workers) for node in cluster.workers)
    workers = f"up to {min(most, cluster.max_workers)} workers of {len(cluster.workers)} kind(s)"
    console.print(f"{file}: {cluster.provider}, a head and {workers}")
    idle, at_most = cluster.cost_idle(), cluster.cost_at_most()
    if idle is not None and at_most is not None:
        console.print(
            f"cost  {idle:.2f} USD an hour idle ({idle * 24 * 30:.0f} a month), {at_most:.2f} at most, without storage"
        )
    errors = sum(not finding.note for finding in findings)
    console.print(f"[red]{errors} error(s)[/]" if errors else "[green]ok[/]")
    if errors:
        raise typer.Exit(1)
