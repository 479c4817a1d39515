"""Judge points from their trials' results: estimates, differences, and 95 % intervals for examples and seeds.

The functions here work on arrays of numbers. `compare.py` reads the arrays from the trials of sweeps; `seeds.py` holds
the model of the seeds, `binary.py` what is special for shares such as an accuracy.

A trial's metric is the ratio of its sums over the clusters. A point's estimate is a weighted mean over trials (see
`fit_seeds`; the plain mean over its seeds if all points have the same seeds). The same weights serve the values,
their order, the differences and all draws.

*Examples*: clusters are resampled with replacement, one resample for all trials at once (the crossed bootstrap of
Owen 2007, "The pigeonhole bootstrap"; clusters: Miller 2024, arXiv 2411.00640).

*Seeds* are too few to resample. Their part of a draw comes from Student's t, with the variances of `fit_seeds`. If
all points have one seed, this part is unknown and left out.

*Differences* use the same resamples for both points (paired examples), and the seeds' effects on all points cancel
as far as the points share seeds. The intervals are simultaneous over all pairs: each is widened by the same factor,
so that in 95 % of draws the deviation of every pair lies inside its interval (single-step max-T, Westfall & Young
1993; for independent means it is Tukey's range test).

    P points, T trials (a point with a seed), C clusters of validation examples, B draws
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minimind_ray.sweep.binary import widen_pairs
from minimind_ray.sweep.seeds import Seeds, fit_seeds
from minimind_ray.train.intervals import NORMAL, effective_count, wilson

DRAWS = 4000
MOST_CLUSTERS = 2000
"""More clusters are merged at random into this many groups. The intervals stay the same, and large validation sets do
not take longer."""
VAGUE = 0.75
"""An interval that reaches further than this part of the values may say nothing: see `_vague`."""
NOISE = 1e-9
"""A difference that is smaller than this part of the examples' values is due to rounding, and counts as 0."""


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
class Statistics:
    """What is known about the points.

    `estimate_P` with `low_P` and `high_P` are single 95 % intervals. `difference_PP` is row minus column; its intervals
    hold for all pairs at once. `order_P` lists the points, best first. `eligible_P` marks the points that may be picked
    as the best. Of these, `may_be_best_P` is False for points that are worse than some other point (Hsu), and
    `vs_best_P3` holds value, low and high of each point minus the best of the others; NaN for all other points.
    `headline` is the value of the best point, corrected for having been picked. `examples_variance_PP` and
    `seeds_variance_PP` are the two parts of the differences' variances. `seeds_free_P` are the degrees of freedom of
    the points' variances over seeds, and `common_free` those of the seeds' effects on all points; 0 means unknown.
    `vague_P` and `vague_PP` mark points and differences whose interval says nothing; see `_vague`. `draws_BP` are draws
    of the errors of `estimate_P`.

    `diverged_P` marks points that lost a seed because it diverged. Their mean over seeds has no bound on the worse
    side, so neither have their differences: an end of these intervals is infinite.
    """

    estimate_P: np.ndarray
    low_P: np.ndarray
    high_P: np.ndarray
    difference_PP: np.ndarray
    low_PP: np.ndarray
    high_PP: np.ndarray
    order_P: np.ndarray
    eligible_P: np.ndarray
    may_be_best_P: np.ndarray
    vs_best_P3: np.ndarray
    headline: Interval
    odd_P: np.ndarray
    examples_variance_PP: np.ndarray
    seeds_variance_PP: np.ndarray
    seeds_free_P: np.ndarray
    common_free: int
    vague_P: np.ndarray
    vague_PP: np.ndarray
    diverged_P: np.ndarray
    draws_BP: np.ndarray

    def hidden_points(self) -> np.ndarray:
        """Return for each point whether its own interval is not to be shown."""
        return self.vague_P | self.diverged_P

    def hidden_pairs(self) -> np.ndarray:
        """Return for each difference whether its interval is not to be shown."""
        return self.vague_PP | ~np.isfinite(self.high_PP - self.low_PP)


