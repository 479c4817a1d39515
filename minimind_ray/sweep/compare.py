"""Compare the points of a sweep: find the better points, and the differences that are too uncertain for a verdict.

A measured difference is uncertain for two reasons: the validation set has a limited number of examples, and each run
has one seed. The intervals of `statistics.py` account for both. All trials are validated on the same examples, so
differences are paired: the same examples, the same seeds. `chart.py` and `report.py` present the results.

    P points, T trials (a point with a seed), E validation examples
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minimind_ray.config.errors import UserError
from minimind_ray.sweep.axes import short_names
from minimind_ray.sweep.metric import Mode, judged_by, terms, trial_metric
from minimind_ray.sweep.statistics import Statistics, statistics
from minimind_ray.sweep.text import shorten, value_text
from minimind_ray.sweep.trials import Sweep, Trial, Validation

ONE_SEED = "differs on these examples; one seed"
Verdict = str
"""One of "best", "better", "worse", "not distinguishable", "equal within M" (with a margin M), and ONE_SEED."""
LEAST_EXAMPLES = 5
"""With fewer examples the intervals are too narrow. In simulations with 4 equal points, all intervals together held the
truth in 92 % of cases with 5 examples, in 80 % with 3, and in 70 % with 2."""

TOO_FEW = "{} validation example(s) are too few to compare points: give data.val, or raise data.val_fraction."

METHOD = (
    "Intervals cover 95 % and account for both the validation examples (bootstrap, the same examples for every trial) "
    "and the seeds (Student's t). A point differs from the best if the 95 % interval of their paired difference does "
    "not contain zero. These intervals hold for all pairs of points at once, because the best was chosen from the same "
    "data."
)


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval. The bounds are None if the uncertainty is unknown."""

    value: float
    low: float | None = None
    high: float | None = None

    def text(self, digits: int) -> str:
        """The bounds as text, such as "2.31 to 2.38"; empty if they are unknown."""
        return "" if self.low is None else f"{self.low:.{digits}f} to {self.high:.{digits}f}"


@dataclass(frozen=True)
class Row:
    """A point with all its seeds.

    `metric` is the point's value over its seeds. `difference` is this point minus the best point, with an interval that
    holds for all pairs of points at once. `vs_best` is the same difference with an interval that holds for all
    comparisons with the best at once. `may_be_best` is False if the point is worse than another point.

    `trials` are all trials of the point; `compared` are the trials whose validation counts. Of these, `seeds` finished
    and `stopped_seeds` were stopped. `left_out` names each other trial, and the reason why it does not count.
    `cost` is None without a price.
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
    left_out: tuple[tuple[str, str], ...]
    tokens: int
    seconds: float
    cost: float | None
    status: str


@dataclass(frozen=True)
class More:
    """How many more seeds or examples would decide a pair of points, if the difference stays as observed.

    `pair` holds the labels of the best point and the other point. `seeds` is the number of seeds for each of the two
    points on the same examples, `examples` the number of validation examples with the same seeds. Each is None if no
    number would do; then `why` says what stands in the way. `seconds` and `cost` are for the seeds to add.
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

    With fewer than LEAST_EXAMPLES examples, no row has bounds, and `low_PP` and `high_PP` have no meaning.

    `clusters` counts the independent groups of examples, `cluster_noun` names them, such as "documents". `headline` is
    the best point's value, corrected for having been picked from several. `more` says what would decide the pairs that
    are not distinguishable. `method` describes how the intervals were computed. `margin` is 0 if none was asked for.
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

    @property
    def winner(self) -> Trial | None:
        """The trial with the best metric of the best point; None while no trial can be compared."""
        if not self.rows or not self.rows[0].compared:
            return None
        sign = 1.0 if self.mode == "min" else -1.0
        return min(self.rows[0].compared, key=lambda trial: sign * trial_metric(trial, self.metric))

    @property
    def digits(self) -> int:
        """The number of decimals that show two digits of the narrowest interval."""
        intervals = [i for row in self.rows for i in (row.metric, row.difference) if i]
        widths = [(i.high - i.low) / 2 for i in intervals if i.low is not None and i.high is not None]
        narrowest = min((w for w in widths if w > 0), default=1e-3)
        return min(max(1 - math.floor(math.log10(narrowest)), 2), 6)


