"""A stage's train-loop function on Ray Train workers."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer

from minimind_ray.config.errors import UserError
from minimind_ray.data.pack import Pack
from minimind_ray.on_ray.ingest import read_shares, step_dataset
from minimind_ray.on_ray.prepare import run_units_on_ray
from minimind_ray.on_ray.reference import compute_on_ray
from minimind_ray.on_ray.session import interruptible, require_cpus
from minimind_ray.stages.run import Host, Job
from minimind_ray.train.context import default_device
from minimind_ray.train.loop import TrainingData, last_sound_checkpoint
from minimind_ray.train.run import RunDirectory

STOP_FILE = ".stop"


class RayTrainContext:
    """A Ray Train worker. The driver asks for a stop by a file in the run directory, which all nodes see."""

    def __init__(self, run_dir: str) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device() if torch.cuda.is_available() else default_device()
        self.stop_file = Path(run_dir) / STOP_FILE

    def report(self, metrics: dict[str, Any], checkpoint: str | None) -> bool:
        """Metrics to Ray Train's controller. The checkpoint is in the run directory, which alone is resumed from."""
        ray.train.report(metrics)
        return True

    def should_stop(self) -> bool:
        """Rank 0 looks for the driver's file; the step tells the other workers."""
        return self.rank == 0 and self.stop_file.exists()

    def base_weights(self, directory: Path) -> None:
        """Holds none."""


# The train function runs in a thread, to which glibc would give an arena of its own, of memory that it maps anew for
# each large tensor (see `keep_freed_memory`); the main arena is chosen before a process starts.
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}

RAY_HOST = Host(run_units_on_ray, compute_on_ray)


def train_on_ray(job: Job) -> None:
    """Run the stage on `scale.workers` workers.

    The first Ctrl-C stops after the step with a checkpoint, the second one at once.

    Raises:
        UserError: too few resources, what a worker found wrong, or a worker that ended otherwise.
    """
    config = job.config
    scale, run = config.scale, RunDirectory(config.out)
    # Ray Data hangs without a CPU of its own beside the workers'.
    require_cpus(scale.workers * scale.cpus_per_worker + 1, scale.workers * scale.gpus_per_worker, "this run")
    (run.path / STOP_FILE).unlink(missing_ok=True)
    resources = {"CPU": scale.cpus_per_worker} | ({"GPU": scale.gpus_per_worker} if scale.gpus_per_worker else {})
    trainer = TorchTrainer(
        partial(_worker, job),
        scaling_config=ray.train.ScalingConfig(
            num_workers=scale.workers, use_gpu=scale.gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            # Ray keeps its own bookkeeping per attempt; what is resumed from is our run directory.
            name=f"attempt-{time.time_ns()}",
            storage_path=str(run.path / ".ray"),
            worker_runtime_env={"env_vars": ONE_ARENA},
            failure_config=ray.train.FailureConfig(max_failures=0),
        ),
        datasets={"train": partial(_dataset, job)},
        torch_config=TorchConfig(backend="nccl" if scale.gpus_per_worker else "gloo"),
    )
    stop_file = run.path / STOP_FILE
    try:
        interruptible(trainer.fit, stop_file.touch)
    except Exception as error:
        if found := _user_error(error):
            run.update(state="failed", error=str(found))
            raise found from None
        run.update(state="failed", error=told(error), traceback=traceback.format_exc())
        raise UserError(
            f"a worker ended before the run did: {told(error)}; {run.path}/run.json has the traceback. What was saved "
            "is kept: the same command with --resume goes on from the last checkpoint"
        ) from error
    finally:
        stop_file.unlink(missing_ok=True)


def _steps_done(run: RunDirectory) -> int:
    checkpoint = last_sound_checkpoint(run)
    return int(checkpoint.name.removeprefix("step-")) if checkpoint else 0


def _dataset(job: Job) -> ray.data.Dataset:
    """Evaluated anew at each start of the worker group: from the run's last checkpoint on."""
    return step_dataset(job, _steps_done(RunDirectory(job.config.out)))


def _worker(job: Job) -> None:
    torch.set_num_threads(max(1, int(job.config.scale.cpus_per_worker)))
    context = RayTrainContext(job.config.out)

    def steps(start: int) -> Iterator[list[Pack]]:
        shard = ray.train.get_dataset_shard("train")
        blocks = shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
        return read_shares(blocks, job, start, context.rank)

    job.run(context, TrainingData(job.plan, steps, job.val_store()))


def told(error: BaseException) -> str:
    """An error in a line; Ray's begin with long ones about other processes."""
    if isinstance(error, UserError):
        return str(error)
    for cause in [*getattr(error, "worker_failures", {}).values(), error]:
        if isinstance(cause, ray.exceptions.OutOfMemoryError):
            return "a machine ran out of memory, and Ray ended the process"
    last = (str(error).strip() or "no message").splitlines()[-1]
    return f"{type(error).__name__}: {last}"


def _user_error(error: BaseException) -> UserError | None:
    """A UserError that some worker raised, out of Ray's wrappings."""
    causes = [error, *getattr(error, "worker_failures", {}).values()]
    while causes:
        cause = causes.pop()
        if isinstance(cause, UserError):
            return cause
        causes += [c for c in (cause.__cause__, getattr(cause, "cause", None)) if isinstance(c, BaseException)]
    return None
