"""Compare the points of a sweep: which are better, and which differences are too uncertain to tell.

A measured difference is uncertain for two reasons: the validation set has only some examples, and each run has one
seed. The intervals here account for both. All trials are validated on the same examples, so differences are paired: the
same examples, the same seeds. `chart.py` and `report.py` present the results.

    P points, S seeds, T trials (a point with a seed), E validation examples, B bootstrap draws
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from minimind_ray.config.errors import UserError
from minimind_ray.sweep.axes import short_names
from minimind_ray.sweep.text import shorten, value_text
from minimind_ray.sweep.trials import Sweep, Trial, Validation

Verdict = Literal["best", "better", "worse", "not distinguishable"]
DRAWS = 4000
OUTLIER = 16.0
"""A point keeps its own variance over seeds if that is this many times larger than the typical variance."""
LEAST_EXAMPLES = 5
"""With fewer examples the intervals are too narrow. In simulations with 4 equal points, all intervals together held the
truth in 92 % of cases with 5 examples, in 80 % with 3, and in 70 % with 2."""

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

    `metric` is the mean over seeds. `difference` is this point minus the best point. `trials` are all trials of the
    point; `compared` are the trials whose validation counts. `cost` is None without a price.
    """

    sweep: str
    point: dict[str, Any]
    label: str
    trials: tuple[Trial, ...]
    compared: tuple[Trial, ...]
    metric: Interval | None
    difference: Interval | None
    verdict: Verdict | None
    tokens: int
    seconds: float
    cost: float | None
    status: str


@dataclass(frozen=True)
class Comparison:
    """All points, best first. `difference_PP[i, j]` is row i minus row j, for the first rows, which have a verdict.

    With fewer than LEAST_EXAMPLES examples, no row has bounds, and `low_PP` and `high_PP` have no meaning.
    """

    metric: str
    mode: Literal["min", "max"]
    keys: list[str]
    rows: list[Row]
    examples: int
    notes: list[str]
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


@dataclass(frozen=True)
class Statistics:
    """Means with 95 % intervals, and all differences (row minus column) with simultaneous 95 % intervals."""

    mean_P: np.ndarray
    low_P: np.ndarray
    high_P: np.ndarray
    difference_PP: np.ndarray
    low_PP: np.ndarray
    high_PP: np.ndarray


def statistics(
    numerator_TE: np.ndarray,
    denominator_TE: np.ndarray,
    point_T: np.ndarray,
    seed_T: np.ndarray,
    *,
    draws: int = DRAWS,
    random_seed: int = 0,
) -> Statistics:
    """Compute means, differences and their intervals for points with several seeds on the same examples.

    A trial's metric is the ratio of its sums over the examples; a point's metric is the mean over its seeds.

    *Examples* are resampled with replacement, one resample for all trials at once (the crossed bootstrap of Owen 2007,
    "The pigeonhole bootstrap", which errs a little on the safe side).

    *Seeds* are too few to resample: with two seeds, a bootstrap interval holds the truth in 60 % of cases. Their part
    of a draw comes from Student's t instead, with the variances of `split_seeds`. If all points have one seed, this
    part is unknown and left out.

    *Differences* use the same resamples for both points (paired examples). For points with common seeds, the effect of
    a seed on all points cancels (paired seeds). The intervals are simultaneous over all pairs: each is widened by the
    same factor, so that in 95 % of draws the deviation of every pair lies inside its interval (single-step max-T,
    Westfall & Young 1993; for independent means it is Tukey's range test). Separate intervals would find a difference
    between the best of eight equal points and another point in half of all sweeps. Holm's method for the comparisons
    with the best would ignore that the best was chosen from the same data.

    Args:
        numerator_TE: the summed values per trial and example; at least two examples.
        denominator_TE: the divisors: the number of counted tokens, or 1.
        point_T: each trial's point, 0 to P - 1.
        seed_T: each trial's seed, any whole numbers.
        draws: B.
        random_seed: the seed of the draws; the same input gives the same numbers.
    """
    rng = np.random.default_rng(random_seed)
    points, (seeds, at_seed_T) = int(point_T.max()) + 1, np.unique(seed_T, return_inverse=True)
    value_T = numerator_TE.sum(1) / denominator_TE.sum(1)
    value_PS = np.full((points, len(seeds)), np.nan)
    value_PS[point_T, at_seed_T] = value_T
    seeds_P = np.isfinite(value_PS).sum(1)
    mean_P = np.nanmean(value_PS, 1)
    spread = split_seeds(value_PS)

    averaging_TP = (point_T[:, None] == np.arange(points)) / seeds_P
    examples_BP = _resampled_examples(numerator_TE, denominator_TE, draws, rng) @ averaging_TP
    runs_BP = examples_BP + _drawn_t(spread.own_P / seeds_P, spread.own_free_P, spread.pooled_P, draws, rng)
    alike_S = np.ones(len(seeds))
    common_BS = _drawn_t(spread.common * alike_S, spread.common_free * alike_S, alike_S > 0, draws, rng)
    weight_PS = np.isfinite(value_PS) / seeds_P[:, None]
    low_P, high_P = mean_P + np.quantile(runs_BP + common_BS @ weight_PS.T, (0.025, 0.975), axis=0)
    adjusted_P = np.nanmean(value_PS - spread.effect_S, 1)
    difference_PP = adjusted_P[:, None] - adjusted_P
    reach_PP = _simultaneous_reach(runs_BP + common_BS @ spread.unadjusted(weight_PS).T)
    return Statistics(mean_P, low_P, high_P, difference_PP, difference_PP - reach_PP, difference_PP + reach_PP)


