"""Measure the pace of a sweep's trials: train their first steps in as many processes at once as the sweep will have.

The processes are started as a trial's are, with the same imports and threads, and they train at the same time. So the
measurement includes that they compete for cores, caches and memory.
"""

from __future__ import annotations

import math
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from minimind_ray.config.errors import UserError
from minimind_ray.model.checkpoint import read_weights
from minimind_ray.stages.fused import member
from minimind_ray.stages.run import Job, begin
from minimind_ray.sweep.estimate import Pace, Paces
from minimind_ray.train.context import PlainContext, keep_freed_memory, resolve_precision, settle_compile
from minimind_ray.train.fused import Lockstep, PlainFusedContext
from minimind_ray.train.run import read_jsonl

CALIBRATION_SECONDS, CALIBRATION_STEPS = 15.0, 3
WARM_UP = 2
"""The first steps, which take longer: torch loads its kernels, and may compile some of them in the second step too."""
DRIFT = 0.2
"""How much the pace of a machine may differ between the measurement and the sweep, as a part of itself."""


@dataclass
class Times:
    """Seconds that one process measured: from its launch to the end of its imports, from there to the first step (with
    what the first step takes longer than others), and of each step after the warm-up, validation and checkpoint.
    """

    start: float
    steps: list[float]
    validations: list[float]
    checkpoints: list[float]
    process: float = 0.0

    @classmethod
    def after_warm_up(
        cls, start: float, steps: Sequence[float], validations: list[float], checkpoints: list[float]
    ) -> Times:
        """Return the times of a process that began the first of these `steps` after `start` seconds."""
        later = list(steps[WARM_UP:] or steps[-1:])
        return cls(start + max(0.0, steps[0] - statistics.median(later)), later, validations, checkpoints)


def calibrate(groups: Sequence[Sequence[Job]], waiting: int = 0) -> Paces:
    """Train a few steps of each group in its own process, all at once, validate, save, and delete the runs.

    A group is one job, or several that share a process. `waiting` further processes only start, as those of trials that
    wait for a group do.

    Raises:
        UserError: a process raised this error, or was killed.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as started:
        processes = [
            started.enter_context(_Process(Path(folder) / str(i), jobs, i))
            for i, jobs in enumerate([*groups, *[[]] * waiting])
        ]
        for process in processes:
            process.wait_until_ready()
        for process in processes:
            process.go()
        found = [process.result() for process in processes[: len(groups)]]
    crowding = max(1.0, len(processes) / (os.cpu_count() or 1))
    return paces_of(found, groups[0][0].config.scale.most, crowding)


def paces_of(found: Sequence[Times], workers: int = 1, crowding: float = 1.0) -> Paces:
    """Return the fastest and the slowest pace to expect from what the processes measured.

    Each part is expected to take its mean m. Its bounds are m / (1 + u) and m * (1 + u). Here u is the uncertainty of
    the mean: twice its standard error, and the DRIFT of the machine, added as squares. A step is divided by the
    `workers` that share it. `crowding` is the number of processes that started at the same time, for each CPU: alone,
    a process starts faster by this factor.
    """
    parts = {
        "alone": [times.process / crowding for times in found],
        "process": [times.process for times in found],
        "start": [times.start for times in found],
        "step": [seconds / workers for times in found for seconds in times.steps],
        "validation": [seconds for times in found for seconds in times.validations],
        "checkpoint": [seconds for times in found for seconds in times.checkpoints],
    }
    bounds = {name: _bounds(seconds) for name, seconds in parts.items()}
    return Paces(*(Pace(**{name: pair[i] for name, pair in bounds.items()}) for i in range(2)))


def _bounds(seconds: Sequence[float]) -> tuple[float, float]:
    mean, n = statistics.mean(seconds), len(seconds)
    error = statistics.stdev(seconds) / math.sqrt(n) / mean if n > 1 and mean else 0.0
    factor = 1 + math.hypot(DRIFT, 2 * error)
    return mean / factor, mean * factor


class _Process:
    """A process that imports what a trial's process imports, waits for `go`, and measures its jobs, if it has any."""

    def __init__(self, folder: Path, jobs: Sequence[Job], number: int) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "jobs").write_bytes(pickle.dumps([shortened(job, folder / f"run-{k}") for k, job in enumerate(jobs)]))
        threads = _threads(jobs[0]) if jobs else 1
        gpus = jobs[0].config.scale.gpus_per_worker if jobs else 0.0
        # Ray gives its workers the same variables.
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "CUDA_VISIBLE_DEVICES": _gpus(number, gpus)}
        code = "from minimind_ray.sweep.calibrate import main; main()"
        with (folder / "errors").open("wb") as errors:
            self._popen = subprocess.Popen(
                [sys.executable, "-c", code, str(folder), str(time.time())],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment,
            )  # fmt: skip

    def wait_until_ready(self) -> None:
        assert self._popen.stdout
        if not self._popen.stdout.readline():
            self._fail()

    def go(self) -> None:
        assert self._popen.stdin
        self._popen.stdin.write(b"go\n")
        self._popen.stdin.flush()

    def result(self) -> Times:
        self._popen.wait()
        if not (self.folder / "times").exists():
            self._fail()
        found: Times | Exception = pickle.loads((self.folder / "times").read_bytes())
        if isinstance(found, Exception):
            raise found
        return found

    def _fail(self) -> None:
        code = self._popen.wait()
        last = (self.folder / "errors").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise UserError(
            f"a process that measured the first steps of a trial ended with exit code {code}{': ' if last else ''}"
            f"{''.join(last)}; is there enough memory for so many trials at once? --concurrent lowers their number"
        )

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *error: object) -> None:
        self._popen.kill()
        self._popen.communicate()


