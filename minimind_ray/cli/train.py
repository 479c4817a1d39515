"""`minimind-ray train STAGE`: train one stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from minimind_ray.cli.flags import added, config_from_flags, key_options, require_stage, stage_names, with_options
from minimind_ray.cli.missing import require_inputs
from minimind_ray.cli.recipes import take

if TYPE_CHECKING:
    from minimind_ray.config.schema import Config


# All runs usually share one cache, so it has no short flag here: use --set data.cache_dir.
TrainCommand = with_options(lambda: key_options(lambda flag: "Short names for config keys", without=["cache_dir"]))


def train(
    context: typer.Context,
    stage: Annotated[
        str | None, typer.Argument(help="{stages}", show_default=False, autocompletion=stage_names)
    ] = None,
    config: Annotated[
        list[str] | None, typer.Option(metavar="FILE|NAME", help="config file; a later file overrides earlier ones")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="any config key")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in --out")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and start nothing")] = False,
    ray: Annotated[bool, typer.Option("--ray/--no-ray", help="Ray Train workers, or this process alone")] = True,
) -> None:
    """Train one stage: prepare the data, then run the stage's loop on Ray Train workers."""
    stage = require_stage(stage, "train")
    resolved = config_from_flags(stage, [take("config", each) for each in config or []], set_ or [], added(context))
    if not resume:  # A resume has its own message, which names the run's settings.
        require_inputs(resolved)
    if dry_run:
        from minimind_ray.cli.plan import print_plan

        print_plan(resolved)
    else:
        run_stage(resolved, resume=resume, ray=ray)


def run_stage(config: Config, *, resume: bool, ray: bool) -> None:
    """Train, show progress, and print where the result is. Ctrl-C leaves a checkpoint and prints how to continue."""
    from functools import partial

    from rich.console import Console

    from minimind_ray.display.findings import print_run_findings
    from minimind_ray.display.progress import print_result, watching
    from minimind_ray.on_ray.host import train_stage

    console = Console(markup=False)
    say = partial(console.print, highlight=False, soft_wrap=True)
    run = train_stage(config, resume=resume, ray=ray, say=say, watch=partial(watching, console=console))
    print_result(run.where, console)
    print_run_findings(run.where, console)
    if run.info()["state"] == "stopped":
        raise typer.Exit(130)
