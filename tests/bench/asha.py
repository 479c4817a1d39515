"""Simulate sweeps under asynchronous successive halving, with known truth: results decide which trials stop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minimind_ray.config.search import ASHA_FIRST, ASHA_KEEP

PERCENT = np.arange(10, 101, 10)
"""Where trials are validated, in per cent of their steps."""


@dataclass
class Halved:
    """A simulated sweep. `end_T` is each trial's true metric at the end of its training, also if it was stopped.

    `value_TE` are the values of the examples at the trial's last validation, `curves` the trial's validations.
    """

    point_T: np.ndarray
    seed_T: np.ndarray
    truth_P: np.ndarray
    end_T: np.ndarray
    value_TE: np.ndarray
    curves: list[dict[int, float]]
    finished_T: np.ndarray


def halved_sweep(
    rng: np.random.Generator, points: int, seeds: int, *, spread: float = 0.05, own: float = 0.05, common: float = 0.03,
    wander: float = 0.03, fall: float = 0.1, unlike: float = 0.3, at_once: int = 4, examples: int = 200,
) -> Halved:  # fmt: skip
    """Simulate a sweep whose trials are stopped as by Tune's scheduler.

    The loss of a trial falls by about `fall` in the course of its training; how fast depends on its point (by the
    share `unlike`). What a seed does to a trial (`own`) grows with the square root of its steps. Besides, each trial's
    curve wanders by `wander` in a random walk, so that early validations say only so much about the end.
    """
    point_T, seed_T = np.tile(np.arange(points), seeds), np.repeat(np.arange(seeds), points)
    truth_P, rate_P = rng.normal(0, spread, points), fall * (1 + unlike * rng.normal(0, 1, points))
    trials, time_K = len(point_T), PERCENT / 100
    walk_TK = np.cumsum(rng.normal(0, wander / np.sqrt(len(time_K)), (trials, len(time_K))), 1)
    level_TK = (truth_P[point_T] + rng.normal(0, common, seeds)[seed_T])[:, None] + walk_TK - walk_TK[:, -1:]
    level_TK += rng.normal(0, own, (trials, 1)) * np.sqrt(time_K) + rate_P[point_T][:, None] * (1 - time_K)
    example_TE = rng.normal(0, 1, examples) + rng.normal(0, 0.3, (trials, examples))
    seen_TK = level_TK + example_TE.mean(1)[:, None]
    last_T = _stops(seen_TK, at_once)
    curves = [dict(zip(PERCENT[: last + 1].tolist(), seen_K.tolist())) for last, seen_K in zip(last_T, seen_TK)]
    value_TE = level_TK[np.arange(trials), last_T][:, None] + example_TE
    return Halved(point_T, seed_T, truth_P, level_TK[:, -1], value_TE, curves, last_T == len(time_K) - 1)


def _stops(seen_TK: np.ndarray, at_once: int) -> np.ndarray:
    """Return the number of each trial's last validation. A loss outside of the best third at a rung stops a trial."""
    rungs: dict[int, list[float]] = {ASHA_FIRST: [], ASHA_FIRST * ASHA_KEEP: []}
    last_T, waiting = np.full(len(seen_TK), -1), list(range(len(seen_TK)))
    running: list[int] = []
    while running or waiting:
        while waiting and len(running) < at_once:
            running.append(waiting.pop(0))
        for trial in list(running):
            last_T[trial] += 1
            seen, before = seen_TK[trial, last_T[trial]], rungs.get(int(PERCENT[last_T[trial]]))
            stopped = bool(before) and seen > np.percentile(before or [0.0], 100 / ASHA_KEEP)
            if before is not None:
                before.append(seen)
            if stopped or last_T[trial] == len(PERCENT) - 1:
                running.remove(trial)
    return last_T