def _resampled_examples(
    numerator_TE: np.ndarray, denominator_TE: np.ndarray, draws: int, rng: np.random.Generator
) -> np.ndarray:
    """Every trial's metric on each resample of the examples, minus the metric itself, [B, T].

    Resamples of E examples have only (E - 1) / E of the variance, and estimate it with E - 1 degrees of freedom. Both
    are corrected as in Student's t, which matters for validation sets with few examples.
    """
    examples = numerator_TE.shape[1]
    value_T = numerator_TE.sum(1) / denominator_TE.sum(1)
    blocks: list[np.ndarray] = []
    step = max(1, 4_000_000 // examples)  # so that a block of weights takes at most 32 MB
    for start in range(0, draws, step):
        rows = min(step, draws - start)
        drawn = rng.integers(examples, size=(rows, examples)) + examples * np.arange(rows)[:, None]
        weight_BE = np.bincount(drawn.ravel(), minlength=rows * examples).reshape(rows, examples).astype(float)
        blocks.append((weight_BE @ numerator_TE.T) / (weight_BE @ denominator_TE.T))
    wider_B = np.sqrt(examples / rng.chisquare(examples - 1, draws))
    return (np.concatenate(blocks) - value_T) * wider_B[:, None]


@dataclass(frozen=True)
class SeedSpread:
    """How much the seed changes a trial's metric: variances for a single seed, with their degrees of freedom.

    `effect_S` is each seed's effect on all points, and `common` the variance of these effects. Only effects of seeds
    that points share can be compared: `group_S` numbers the groups of such seeds; -1 means that only one point has the
    seed, so its effect is unknown. `own_P` is the remaining variance of each point; `pooled_P` marks the points that
    share one estimate of it. Zero degrees of freedom mean that a variance is unknown.
    """

    effect_S: np.ndarray
    group_S: np.ndarray
    common: float
    common_free: int
    own_P: np.ndarray
    own_free_P: np.ndarray
    pooled_P: np.ndarray

    def unadjusted(self, weight_PS: np.ndarray) -> np.ndarray:
        """The weights that the seeds' true effects still have in means of `weight_PS` after `effect_S` was subtracted.

        An unknown effect keeps its full weight, and each group keeps its mean effect. Points with the same seeds have
        the same weights here, which cancel in their difference.
        """
        left_PS = weight_PS.copy()
        for group in range(self.group_S.max() + 1):
            members_S = self.group_S == group
            left_PS[:, members_S] = weight_PS[:, members_S].mean(1, keepdims=True)
        return left_PS


def split_seeds(value_PS: np.ndarray) -> SeedSpread:
    """Separate seeds' common effects from effects on single points (randomised block design, seeds as blocks).

    Two seeds alone give little information: a t interval with 1 degree of freedom is 13 standard errors wide. So the
    residuals after the common effects are pooled over the points into one mean square (Montgomery, Design and Analysis
    of Experiments, ch. 4). Points that vary far more than is typical (such as a learning rate at the edge of stability)
    would spoil the pooled estimate: they keep their own variance and their own few degrees of freedom. Common effects
    are medians over the points, so that one diverging point does not look like an effect of a seed.

    `value_PS` holds NaN where a point lacks a seed. A point with one seed uses the pooled variance. So does a point
    that shares no seed with other points (from a sweep with another first seed), if other points share seeds.
    """
    points, there_PS = len(value_PS), np.isfinite(value_PS)
    several_PS = used_PS = there_PS & (there_PS.sum(1) > 1)[:, None]
    # Use seeds that at least two points have, and points with at least two such seeds.
    while (fewer_PS := used_PS & (used_PS.sum(0) > 1) & (used_PS.sum(1) > 1)[:, None]).sum() < used_PS.sum():
        used_PS = fewer_PS
    group_S = _groups(used_PS)
    if not used_PS.any():  # Common effects cannot be separated; the points' own variances contain them.
        used_PS = several_PS
    free_P = np.maximum(used_PS.sum(1) - 1, 0)
    known_P = free_P > 0
    effect_S = _seed_effects(np.where(used_PS & known_P[:, None], value_PS, np.nan), group_S)
    if not known_P.any():
        nothing = np.zeros(points)
        return SeedSpread(effect_S, group_S, 0.0, 0, nothing, free_P, np.ones(points, bool))

    sum_P, common_free = _squares(value_PS - effect_S, used_PS), 0
    for group in range(group_S.max() + 1):
        members_S = group_S == group
        of_P, fitted = known_P & used_PS[:, members_S].any(1), int(members_S.sum()) - 1
        # The fitted effects have taken a part of the variance and of the degrees of freedom: correct for both.
        sum_P[of_P] *= free_P[of_P].sum() / (free_P[of_P].sum() - fitted)
        common_free += fitted
    variance_P = sum_P / np.maximum(free_P, 1)
    # The median of chi-squared over its degrees of freedom (Wilson & Hilferty 1931).
    typical = np.median(variance_P[known_P] / (1 - 2 / (9 * free_P[known_P])) ** 3)
    pooled_P = ~known_P | (variance_P <= OUTLIER * typical)
    pooled = sum_P[pooled_P].sum() / free_P[pooled_P].sum()
    pooled_free = max(1, free_P[pooled_P].sum() - common_free)
    # The effects also vary by chance, as the mean of the residuals of so many points does.
    sharing = used_PS[known_P].sum() / max(1, (group_S >= 0).sum())
    common = max(0.0, (effect_S**2).sum() / common_free - pooled / sharing) if common_free else 0.0
    # A borrower that varies far more than what it would borrow explains.
    all_free_P = np.maximum(there_PS.sum(1) - 1, 1)
    all_P = _squares(value_PS, there_PS) / all_free_P
    astray_P = ~known_P & (all_P > OUTLIER * (pooled + common))
    variance_P, free_P = np.where(astray_P, all_P, variance_P), np.where(astray_P, all_free_P, free_P)
    pooled_P &= ~astray_P
    return SeedSpread(
        effect_S,
        group_S,
        common,
        common_free,
        np.where(pooled_P, pooled, variance_P),
        np.where(pooled_P, pooled_free, free_P),
        pooled_P,
    )


def _groups(shared_PS: np.ndarray) -> np.ndarray:
    """The group number, from 0, of each seed; points with several seeds connect these to a group. -1: not shared."""
    group_S = np.full(shared_PS.shape[1], -1)
    for first in np.flatnonzero(shared_PS.any(0)):
        if group_S[first] >= 0:
            continue
        members_S = np.arange(len(group_S)) == first
        while (more_S := shared_PS[shared_PS[:, members_S].any(1)].any(0)).sum() > members_S.sum():
            members_S = more_S
        group_S[members_S] = group_S.max() + 1
    return group_S


def _seed_effects(value_PS: np.ndarray, group_S: np.ndarray) -> np.ndarray:
    """The median effect of each seed over the points, with mean 0 in each group; 0 outside of groups.

    The level of a point that lacks a seed depends on the effects of its other seeds, and the effects depend on the
    levels. So both are computed in turn, a few times.
    """
    effect_S = np.zeros(len(group_S))
    in_groups_S = group_S >= 0
    rows_PS = value_PS[np.isfinite(value_PS).any(1)][:, in_groups_S]
    for _ in range(50 if in_groups_S.any() else 0):
        before_S, level_P = effect_S.copy(), np.nanmean(rows_PS - effect_S[in_groups_S], 1)
        effect_S[in_groups_S] = np.nanmedian(rows_PS - level_P[:, None], 0)
        for group in range(group_S.max() + 1):
            effect_S[group_S == group] -= effect_S[group_S == group].mean()
        if np.allclose(effect_S, before_S, rtol=1e-9, atol=0):
            break
    return effect_S


def _squares(value_PS: np.ndarray, used_PS: np.ndarray) -> np.ndarray:
    """Sums of squared deviations from each point's own mean; 0 for a point without used values."""
    mean_P = np.where(used_PS, value_PS, 0).sum(1) / np.maximum(used_PS.sum(1), 1)
    return (np.where(used_PS, value_PS - mean_P[:, None], 0) ** 2).sum(1)


def _drawn_t(
    variance_P: np.ndarray, free_P: np.ndarray, pooled_P: np.ndarray, draws: int, rng: np.random.Generator
) -> np.ndarray:
    """Draws of Student's t with `free_P` degrees of freedom, times the standard deviation, [B, P]; 0 if unknown."""
    free_BP = np.broadcast_to(np.maximum(free_P, 1), (draws, len(free_P)))
    chi_BP = rng.chisquare(free_BP) / free_BP
    # Points that share an estimate of the variance share its error.
    chi_BP[:, pooled_P] = chi_BP[:, pooled_P][:, :1]
    return rng.standard_normal(chi_BP.shape) * np.sqrt(variance_P / chi_BP)


def _simultaneous_reach(draws_BP: np.ndarray) -> np.ndarray:
    """Half-widths of intervals around all pairwise differences, [P, P]. In 95 % of draws, all of them hold together."""
    points = draws_BP.shape[1]
    single_PP = np.zeros((points, points))
    largest_B = np.zeros(len(draws_BP))
    for i in range(points):
        deviation_BP = np.abs(draws_BP - draws_BP[:, i : i + 1])
        single_PP[i] = np.quantile(deviation_BP, 0.95, axis=0)
        with np.errstate(invalid="ignore"):  # For two points that always agree, this is 0 / 0.
            largest_B = np.fmax(largest_B, np.nan_to_num(deviation_BP / single_PP[i], nan=0.0).max(1))
    return single_PP * np.quantile(largest_B, 0.95)


def compare(sweeps: Sequence[Sweep]) -> Comparison:
    """Compare all points of all `sweeps` in one table.

    A point's finished trials count. If it has none, its stopped trials count with their last validation. Points without
    per-example results show their best metric during training and get no verdict. If any point has a finished trial,
    only such points can be the best.

    Raises:
        UserError: the sweeps have different metrics, trials were validated on different examples, or the per-example
            results lack a column that the metric needs.
    """
    metric, mode = _common_metric(sweeps)
    sign = 1.0 if mode == "min" else -1.0
    keys = list(dict.fromkeys(key for sweep in sweeps for key in sweep.info.axes))
    groups = [(sweep, trials) for sweep in sweeps for trials in _by_point(sweep)]
    counted = [trials for _, all_trials in groups if (trials := _countable(all_trials))]
    if not counted:
        rows = [_row(sweep, trials, keys, metric) for sweep, trials in groups]
        nothing = np.zeros((0, 0))
        return Comparison(metric, mode, keys, _by_metric(rows, sign), 0, _notes(rows), nothing, nothing, nothing)

    trials_T = [trial for trials in counted for trial in trials]
    check_same_examples(trials_T)
    terms = [_terms(trial, metric) for trial in trials_T]
    examples = len(terms[0][0])
    judged = examples >= LEAST_EXAMPLES
    # A single example cannot be resampled: repeat it. So few examples get no bounds anyway.
    found = statistics(
        np.stack([np.resize(numerator_E, max(examples, 2)) for numerator_E, _ in terms]),
        np.stack([np.resize(denominator_E, max(examples, 2)) for _, denominator_E in terms]),
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
        measured[p] = row = replace(row, compared=tuple(compared), metric=value, verdict="best")
        if p != best:
            low, high = float(found.low_PP[p, best]), float(found.high_PP[p, best])
            difference = Interval(float(found.difference_PP[p, best]), *((low, high) if judged else ()))
            verdict = _verdict(*sorted((sign * low, sign * high))) if judged else "not distinguishable"
            measured[p] = replace(row, difference=difference, verdict=verdict)
    rows = [measured[p] for p in order] + _by_metric(others, sign)
    notes = _notes(rows)
    if not judged:
        notes.insert(0, f"{examples} validation example(s) are too few to compare points: give data.val, or raise "
                     "data.val_fraction.")  # fmt: skip
    pick = np.ix_(order, order)
    return Comparison(
        metric, mode, keys, rows, examples, notes,
        found.difference_PP[pick], found.low_PP[pick], found.high_PP[pick],
    )  # fmt: skip


def _value(found: Statistics, p: int, metric: str) -> Interval:
    """Point p's mean with its bounds; an accuracy's are those of a part of the pairs."""
    low, high = float(found.low_P[p]), float(found.high_P[p])
    if metric == "val/accuracy":
        low, high = max(low, 0.0), min(high, 1.0)
    return Interval(float(found.mean_P[p]), low, high)


def _common_metric(sweeps: Sequence[Sweep]) -> tuple[str, Literal["min", "max"]]:
    first = sweeps[0].info
    for sweep in sweeps[1:]:
        if (sweep.info.metric, sweep.info.mode) != (first.metric, first.mode):
            raise UserError(
                f"{sweeps[0].path} is judged by {first.metric} ({first.mode}), {sweep.path} by {sweep.info.metric} "
                f"({sweep.info.mode}); only sweeps with the same metric fit in one table"
            )
    return first.metric, first.mode


def _by_point(sweep: Sweep) -> list[list[Trial]]:
    groups: dict[str, list[Trial]] = {}
    for trial in sweep.trials:
        groups.setdefault(repr([trial.point[key] for key in sweep.info.axes]), []).append(trial)
    return list(groups.values())


def _row(sweep: Sweep, trials: Sequence[Trial], keys: Sequence[str], metric: str) -> Row:
    """A point's row without statistics."""
    point = {key: trials[0].point.get(key, _config_value(sweep, key)) for key in keys}
    names = short_names(keys)
    values = [v for t in trials if (v := t.best(metric)) is not None and math.isfinite(v)]
    seconds, price = sum(t.seconds for t in trials), sweep.info.price_per_hour
    return Row(
        sweep=sweep.name,
        point=point,
        label=", ".join(f"{names[key]} {shorten(value_text(value), 27)}" for key, value in point.items()) or sweep.name,
        trials=tuple(trials),
        compared=(),
        metric=Interval(sum(values) / len(values)) if values else None,
        difference=None,
        verdict=None,
        tokens=sum(t.tokens for t in trials),
        seconds=seconds,
        cost=None if price is None else seconds / 3600 * price,
        status=_status(trials, sweep.info.seeds) + _moves(trials),
    )


def _by_metric(rows: Sequence[Row], sign: float) -> list[Row]:
    return sorted(rows, key=lambda row: sign * row.metric.value if row.metric else math.inf)


def _countable(trials: list[Trial]) -> list[Trial]:
    measured = [t for t in trials if t.validation and t.validation.finite]
    finished = [t for t in measured if t.state == "finished"]
    return finished or [t for t in measured if t.state in ("early-stopped", "stopped")]


def _validation(trial: Trial) -> Validation:
    assert trial.validation
    return trial.validation


def check_same_examples(trials: Sequence[Trial]) -> None:
    """Check that all trials were validated on the same examples.

    Raises:
        UserError: two trials had different examples. The message says how they differ.
    """
    first, a = trials[0], _validation(trials[0])
    for trial in trials[1:]:
        b = _validation(trial)
        if len(a.example_E) != len(b.example_E):
            difference = f"{len(a.example_E)} and {len(b.example_E)} examples"
        elif not np.array_equal(a.example_E, b.example_E):
            difference = "examples of different numbers"
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


def _terms(trial: Trial, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """The metric's numerator and denominator for each example. The metric is the ratio of their sums."""
    validation = _validation(trial)
    name = metric.removeprefix("val/")
    numerator, denominator = ("loss", "bytes") if name == "bits_per_byte" else (name, "count")
    if missing := {numerator, denominator} - validation.columns.keys():
        raise UserError(
            f"{validation.path} has no {' and '.join(missing)} for each example, which {metric} needs; judge the sweep "
            f"by another metric: val/loss, or one of {', '.join(sorted(validation.columns))}"
        )
    scale = 1 / math.log(2) if name == "bits_per_byte" else 1.0
    return validation.columns[numerator] * scale, validation.columns[denominator]


def trial_metric(trial: Trial, metric: str) -> float:
    """The metric of a trial's validation. Raises UserError if the per-example results lack a column for it."""
    numerator_E, denominator_E = _terms(trial, metric)
    return float(numerator_E.sum() / denominator_E.sum())


def _verdict(low: float, high: float) -> Verdict:
    """The verdict for the interval of a difference whose positive values are worse."""
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
    """The points to which pbt has moved the trials, as text."""
    ends = [trial.lineage[-1]["point"] for trial in trials if trial.lineage]
    names = short_names(list(ends[0]) if ends else [])
    return "".join(f", moved to {' '.join(f'{names[k]} {value_text(v)}' for k, v in end.items())}" for end in ends)


def _notes(rows: Sequence[Row]) -> list[str]:
    notes: list[str] = []
    compared = [row for row in rows if row.compared]
    if compared and all(len(row.compared) == 1 for row in compared):
        more = any(len(row.trials) > 1 for row in rows)
        advice = "no point has two finished seeds" if more else "--seeds 2 or more accounts for the runs, too"
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


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The table in a form for JSON."""
    return {
        "metric": comparison.metric,
        "mode": comparison.mode,
        "examples": comparison.examples,
        "notes": comparison.notes,
        "winner": comparison.winner.id if comparison.winner else None,
        "points": [
            {
                "sweep": row.sweep,
                "point": row.point,
                "verdict": row.verdict,
                "metric": vars(row.metric) if row.metric else None,
                "difference_to_best": vars(row.difference) if row.difference else None,
                "status": row.status,
                "tokens": row.tokens,
                "seconds": row.seconds,
                "cost": row.cost,
                "trials": [
                    {"id": t.id, "seed": t.seed, "state": t.state, "error": t.error,
                     "path": str(t.path), "result": str(t.result) if t.result else None}
                    for t in row.trials
                ],
            }
            for row in comparison.rows
        ],
    }  # fmt: skip


def to_records(comparison: Comparison) -> list[dict[str, Any]]:
    """The table as flat records for CSV. All records have the same columns."""

    def bounds(name: str, interval: Interval | None) -> dict[str, float | None]:
        known = interval or Interval(math.nan)
        value = interval.value if interval else None
        return {name: value, f"{name} low": known.low, f"{name} high": known.high}

    return [
        {
            "sweep": row.sweep,
            **{key: value_text(value) for key, value in row.point.items()},
            **bounds(comparison.metric, row.metric),
            **bounds("difference", row.difference),
            "verdict": row.verdict,
            "status": row.status,
            "tokens": row.tokens,
            "seconds": row.seconds,
            "cost": row.cost,
        }
        for row in comparison.rows
    ]
