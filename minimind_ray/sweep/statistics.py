"""Compute means of points, their differences, and 95 % intervals that account for examples and seeds.

The functions here work on arrays of numbers. `compare.py` reads the arrays from the trials of sweeps.

    P points, S seeds, T trials (a point with a seed), E validation examples, B bootstrap draws
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DRAWS = 4000
OUTLIER = 16.0
"""A point keeps its own variance over seeds if that is this many times larger than the typical variance."""


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
    """Return every trial's metric on each resample of the examples, minus the metric on all examples: [B, T].

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
        """Return the weights that the seeds' true effects still have after `effect_S` was subtracted.

        `weight_PS` are the weights of the seeds in each point's mean before the subtraction.

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
    # A point that uses the pooled variance, but varies far more than the pooled variance explains.
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
    """Return the group number, from 0, of each seed; -1 if the seed is not shared.

    Two seeds are in the same group if a point has both, directly or through a chain of points.
    """
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
    """Return the median effect of each seed over the points, with mean 0 in each group; 0 outside of groups.

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
    """Return the sums of squared deviations from each point's own mean; 0 for a point without used values."""
    mean_P = np.where(used_PS, value_PS, 0).sum(1) / np.maximum(used_PS.sum(1), 1)
    return (np.where(used_PS, value_PS - mean_P[:, None], 0) ** 2).sum(1)


def _drawn_t(
    variance_P: np.ndarray, free_P: np.ndarray, pooled_P: np.ndarray, draws: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw from Student's t with `free_P` degrees of freedom, times the standard deviation: [B, P]; 0 if unknown."""
    free_BP = np.broadcast_to(np.maximum(free_P, 1), (draws, len(free_P)))
    chi_BP = rng.chisquare(free_BP) / free_BP
    # Points that share an estimate of the variance share its error.
    chi_BP[:, pooled_P] = chi_BP[:, pooled_P][:, :1]
    return rng.standard_normal(chi_BP.shape) * np.sqrt(variance_P / chi_BP)


def _simultaneous_reach(draws_BP: np.ndarray) -> np.ndarray:
    """Return half-widths of intervals around all pairwise differences: [P, P]. In 95 % of draws, all hold at once."""
    points = draws_BP.shape[1]
    single_PP = np.zeros((points, points))
    largest_B = np.zeros(len(draws_BP))
    for i in range(points):
        deviation_BP = np.abs(draws_BP - draws_BP[:, i : i + 1])
        single_PP[i] = np.quantile(deviation_BP, 0.95, axis=0)
        with np.errstate(invalid="ignore"):  # For two points that always agree, this is 0 / 0.
            largest_B = np.fmax(largest_B, np.nan_to_num(deviation_BP / single_PP[i], nan=0.0).max(1))
    return single_PP * np.quantile(largest_B, 0.95)
