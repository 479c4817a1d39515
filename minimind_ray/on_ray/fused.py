"""Train many of Tune's trials together in one process, a `Group` (see train/fused.py).

Tune still has a process for each trial, but the trial's process does not train. It asks the group to begin the run and
gets the run's first validation. Then it sends Tune's verdict and gets the next validation, until the run ends. Before
each step the group waits for the verdicts on all runs that have reported.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from minimind_ray.config.schema import ScaleConfig
from minimind_ray.data.storage import flag, watch_flag
from minimind_ray.model.checkpoint import read_weights
from minimind_ray.on_ray.columns import granted_device
from minimind_ray.on_ray.trainer import STOP_FILE
from minimind_ray.stages.fused import member
from minimind_ray.stages.run import Job
from minimind_ray.train.context import (
    Context,
    PlainContext,
    keep_freed_memory,
    resolve_precision,
    settle_compile,
)
from minimind_ray.train.fused import Lockstep, Member
from minimind_ray.train.run import RunDirectory

VERDICT_SECONDS = 600
"""If a trial's process sends no verdict for this time, it counts as dead, and the other trials continue without it."""

Answer = dict[str, Any] | BaseException | None
"""A validation's metrics, or the exception that ended the run, or None after its end."""


class GroupContext(PlainContext):
    """The host of a run in a group. Two queues connect it to the trial's process."""

    def __init__(self, weights: Mapping[str, Tensor], device: torch.device, stopped: Callable[[], bool]) -> None:
        super().__init__(device)
        self.weights, self.stopped = weights, stopped
        self.answers: SimpleQueue[Answer] = SimpleQueue()
        self.verdicts: SimpleQueue[bool | None] = SimpleQueue()
        self.left = False

    def base_weights(self, directory: Path) -> Mapping[str, Tensor]:
        """Return the group's weights, not a copy of them."""
        return self.weights

    def should_stop(self) -> bool:
        """Whether the sweep was asked to stop."""
        self.stopping = self.stopping or self.stopped()
        return self.stopping

    def post(self, metrics: dict[str, Any], checkpoint: str | None) -> None:
        """Send a validation's metrics to the trial's process."""
        self.answers.put(metrics)

    def verdict(self) -> bool:
        """Wait for the verdict from the trial's process. If the process is gone, end the run and set `left`."""
        try:
            verdict = self.verdicts.get(timeout=VERDICT_SECONDS)
        except Empty:
            verdict = None
        self.left = verdict is None
        return bool(verdict)


