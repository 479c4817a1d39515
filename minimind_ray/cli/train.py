"""`minimind-ray train STAGE`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minimind_ray.cli.flags import added, config_from_flags, key_options, with_options

if TYPE_CHECKING:
    from minimind_ray.config.schema import Config, ScaleConfig
    from minimind_ray.stages.run import Host, Job


# Where packs are kept is no question of one run: --set data.cache_dir.
TrainCommand = with_options(lambda: key_options(lambda flag: "Short names for config keys", without=["cache_dir"]))


def train(
    context: typer.Context,
    stage: Annotated[str, typer.Argument(help="pretrain, sft, lora or dpo")],
    config: Annotated[list[Path] | None, typer.Option(help="YAML file; later ones win")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="any config key")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and start nothing")] = False,
    ray: Annotated[bool, typer.Option("--ray/--no-ray", help="Ray Train workers, or this process alone")] = True,
) -> None:
    """Train one stage: prepare the data, then run the stage's loop on Ray Train workers."""
    resolved = config_from_flags(stage, config or [], set_ or [], added(context))
    if dry_run:
        from minimind_ray.cli.plan import print_plan

        print_plan(resolved)
    else:
        run_stage(resolved, resume=resume, ray=ray)


def run_stage(config: Config, *, resume: bool, ray: bool) -> None:
    """Prepare, train, show progress, and say where the result is. Ctrl-C leaves a checkpoint and says how to go on."""
    from functools import partial

    from rich.console import Console

    from minimind_ray.data.shipped import resolve_paths
    from minimind_ray.data.storage import require_writable
    from minimind_ray.stages.start import require_sources
    from minimind_ray.track.wandb import check_tracking
    from minimind_ray.train.resume import longer
    from minimind_ray.train.run import RunDirectory

    console = Console(markup=False)
    say = partial(console.print, highlight=False, soft_wrap=True)
    config = resolve_paths(config)
    require_writable(config.out, config.data.cache_dir)
    run = RunDirectory(config.out)
    run.check(config, resume=resume)
    before = run.state() if resume else None
    require_sources([config])
    check_tracking(config)
    with host([config.scale], ray=ray) as (work, run_job):
        from minimind_ray.cli.progress import print_result, watching
        from minimind_ray.stages.run import begun, prepare_job

        job = prepare_job(config, work, say)
        with begun(job, resume=resume):
            if before == "finished" and run.checkpoints():
                say(f"{run.where} is finished. {longer(run.where, run.file('config.yaml'), config)}")
            elif resume:
                say(f"{run.where}: {before or 'not begun'}; {run.resume_point()}")
            with watching(job, console):
                run_job(job)
    print_result(config.out, console)
    if run.info()["state"] == "stopped":
        raise typer.Exit(130)


@contextmanager
def host(scales: Sequence[ScaleConfig], *, ray: bool) -> Generator[tuple[Host, Callable[[Job], None]]]:
    """How to prepare and how to run jobs of these scales: on Ray, started for as long as the block lasts, or in this
    process.

    Raises:
        UserError: there are too few CPUs or GPUs for one of them.
    """
    if not ray:
        from minimind_ray.stages.run import Host, require_gpus_here, run_here

        for scale in scales:
            require_gpus_here(scale)
        yield Host(), run_here
        return
    # Import torch before a job joins its cluster. Joining makes each node unpack the job's working directory, and a
    # second node on the same machine replaces the first one's. In a deleted directory torch's libraries exit.
    from minimind_ray.on_ray.session import local_cpus, require_resources, start_ray, stop_ray
    from minimind_ray.on_ray.trainer import RAY_HOST, train_on_ray

    start_ray(max(map(local_cpus, scales)))
    try:
        for scale in scales:
            require_resources(scale)
        yield RAY_HOST, train_on_ray
    finally:
        stop_ray()
