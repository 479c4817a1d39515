"""Train a stage on Ray Train workers, and continue after losses of workers and nodes.

A run is a sequence of attempts. Each attempt is a separate Ray Train run. It starts from the run directory's last sound
checkpoint, with as many workers as the cluster has room for. An attempt ends, and the next attempt begins, if

- a worker, a process of Ray Data or a node is lost;
- a preemption notice says that a node will be taken away;
- more workers fit on the cluster and `scale.workers` allows more;
- the cluster lost resources that the run needs, but no worker. (Without a new attempt, Ray Data would wait silently.)

In the last three cases the workers first write a checkpoint if they can, so that no step is done twice.

Ray Train's own restarts and elastic sizes are not used. They take the CPU that Ray Data needs, retry after a user's
error, and lose the steps since the last checkpoint whenever the size changes.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.autoscaler.sdk import request_resources
from ray.train import PreemptionError
from ray.train.torch import TorchConfig, TorchTrainer

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import ScaleConfig
from minimind_ray.data.background import in_background
from minimind_ray.data.files import join
from minimind_ray.data.pack import Pack
from minimind_ray.data.plan import PackSource
from minimind_ray.data.storage import Flag, flag, watch_flag
from minimind_ray.data.stream import Stream
from minimind_ray.on_ray.columns import compute_on_ray, dtype_on_ray
from minimind_ray.on_ray.ingest import own_steps, read_shares, step_dataset
from minimind_ray.on_ray.prepare import run_units_on_ray
from minimind_ray.on_ray.reservation import (
    NO_ROOM,
    START_SECONDS,
    NoRoomError,
    Reservation,
    StoppedError,
    reserved,
)
from minimind_ray.on_ray.session import (
    free_left_groups,
    interruptible,
    notices_may_come,
    require_resources,
    worker_resources,
    workers_that_fit,
)
from minimind_ray.on_ray.versions import private_parts
from minimind_ray.on_ray.waiting import print_wait_reason, workers_wait_reason
from minimind_ray.stages.run import Host, Job
from minimind_ray.train.context import default_device
from minimind_ray.train.recorder import alert_of_lost_process
from minimind_ray.train.run import RunDirectory, last_sound_checkpoint
from minimind_ray.train.step import all_reduce_sums

# The driver makes these files in the run directory, which all nodes see. STOP_FILE: end the run after the current step.
# AGAIN_FILE: end the attempt after the current step. LEAVE_FILE: end the attempt at once.
STOP_FILE, AGAIN_FILE, LEAVE_FILE = ".stop", ".again", ".leave"
NOTICE_SECONDS = 2.0
LOOK_SECONDS, LEAVE_SECONDS = 5.0, 60.0


class RayTrainContext:
    """The host of a run on a Ray Train worker."""

    reads_checkpoints = False

    def __init__(self, run_dir: str, *, notices: bool) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device() if torch.cuda.is_available() else default_device()
        # Only rank 0 looks for the driver's files. The workers then agree within the training step.
        names = (STOP_FILE, AGAIN_FILE) if self.rank == 0 else ()
        self.flags = [watch_flag(flag(run_dir, name)) for name in names]
        if self.rank == 0:
            threading.Thread(target=_exit_on_flag, args=(run_dir,), daemon=True).start()
        self.steps, self.look_after, self.looked = 0, 1 if notices else math.inf, time.monotonic()
        self.noticed: list[str] = []

    def report(self, metrics: dict[str, Any], checkpoint: str | None) -> bool:
        """Do nothing: the run directory has the content already. (A report to Ray Train would take a second.)"""
        return True

    def should_stop(self) -> bool:
        """Whether there is a preemption notice, or the driver asks for a stop."""
        self.steps += 1
        if self.steps == self.look_after:
            self._look_for_notice()
        return bool(self.noticed) or any(up() for up in self.flags)

    def _look_for_notice(self) -> None:
        """Ask Ray for preemption notices, and set the step of the next look, about NOTICE_SECONDS later.

        Asking is a collective operation, so all workers must ask in the same step.
        """
        now = time.monotonic()
        (seconds,) = all_reduce_sums([(now - self.looked) / self.steps / self.world_size], self.device).tolist()
        self.steps, self.looked, self.look_after = 0, now, max(1, int(NOTICE_SECONDS / seconds))
        self.noticed = self._draining_nodes()

    def _draining_nodes(self) -> list[str]:
        """Return the ids of the workers' nodes that have a preemption notice, the same in all workers."""
        if not private_parts():
            info = ray.train.get_preemption_info()
            return info.preempted_node_ids if info else []
        from minimind_ray.on_ray.private_ray import draining

        own = draining()
        (found,) = all_reduce_sums([float(own)], self.device).tolist()
        if not found:
            return []
        ids = [ray.get_runtime_context().get_node_id() if own else None] * self.world_size
        if dist.is_initialized():
            dist.all_gather_object(ids, ids[self.rank])
        return sorted({id for id in ids if id})

    def base_weights(self, directory: Path) -> None:
        """Return None: this host keeps no base weights in memory."""


