"""Whether a sweep's intervals hold: simulated sweeps with known truth, judged by the rules before issue 26 and after.

    make bench ARGS=coverage

For each kind of sweep and both rules, the table shows in how many sweeps or cases

    single    a point's 95 % interval holds its true value (should be 0.95 or a little more)
    pairs     the intervals of all pairs of points hold at once (0.95 or more)
    error     a point that is truly as good as the best or better is called worse (0.05 or less)
    wrong     the point that is picked as the best is not a truly best point
    winner    the interval of the picked point's value holds (before: its plain interval; after: the headline)
    best set  Hsu's set contains a point that is truly the best of those with a finished trial (0.95 or more for each)

and Hsu's half-width in parts of the half-width for all pairs, and two widths, in units of the metric: the median
half-widths of the points' own intervals and of the pairs' intervals, without those of odd points.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from minimind_ray.sweep.measured import Measured
from minimind_ray.sweep.models import compare_models
from minimind_ray.sweep.statistics import judge
from minimind_ray.sweep.stopping import predicted_ends
from minimind_ray.tasks.items import Scores
from tests.bench.asha import halved_sweep
from tests.bench.common import Report

COLUMNS = ("single", "pairs", "error", "wrong", "winner", "best set", "Hsu's", "own width", "width")
WIDTHS = 2
"""The last columns are medians over the sweeps, all others are means."""
Rng = np.random.Generator


@dataclass
class Simulated:
    """A sweep whose truth is known. `unfinished_T` marks trials that were stopped; their shift is predicted.

    The first `odd` points vary more over seeds than the others. With `tasks`, the points are models, and the examples
    are items of so many tasks, one after another; the truth is about the mean over tasks.
    """

    numerator_TE: np.ndarray
    denominator_TE: np.ndarray
    point_T: np.ndarray
    seed_T: np.ndarray
    truth_P: np.ndarray
    cluster_E: np.ndarray
    larger_is_better: bool = False
    binary: bool = False
    odd: int = 0
    tasks: int = 0
    unfinished_T: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    shift_T: np.ndarray | None = None
    extra_T: np.ndarray | None = None

    @property
    def eligible(self) -> np.ndarray:
        """Whether a point has a finished trial, so that it may be picked as the best."""
        finished_T = ~self.unfinished_T if self.unfinished_T.size else np.ones(len(self.point_T), bool)
        return np.array([finished_T[self.point_T == p].any() for p in range(len(self.truth_P))])

    def kept(self, keep_T: np.ndarray) -> Simulated:
        """Return the sweep with some of its trials only."""
        return replace(
            self,
            numerator_TE=self.numerator_TE[keep_T],
            denominator_TE=self.denominator_TE[keep_T],
            point_T=self.point_T[keep_T],
            seed_T=self.seed_T[keep_T],
        )


@dataclass
class Judged:
    """What a rule says of a sweep: the fields of `Statistics` that are scored."""

    estimate_P: np.ndarray
    low_P: np.ndarray
    high_P: np.ndarray
    low_PP: np.ndarray
    high_PP: np.ndarray
    winner: tuple[float, float] | None
    may_be_best_P: np.ndarray | None
    hsu: float
    claims: bool


def crossed(
    rng: Rng, truth: Sequence[float], *, seeds: int = 2, clusters: int = 100, pieces: int = 1, common: float = 0.02,
    own: float | Sequence[float] = 0.03, ease: float = 0.4, noise: float = 0.2, document: float = 0.0,
) -> Simulated:  # fmt: skip
    """A crossed design of points, seeds and examples of unequal length, each with its own random effect.

    `pieces` examples of a cluster share the effect `ease`, and for each trial the effect `document`.
    """
    point_T, seed_T = np.repeat(np.arange(len(truth)), seeds), np.tile(np.arange(seeds), len(truth))
    cluster_E = np.repeat(np.arange(clusters), rng.poisson(pieces - 1, clusters) + 1 if pieces > 1 else 1)
    examples, trials = len(cluster_E), len(point_T)
    own_T = np.broadcast_to(own, len(truth))[point_T]
    level_T = np.array(truth)[point_T] + rng.normal(0, common, seeds)[seed_T] + rng.normal(0, 1, trials) * own_T
    value_TE = level_T[:, None] + rng.normal(0, ease, clusters)[cluster_E] + rng.normal(0, noise, (trials, examples))
    # What settings do to a document: the same for all seeds of a point.
    value_TE += rng.normal(0, document, (len(truth), clusters))[point_T][:, cluster_E]
    length_E = rng.integers(5, 100, examples).astype(float)
    return Simulated(value_TE * length_E, np.tile(length_E, (trials, 1)), point_T, seed_T, np.array(truth), cluster_E)


def unequal_seeds(rng: Rng) -> Simulated:
    """Four points with three seeds, of which two trials were lost; the seed's effect on all points is large."""
    return _with_lost_trials(rng, crossed(rng, [2.0, 2.1, 2.1, 2.1], seeds=3, common=0.3))


