"""Choose where stages run (on Ray or in this process), and run one stage from the first check to its result."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from minimind_ray.config.schema import Config, ScaleConfig
from minimind_ray.data.shipped import resolve_paths
from minimind_ray.data.storage import require_writable

# `stages.run` imports torch, which has to happen before a job joins its cluster. Joining makes each node unpack the
# job's working directory, and a second node on the same machine replaces the first one's. In a deleted directory
# torch's libraries exit.
from minimind_ray.stages.run import Host, Job, begun, prepare_job, require_gpus_here, run_here
from minimind_ray.stages.start import require_sources
from minimind_ray.track.registry import check_trackers
from minimind_ray.train.resume import longer
from minimind_ray.train.run import RunDirectory

Watch = Callable[[Job], AbstractContextManager[None]]
"""A context manager that shows a run's progress, while the run trains inside."""


@contextmanager
def host(scales: Sequence[ScaleConfig], *, ray: bool) -> Generator[tuple[Host, Callable[[Job], None]]]:
    """Give the functions that prepare and run jobs of these scales, on Ray or in this process.

    With `ray`, Ray runs from the beginning to the end of the block.

    Raises:
        UserError: there are too few CPUs or GPUs for one of the scales.
    """
    if not ray:
        for scale in scales:
            require_gpus_here(scale)
        yield Host(), run_here
        return
    from minimind_ray.on_ray.session import local_cpus, ray_running, require_resources
    from minimind_ray.on_ray.trainer import RAY_HOST, train_on_ray

    with ray_running(max(map(local_cpus, scales))):
        for scale in scales:
            require_resources(scale)
        yield RAY_HOST, train_on_ray


def train_stage(
    config: Config,
    *,
    resume: bool,
    ray: bool,
    say: Callable[[str], None] = lambda line: None,
    watch: Watch = lambda job: nullcontext(),
) -> RunDirectory:
    """Check, prepare and train one stage; return its run directory, whose state says how the run ended.

    A finished run is not resumed: `say` gets how to train longer. Ctrl-C stops the run after the current step, with a
    checkpoint.

    Raises:
        UserError: as `prepare_job`, `begun` and `host`; or a directory cannot be written, or input files are missing.
    """
    config = resolve_paths(config, again=resume)
    require_writable(config.out, config.data.cache_dir)
    run = RunDirectory(config.out)
    run.check(config, resume=resume)
    before = run.state() if resume else None
    if before == "finished" and run.holds_last_checkpoint():
        say(f"{run.where} is finished. {longer(run.where, run.file('config.yaml'), config)}")
        return run
    require_sources([config])
    check_trackers(config)
    with host([config.scale], ray=ray) as (work, run_job):
        job = prepare_job(config, work, say)
        with begun(job, resume=resume):
            if resume:
                say(f"{run.where}: {before or 'not begun'}; {run.resume_point()}")
            with watch(job):
                run_job(job)
    return run