def judge(
    numerator_TC: np.ndarray,
    denominator_TC: np.ndarray,
    point_T: np.ndarray,
    seed_T: np.ndarray,
    *,
    larger_is_better: bool,
    shift_T: np.ndarray | None = None,
    extra_T: np.ndarray | None = None,
    eligible_P: np.ndarray | None = None,
    diverged_P: np.ndarray | None = None,
    binary: bool = False,
    draws: int = DRAWS,
    random_seed: int = 0,
) -> Statistics:
    """Compute estimates, differences and their intervals for points with several seeds on the same examples.

    Args:
        numerator_TC: the summed values per trial and cluster; at least two clusters.
        denominator_TC: the divisors, above 0: the number of counted tokens, or of examples.
        point_T: each trial's point, 0 to P - 1.
        seed_T: each trial's seed, any whole numbers.
        larger_is_better: the direction of the metric.
        shift_T: what is added to trials' metrics, such as the predicted rest of a trial that was stopped early.
        extra_T: the variances of these shifts, which are independent between trials.
        eligible_P: the points that may be picked as the best; all by default.
        diverged_P: the points that lost a seed because it diverged; none by default.
        binary: whether the metric is a share: every example has the value 0 or 1 and counts once.
        draws: B; `random_seed` is their seed, so that the same input gives the same numbers.
    """
    rng, nothing_T = np.random.default_rng(random_seed), np.zeros(len(point_T))
    points, sign = int(point_T.max()) + 1, -1.0 if larger_is_better else 1.0
    value_T = numerator_TC.sum(1) / denominator_TC.sum(1) + (nothing_T if shift_T is None else shift_T)
    seeds = fit_seeds(value_T, point_T, seed_T, nothing_T if extra_T is None else extra_T)
    unclipped_P = seeds.weight_PT @ value_T
    estimate_P = np.clip(unclipped_P, 0, 1) if binary else unclipped_P
    examples_BP = _resampled(numerator_TC, denominator_TC, draws, rng) @ seeds.weight_PT.T
    draws_BP = examples_BP + seeds.draw(draws, rng)
    size_P = _sizes(numerator_TC, denominator_TC, value_T, point_T)
    found = _intervals(estimate_P, draws_BP, examples_BP, size_P)
    if binary:
        found = _of_shares(found, examples_BP.var(0), numerator_TC, denominator_TC, seeds)
    eligible_P = np.ones(points, bool) if eligible_P is None else eligible_P
    diverged_P = np.zeros(points, bool) if diverged_P is None else diverged_P
    may_be_best_P, vs_best_P3 = _best_of_eligible(found, draws_BP, eligible_P, sign)
    may_be_best_P |= eligible_P & diverged_P
    order_P = np.lexsort((sign * unclipped_P, ~eligible_P))
    headline = _headline(sign * estimate_P[eligible_P], sign * draws_BP[:, eligible_P], ~seeds.odd_P[eligible_P])
    headline = headline if sign > 0 else _mirrored(headline)
    if binary:
        headline, vs_best_P3 = _share(headline, found, order_P[0]), np.clip(vs_best_P3, -1, 1)
    examples_PP = _variances_of_differences(np.cov(examples_BP.T).reshape(points, points))
    low_PP, high_PP = _open_ended(found, diverged_P, sign)
    return Statistics(
        estimate_P, found.low_P, found.high_P, found.difference_PP, low_PP, high_PP, order_P,
        eligible_P, may_be_best_P, vs_best_P3, Interval(*headline.tolist()), draws_BP=draws_BP,
        odd_P=seeds.odd_P, seeds_free_P=seeds.own_free_P, common_free=seeds.common_free, diverged_P=diverged_P,
        examples_variance_PP=examples_PP, seeds_variance_PP=_variances_of_differences(seeds.covariance()),
        **_vague(found, NORMAL * np.sqrt(examples_PP), seeds, size_P, value_T, 1.0 if binary else None),
    )  # fmt: skip