def odd_and_unequal(rng: Rng) -> Simulated:
    """Four equal points as in `odd`, with lost trials and effects of the seeds as in `unequal_seeds`."""
    return _with_lost_trials(rng, odd(4, 3, common=0.3)(rng))


def _with_lost_trials(rng: Rng, sweep: Simulated) -> Simulated:
    """Return a sweep of 4 points with 3 seeds without one trial of the first point, and one of another point."""
    keep_T = np.ones(12, bool)
    keep_T[[rng.integers(3), 3 + rng.integers(9)]] = False
    return sweep.kept(keep_T)


def accuracy(rng: Rng, examples: int, share: float = 0.99) -> Simulated:
    """Two points with one seed that answer `examples` questions, with the same probability and partly the same luck."""
    together = rng.random(examples)
    right_TE = np.stack([np.where(rng.random(examples) < 0.5, together, rng.random(examples)) for _ in range(2)])
    right_TE = (right_TE < share).astype(float)
    return Simulated(
        right_TE, np.ones_like(right_TE), np.arange(2), np.zeros(2, int), np.full(2, share), np.arange(examples),
        larger_is_better=True, binary=True,
    )  # fmt: skip


def models(
    points: int, items: int, share: float = 0.5, *, tasks: int = 0, together: float = 0.6, group: int = 1
) -> Callable[[Rng], Simulated]:
    """Equal models that answer `items` items of a task, or of each of so many `tasks`, with the same probability.

    An item is as hard for all models in the part `together` of cases. A `group` of items has the same answers.
    """

    def simulate(rng: Rng) -> Simulated:
        count = items * max(1, tasks)
        ease_E = np.repeat(rng.random(count // group), group)
        own_PE = np.repeat(rng.random((points, count // group)), group, axis=1)
        shared_PE = np.repeat(rng.random((points, count // group)) < together, group, axis=1)
        right_PE = (np.where(shared_PE, ease_E, own_PE) < share).astype(float)
        return Simulated(
            right_PE, np.ones_like(right_PE), np.arange(points), np.zeros(points, int), np.full(points, share),
            np.repeat(np.arange(count // group), group), larger_is_better=True, binary=True, tasks=tasks,
        )  # fmt: skip

    return simulate


def asha(points: int, seeds: int, **options: Any) -> Callable[[Rng], Simulated]:
    """Sweeps under ASHA with at least two finished trials, so that the ends of the others are predicted.

    With one seed, the truth is about these trained models.
    """

    def simulate(rng: Rng) -> Simulated:
        while True:
            found = halved_sweep(rng, points, seeds, **options)
            shift_T, extra_T = predicted_ends(found.curves, found.finished_T.tolist())
            if np.isfinite(shift_T).all():
                break
        truth_P, examples = found.end_T if seeds == 1 else found.truth_P, found.value_TE.shape[1]
        return Simulated(
            found.value_TE, np.ones_like(found.value_TE), found.point_T, found.seed_T, truth_P, np.arange(examples),
            unfinished_T=~found.finished_T, shift_T=shift_T, extra_T=extra_T,
        )  # fmt: skip

    return simulate


def odd(points: int, seeds: int, odd: int = 1, **options: Any) -> Callable[[Rng], Simulated]:
    """Equal points, of which the first `odd` vary over seeds six times as much as the others."""
    own = [*[0.3] * odd, *[0.05] * (points - odd)]
    return lambda rng: replace(crossed(rng, [2.0] * points, seeds=seeds, own=own, noise=0.1, **options), odd=odd)


def diverged(points: int, seeds: int) -> Callable[[Rng], Simulated]:
    """Equal points, of which one has a seed that is worse by 100 times the spread over seeds."""

    def simulate(rng: Rng) -> Simulated:
        sweep = crossed(rng, [2.0 + 5.0 / seeds, *[2.0] * (points - 1)], seeds=seeds, own=0.05, noise=0.1)
        worse_T = np.where(sweep.point_T == 0, np.where(sweep.seed_T == 0, 5.0, 0.0) - 5.0 / seeds, 0.0)
        return replace(sweep, numerator_TE=sweep.numerator_TE + worse_T[:, None] * sweep.denominator_TE, odd=1)

    return simulate


KINDS: dict[str, Callable[[Rng], Simulated]] = {
    "4 equal points, 3 seeds": lambda rng: crossed(rng, [2.0] * 4, seeds=3),
    "4 equal points, 2 seeds": lambda rng: crossed(rng, [2.0] * 4),
    "687 pieces of 40 documents": lambda rng: crossed(
        rng, [2.0] * 4, clusters=40, pieces=17, document=0.1, own=0.01, noise=0.1
    ),
    "DPO pairs that share prompts": lambda rng: crossed(
        rng, [2.0] * 4, clusters=60, pieces=4, document=0.2, own=0.01
    ),
    "two lost trials, 3 seeds": unequal_seeds,
    "one odd point of 4, 2 seeds": odd(4, 2),
    "one odd point of 4, 3 seeds": odd(4, 3),
    "one odd point of 8, 2 seeds": odd(8, 2),
    "one odd point of 8, 3 seeds": odd(8, 3),
    "one odd point of 8, 5 seeds": odd(8, 5),
    "one odd point of 4, two lost trials, 3 seeds": odd_and_unequal,
    "two odd points of 8, 3 seeds": odd(8, 3, odd=2),
    "8 points, spreads 0.02 to 0.3, 3 seeds": lambda rng: crossed(
        rng, [2.0] * 8, seeds=3, own=np.geomspace(0.02, 0.3, 8).tolist(), noise=0.1
    ),
    "one diverged seed of 4 points, 2 seeds": diverged(4, 2),
    "one diverged seed of 4 points, 3 seeds": diverged(4, 3),
    "4 equal points, 1 seed": lambda rng: crossed(rng, [2.0] * 4, seeds=1, own=0.05),
    "accuracy 0.99, 50 examples": lambda rng: accuracy(rng, 50),
    "accuracy 0.99, 200 examples": lambda rng: accuracy(rng, 200),
    "16 equal points, 3 seeds": lambda rng: crossed(rng, [2.0] * 16, seeds=3, own=0.05, ease=0.1),
    "4 slightly different points": lambda rng: crossed(rng, [2, 2.01, 2.02, 2.03], seeds=3, own=0.05, ease=0.1),
    "16 slightly different points": lambda rng: crossed(
        rng, list(2 + 0.004 * np.arange(16)), seeds=3, own=0.05, ease=0.1
    ),
    "ASHA, 8 points, 2 seeds": asha(8, 2),
    "ASHA, 16 points, 1 seed": asha(16, 1),
    "ASHA, 4 points, 3 seeds": asha(4, 3),
    "ASHA, 4 equal points, 3 seeds": asha(4, 3, spread=0.0, own=0.1),
    "ASHA, 4 equal points, 12 seeds": asha(4, 12, spread=0.0, own=0.1),
    "2 equal models, 20 items": models(2, 20),
    "2 equal models, 20 items, accuracy 0.9": models(2, 20, 0.9),
    "2 equal models, 100 items": models(2, 100),
    "2 equal models, 1,000 items": models(2, 1000),
    "2 equal models, 100 items, nearly the same answers": models(2, 100, together=0.95),
    "2 equal models, 200 items on 40 texts": models(2, 200, group=5),
    "4 equal models, 20 items": models(4, 20),
    "4 equal models, 100 items": models(4, 100),
    "mean over 7 tasks of 20 items, 4 equal models": models(4, 20, tasks=7),
    "mean over 7 tasks of 100 items, 4 equal models": models(4, 100, tasks=7),
    "mean over 3 tasks of 100 items, accuracy 0.95, 2 equal models": models(2, 100, 0.95, tasks=3),
}  # fmt: skip


def judge_after(sweep: Simulated, draws: int, random_seed: int) -> Judged:
    """Judge as `minimind-ray compare` does."""
    if sweep.tasks:
        return judge_mean(sweep, draws)
    starts = np.flatnonzero(np.diff(sweep.cluster_E, prepend=-1))
    found = judge(
        np.add.reduceat(sweep.numerator_TE, starts, axis=1), np.add.reduceat(sweep.denominator_TE, starts, axis=1),
        sweep.point_T, sweep.seed_T, larger_is_better=sweep.larger_is_better, binary=sweep.binary,
        shift_T=sweep.shift_T, extra_T=sweep.extra_T, eligible_P=sweep.eligible, draws=draws, random_seed=random_seed,
    )  # fmt: skip
    headline = found.headline
    assert headline.low is not None and headline.high is not None
    # From the best point to the next one; the bound on the other side is cut at 0.
    best, next_best = found.order_P[:2]
    value, low, high = found.vs_best_P3[best]
    hsu = (high - value if sweep.larger_is_better else value - low) * 2
    hsu /= found.high_PP[best, next_best] - found.low_PP[best, next_best]
    several = len(np.unique(sweep.seed_T)) > 1 or sweep.binary
    return Judged(
        found.estimate_P, found.low_P, found.high_P, found.low_PP, found.high_PP,
        (headline.low, headline.high), found.may_be_best_P, hsu, several,
    )  # fmt: skip


def judge_mean(sweep: Simulated, draws: int) -> Judged:
    """Judge models by the mean over their tasks."""
    names = [str(p) for p in range(len(sweep.truth_P))]
    of_task = np.array_split(np.arange(len(sweep.cluster_E)), sweep.tasks)

    def measured(p: int, k: int) -> Measured:
        items = of_task[k]
        scores = Scores(items, sweep.cluster_E[items], sweep.numerator_TE[p, items], np.ones(len(items)))
        return Measured(names[p], names[p], f"t{k}", "acc", "max", scores)

    of_models = [[measured(p, k) for k in range(sweep.tasks)] for p in range(len(names))]
    found = compare_models(of_models, draws=draws).mean
    assert found
    values = [next(standing.value for standing in found.standings if standing.model == name) for name in names]
    estimate_P, low_P, high_P = (np.array([getattr(v, end) for v in values], float) for end in ("value", "low", "high"))
    return Judged(estimate_P, low_P, high_P, found.low_PP, found.high_PP, None, None, math.nan, True)


def judge_before(sweep: Simulated, draws: int, random_seed: int) -> Judged:
    """Judge by the rules before issue 26.

    Examples are independent, a point's value is the mean over the seeds that finished, all points share one variance
    over seeds (unless one is 16 times the typical variance), and nothing is special about shares.
    """
    eligible_P = sweep.eligible
    if sweep.unfinished_T.any():
        done = {int(p) for p in sweep.point_T[~sweep.unfinished_T]}
        sweep = sweep.kept(~sweep.unfinished_T | np.array([p not in done for p in sweep.point_T]))
    rng, points, value_T = np.random.default_rng(random_seed), len(sweep.truth_P), _values(sweep)
    present_PT = sweep.point_T == np.arange(points)[:, None]
    mean_PT = present_PT / present_PT.sum(1, keepdims=True)
    examples = sweep.numerator_TE.shape[1]
    weight_BE = rng.multinomial(examples, np.full(examples, 1 / examples), draws).astype(float)
    draws_BT = (weight_BE @ sweep.numerator_TE.T) / (weight_BE @ sweep.denominator_TE.T) - value_T
    own_P, common, free, seeds = _pooled(value_T, sweep, mean_PT)
    chi_B = rng.chisquare(free, draws) / free
    error_BP = rng.standard_normal((draws, points)) * np.sqrt(own_P / present_PT.sum(1) / chi_B[:, None])
    chi_B = rng.chisquare(max(1, seeds - 1), draws) / max(1, seeds - 1)
    common_B = rng.standard_normal(draws) * np.sqrt(common / seeds / chi_B)
    error_BP += draws_BT @ mean_PT.T
    estimate_P = mean_PT @ value_T
    low_P, high_P = estimate_P + np.quantile(error_BP + common_B[:, None], (0.025, 0.975), axis=0)
    deviation_BPP = np.abs(error_BP[:, :, None] - error_BP[:, None])
    single_PP = np.quantile(deviation_BPP, 0.95, axis=0)
    ratio_B = (deviation_BPP / np.where(single_PP > 0, single_PP, np.inf)).max((1, 2))
    reach_PP, difference_PP = single_PP * np.quantile(ratio_B, 0.95), estimate_P[:, None] - estimate_P
    best = int(np.where(eligible_P, -estimate_P if sweep.larger_is_better else estimate_P, np.inf).argmin())
    return Judged(
        estimate_P, low_P, high_P, difference_PP - reach_PP, difference_PP + reach_PP,
        (float(low_P[best]), float(high_P[best])), None, math.nan, True,
    )  # fmt: skip


def _values(sweep: Simulated) -> np.ndarray:
    return sweep.numerator_TE.sum(1) / sweep.denominator_TE.sum(1)


def _pooled(value_T: np.ndarray, sweep: Simulated, mean_PT: np.ndarray) -> tuple[np.ndarray, float, int, int]:
    """Return each point's variance over seeds, the variance of the common effects, and degrees of freedom and seeds."""
    points, seeds = len(mean_PT), len(np.unique(sweep.seed_T))
    residual_T = value_T - (mean_PT @ value_T)[sweep.point_T]
    effect_S = np.array([np.median(residual_T[sweep.seed_T == s]) for s in np.unique(sweep.seed_T)])
    residual_T = residual_T - effect_S[np.searchsorted(np.unique(sweep.seed_T), sweep.seed_T)]
    free = len(value_T) - points - (seeds - 1)
    if seeds == 1 or free < 1:
        return np.zeros(points), 0.0, 1, seeds
    pooled = float((residual_T**2).sum() / free)
    own_P = np.array([(residual_T[sweep.point_T == p] ** 2).mean() * seeds / (seeds - 1) for p in range(points)])
    odd_P = own_P > 16 * np.median(own_P) / (1 - 2 / (9 * (seeds - 1))) ** 3
    common = max(0.0, float((effect_S**2).sum() / (seeds - 1)) - pooled / points)
    return np.where(odd_P, own_P, pooled), common, free, seeds


def score(sweep: Simulated, found: Judged) -> list[float]:
    """Return the numbers of one sweep, in the order of COLUMNS."""
    sign = -1.0 if sweep.larger_is_better else 1.0
    truth_P, true_PP = sweep.truth_P, sweep.truth_P[:, None] - sweep.truth_P
    best = int(np.where(sweep.eligible, sign * found.estimate_P, np.inf).argmin())
    low_P, high_P = found.low_PP[:, best], found.high_PP[:, best]
    worse_P = low_P > 0 if sign > 0 else high_P < 0
    wrongly_P = worse_P & (sign * (truth_P - truth_P[best]) <= 0)
    best_P = sign * truth_P == (sign * truth_P).min()
    # The set is of the points that may be picked.
    best_eligible_P = sweep.eligible & (sign * truth_P == (sign * truth_P)[sweep.eligible].min())
    usual_PP = (found.high_PP - found.low_PP)[sweep.odd :, sweep.odd :]
    slack = 1e-12
    return [
        float(((found.low_P <= truth_P + slack) & (found.high_P >= truth_P - slack)).mean()),
        float(((found.low_PP <= true_PP + slack) & (found.high_PP >= true_PP - slack)).all()),
        float(wrongly_P.any() and found.claims),
        float(not best_P[best]),
        float(found.winner[0] <= truth_P[best] <= found.winner[1]) if found.winner else np.nan,
        np.nan if found.may_be_best_P is None else float(found.may_be_best_P[best_eligible_P].mean()),
        found.hsu,
        float((found.high_P - found.low_P)[sweep.odd :].mean() / 2),
        float(usual_PP[np.triu_indices(len(usual_PP), 1)].mean() / 2),
    ]


def coverage(kind: str, sweeps: int, draws: int, random_seed: int = 0) -> dict[str, list[float]]:
    """Return the means over simulated sweeps (of widths: the medians), before and after, in the order of COLUMNS."""
    rng, scores = np.random.default_rng(random_seed), {"before": list[list[float]](), "after": list[list[float]]()}
    for _ in range(sweeps):
        sweep, seed = KINDS[kind](rng), int(rng.integers(2**31))
        scores["before"].append(score(sweep, judge_before(sweep, draws, seed)))
        scores["after"].append(score(sweep, judge_after(sweep, draws, seed)))
    return {
        rule: [*np.mean(np.array(found)[:, :-WIDTHS], 0).tolist(), *np.median(np.array(found)[:, -WIDTHS:], 0).tolist()]
        for rule, found in scores.items()
    }


def measure_coverage(args: Namespace, report: Report, scratch: Path) -> None:
    """Simulate all kinds of sweeps, print the table and put it into the report."""
    print(f"{args.sweeps} simulated sweeps of each kind, {args.draws} draws\n")
    print(f"| sweeps | rule | {' | '.join(COLUMNS)} |")
    print(f"| --- | --- |{' ---: |' * len(COLUMNS)}")
    table: dict[str, dict[str, dict[str, float]]] = {}
    for kind in KINDS:
        found = coverage(kind, args.sweeps, args.draws)
        for rule, numbers in found.items():
            digits = [3 if "width" in name else 2 for name in COLUMNS]
            cells = ["" if np.isnan(n) else f"{n:.{d}f}" for n, d in zip(numbers, digits)]
            print(f"| {kind} | {rule} | {' | '.join(cells)} |", flush=True)
        table[kind] = {
            rule: {name: n for name, n in zip(COLUMNS, numbers) if not np.isnan(n)} for rule, numbers in found.items()
        }
    report.put("coverage", "sweeps", table)
