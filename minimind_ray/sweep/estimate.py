"""Estimate what a sweep takes: count its tokens and FLOPs, and turn a measured pace into a range of time and price."""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from statistics import NormalDist

import numpy as np

from minimind_ray.config.search import ASHA_FIRST, ASHA_KEEP, SearchConfig
from minimind_ray.on_ray.layout import Layout
from minimind_ray.stages.run import Job
from minimind_ray.stages.start import load_tokenizer, model_shape
from minimind_ray.sweep.cost import price
from minimind_ray.sweep.plan import train_store, train_tokens
from minimind_ray.train.throughput import training_flops_per_token

SIMULATIONS = 200
LIKELY = (0.1, 0.9)
"""The quantiles that bound a range."""
BESIDE_TRIALS, RAY_TRIALS = 4.0, 2.0
"""Times in starts of a process: for the command, Ray's start and end, and the table at the end; and for Ray to start
the trials' processes. docs/performance-log.md shows the measurements."""
RAY_TRAIN = 2.0
"""The time that Ray Train takes to start the workers of a trial with several workers, in starts of a process."""


@dataclass(frozen=True)
class Pace:
    """Seconds of a trial's parts: its process, its start after that, a step, a validation, and a checkpoint.

    `process` is the start of a process among those of the other trials, `alone` the start of a process by itself. A
    start ends with the first step; what the first step takes longer than other steps is part of it. If trials share a
    process, a step, a validation and a checkpoint are those of all trials in the process.
    """

    alone: float
    process: float
    start: float
    step: float
    validation: float
    checkpoint: float


@dataclass(frozen=True)
class Paces:
    """The fastest and the slowest pace to expect."""

    low: Pace
    high: Pace


@dataclass(frozen=True)
class Estimate:
    """The cost of all trials. `low` and `high` are the seconds that the sweep takes on `places` places (see cost.py).

    `kept` is the part of all steps that is left after early stopping.
    """

    steps: int
    tokens: int
    flops: float
    kept: float
    places: int
    low: float
    high: float

    def price(self, per_hour: float) -> tuple[float, float]:
        """Return the lowest and the highest price."""
        return price(self.low, self.places, per_hour), price(self.high, self.places, per_hour)


def estimate(jobs: Sequence[Job], paces: Paces, search: SearchConfig, spread: Layout) -> Estimate:
    """Add up the costs of all trials.

    `paces` belong to the first trial. The time of another trial's steps and validations is taken as proportional to its
    FLOPs.
    """
    per_token_J = np.array([_flops_per_token(job) for job in jobs])
    flops_J = per_token_J * [train_tokens(job) for job in jobs]
    steps_J = jobs[0].plan.steps * flops_J / flops_J[0]
    validations_J = np.array([_validations(job) for job in jobs])
    parts_SJ = asha_parts(len(jobs)) if search.scheduler == "asha" else np.ones((SIMULATIONS, len(jobs)))

    several_workers = jobs[0].config.scale.most > 1

    def clocks(pace: Pace) -> np.ndarray:
        validation_J = pace.validation * per_token_J / per_token_J[0] + pace.checkpoint
        work_J = pace.step * steps_J + validations_J * validation_J
        start = pace.start + several_workers * RAY_TRAIN * pace.process
        beside = BESIDE_TRIALS * pace.alone + RAY_TRIALS * pace.process
        return np.array([beside + clock(start + parts_J * work_J, spread.at_once) for parts_J in parts_SJ])

    low, high = likely(clocks(paces.low), clocks(paces.high))
    return Estimate(
        steps=sum(job.plan.steps for job in jobs),
        tokens=sum(map(train_tokens, jobs)),
        flops=float(flops_J.sum()),
        kept=float(parts_SJ.mean()),
        places=spread.places,
        low=low,
        high=high,
    )


def likely(low_S: np.ndarray, high_S: np.ndarray) -> tuple[float, float]:
    """Return the LIKELY quantiles of simulated times, of which each is uncertain itself, from low to high.

    These bounds are taken as the same quantiles of a log-normal distribution. What the scheduler stops and the pace of
    the machine are independent, so that the range is narrower than from the lowest low to the highest high.
    """
    normal = NormalDist()
    ranks_S = np.random.default_rng(0).permutation(len(low_S))
    z_S = np.array([normal.inv_cdf((rank + 0.5) / len(low_S)) for rank in ranks_S])
    share_S = 0.5 + z_S / 2 / normal.inv_cdf(LIKELY[1])  # 0 at the lower quantile, 1 at the upper.
    first, last = np.quantile(low_S ** (1 - share_S) * high_S**share_S, LIKELY)
    return float(first), float(last)


def clock(seconds_J: Sequence[float] | np.ndarray, at_once: int) -> float:
    """Return when the last of the trials ends, if each starts as soon as one of `at_once` places is free."""
    free = [0.0] * at_once
    heapify(free)
    for seconds in seconds_J:
        heapreplace(free, free[0] + float(seconds))
    return max(free)


def _validations(job: Job) -> int:
    return -(-job.plan.steps // (job.config.eval.every or max(1, job.plan.steps // 10)))


def _flops_per_token(job: Job) -> float:
    """Return the FLOPs of forward and backward for a token, at the mean context length of the data's first packs."""
    store = train_store(job)
    lengths = np.concatenate([pack.lengths for pack in store.read(range(min(8, store.n_packs)))]).astype(float)
    base = job.base and job.base.local()
    shape = model_shape(job.config, load_tokenizer(job.config, base), base)
    return training_flops_per_token(shape, float((lengths**2).sum() / lengths.sum() / 2), job.config.trains_adapter)


def asha_parts(trials: int) -> np.ndarray:
    """Simulate the part of its steps that each trial trains under ASHA: [SIMULATIONS, trials].

    Simulates Tune's scheduler: trials come in random order, which never changes during training, and each continues
    after a rung if it is in the best third of the trials that reached the rung before it. The first trials have no
    others to compare with, so a sweep of few trials saves less than the rungs promise.
    """
    rng = np.random.default_rng(0)
    rungs = [rung / 100 for rung in _rungs()]
    parts_SJ = np.ones((SIMULATIONS, trials))
    for parts_J in parts_SJ:
        seen: list[list[float]] = [[] for _ in rungs]
        for j, quality in enumerate(rng.random(trials)):
            for rung, before in zip(rungs, seen):
                passed = not before or quality >= _percentile(before, 1 - 1 / ASHA_KEEP)
                insort(before, quality)
                if not passed:
                    parts_J[j] = rung
                    break
    return parts_SJ


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