@dataclass(frozen=True)
class _Intervals:
    """Intervals of points and of all pairs. `single_PP` are half-widths of single 95 % intervals of differences.

    `examples_P` are the half-widths of the points' intervals by the examples alone. `least_PP` is how far the lower
    bounds must be from the differences apart from the draws; 0 where the draws are enough. The upper bound of a pair is
    the lower bound of the pair in the other order.
    """

    value_P: np.ndarray
    low_P: np.ndarray
    high_P: np.ndarray
    examples_P: np.ndarray
    difference_PP: np.ndarray
    low_PP: np.ndarray
    high_PP: np.ndarray
    single_PP: np.ndarray
    least_PP: np.ndarray


def _sizes(
    numerator_TC: np.ndarray, denominator_TC: np.ndarray, value_T: np.ndarray, point_T: np.ndarray
) -> np.ndarray:
    """Return the size of the numbers that each point's estimate is made of; rounding errors are in proportion to it."""
    size_P = np.zeros(int(point_T.max()) + 1)
    np.maximum.at(size_P, point_T, np.abs(numerator_TC).sum(1) / denominator_TC.sum(1) + np.abs(value_T))
    return size_P


def _intervals(estimate_P: np.ndarray, draws_BP: np.ndarray, examples_BP: np.ndarray, size_P: np.ndarray) -> _Intervals:
    """Return the intervals that follow from the draws of the estimates' errors.

    `examples_BP` are the parts of the draws that are due to the examples; `size_P` are the `_sizes`.
    """
    difference_PP = estimate_P[:, None] - estimate_P
    noise_PP = NOISE * np.maximum(size_P[:, None], size_P)
    reach_PP, single_PP = _simultaneous_reach(draws_BP, noise_PP)
    difference_PP[np.abs(difference_PP) <= noise_PP] = 0.0
    low_P, high_P = estimate_P + np.quantile(draws_BP, (0.025, 0.975), axis=0)
    least_PP = np.zeros_like(reach_PP)
    return _Intervals(
        estimate_P, low_P, high_P, NORMAL * examples_BP.std(0), difference_PP, difference_PP - reach_PP,
        difference_PP + reach_PP, single_PP, least_PP,
    )  # fmt: skip


def _of_shares(
    drawn: _Intervals, variance_P: np.ndarray, right_TC: np.ndarray, count_TC: np.ndarray,
    seeds: Seeds,
) -> _Intervals:  # fmt: skip
    """Return the intervals of shares: Wilson's, and exact ones where few clusters differ between two points.

    `variance_P` is the shares' variance over the examples. Where the draws account for seeds and give a wider interval
    than Wilson's, theirs is used.
    """
    share_P, count, clusters = drawn.value_P, int(count_TC[0].sum()), count_TC.shape[1]
    count_P = np.array([effective_count(float(s), float(v), count, clusters) for s, v in zip(share_P, variance_P)])
    low_P, high_P = np.array([wilson(float(s), c) for s, c in zip(share_P, count_P)]).T
    examples_P = np.maximum(high_P - share_P, share_P - low_P)
    if seeds.covariance().any():
        low_P, high_P = np.clip(np.minimum(drawn.low_P, low_P), 0, 1), np.clip(np.maximum(drawn.high_P, high_P), 0, 1)
    low_PP, high_PP = np.clip(drawn.low_PP, -1, 1), np.clip(drawn.high_PP, -1, 1)
    widen_pairs(share_P, seeds.weight_PT @ right_TC, count_P, low_PP, high_PP)
    least_PP = np.where(low_PP < drawn.low_PP, drawn.difference_PP - low_PP, 0.0)
    return _Intervals(
        share_P, low_P, high_P, examples_P, drawn.difference_PP, low_PP, high_PP, drawn.single_PP, least_PP
    )