def _exit_on_flag(run_dir: str) -> None:
    """End this process, without a checkpoint, as soon as LEAVE_FILE exists. Runs in a thread."""
    up = watch_flag(flag(run_dir, LEAVE_FILE))
    while not up():
        time.sleep(1)
    os._exit(1)


RAY_HOST = Host(run_units_on_ray, compute_on_ray, dtype_on_ray)


def train_on_ray(job: Job) -> None:
    """Train the job on `scale.workers` workers, and continue after losses of workers and nodes (see the module's text).

    The first Ctrl-C stops the run after the current step, with a checkpoint; the second stops it at once.

    Raises:
        UserError: the cluster has too few resources; a worker raised a UserError; or more than `scale.max_failures`
            attempts in a row failed without a new checkpoint.
        StoppedError: the run was asked to stop before it had workers.
    """
    scale, run = job.config.scale, RunDirectory(job.config.out)
    files = [flag(run.where, name) for name in (STOP_FILE, AGAIN_FILE, LEAVE_FILE)]
    for file in files:
        file.unlink(missing_ok=True)
    try:
        require_resources(scale)
        with print_wait_reason(workers_wait_reason):
            interruptible(partial(_run_attempts, job), files[0].touch)
    except Exception as error:
        if isinstance(error, StoppedError):
            run.update(state="stopped")
            raise
        if found := _user_error(error):
            run.fail(str(found))
            raise found from None
        run.fail(format_error(error), traceback=traceback.format_exc())
        if any(isinstance(cause, LOST) for cause in error_chain(error)):
            alert_of_lost_process(run, job.config, format_error(error))
        again = f", after {scale.max_failures} restart(s) with no checkpoint between (scale.max_failures)"
        raise UserError(
            f"a worker ended before the run did: {format_error(error)}{'' if files[0].exists() else again}; "
            f"{run.where}/run.json has the traceback. Add --resume to the same command: {run.resume_point()}"
        ) from error
    finally:
        for file in files:
            file.unlink(missing_ok=True)
        if scale.fewest < scale.most:
            request_resources(bundles=[])


def _run_attempts(job: Job) -> None:
    """Start attempts until the run has ended. Raises the last error if `scale.max_failures` allows no more attempts."""
    scale, run = job.config.scale, RunDirectory(job.config.out)
    stop_file, again_file, leave_file = (flag(run.where, name) for name in (STOP_FILE, AGAIN_FILE, LEAVE_FILE))
    failures, most, gone, done = 0, scale.most, set[str](), _steps_done(run)
    while True:
        free_left_groups()
        before, workers = done, min(_wait_for_capacity(scale, gone, stop_file), most)
        changed: list[str] = []
        try:
            with (
                _reserve(job, workers, before) as reservation,
                _watch_capacity(scale, workers, gone, again_file, leave_file, changed.append, reservation.broken),
            ):
                noticed = _attempt(job, workers, before, reservation)
            asked = noticed or changed
            if stop_file.exists() or not asked or run.info()["state"] != "stopped":
                return
            why = f"notice was given for {len(noticed)} node(s)" if noticed else changed[0]
            gone |= set(noticed)
            failures, most, done = 0, scale.most, _steps_done(run)
        except Exception as error:
            if _user_error(error) or stop_file.exists() or not ray.is_initialized():
                raise
            why, done = format_error(error), _steps_done(run)
            if leave_file.exists():
                why = changed[0]
            elif isinstance(error, NoRoomError):
                # Other programs use the cluster, or Ray has not noticed yet that a node is lost: try fewer workers.
                most, why = max(scale.fewest, workers - 1), str(error)
            elif isinstance(error, PreemptionError):
                gone |= set(error.preemption_info.preempted_node_ids)
            elif not any(getattr(cause, "preempted", False) for cause in error_chain(error)):
                failures = failures + 1 if done == before else 1
                if failures > scale.max_failures:
                    raise
        again_file.unlink(missing_ok=True)
        leave_file.unlink(missing_ok=True)
        restart = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "step": done, "why": why}
        run.update(restarts=[*run.info().get("restarts", []), restart])
        print(f"{why}; continuing from step {done}", file=sys.stderr)