def shortened(job: Job, out: Path) -> Job:
    """Return the job with its run in `out`, an early validation and checkpoint, and no trackers."""
    steps, config = job.plan.steps, job.config
    every = min(CALIBRATION_STEPS, steps)
    return job.with_config(
        config.model_copy(
            update={
                "out": str(out),
                "eval": config.eval.model_copy(update={"every": every}),
                "checkpoint": config.checkpoint.model_copy(update={"every": every}),
                "track": config.track.model_copy(update={"to": []}),
            }
        )
    )


def _threads(job: Job) -> int:
    return max(1, int(job.config.scale.cpus_per_worker))


def _gpus(number: int, each: float) -> str:
    """Return the GPUs that the process of this number sees: its own, or the one that it shares."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    here = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    first = int(number * each)
    return ",".join(here[first : first + math.ceil(each)])


def main() -> None:
    """Run in a process of the calibration. Arguments: its folder, and the time when it was launched."""
    import_module("minimind_ray.on_ray.tuner")  # As a trial's process does.
    folder, launched = Path(sys.argv[1]), float(sys.argv[2])
    jobs: list[Job] = pickle.loads((folder / "jobs").read_bytes())
    process = time.time() - launched
    print("ready", flush=True)
    os.dup2(2, 1)  # The parent process reads only the line above. Later prints go to the error file.
    if not sys.stdin.readline() or not jobs:
        return
    try:
        found: Times | UserError = measure(jobs)
        found.process = process
    except UserError as error:
        found = error
    (folder / "times").write_bytes(pickle.dumps(found))


def measure(jobs: Sequence[Job]) -> Times:
    """Train a few steps of the jobs in this process (several jobs: together), with a validation and a checkpoint.

    Raises:
        UserError: a run raised this error.
    """
    keep_freed_memory()
    torch.set_num_threads(_threads(jobs[0]))
    for job in jobs:
        begin(job, resume=False)
    return _measure_fused(jobs) if len(jobs) > 1 else _measure_alone(jobs[0])


class _Stopwatch(PlainContext):
    """Stops a run some seconds after its warm-up. Records the times of validations and checkpoints."""

    reads_checkpoints = True  # So the report comes after the checkpoint's write.

    def __init__(self) -> None:
        super().__init__()
        self.begins: list[float] = []
        self.validations: list[float] = []
        self.checkpoints: list[float] = []

    def should_stop(self) -> bool:
        """Whether the time is up and there was a validation. Called at the begin of each step."""
        self.begins.append(time.perf_counter())
        steady = self.begins[WARM_UP:]
        return bool(self.validations and steady) and steady[-1] - steady[0] > CALIBRATION_SECONDS

    def report(self, metrics: dict[str, Any], checkpoint: str | None) -> bool:
        """Record the times of a validation and its checkpoint. Also called after the checkpoint of a stop."""
        timing = metrics["timing"]
        if validation := timing.get("validation_seconds"):
            self.validations.append(validation)
            self.checkpoints.append(max(0.0, time.perf_counter() - self.begins[-1] - timing["seconds"] - validation))
        return True


def _measure_alone(job: Job) -> Times:
    watch, began = _Stopwatch(), time.perf_counter()
    job.run(watch, job.data(watch))
    steps = [line["timing"]["seconds"] for line in read_jsonl(Path(job.config.out) / "metrics.jsonl")]
    return Times.after_warm_up(watch.begins[0] - began, steps, watch.validations, watch.checkpoints)


class _FusedContext(PlainFusedContext):
    reads_checkpoints = True
    validation = 0.0
    """Seconds of the last turn's validation; 0 if there was none."""

    def post(self, metrics: dict[str, Any], checkpoint: str | None) -> None:
        """Record the time of a validation."""
        self.validation = metrics["timing"].get("validation_seconds", 0.0)


def _measure_fused(jobs: Sequence[Job]) -> Times:
    began, base = time.perf_counter(), jobs[0].base
    assert base
    device = PlainContext().device
    weights = {name: tensor.to(device) for name, tensor in read_weights(base.local()).items()}
    settle_compile(jobs[0].config.train.compile is True, 0, device)
    lockstep = Lockstep(weights, device, resolve_precision(jobs[0].config.train.precision, device))
    contexts = [_FusedContext(weights, device) for _ in jobs]
    members = [member(job, context) for job, context in zip(jobs, contexts, strict=True)]
    for each in members:
        lockstep.add(each)
    prepared = time.perf_counter()
    steps: list[float] = []
    reports: list[tuple[float, float]] = []
    steady = prepared
    while not reports or len(steps) <= WARM_UP or time.perf_counter() - steady < CALIBRATION_SECONDS:
        for context in contexts:
            context.validation = 0.0
        turn = time.perf_counter()
        ended = lockstep.turn()
        seconds, validation = time.perf_counter() - turn, sum(context.validation for context in contexts)
        for each in members:
            if each.error:
                raise each.error
        if ended:
            break
        if validation:
            reports.append((seconds, validation))
        else:
            steps.append(seconds)
        if len(steps) <= WARM_UP:
            steady = time.perf_counter()
    for each in lockstep.members:
        each.run.close()
    # A run of one step has a report at once.
    steps = steps or [reports[0][0] - reports[0][1]]
    step = statistics.median(steps[WARM_UP:] or steps[-1:])
    checkpoints = [max(0.0, seconds - validation - step) for seconds, validation in reports]
    validations = [validation for _, validation in reports]
    return Times.after_warm_up(prepared - began, steps, validations, checkpoints)