def compare(
    sweeps: Sequence[Sweep], *, metric: str | None = None, mode: str | None = None, margin: float | None = None
) -> Comparison:
    """Compare all points of all `sweeps` in one table.

    The sweeps' own metric, mode and margin are used where none is given; see metric.py.

    A point's finished trials count. If it has none, its stopped trials count with their last validation. Points without
    per-example results show their best metric during training and get no verdict. If any point has a finished trial,
    only such points can be the best.

    Raises:
        UserError: trials were validated on different examples; also as `judged_by` and `terms`.
    """
    metric, mode, margin = judged_by(sweeps, metric, mode, margin)
    sign = 1.0 if mode == "min" else -1.0
    keys = list(dict.fromkeys(key for sweep in sweeps for key in sweep.info.axes))
    groups = [(sweep, trials) for sweep in sweeps for trials in _by_point(sweep)]
    counted = [trials for _, all_trials in groups if (trials := _countable(all_trials))]
    if not counted:
        rows = _by_metric([_row(sweep, trials, keys, metric) for sweep, trials in groups], sign)
        return _without_statistics(metric, mode, keys, rows, margin)

    trials_T = [trial for trials in counted for trial in trials]
    check_same_examples(trials_T)
    terms_T = [terms(trial, metric) for trial in trials_T]
    examples = len(terms_T[0][0])
    judged = examples >= LEAST_EXAMPLES
    # A single example cannot be resampled, so repeat it. With so few examples no bounds are shown anyway.
    found = statistics(
        np.stack([np.resize(numerator_E, max(examples, 2)) for numerator_E, _ in terms_T]),
        np.stack([np.resize(denominator_E, max(examples, 2)) for _, denominator_E in terms_T]),
        np.array([p for p, trials in enumerate(counted) for _ in trials]),
        np.array([trial.seed for trial in trials_T]),
    )
    unfinished = [all(t.state != "finished" for t in trials) for trials in counted]
    order = sorted(range(len(counted)), key=lambda p: (unfinished[p], sign * found.mean_P[p]))
    best, measured, others = order[0], dict[int, Row](), list[Row]()
    for sweep, trials in groups:
        row = _row(sweep, trials, keys, metric)
        if not (compared := _countable(trials)):
            others.append(row)
            continue
        p = len(measured)
        value = _value(found, p, metric) if judged else Interval(float(found.mean_P[p]))
        measured[p] = row = replace(row, compared=tuple(compared), metric=value, verdict="best", may_be_best=True)
        if p != best:
            low, high = float(found.low_PP[p, best]), float(found.high_PP[p, best])
            difference = Interval(float(found.difference_PP[p, best]), *((low, high) if judged else ()))
            verdict = _verdict(*sorted((sign * low, sign * high))) if judged else "not distinguishable"
            possible = verdict != "worse"
            measured[p] = replace(row, difference=difference, vs_best=difference, verdict=verdict, may_be_best=possible)
    rows = [measured[p] for p in order] + _by_metric(others, sign)
    notes = _notes(rows) if judged else [TOO_FEW.format(examples), *_notes(rows)]
    pick = np.ix_(order, order)
    return Comparison(
        metric, mode, keys, rows, examples, examples, "examples", notes, METHOD, rows[0].metric, [], margin,
        found.difference_PP[pick], found.low_PP[pick], found.high_PP[pick],
    )  # fmt: skip


def _without_statistics(metric: str, mode: Mode, keys: list[str], rows: list[Row], margin: float) -> Comparison:
    """Return the table of sweeps in which no trial can be compared yet."""
    nothing = np.zeros((0, 0))
    return Comparison(
        metric, mode, keys, rows, 0, 0, "examples", _notes(rows), "", None, [], margin, nothing, nothing, nothing
    )


def _value(found: Statistics, p: int, metric: str) -> Interval:
    """Return point p's mean with its bounds. The bounds of an accuracy are limited to 0 and 1."""
    low, high = float(found.low_P[p]), float(found.high_P[p])
    if metric == "val/accuracy":
        low, high = max(low, 0.0), min(high, 1.0)
    return Interval(float(found.mean_P[p]), low, high)


def _by_point(sweep: Sweep) -> list[list[Trial]]:
    groups: dict[str, list[Trial]] = {}
    for trial in sweep.trials:
        groups.setdefault(repr([trial.point[key] for key in sweep.info.axes]), []).append(trial)
    return list(groups.values())


def _row(sweep: Sweep, trials: Sequence[Trial], keys: Sequence[str], metric: str) -> Row:
    """Return a point's row without statistics."""
    point = {key: trials[0].point.get(key, _config_value(sweep, key)) for key in keys}
    names = short_names(keys)
    values = [v for t in trials if (v := t.best(metric)) is not None and math.isfinite(v)]
    counted, seconds, price = _countable(trials), sum(t.seconds for t in trials), sweep.info.price_per_hour
    return Row(
        sweep=sweep.name,
        point=point,
        label=", ".join(f"{names[key]} {shorten(value_text(value), 27)}" for key, value in point.items()) or sweep.name,
        trials=tuple(trials),
        compared=(),
        metric=Interval(sum(values) / len(values)) if values else None,
        difference=None,
        vs_best=None,
        verdict=None,
        may_be_best=False,
        seeds=sum(t.state == "finished" for t in counted),
        stopped_seeds=sum(t.state != "finished" for t in counted),
        left_out=tuple((t.id, _reason(t)) for t in trials if all(t is not c for c in counted)),
        tokens=sum(t.tokens for t in trials),
        seconds=seconds,
        cost=None if price is None else seconds / 3600 * price,
        status=_status(trials, sweep.info.seeds) + _moves(trials),
    )


