"""Estimate the cost of a sweep: count its tokens and FLOPs, and measure seconds on the first trial's first steps."""

from __future__ import annotations

import statistics
import tempfile
import time
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from minimind_ray.config.search import ASHA_FIRST, ASHA_KEEP, SearchConfig
from minimind_ray.stages.run import Job, begin
from minimind_ray.stages.start import load_tokenizer, model_shape
from minimind_ray.sweep.plan import train_store, train_tokens
from minimind_ray.train.context import PlainContext
from minimind_ray.train.run import read_jsonl
from minimind_ray.train.throughput import training_flops_per_token

CALIBRATION_SECONDS, CALIBRATION_STEPS = 5.0, 3
SIMULATIONS = 200


@dataclass(frozen=True)
class Pace:
    """Measured seconds of one trial in this process: for its start, a step and a validation.

    They are measured with as many threads as a trial gets.
    """

    start: float
    step: float
    validation: float


@dataclass(frozen=True)
class Estimate:
    """The cost of all trials. `seconds` is the sum over the trials; `kept` is the part left after early stopping."""

    steps: int
    tokens: int
    flops: float
    seconds: float
    kept: float

    def hours(self, at_once: int) -> float:
        """The hours that the sweep takes with `at_once` trials at the same time."""
        return self.kept * self.seconds / at_once / 3600

    def price(self, per_hour: float) -> float:
        """The price of all trials if one trial costs `per_hour`."""
        return self.kept * self.seconds / 3600 * per_hour


def estimate(jobs: Sequence[Job], pace: Pace, search: SearchConfig, at_once: int) -> Estimate:
    """Add up the costs of all trials.

    `pace` belongs to the first trial. The time of another trial is taken as proportional to its FLOPs.
    """
    per_token_J = [_flops_per_token(job) for job in jobs]
    flops_J = [train_tokens(job) * per_token for job, per_token in zip(jobs, per_token_J)]
    seconds_per_flop = pace.step * jobs[0].plan.steps / flops_J[0]
    seconds = sum(
        pace.start + flops * seconds_per_flop + _validations(job) * pace.validation * per_token / per_token_J[0]
        for job, flops, per_token in zip(jobs, flops_J, per_token_J)
    )
    return Estimate(
        steps=sum(job.plan.steps for job in jobs),
        tokens=sum(map(train_tokens, jobs)),
        flops=sum(flops_J),
        seconds=seconds,
        kept=asha_keeps(len(jobs)) if search.scheduler == "asha" else 1.0,
    )


def _validations(job: Job) -> int:
    return -(-job.plan.steps // (job.config.eval.every or max(1, job.plan.steps // 10)))


def _flops_per_token(job: Job) -> float:
    """Return the FLOPs of forward and backward for a token, at the mean context length of the data's first packs."""
    store = train_store(job)
    lengths = np.concatenate([pack.lengths for pack in store.read(range(min(8, store.n_packs)))]).astype(float)
    base = job.base and job.base.local()
    shape = model_shape(job.config, load_tokenizer(job.config, base), base)
    return training_flops_per_token(shape, float((lengths**2).sum() / lengths.sum() / 2), job.config.trains_adapter)


def asha_keeps(trials: int) -> float:
    """Return the part of all steps that ASHA is expected to train, if the order of the trials never changes.

    Simulates Tune's scheduler: trials come in random order, and each continues after a rung if it is in the best third
    of the trials that reached the rung before it. The first trials have no others to compare with, so a sweep of few
    trials saves less than the rungs promise.
    """
    rng = np.random.default_rng(0)
    rungs = [rung / 100 for rung in _rungs()]
    trained = 0.0
    for _ in range(SIMULATIONS):
        seen: list[list[float]] = [[] for _ in rungs]
        for quality in rng.random(trials):
            reached = 1.0
            for rung, before in zip(rungs, seen):
                passed = not before or quality >= _percentile(before, 1 - 1 / ASHA_KEEP)
                insort(before, quality)
                if not passed:
                    reached = rung
                    break
            trained += reached
    return trained / SIMULATIONS / trials


def _percentile(sorted_values: Sequence[float], part: float) -> float:
    """Return the same as `numpy.percentile`, which spends most of its time on checks of its arguments."""
    place = (len(sorted_values) - 1) * part
    low = sorted_values[int(place)]
    return low + (sorted_values[min(int(place) + 1, len(sorted_values) - 1)] - low) * (place % 1)


def _rungs() -> list[float]:
    rungs = [float(ASHA_FIRST)]
    while rungs[-1] * ASHA_KEEP < 100:
        rungs.append(rungs[-1] * ASHA_KEEP)
    return rungs


class _Stopwatch(PlainContext):
    """Stops a run after some seconds and at least one validation. Records the times of steps and validations."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[float] = []
        self.validations: list[float] = []

    def should_stop(self) -> bool:
        """Whether the time is up and there was a validation."""
        self.steps.append(time.perf_counter())
        return bool(self.validations) and self.steps[-1] - self.steps[0] > CALIBRATION_SECONDS

    def report(self, metrics: dict[str, Any], checkpoint: str | None) -> bool:
        """Record the time of a validation. Also called after the checkpoint of a stop."""
        if any(name.startswith("val/") for name in metrics):
            self.validations.append(time.perf_counter() - self.steps[-1] - metrics["timing"]["seconds"])
        return True


def calibrate(job: Job) -> Pace:
    """Measure a trial's pace: train a few steps in this process, validate, and delete the run."""
    watch = _Stopwatch()
    with tempfile.TemporaryDirectory() as out:
        steps = job.plan.steps
        config = job.config.model_copy(
            update={
                "out": out,
                "eval": job.config.eval.model_copy(update={"every": min(CALIBRATION_STEPS, steps)}),
                "checkpoint": job.config.checkpoint.model_copy(update={"every": steps}),
                "track": job.config.track.model_copy(update={"to": []}),
            }
        )
        job = job.with_config(config)
        run = begin(job, resume=False)
        torch.set_num_threads(max(1, int(config.scale.cpus_per_worker)))
        started = time.perf_counter()
        job.run(watch, job.data(watch))
        seconds = [line["timing"]["seconds"] for line in read_jsonl(run.path / "metrics.jsonl")]
    return Pace(
        start=watch.steps[0] - started,
        # Leave out the first step, which is slower.
        step=statistics.median(seconds[1:] or seconds) / job.config.scale.most,
        validation=max(0.0, statistics.median(watch.validations)),
    )
