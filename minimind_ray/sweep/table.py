"""The table of a comparison: its rows and what is said about it as a whole. `compare.py` fills it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minimind_ray.config.stages import Mode
from minimind_ray.sweep.importance import Importance
from minimind_ray.sweep.metric import examples_noun, trial_metric
from minimind_ray.sweep.statistics import Interval
from minimind_ray.sweep.stopping import has_end
from minimind_ray.sweep.trials import Trial

DIFFERS = "differs on these examples"
"""The beginning of the verdict on trained models, if a sweep does not compare settings. See `only_models`."""
Verdict = str
"""One of "best", "better", "worse", "not distinguishable", "equal within M" (with a margin M), and DIFFERS with a
reason."""
MOST_DIGITS = 12
"""More decimals are not shown: floats near 1 have 15 digits, and the last ones of a sum are rounding."""
LEAST_CLUSTERS = 5
"""With fewer clusters the intervals are too narrow. In simulations with 4 equal points, all intervals together held the
truth in 92 % of cases with 5 clusters, in 80 % with 3, and in 70 % with 2."""


@dataclass(frozen=True)
class Row:
    """A point with all its seeds.

    `metric` is the point's value over its seeds. `difference` is this point minus the best point, with an interval that
    holds for all pairs of points at once. `vs_best` is this point minus the best of all other points, with an interval
    that holds for all points at once; None for points that cannot be picked as the best. `may_be_best` is False for
    these, and for points that are worse than another point by this interval.

    `trials` are all trials of the point; `compared` are the trials whose validation counts. Of these, `seeds` finished
    and `stopped_seeds` were stopped. `predicted` names the stopped trials that count with a predicted end.
    `diverged_seeds` trials do not count because they diverged. `left_out` names each trial that does not count, and the
    reason. `cost` is None without a price. `early_step` is None, or for a point without a verdict whose stopped trials
    are left out: the last step at which all trials of its sweep were validated. Its `metric` is then the value at that
    step.
    """

    sweep: str
    point: dict[str, Any]
    label: str
    trials: tuple[Trial, ...]
    compared: tuple[Trial, ...]
    metric: Interval | None
    difference: Interval | None
    vs_best: Interval | None
    verdict: Verdict | None
    may_be_best: bool
    seeds: int
    stopped_seeds: int
    diverged_seeds: int
    predicted: frozenset[str]
    left_out: tuple[tuple[str, str], ...]
    early_step: int | None
    tokens: int
    seconds: float
    cost: float | None
    status: str


@dataclass(frozen=True)
class More:
    """How many more seeds or examples would decide a pair of points, if the difference stays as observed.

    `pair` holds the labels of the best point and the other point. `seeds` is the number of seeds for each of the two
    points on the same examples, `examples` the number of validation examples with the same seeds. Each is None if no
    number would do; then `why` says what stands in the way. `seconds` and `cost` are for the seeds to add, and for
    the failed and stopped trials that a resume trains as well.
    """

    pair: tuple[str, str]
    seeds: int | None
    examples: int | None
    why: str
    seconds: float | None
    cost: float | None


@dataclass(frozen=True)
class Comparison:
    """All points, best first. Rows with a verdict come first; for these, `difference_PP[i, j]` is row i minus row j.

    With fewer than LEAST_CLUSTERS clusters, no row has bounds, and `low_PP` and `high_PP` have no meaning. `hidden_PP`
    marks differences whose interval is not shown, because it is too wide or has an end that is infinite.

    `clusters` counts the independent groups of examples, `cluster_noun` names them, such as "documents". `headline` is
    the best point's value, corrected for having been picked from several. `more` says what would decide the pairs that
    are not distinguishable. `method` describes how the intervals were computed. `margin` is 0 if none was asked for.
    `importance` is that of the axes, largest first; see importance.py.
    """

    metric: str
    mode: Mode
    keys: list[str]
    rows: list[Row]
    examples: int
    clusters: int
    cluster_noun: str
    notes: list[str]
    method: str
    headline: Interval | None
    more: list[More]
    margin: float
    difference_PP: np.ndarray
    low_PP: np.ndarray
    high_PP: np.ndarray
    hidden_PP: np.ndarray
    importance: list[Importance] = field(default_factory=list[Importance])

    @property
    def winner(self) -> Trial | None:
        """The best trial of the best point, of its finished trials if it has any; None while no trial has results."""
        if not self.rows:
            return None
        trials = self.rows[0].compared or [trial for trial in self.rows[0].trials if has_end(trial, self.metric)]
        finished, sign = [trial for trial in trials if trial.state == "finished"], 1.0 if self.mode == "min" else -1.0
        return min(finished or trials, key=lambda trial: sign * trial_metric(trial, self.metric), default=None)

    @property
    def examples_noun(self) -> str:
        """What the examples are called: "validation examples", or "items" for a task."""
        return examples_noun(self.metric)

    @property
    def digits(self) -> int:
        """The number of decimals that show two digits of the narrowest interval."""
        intervals = [i for row in self.rows for i in (row.metric, row.difference) if i]
        widths = [(i.high - i.low) / 2 for i in intervals if i.low is not None and i.high is not None]
        narrowest = min((w for w in widths if w > 0), default=1e-3)
        return min(max(1 - math.floor(math.log10(narrowest)), 2), MOST_DIGITS)


def only_models(rows: Iterable[Row]) -> str:
    """Return why verdicts are about these trained models and not about their settings; empty if they are not.

    The reason is "pbt" if trials took over weights from each other: they are then no independent runs of their
    settings. It is "one seed" if no point has a second seed.
    """
    compared = [row for row in rows if row.compared]
    if any(trial.lineage for row in compared for trial in row.trials):
        return "pbt"
    return "one seed" if all(len(row.compared) == 1 for row in compared) else ""


def verdict_of(low: float, high: float, *, margin: float, only_models: str) -> Verdict:
    """Return the verdict for the interval of a difference whose positive values are worse.

    With a reason in `only_models` (see there), an interval shows neither which settings are better nor that they are
    equal.
    """
    if not only_models and -margin < low and high < margin:
        return f"equal within {margin:g}"
    if low <= 0 <= high:
        return "not distinguishable"
    return f"{DIFFERS}; {only_models}" if only_models else "worse" if low > 0 else "better"