def _by_metric(rows: Sequence[Row], sign: float) -> list[Row]:
    return sorted(rows, key=lambda row: sign * row.metric.value if row.metric else math.inf)


def _reason(trial: Trial) -> str:
    """Return the reason why a trial does not count in the comparison."""
    if trial.state not in ("finished", "early-stopped", "stopped"):
        return trial.state
    if not trial.validation:
        return f"{trial.state}, without results for each example"
    return trial.state if trial.validation.finite else "a value in its validation is not finite"


def _countable(trials: Sequence[Trial]) -> list[Trial]:
    measured = [t for t in trials if t.validation and t.validation.finite]
    finished = [t for t in measured if t.state == "finished"]
    return finished or [t for t in measured if t.state in ("early-stopped", "stopped")]


def _validation(trial: Trial) -> Validation:
    assert trial.validation
    return trial.validation


def check_same_examples(trials: Sequence[Trial]) -> None:
    """Check that all trials were validated on the same examples.

    Raises:
        UserError: two trials had different examples. The message names the difference.
    """
    first, a = trials[0], _validation(trials[0])
    for trial in trials[1:]:
        b = _validation(trial)
        if len(a.example_E) != len(b.example_E):
            difference = f"{len(a.example_E)} and {len(b.example_E)} examples"
        elif not np.array_equal(a.example_E, b.example_E):
            difference = "different examples"
        elif not np.array_equal(a.columns["count"], b.columns["count"]):
            difference = "examples of different lengths"
        elif first.validated_on and trial.validated_on and first.validated_on != trial.validated_on:
            difference = "different prepared data"
        else:
            continue
        raise UserError(
            f"{first.path} and {trial.path} were validated on {difference}; trials can be compared only on the same "
            "validation set, tokenizer and data.max_seq_len"
        )


def _verdict(low: float, high: float) -> Verdict:
    """Return the verdict for the interval of a difference whose positive values are worse."""
    return "worse" if low > 0 else "better" if high < 0 else "not distinguishable"


def _config_value(sweep: Sweep, key: str) -> Any:
    value: Any = sweep.info.config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _status(trials: Sequence[Trial], seeds: int) -> str:
    states = Counter[str](t.status for t in trials)
    states["waiting"] += max(0, seeds - len(trials))
    states = +states
    if len(states) == 1:
        return next(iter(states))
    return ", ".join(f"{count} {state}" for state, count in states.most_common())


def _moves(trials: Sequence[Trial]) -> str:
    """Return the points to which pbt has moved the trials, as text."""
    ends = [trial.lineage[-1]["point"] for trial in trials if trial.lineage]
    names = short_names(list(ends[0]) if ends else [])
    return "".join(f", moved to {' '.join(f'{names[k]} {value_text(v)}' for k, v in end.items())}" for end in ends)


def _notes(rows: Sequence[Row]) -> list[str]:
    notes: list[str] = []
    compared = [row for row in rows if row.compared]
    if compared and all(len(row.compared) == 1 for row in compared):
        more = any(len(row.trials) > 1 for row in rows)
        advice = "no point has two finished seeds" if more else "use --seeds 2 or more to account for the seeds, too"
        notes.append(f"One seed: intervals account only for the validation examples; {advice}.")
    elif compared and all(len(row.compared) <= 2 for row in compared):
        notes.append("Two seeds say little about a seed's effect on all points: a third narrows the intervals.")
    seeds = {frozenset(trial.seed for trial in row.compared) for row in compared}
    if any(a.isdisjoint(b) for a in seeds for b in seeds):
        notes.append(
            "Points that have no seed in common differ by their seeds, too: as far as this effect is known, the "
            "intervals of their differences account for it."
        )
    elif len(seeds) > 1:
        notes.append("Points that lack a seed are compared without that seed's effect on the other points.")
    if any(t.lineage for row in rows for t in row.trials):
        notes.append("pbt moved points in training: the table shows where each began, and its status where it ended.")
    if any(t.state != "finished" for row in compared for t in row.compared):
        notes.append("Stopped points are compared by their last validation.")
    unmeasured = [t.id for row in rows for t in row.trials if t.validation and not t.validation.finite]
    if unmeasured:
        notes.append(f"Not compared, because a value in their validation is not finite: {', '.join(unmeasured)}.")
    return notes
