"""Track the progress of a running sweep: each trial's step, metric, speed and time left, and the sweep's expected end.

This module does no I/O. The caller passes the tuner's events and the newest lines of the trials' metrics.jsonl, and
gets rows of text and totals. All times, such as `now`, are in seconds by `time.monotonic`.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from minimind_ray.sweep.axes import short_names
from minimind_ray.sweep.text import count_text, duration_text, value_text

READINGS = 60
"""The number of latest readings over which a trial's speed is measured."""


class Reading(NamedTuple):
    """The step and the tokens of a trial at the time `at`."""

    at: float
    step: int
    tokens: int


@dataclass
class TrialProgress:
    """The progress of a trial.

    `state` is "running", "paused" (while pbt lets another trial run), or the state in which the run ended.

    `value` is the trial's value of the sweep's metric so far (see train/best.py), finite, or None.
    """

    name: str
    steps: int
    began: float
    state: str = "running"
    startup: float = 0.0
    value: float | None = None
    readings: deque[Reading] = field(default_factory=lambda: deque(maxlen=READINGS))

    def read(self, reading: Reading) -> None:
        """Add a reading. A lower step than before means that the run restarted from an earlier checkpoint."""
        if self.readings and reading.step == self.step:
            return
        if not self.readings:
            self.startup = reading.at - self.began
        elif reading.step < self.step:
            self.readings.clear()
        self.readings.append(reading)

    @property
    def step(self) -> int:
        """Steps done by the latest reading."""
        return self.readings[-1].step if self.readings else 0

    @property
    def seconds_per_step(self) -> float | None:
        """Seconds per step over the latest readings, including validation; None with fewer than two readings."""
        if len(self.readings) < 2:
            return None
        first, last = self.readings[0], self.readings[-1]
        return (last.at - first.at) / (last.step - first.step)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second over the latest readings, including validation; None with fewer than two readings."""
        if not self.seconds_per_step:
            return None
        first, last = self.readings[0], self.readings[-1]
        return (last.tokens - first.tokens) / (last.at - first.at)

    def seconds_left(self, now: float) -> float | None:
        """Return the time to the last step; None with fewer than two readings."""
        if self.seconds_per_step is None:
            return None
        return max(0.0, (self.steps - self.step) * self.seconds_per_step - (now - self.readings[-1].at))

    @property
    def seconds(self) -> float | None:
        """Time for the whole trial, or up to the step at which it ended; None with fewer than two readings."""
        steps = self.steps if self.state in ("running", "paused") else self.step
        return None if self.seconds_per_step is None else self.startup + steps * self.seconds_per_step


class Row(NamedTuple):
    """A running trial as text. Cells are empty while their value is unknown."""

    trial: str
    step: str
    value: str
    speed: str
    left: str


class Best(NamedTuple):
    """The best trial so far and its value of the metric."""

    value: float
    trial: str


class SweepProgress:
    """The started trials of a sweep by id, in the order in which they started. `count` is the number of all trials.

    With one seed, the trials' names leave out the seed. `ends_by` is the time at which the time budget is used up.
    """

    def __init__(
        self, count: int, metric: str, mode: Literal["min", "max"], *, seeds: int = 1, ends_by: float = math.inf
    ) -> None:
        self.count, self.metric, self.seeds, self.ends_by = count, metric, seeds, ends_by
        self.sign = 1 if mode == "max" else -1
        self.trials: dict[str, TrialProgress] = {}
        self.most_at_once = 1

    def started(self, id: str, steps: int, point: Mapping[str, Any], now: float) -> None:
        """Note that a trial of `steps` steps runs, at its start or after a pause. `point` is its current point."""
        trial, before = TrialProgress(self._name(id, point), steps, now), self.trials.get(id)
        if before and before.name == trial.name:  # If pbt moved the point, the trial also got other weights.
            trial.value = before.value
        self.trials[id] = trial
        self.most_at_once = max(self.most_at_once, len(self.running))

    def _name(self, id: str, point: Mapping[str, Any]) -> str:
        labels = short_names(list(point))
        values = [f"{labels[key]}={value_text(value)}" for key, value in point.items()]
        moved = [value for value in values if value not in id.split(",")]
        name = id.rpartition(",seed=")[0] or id if self.seeds == 1 else id
        return f"{name} now {','.join(moved)}" if moved else name

    def paused(self, id: str) -> None:
        """Note that a trial was paused so that another trial can run."""
        if id in self.trials:
            self.trials[id].state = "paused"

    def validated(self, id: str, metrics: Mapping[str, Any]) -> None:
        """Note a trial's best validation so far."""
        if math.isfinite(metrics[self.metric]):
            self.trials[id].value = metrics[self.metric]

    def read(self, id: str, reading: Reading) -> None:
        """Add a reading of a trial, from the newest line of its metrics.jsonl."""
        self.trials[id].read(reading)

    def ended(self, id: str, state: str) -> TrialProgress:
        """Note that a trial's run ended in this state. The run may not have started, if its process failed at once."""
        trial = self.trials.setdefault(id, TrialProgress(self._name(id, {}), steps=1, began=0.0))
        trial.state = state
        return trial

    @property
    def running(self) -> dict[str, TrialProgress]:
        """The running trials."""
        return self._in("running")

    @property
    def endings(self) -> Counter[str]:
        """The number of trials that ended in each state."""
        return Counter(trial.state for trial in self.trials.values() if trial.state not in ("running", "paused"))

    @property
    def best(self) -> Best | None:
        """The best trial that did not fail; None before the first validation."""
        found = [Best(t.value, t.name) for t in self.trials.values() if t.value is not None and t.state != "failed"]
        return max(found, key=lambda best: self.sign * best.value, default=None)

    def rows(self, now: float) -> list[Row]:
        """Return one row for each running trial."""
        return [_row(trial, now) for trial in self.running.values()]

    def counts(self) -> str:
        """Return the numbers of trials as text: "2 running, 3 waiting, 3 of 8 ended (1 failed)"."""
        if not self.trials:
            return f"{self.count} trials, no trial has started yet"
        running, ended = len(self.running), self.endings
        waiting = self.count - running - ended.total()
        names = {"failed": "failed", "early-stopped": "stopped early", "stopped": "stopped"}
        special = ", ".join(f"{ended[state]} {name}" for state, name in names.items() if ended[state])
        return (
            f"{running} running, {f'{waiting} waiting, ' if waiting > 0 else ''}{ended.total()} of {self.count} ended"
            f"{f' ({special})' if special else ''}"
        )

    def seconds_left(self, now: float) -> float | None:
        """Return the seconds to the sweep's end, or to the end of its time budget; None if no trial's speed is known.

        Assumes that waiting trials take the mean time of the earlier trials, and that running trials run to their last
        step. A scheduler that stops trials early makes the sweep end sooner.
        """
        totals = [t.seconds for t in self.trials.values() if t.seconds is not None and t.state != "failed"]
        if not totals:
            return None
        typical = sum(totals) / len(totals)
        lefts = [(trial, trial.seconds_left(now)) for trial in self.running.values()]
        ends = [max(0.0, typical - (now - trial.began)) if left is None else left for trial, left in lefts]
        waiting = [typical * (1 - trial.step / trial.steps) for trial in self._in("paused").values()]
        waiting += [typical] * (self.count - len(self.trials))
        return min(_last_end(ends, waiting, self.most_at_once), max(0.0, self.ends_by - now))

    def _in(self, state: str) -> dict[str, TrialProgress]:
        return {id: trial for id, trial in self.trials.items() if trial.state == state}


def _row(trial: TrialProgress, now: float) -> Row:
    speed, left = trial.tokens_per_second, trial.seconds_left(now)
    return Row(
        trial.name,
        f"{trial.step:,}/{trial.steps:,}" if trial.readings else "starting",
        "" if trial.value is None else f"{trial.value:.4f}",
        "" if speed is None else count_text(speed),
        "" if left is None else duration_text(left),
    )


def _last_end(running: Sequence[float], waiting: Sequence[float], concurrent: int) -> float:
    """Return the seconds until the last trial ends, if `concurrent` trials run at once.

    `running` and `waiting` are the seconds that each trial still needs.
    """
    free = [*running, *[0.0] * (concurrent - len(running))]
    heapq.heapify(free)
    for seconds in waiting:
        heapq.heappush(free, heapq.heappop(free) + seconds)
    return max(free)