def _wait_for_capacity(scale: ScaleConfig, gone: Collection[str], stop_file: Flag) -> int:
    """Wait until at least `scale.fewest` workers fit on the cluster. Return how many to start, at most `scale.most`.

    Nodes with the ids `gone` are not counted.

    Raises:
        StoppedError: `stop_file` was made while the run waited.
    """
    asked = False
    try:
        while (workers := workers_that_fit(scale, spare_cpus=1, without=gone)) < scale.fewest:
            if stop_file.exists():
                raise StoppedError(NO_ROOM)
            if not asked:
                asked = True
                room_for = f"{workers} of {scale.workers} workers"
                print(f"the cluster has room for {room_for}; waiting for nodes", file=sys.stderr)
                _request_nodes(scale)
            time.sleep(1)
    finally:
        if asked and scale.fewest == scale.most:  # A run that can grow keeps its request until it ends.
            request_resources(bundles=[])
    return min(workers, scale.most)


@contextmanager
def _watch_capacity(
    scale: ScaleConfig,
    workers: int,
    gone: Collection[str],
    again_file: Flag,
    leave_file: Flag,
    set_reason: Callable[[str], object],
    broken: Callable[[], bool],
) -> Generator[None]:
    """Inside, end the attempt if more workers fit on the cluster, or if these `workers` no longer fit.

    Calls `set_reason` with a sentence before it ends the attempt. `broken` says whether the attempt's placement group
    has lost a node. If Ray Data's CPU is lost, the workers wait for data and never finish the step after which they
    would stop. So after LEAVE_SECONDS they are ended at once.
    """

    def look(ended: threading.Event) -> None:
        pause = min(LOOK_SECONDS, scale.resize_seconds)
        due, lacking = time.monotonic() + scale.resize_seconds, 0
        while not ended.wait(pause):
            found = min(workers_that_fit(scale, spare_cpus=1, without=gone), scale.most)
            # Require two looks in a row, because a busy node may answer too late.
            lacking = lacking + 1 if found < workers or broken() else 0
            if lacking == 2:
                set_reason(f"the cluster no longer has room for {workers} worker(s)")
                again_file.touch()
            elif lacking * pause > LEAVE_SECONDS:
                leave_file.touch()
                return
            if workers < scale.most and time.monotonic() >= due:
                due += scale.resize_seconds
                if found > workers:
                    set_reason("the cluster has room for more workers")
                    again_file.touch()
                    return
                _request_nodes(scale)

    if workers < scale.most:
        _request_nodes(scale)
    with in_background(look, "room"):
        yield


def _request_nodes(scale: ScaleConfig) -> None:
    """Ask Ray's autoscaler for the resources that the whole run can use."""
    request_resources(bundles=[worker_resources(scale)] * scale.most + [{"CPU": 1}])


def _reserve(job: Job, workers: int, start: int) -> AbstractContextManager[Reservation]:
    """Reserve the resources of an attempt that begins at step `start`.

    The reservation may raise NoRoomError after START_SECONDS if the attempt could do with fewer workers or fewer CPUs
    for Ray Data; otherwise it waits without limit.
    """
    scale = job.config.scale
    data_cpus = _data_cpus(job, workers) if start + own_steps(job, start) < job.plan.steps else 0
    seconds = START_SECONDS if workers > scale.fewest or data_cpus > 1 else math.inf
    return reserved(scale, workers, data_cpus, flag(job.config.out, STOP_FILE).exists, seconds)


def _data_cpus(job: Job, workers: int) -> int:
    """Return how many CPUs to reserve for Ray Data.

    The number is 1, except for a stream: its tasks encode text, so it gets one CPU for each worker if so many are free.
    A trial of a sweep also gets 1, because its sweep's layout counts with 1.
    """
    if not isinstance(job.train, Stream) or ray.get_runtime_context().get_actor_id():
        return 1
    free = ray.available_resources().get("CPU", 0) - workers * job.config.scale.cpus_per_worker
    return max(1, min(workers, int(free)))


def _attempt(job: Job, workers: int, start: int, reservation: Reservation) -> list[str]:
    """Train from step `start` in one Ray Train run. Return the ids of nodes that got a preemption notice meanwhile."""
    scale, first, notices = job.config.scale, start + own_steps(job, start), notices_may_come()
    datasets: Any = None
    if first < job.plan.steps:
        datasets = {"train": partial(reservation.dataset, partial(step_dataset, job, first, workers))}
    worker = partial(_worker, job, first, notices)
    scaling: dict[str, Any] = {
        "num_workers": workers,
        "use_gpu": scale.gpus_per_worker > 0,
        "resources_per_worker": worker_resources(scale),
    }
    settings: dict[str, Any] = {
        "dataset_config": reservation.data_config(),
        "run_config": _run_config(job),
        "datasets": datasets,
        "torch_config": TorchConfig(backend="nccl" if scale.gpus_per_worker else "gloo"),
    }
    # Whether Ray Train starts its process that looks for preemption notices; `_draining_nodes` asks this process.
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = str(int(notices and not private_parts()))
    if not private_parts():
        scaling_config = ray.train.ScalingConfig(**scaling)
        return _fit(TorchTrainer(worker, scaling_config=scaling_config, **settings), workers, job.config.out)
    from minimind_ray.on_ray.private_train import Reserved, Trainer

    trainer = Trainer(worker, scaling_config=Reserved(**scaling, group=reservation.group), **settings)
    trainer.shares = isinstance(job.train, Stream)
    return trainer.fit().return_value or []