def _open_ended(found: _Intervals, diverged_P: np.ndarray, sign: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounds of the differences, infinite on the worse side of points that lost a diverged seed."""
    low_PP, high_PP = found.low_PP.copy(), found.high_PP.copy()
    above_PP = low_PP if sign < 0 else high_PP
    below_PP = high_PP if sign < 0 else low_PP
    above_PP[diverged_P], below_PP[:, diverged_P] = sign * np.inf, -sign * np.inf
    for bound_PP in (low_PP, high_PP):
        np.fill_diagonal(bound_PP, 0.0)
    return low_PP, high_PP


def _share(headline: np.ndarray, found: _Intervals, best: int) -> np.ndarray:
    """Return the best point's headline for a share: no narrower than the point's own interval, and from 0 to 1."""
    bounds = [headline[0], min(headline[1], found.low_P[best]), max(headline[2], found.high_P[best])]
    return np.clip(bounds, 0, 1)


def _mirrored(interval: np.ndarray) -> np.ndarray:
    """Return value, low and high (the last axis) of the negative quantity."""
    return 0.0 - interval[..., [0, 2, 1]]


def _resampled(
    numerator_TC: np.ndarray, denominator_TC: np.ndarray, draws: int, rng: np.random.Generator
) -> np.ndarray:
    """Return every trial's metric on each resample of the clusters, minus the metric on all clusters: [B, T].

    Resamples of C clusters have only (C - 1) / C of the variance, and estimate it with C - 1 degrees of freedom. Both
    are corrected as in Student's t, which matters for validation sets with few clusters.
    """
    if numerator_TC.shape[1] > MOST_CLUSTERS:
        order_C = rng.permutation(numerator_TC.shape[1])
        starts = np.linspace(0, len(order_C), MOST_CLUSTERS, endpoint=False).astype(int)
        numerator_TC = np.add.reduceat(numerator_TC[:, order_C], starts, axis=1)
        denominator_TC = np.add.reduceat(denominator_TC[:, order_C], starts, axis=1)
    clusters = numerator_TC.shape[1]
    value_T = numerator_TC.sum(1) / denominator_TC.sum(1)
    blocks: list[np.ndarray] = []
    step = max(1, 4_000_000 // clusters)  # so that a block of weights takes at most 32 MB
    for start in range(0, draws, step):
        rows = min(step, draws - start)
        drawn = rng.integers(clusters, size=(rows, clusters)) + clusters * np.arange(rows)[:, None]
        weight_BC = np.bincount(drawn.ravel(), minlength=rows * clusters).reshape(rows, clusters).astype(float)
        blocks.append((weight_BC @ numerator_TC.T) / (weight_BC @ denominator_TC.T))
    wider_B = np.sqrt(clusters / rng.chisquare(clusters - 1, draws))
    return (np.concatenate(blocks) - value_T) * wider_B[:, None]


def _simultaneous_reach(draws_BP: np.ndarray, noise_PP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return half-widths of intervals around all pairwise differences: [P, P]. In 95 % of draws, all hold at once.

    The second matrix holds the half-widths of single 95 % intervals. Half-widths up to `noise_PP` count as 0.
    """
    draws_PB = np.ascontiguousarray(draws_BP.T)
    single_PP = np.zeros_like(noise_PP)
    largest_B = np.zeros(len(draws_BP))
    for i in range(len(draws_PB) - 1):
        deviation_PB = np.abs(draws_PB[i + 1 :] - draws_PB[i])
        single_P = _quantile(deviation_PB, 0.95)
        single_P = np.where(single_P > noise_PP[i, i + 1 :], single_P, 0.0)
        single_PP[i, i + 1 :] = single_PP[i + 1 :, i] = single_P
        largest_B = np.maximum(largest_B, _ratio(deviation_PB, single_P).max(0))
    return single_PP * np.quantile(largest_B, 0.95), single_PP


def _quantile(value_PB: np.ndarray, share: float) -> np.ndarray:
    """Return np.quantile of each row, in less time: only the two values beside the quantile are looked for."""
    place = share * (value_PB.shape[1] - 1)
    k = min(int(place), value_PB.shape[1] - 2)
    sorted_PB = np.partition(value_PB, k, axis=1)
    return sorted_PB[:, k] + (place - k) * (sorted_PB[:, k + 1 :].min(1) - sorted_PB[:, k])


def _ratio(deviation_PB: np.ndarray, single_P: np.ndarray) -> np.ndarray:
    """Return the deviations in units of the half-widths; 0 for two points that always agree."""
    return deviation_PB / np.where(single_P > 0, single_P, np.inf)[:, None]


def _best_of_eligible(
    found: _Intervals, draws_BP: np.ndarray, eligible_P: np.ndarray, sign: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return `may_be_best_P` and `vs_best_P3` of `Statistics`. Smaller values are better if `sign` is 1."""
    may_be_best_P, vs_best_P3 = np.zeros(len(eligible_P), bool), np.full((len(eligible_P), 3), np.nan)
    among = np.ix_(eligible_P, eligible_P)
    least_PP = found.least_PP if sign > 0 else found.least_PP.T
    may_be_best_P[eligible_P], against = _against_the_best(
        sign * found.difference_PP[among], sign * draws_BP[:, eligible_P], found.single_PP[among], least_PP[among]
    )
    vs_best_P3[eligible_P] = against if sign > 0 else _mirrored(against)
    return may_be_best_P, vs_best_P3


def _against_the_best(
    difference_PP: np.ndarray, draws_BP: np.ndarray, single_PP: np.ndarray, least_PP: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compare each point with the best of the others, for a metric whose smaller values are better.

    Hsu's multiple comparisons with the best (Hsu 1984; for unequal variances Edwards & Hsu 1983; Hsu 1996, "Multiple
    Comparisons", ch. 4). Each point in turn is the control of one-sided comparisons with all others, with a critical
    value of its own from the draws. The true best passes as a control in 95 % of cases, so all points that pass contain
    the best with 95 % confidence. These critical values are smaller than those for all pairs. `least_PP` limits how
    near the lower bounds are, see `_Intervals`.

    Returns:
        Whether each point may be the best, and value, low and high of each point minus the best other point: [P, 3].
    """
    points = len(difference_PP)
    if points == 1:
        return np.ones(1, bool), np.zeros((1, 3))
    draws_PB = np.ascontiguousarray(draws_BP.T)
    reach_PP = np.zeros((points, points))
    for i in range(points):
        worst_B = _ratio(draws_PB[i] - draws_PB, single_PP[i]).max(0)
        reach_PP[i] = np.maximum(single_PP[i] * max(0.0, float(_quantile(worst_B[None], 0.95)[0])), least_PP[i])
    itself = np.where(np.eye(points, dtype=bool), -np.inf, 0.0)
    low_P = np.minimum(0.0, (difference_PP - reach_PP + itself).max(1))
    may_be_best_P = low_P < 0
    may_be_best_P |= (difference_PP - reach_PP + itself).max(1) <= 0
    controls_PP = np.where(may_be_best_P, difference_PP + reach_PP.T + itself, -np.inf)
    high_P = np.maximum(0.0, controls_PP.max(1))
    return may_be_best_P, np.stack([(difference_PP + itself).max(1), low_P, high_P], 1)


def _headline(estimate_P: np.ndarray, draws_BP: np.ndarray, usual_P: np.ndarray) -> np.ndarray:
    """Return the best point's value, low and high, corrected for having been picked; smaller values are better.

    The best of several estimates is too good on average (the winner's curse). A parametric bootstrap repeats the
    picking: in each draw, errors are added to the estimates, the best point is picked, and its error is noted. The
    estimates themselves differ more than the true values, so they are first drawn together by as much as their errors
    explain (James & Stein 1961; the positive part). The median error of the picked points is the correction. Picking
    never makes a value look too bad, so a median above 0 is chance in the draws, and counts as 0. How far the true
    values lie apart stays uncertain, so the interval also holds what follows without drawing together.

    Points that are not `usual_P`, because their seeds differ much more than those of others, are left out, except the
    best point itself: their large errors would hide everything else.
    """
    usual_P = usual_P | (np.arange(len(usual_P)) == estimate_P.argmin())
    estimate_P, draws_BP = estimate_P[usual_P], draws_BP[:, usual_P]
    best, points = float(estimate_P.min()), len(estimate_P)
    middle, factor = estimate_P.mean(), 1.0
    if points > 1:
        # The middle 68 % of the draws: variances from two seeds give heavy tails, which have no variance themselves.
        centred_BP = draws_BP - draws_BP.mean(1, keepdims=True)
        spread_P = (np.quantile(centred_BP, 0.84, axis=0) - np.quantile(centred_BP, 0.16, axis=0)) / 2
        squares = ((estimate_P - middle) ** 2).sum()
        factor = max(0.0, 1 - points * np.median(spread_P**2) / squares if squares > 0 else 0.0)
    low, median, high = _picked_errors(middle + factor * (estimate_P - middle), draws_BP)
    most = _picked_errors(estimate_P, draws_BP)[2]
    return best - np.array([min(median, 0.0), max(high, most), low])


def _picked_errors(estimate_P: np.ndarray, draws_BP: np.ndarray) -> np.ndarray:
    """Return the 2.5 %, 50 % and 97.5 % quantiles of the error of the smallest of estimates with errors."""
    picked_B = (estimate_P + draws_BP).argmin(1)
    return np.quantile(draws_BP[np.arange(len(draws_BP)), picked_B], (0.025, 0.5, 0.975))


def _vague(
    found: _Intervals, examples_PP: np.ndarray, seeds: Seeds, size_P: np.ndarray, value_T: np.ndarray,
    whole: float | None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Return which intervals say nothing, because too little is known about the seeds.

    The examples alone would make such an interval less than half as wide. It reaches further than all trials lie apart,
    and further than the part VAGUE of the values; for shares, whose range is `whole`, of this range. Or it is all that
    is possible. `whole` is None for other metrics. `examples_PP` are the half-widths of single intervals of differences
    by the examples alone; `size_P` are the `_sizes`.
    """
    apart, least_P = float(np.ptp(value_T)), NOISE * size_P
    largest_P = np.abs(seeds.weight_PT @ value_T) if whole is None else np.full(len(size_P), whole)

    def says_nothing(
        value: np.ndarray, low: np.ndarray, high: np.ndarray, examples: np.ndarray, size: np.ndarray, range: float
    ) -> np.ndarray:
        half = np.maximum(high - value, value - low)
        far = (half > apart) & (half > VAGUE * size)
        return (half > 2 * examples) & (far | (high - low >= (1 - NOISE) * range))

    covariance_PP, range = seeds.covariance(), np.inf if whole is None else whole
    return {
        "vague_P": (np.diag(covariance_PP) > least_P**2)
        & says_nothing(found.value_P, found.low_P, found.high_P, found.examples_P, largest_P, range),
        "vague_PP": (_variances_of_differences(covariance_PP) > np.maximum(least_P[:, None], least_P) ** 2)
        & says_nothing(
            found.difference_PP, found.low_PP, found.high_PP, np.maximum(examples_PP, found.least_PP),
            np.maximum(largest_P[:, None], largest_P), 2 * range,
        ),
    }  # fmt: skip


def _variances_of_differences(covariance_PP: np.ndarray) -> np.ndarray:
    variance_P = np.diag(covariance_PP)
    return np.maximum(variance_P[:, None] + variance_P - 2 * covariance_PP, 0.0)
