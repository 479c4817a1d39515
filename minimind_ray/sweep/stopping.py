"""Predict the final metric of trials that were stopped early, so that their points can be compared without bias.

A scheduler stops a trial because its validations are bad. If only the finished trials of a point counted, its mean
would be too good: its unlucky seeds are missing. But whether a trial is stopped depends only on its validations so far,
so given these its end is missing at random (Rubin 1976), and the trials that trained on show how such an end follows.
The prediction goes from one step at which trials stopped to the next and at last to the end. For each of these parts a
line is fitted to all trials that trained through it (regression for monotone missing data: Little & Rubin, Statistical
Analysis with Missing Data, ch. 7; with one part it is double sampling with regression: Cochran, Sampling Techniques,
ch. 12).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from minimind_ray.sweep.metric import columns_of, examples_of
from minimind_ray.sweep.trials import LARGEST, MEASURED, Trial
from minimind_ray.tasks.items import PREFIX
from minimind_ray.train.best import best_validation
from minimind_ray.train.intervals import NORMAL, t_quantile

LEAST_FOR_LINE = 4
"""With fewer trials, a slope would be a guess: the mean change is used instead, a line with slope 1."""
LEAST = 2
"""With fewer trials, the spread of the changes is unknown, so that there is no prediction."""

Curve = Mapping[int, float]
"""The metric of a trial after each step with a validation: its value at the best validation so far."""


@dataclass(frozen=True)
class Count:
    """How a trial counts in the comparison: with its own end, with a predicted end, or (None) not, for a `reason`.

    `shift` is to be added to the metric of the trial's validation; `extra` is the variance of this shift.
    """

    how: Literal["finished", "predicted"] | None
    reason: str = ""
    shift: float = 0.0
    extra: float = 0.0


def count_trials(trials: Sequence[Trial], metric: str) -> list[Count]:
    """Return how each trial of a sweep counts. A budget or a stop by hand is treated as a scheduler's stop.

    A trial's end is predicted only from trials of the same length: after as many steps, a longer run is still on its
    way when a shorter one has ended.
    """
    found = [Count(None, _reason(trial, metric)) for trial in trials]
    known = [t for t, count in enumerate(found) if not count.reason]
    lengths = lengths_of([trials[t] for t in known])
    of = " of its length" if len(set(lengths)) > 1 else ""
    for length in set(lengths):
        same = [t for t, other in zip(known, lengths) if other == length]
        for t, count in zip(same, _counts([trials[t] for t in same], metric, of)):
            found[t] = count
    return found


def _counts(trials: Sequence[Trial], metric: str, of: str) -> list[Count]:
    """Return how trials of the same length count. `of` says in reasons that there are other lengths, too."""
    finished = [trial.state == "finished" for trial in trials]
    curves = [curve_of(trial.metrics, metric) for trial in trials]
    shift_T, extra_T = predicted_ends(curves, finished)
    whole = [curve for curve, done in zip(curves, finished) if done and curve]
    found: list[Count] = []
    for trial, curve, shift, extra in zip(trials, curves, shift_T.tolist(), extra_T.tolist()):
        if trial.state == "finished":
            found.append(Count("finished"))
        elif trial.lineage:
            found.append(Count(None, f"{trial.state}; with pbt its weights come from other trials"))
        elif math.isfinite(shift):
            found.append(Count("predicted", "", shift, extra))
        else:
            found.append(Count(None, f"{trial.state}; {_why_unpredicted(curve, whole, metric, of)}"))
    return found


def lengths_of(trials: Sequence[Trial]) -> list[int | None]:
    """Return the planned number of steps of each trial. If it is unknown, it is that of the others if these agree."""
    known = {trial.length for trial in trials if trial.length}
    only = known.pop() if len(known) == 1 else None
    return [trial.length or only for trial in trials]


def _why_unpredicted(curve: Curve, whole: Sequence[Curve], metric: str, of: str) -> str:
    """Return why the end of a stopped trial cannot be predicted from the curves `whole` of the finished trials."""
    if not curve:
        return f"its end cannot be predicted, because {metric} was not measured during training"
    if len(whole) < LEAST:
        return f"too few trials{of} finished to predict its end"
    return (
        f"its end cannot be predicted, because it has no validation at a step at which all finished trials{of} have one"
    )


def has_end(trial: Trial, metric: str) -> bool:
    """Whether a trial finished or was stopped, and has results that can be compared."""
    return not _reason(trial, metric)


def _reason(trial: Trial, metric: str) -> str:
    """Return the reason why a trial cannot count, whatever other trials did; empty if there is none."""
    if trial.state not in ("finished", "early-stopped", "stopped"):
        return trial.state
    if not trial.validation:
        return f"{trial.state}; no validation of it was saved"
    examples = examples_of(trial, metric)
    if not examples:
        return f"{trial.state}; no results of task {metric.removeprefix(PREFIX)} were saved"
    return "" if examples.finite(columns_of(metric)) else "a value in its validation is not finite or too large"


def curve_of(lines: Iterable[Mapping[str, Any]], metric: str) -> dict[int, float]:
    """Return the curve of a trial from the lines of its metrics.jsonl; empty if no validation measures the metric."""
    found, best = dict[int, float](), None
    if not metric.startswith(MEASURED):  # The user's own column, which may be named as a number of training: tokens.
        return found
    for line in lines:
        if "val/loss" in line and (best := best_validation([*([best] if best else []), line])):
            value = best.get(metric)
            found[int(line["step"])] = math.nan if value is None else float(value)
    return {step: value for step, value in found.items() if abs(value) < LARGEST}


def common_step(curves: Sequence[Curve]) -> int | None:
    """Return the last step at which all trials have a value; None if there is none."""
    return max(set[int].intersection(*(set(curve) for curve in curves)), default=None) if curves else None


def predicted_ends(curves: Sequence[Curve], finished: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    """Predict what training to the end would have added to each trial's metric.

    Returns:
        `shift_T`, the predicted final metric minus the last value of the trial's curve, and `extra_T`, the variance of
        the prediction. Both are 0 for finished trials, and NaN for stopped trials without a prediction: they have no
        validation at a common step with all finished trials, or fewer than `LEAST` trials trained on from there.
    """
    shift_T, extra_T = np.zeros(len(curves)), np.zeros(len(curves))
    whole = [curve for curve, done in zip(curves, finished) if done and curve]
    stopped = [t for t, done in enumerate(finished) if not done]
    reached = {t: common_step([*whole, curves[t]]) if whole else None for t in stopped}
    rungs = sorted({step for step in reached.values() if step is not None})
    parts = {rung: _part(curves, finished, rung, end) for rung, end in zip(rungs, [*rungs[1:], None])}
    for t, rung in reached.items():
        value, variance = (math.nan if rung is None else curves[t][rung]), 0.0
        for part in (parts[step] for step in rungs if rung is not None and step >= rung):
            value, variance = part.predict(value, variance) if part else (math.nan, math.nan)
        last = list(curves[t].values())[-1] if curves[t] else math.nan
        shift_T[t], extra_T[t] = value - last, variance if math.isfinite(value) else math.nan
    return shift_T, extra_T


@dataclass(frozen=True)
class _Line:
    """A line fitted to the values of trials at two steps. `variance` is the residual one."""

    n: int
    x: float
    y: float
    slope: float
    squares: float
    variance: float

    def predict(self, x: float, variance: float) -> tuple[float, float]:
        """Return the value at the second step and its variance, from the value at the first step and its variance."""
        of_slope = ((x - self.x) ** 2 + variance) / self.squares if self.squares else 0.0
        own = self.variance * (1 + 1 / self.n + of_slope)
        return self.y + self.slope * (x - self.x), self.slope**2 * variance + own


def _part(curves: Sequence[Curve], finished: Sequence[bool], rung: int, end: int | None) -> _Line | None:
    """Fit the line from the step `rung` to the step `end` (None: to the trials' ends); None with too few trials.

    The line's variance is enlarged by the ratio of the quantiles of Student's t and of the normal distribution, since
    it comes from few trials.
    """
    if end is None:
        through = [(c[rung], list(c.values())[-1]) for c, done in zip(curves, finished) if done and c]
    else:
        through = [(c[rung], c[end]) for c in curves if rung in c and end in c]
    n = len(through)
    if n < LEAST:
        return None
    x_N, y_N = np.array(through).T
    x, y, squares = x_N.mean(), y_N.mean(), float(((x_N - x_N.mean()) ** 2).sum())
    fitted = n >= LEAST_FOR_LINE and squares > 0
    slope = float((x_N - x) @ (y_N - y)) / squares if fitted else 1.0
    free = n - 2 if fitted else n - 1
    residual_N = y_N - y - slope * (x_N - x)
    wider = (t_quantile(free) / NORMAL) ** 2
    variance = float(residual_N @ residual_N) / free * wider
    return _Line(n, float(x), float(y), slope, squares if fitted else 0.0, variance)