def _run_config(job: Job) -> ray.train.RunConfig:
    return ray.train.RunConfig(
        # Ray writes its own records of each attempt here. A resume does not use them; it uses the run directory.
        name=f"attempt-{time.time_ns()}",
        storage_path=join(job.config.out, ".ray"),
        failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        # Ray's logs (ray-train-sys-*.log) have all messages; the terminal shows only our progress.
        logging_config=ray.train.LoggingConfig(log_level="CRITICAL"),
    )


def _fit(trainer: TorchTrainer, workers: int, out: str) -> list[str]:
    """Run a trainer for which Ray Train makes the workers' placement group. Return the list that the workers return.

    Raises:
        NoRoomError: the workers did not start in time, because another program took the resources first.
        StoppedError: as NoRoomError, and the run was asked to stop meanwhile.
    """
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", f"{START_SECONDS:.0f}")
    try:
        return trainer.fit().return_value or []
    except ray.train.ControllerError as error:
        if "startup timed out" not in str(error):
            raise
        if flag(out, STOP_FILE).exists():
            raise StoppedError(NO_ROOM) from error
        raise NoRoomError(f"{workers} worker(s) could not be started in time") from error


def _steps_done(run: RunDirectory) -> int:
    checkpoint = last_sound_checkpoint(run)
    return int(checkpoint.name.removeprefix("step-")) if checkpoint else 0


def _worker(job: Job, first: int, notices: bool) -> list[str]:
    """Train on one worker (Ray Train's train function). Return the ids of nodes that got a preemption notice.

    The worker reads the packs of the steps before `first` itself; Ray Data delivers the later packs. With `notices`,
    the worker looks for preemption notices.
    """
    torch.set_num_threads(max(1, int(job.config.scale.cpus_per_worker)))
    context = RayTrainContext(job.config.out, notices=notices)
    with ThreadPoolExecutor(1) as background:

        def steps(start: int) -> Iterator[list[Pack]]:
            own = islice(job.steps(context.rank, context.world_size, start), first - start)
            yield from islice(own, 1)
            # After the first own step, start Ray Data in a thread. Meanwhile the worker trains its other own steps.
            shares = background.submit(_rows_of_worker) if first < job.plan.steps else None
            yield from own
            if shares:
                yield from read_shares(shares.result(), job, first, context.rank)

        job.run(context, job.data_from(PackSource(steps)))
    return context.noticed


def _rows_of_worker() -> Iterator[Any]:
    """Return this worker's rows of the dataset, after waiting for the first row."""
    shard = ray.train.get_dataset_shard("train")
    assert shard
    # A batch_size of None gives whole blocks. Ray's type annotations do not allow it.
    batches = shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)  # pyright: ignore[reportArgumentType]
    rows = iter(batches)
    return chain(list(islice(rows, 1)), rows)


def format_error(error: BaseException) -> str:
    """Return an error as one line, without the long lines about other processes with which Ray's errors begin."""
    if isinstance(error, UserError):
        return str(error)
    for cause in error_chain(error):
        if isinstance(cause, ray.exceptions.OutOfMemoryError):
            return "a machine ran out of memory, and Ray ended the process"
    for rank, failure in sorted(getattr(error, "worker_failures", {}).items()):
        if any(isinstance(cause, ray.exceptions.RayActorError) for cause in error_chain(failure)):
            return f"worker {rank}'s process, a process of Ray Data, or the node of one of them is lost"
    if any(isinstance(cause, ray.exceptions.RayActorError) for cause in error_chain(error)):
        return "a process of the run, or its node, is lost"
    last = (str(error).strip() or "no message").splitlines()[-1]
    if "gloo" in last or "NCCL" in last:
        return "a worker lost its connection to the other workers, as happens when one of them ends"
    return f"{type(error).__name__}: {last}"


def _user_error(error: BaseException) -> UserError | None:
    """Return the UserError that a worker raised, taken out of Ray's wrappers; None if there is none."""
    return next((cause for cause in error_chain(error) if isinstance(cause, UserError)), None)


def error_chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and the errors that Ray wrapped in it."""
    yield error
    inner = [error.__cause__, *(getattr(error, name, None) for name in ("cause", *WRAPPED))]
    for cause in [*inner, *getattr(error, "worker_failures", {}).values()]:
        if isinstance(cause, BaseException):
            yield from error_chain(cause)


LOST = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)
WRAPPED = ("controller_failure", "health_check_failure")