class Group:
    """A Ray actor that trains up to `size` runs on one base."""

    def __init__(self, size: int, sweep: str, threads: int) -> None:
        self.size, self.stopped, self.threads = size, watch_flag(flag(sweep, STOP_FILE)), threads
        self.arrivals: SimpleQueue[Job] = SimpleQueue()
        self.contexts: dict[str, GroupContext] = {}
        self.taken: set[str] = set()
        self.lock = threading.Lock()
        self.device = granted_device()
        self.weights: Mapping[str, Tensor] = {}
        threading.Thread(target=self._work, name="training", daemon=True).start()

    def take(self, out: str) -> bool:
        """Reserve a place for the run in directory `out`. Return False if all places are taken."""
        with self.lock:
            if len(self.taken) < self.size:
                self.taken.add(out)
            return out in self.taken

    def begin(self, job: Job, bases: Mapping[str, ray.ObjectRef]) -> Answer:
        """Begin a run; return its first report. `bases` are weights in the object store, by directory.

        They are not an argument of the constructor, because Ray could not restart the actor with such arguments.
        """
        with self.lock:
            self.weights = self.weights or self._load(job, bases)
        self.contexts[job.config.out] = GroupContext(self.weights, self.device, self.stopped)
        self.arrivals.put(job)
        return self.contexts[job.config.out].answers.get()

    def continue_run(self, out: str, proceed: bool) -> Answer:
        """Send the verdict on a run's last report to the run; wait for the run's next report and return it."""
        self.contexts[out].verdicts.put(proceed)
        return self.contexts[out].answers.get()

    def leave(self, out: str) -> None:
        """End a run at its next validation, because its trial's process is gone. Does nothing in other groups."""
        if out in self.contexts:
            self.contexts[out].verdicts.put(None)

    def _load(self, job: Job, bases: Mapping[str, ray.ObjectRef]) -> Mapping[str, Tensor]:
        assert job.base
        base = job.base.local()
        if str(base) not in bases:
            return {name: tensor.to(self.device) for name, tensor in read_weights(base).items()}
        arrays: Mapping[str, np.ndarray] = ray.get(bases[str(base)])
        return {name: torch.from_numpy(array.copy()).to(self.device) for name, array in arrays.items()}

    def _work(self) -> None:
        keep_freed_memory()
        torch.set_num_threads(self.threads)
        lockstep, outs = None, dict[Member, str]()
        while True:
            # Block while idle; otherwise take the jobs in the queue without waiting.
            while not outs or not self.arrivals.empty():
                job = self.arrivals.get()
                out = job.config.out
                try:
                    new = member(job, self.contexts[out])
                except BaseException as error:
                    self._end(out, error)
                    continue
                dtype = resolve_precision(job.config.train.precision, self.device)
                if lockstep is None:
                    # No `auto`: it depends on a run's length, and these runs have different lengths.
                    settle_compile(job.config.train.compile is True, 0, self.device)
                    lockstep = Lockstep(self.weights, self.device, dtype)
                lockstep.add(new)
                outs[new] = out
            assert lockstep
            try:
                for ended in lockstep.turn():
                    self._end(outs.pop(ended), ended.error)
            except BaseException as error:  # An error of the shared step ends all runs.
                for out in outs.values():
                    self._end(out, error)
                lockstep, outs = None, {}

    def _end(self, out: str, error: BaseException | None) -> None:
        if self.contexts[out].left:  # The trial's process died; do not record early stopping.
            run = RunDirectory(out)
            run.fail(run.info().get("error") or "its process ended")
        with self.lock:
            self.taken.discard(out)
        self.contexts[out].answers.put(error)


def start_groups(count: int, size: int, sweep: str, scale: ScaleConfig) -> list[Any]:
    """Start `count` groups of `size` trials. Each group takes the CPUs and GPUs of a single trial."""
    actor = ray.remote(Group).options(
        num_cpus=scale.cpus_per_worker, num_gpus=scale.gpus_per_worker or None, scheduling_strategy="SPREAD",
        max_concurrency=2 * size + 1, max_restarts=-1,
    )  # fmt: skip
    threads = max(1, int(scale.cpus_per_worker))
    return [actor.remote(size, sweep, threads) for _ in range(count)]


def run_fused(job: Job, groups: Sequence[Any], context: Context, bases: Mapping[str, ray.ObjectRef]) -> None:
    """Train a run in one of the groups; called in the trial's process.

    Raises:
        UserError: the run raised this error.
    """
    out = job.config.out
    group = _place(out, groups, context)
    if group is None:
        RunDirectory(out).update(state="waiting")
        return
    answer: Answer = ray.get(group.begin.remote(job, bases))
    while isinstance(answer, dict):
        answer = ray.get(group.continue_run.remote(out, context.report(answer, None)))
    if isinstance(answer, BaseException):
        raise answer


def _place(out: str, groups: Sequence[Any], context: Context) -> Any:
    """Wait for a group with a free place and reserve the place. Return None if the sweep is asked to stop first."""
    ready = {group.__ray_ready__.remote(): group for group in groups}
    while not context.should_stop():
        for started in ray.wait(list(ready), num_returns=len(ready), timeout=1.0)[0]:
            if ray.get(ready[started].take.remote(out)):
                return ready[started]
        time.sleep(0.1)
    return None
