"""`minimind-ray doctor`: check every node for the packages, devices and storage that a run needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from minimind_ray.on_ray.cluster.doctor import Node


def doctor(
    storage: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="a bucket or shared folder that every node has to read and write; default: MINIMIND_STORAGE",
        ),
    ] = None,
) -> None:
    """Check this machine, or with RAY_ADDRESS every node of a cluster. Exit code 1 if something is wrong."""
    import os

    from rich.console import Console
    from rich.markup import escape

    from minimind_ray.config.paths import STORAGE, masked
    from minimind_ray.on_ray.cluster.check import Finding
    from minimind_ray.on_ray.cluster.doctor import diagnose, examine_cluster, examine_here
    from minimind_ray.on_ray.session import machines, ray_running

    storage = storage or [url for url in [os.environ.get(STORAGE)] if url]
    more: list[Finding] = []
    if "RAY_ADDRESS" in os.environ:
        with ray_running():
            nodes, more = examine_cluster(storage)
            may_come = machines().most
    else:
        nodes, may_come = examine_here(storage), 0
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 240
    console.print(_table(nodes))
    for url in storage:
        able = sum(url not in node.storage for node in nodes)
        console.print(f"storage {escape(masked(url))}: written and read on {able} of {len(nodes)} node(s)")
    if may_come > len(nodes):
        console.print(f"up to {may_come} more workers can start when a run asks for them")
    findings = sorted([*more, *diagnose(nodes)], key=lambda finding: finding.note)
    for finding in findings:
        mark = "[yellow]note[/] " if finding.note else "[red]error[/]"
        console.print(f"{mark} {escape(finding.what)}\n      -> {escape(finding.fix)}", soft_wrap=True)
    errors = sum(not finding.note for finding in findings)
    console.print(f"[red]{errors} error(s)[/]" if errors else "[green]ok[/]")
    if errors:
        raise typer.Exit(1)


def _table(nodes: Sequence[Node]) -> Table:
    from rich.table import Table

    columns = ("node", "role", "Python", "Ray", "torch", "CPUs", "GPUs", "NCCL", "disk free", "object store", "clock")
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for node in nodes:
        gpus = f"{len(node.gpus)} x {node.gpus[0]}" if node.gpus else "-"
        table.add_row(
            node.name, node.role, node.python, node.versions["ray"], node.versions["torch"], str(node.cpus), gpus,
            node.nccl or "-", f"{node.disk_free / 1e9:.0f} GB",
            f"{node.object_store / 1e9:.1f} GB" if node.object_store else "-", f"{node.clock:+.2f} s",
        )  # fmt: skip
    return table
