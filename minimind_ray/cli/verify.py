"""`minimind-ray verify`: check a checkpoint, or prove that a resumed run gives the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minimind_ray.cli.flags import StageCommand, config_from_flags

if TYPE_CHECKING:
    from rich.console import Console

    from minimind_ray.stages.verify import Finding

app = typer.Typer(help="Prove that a checkpoint is whole, and that resuming changes nothing.", no_args_is_help=True)


@app.command()
def checkpoint(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="a checkpoint, or a run (checks its result)")],
) -> None:
    """Check the checksums, the weights (they load, and are finite) and resume/. Exit code 1 if a check fails."""
    from minimind_ray.data.storage import url_of
    from minimind_ray.stages.verify import check_checkpoint
    from minimind_ray.train.run import resolve_model

    console = _console()
    console.print(url_of(resolve_model(directory)))
    findings = list(check_checkpoint(directory))
    for finding in findings:
        _print(finding, console)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


@app.command(cls=StageCommand)
def resume(
    stage: Annotated[str | None, typer.Option(help="{stages}; default: the first of these")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Ray Train workers; with --ray")] = 1,
    ray: Annotated[bool, typer.Option("--ray/--no-ray", help="Ray Train workers, or a plain process")] = False,
    kills: Annotated[int, typer.Option(min=1, help="number of kills")] = 3,
    steps: Annotated[int, typer.Option(min=8, help="length of the run")] = 30,
    seed: Annotated[int, typer.Option(help="seed for the moments of the kills")] = 0,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="for both runs, such as data.cache=false", show_default=False),
    ] = None,
    keep: Annotated[Path | None, typer.Option(metavar="DIR", help="keep both runs there", show_default=False)] = None,
) -> None:
    """Train a small model twice, kill one run several times, and compare. Exit code 1 if the runs differ."""
    import tempfile
    from contextlib import nullcontext

    from minimind_ray.cli.options import require_local
    from minimind_ray.config.errors import UserError
    from minimind_ray.config.stages import STAGES
    from minimind_ray.stages.verify import prove_resume

    name = config_from_flags(stage or next(iter(STAGES)), [], [], {}).stage
    if keep is not None:
        require_local(keep)
    if keep is not None and keep.exists() and any(keep.iterdir()):
        raise UserError(f"--keep {keep} is not empty; give a new directory")
    if workers > 1 and not ray:
        raise UserError(f"--workers {workers} needs Ray: add --ray")
    console = _console()
    place = tempfile.TemporaryDirectory() if keep is None else nullcontext(str(keep.absolute()))
    with place as directory:
        proof = prove_resume(
            name, Path(directory), workers=workers, ray=ray, kills=kills, steps=steps, seed=seed,
            settings=set_ or [], say=console.print,
        )  # fmt: skip
    host = f"{workers} Ray worker(s)" if ray else "a plain process"
    summary = f"{name} on {host}, killed after steps {', '.join(map(str, proof.kills))}"
    if proof.differences:
        for difference in proof.differences:
            console.print(difference)
        console.print(f"[red]not equal[/]: {summary}")
        raise typer.Exit(1)
    console.print(f"weights {proof.sha256}")
    console.print(f"[green]equal to the last bit[/], weights and metrics: {summary}")


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def _print(finding: Finding, console: Console) -> None:
    from rich.markup import escape

    mark = "[green]ok[/]  " if finding.ok else "[red]bad[/] "
    console.print(f"{mark} {finding.check:10} {escape(finding.detail)}")
