"""Intervals for shares, such as an accuracy: every example is right (1) or wrong (0).

Near 0 and 1 the bootstrap fails: 50 right answers out of 50 give an interval from 1 to 1. The intervals here hold
there, too.

    P points, C clusters
"""

from __future__ import annotations

import math

import numpy as np

from minimind_ray.train.intervals import wilson

FEW_DISCORDANT = 25
"""With fewer clusters in which two points differ, the exact test decides beside the bootstrap (Agresti, Categorical
Data Analysis, ch. 11)."""
LEAST_SPREAD = 5
"""The bootstrap fails, too, if the difference is the same in all clusters but fewer than this many."""


def is_binary(numerator_E: np.ndarray, denominator_E: np.ndarray) -> bool:
    """Whether every example has the value 0 or 1 and counts once, so that the metric is a share."""
    return bool((denominator_E == 1).all() and ((numerator_E == 0) | (numerator_E == 1)).all())


def mid_p(above: int, below: int) -> float:
    """Return the two-sided mid-p value of McNemar's test.

    It is the probability of a split as uneven as `above` to `below` if both sides are equally likely; the split itself
    counts half (Fagerland, Lydersen & Laake 2013). The value is 1 if no example differs.
    """
    total, least = above + below, min(above, below)
    if not total:
        return 1.0
    # Whole numbers up to the division: with 1,024 examples or more, they are too large for a float.
    both_tails = 2 * sum(math.comb(total, k) for k in range(least + 1)) - math.comb(total, least)
    return min(1.0, both_tails / 2**total)


def paired_bounds(first: float, second: float, correlation: float, count: float, level: float) -> tuple[float, float]:
    """Return the bounds of the difference of two shares on the same examples (Newcombe 1998, method 10).

    Args:
        first: the first share.
        second: the second share, which is subtracted.
        correlation: of the two points' examples; 0 if unknown.
        count: the effective number of examples.
        level: the confidence, such as 0.95.
    """
    (low_1, high_1), (low_2, high_2) = wilson(first, count, level), wilson(second, count, level)

    def half(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    difference = first - second
    return (
        difference - half(first - low_1, high_2 - second),
        difference + half(high_1 - first, second - low_2),
    )


def widen_pairs(
    share_P: np.ndarray, right_PC: np.ndarray, count_P: np.ndarray, low_PP: np.ndarray, high_PP: np.ndarray
) -> None:
    """Widen the simultaneous intervals of all pairs, in place, where only a few clusters differ between two points.

    The level of each pair is divided by the number of pairs (Bonferroni). `right_PC` holds each point's mean number of
    right answers per cluster, `count_P` the effective numbers of examples. An interval excludes 0 only if the mid-p
    test does, too.
    """
    points = len(share_P)
    alpha = 0.05 / max(1, points * (points - 1) // 2)
    for i in range(points):
        for j in range(i):
            difference_C = right_PC[i] - right_PC[j]
            above, below = int((difference_C > 1e-12).sum()), int((difference_C < -1e-12).sum())
            if above + below >= FEW_DISCORDANT and _spread(difference_C, max(above, below)):
                continue
            first, second, count = float(share_P[i]), float(share_P[j]), float(min(count_P[i], count_P[j]))
            correlation = _correlation(first, second, (above + below + 1) / count)
            low, high = paired_bounds(first, second, correlation, count, 1 - alpha)
            if mid_p(above, below) > alpha:
                low, high = min(low, 0.0), max(high, 0.0)
            low_PP[i, j], high_PP[i, j] = min(low_PP[i, j], low), max(high_PP[i, j], high)
            low_PP[j, i], high_PP[j, i] = -high_PP[i, j], -low_PP[i, j]


def _spread(difference_C: np.ndarray, most: int) -> bool:
    """Return whether enough clusters differ from the usual difference. `most` have a difference of the same sign."""
    if len(difference_C) - most >= LEAST_SPREAD:
        return True
    return int((np.abs(difference_C - np.median(difference_C)) > 1e-12).sum()) >= LEAST_SPREAD


def _correlation(first: float, second: float, discordant: float) -> float:
    """Return the correlation of two points' answers, from their shares and the share of answers that differ.

    The caller adds a half to both kinds of differing answers: without it, two points that agree on all examples would
    seem to agree on all examples that exist.
    """
    variances = first * (1 - first), second * (1 - second)
    if not min(variances):
        return 0.0
    covariance = (sum(variances) - discordant + (first - second) ** 2) / 2
    return min(1.0, max(0.0, covariance / math.sqrt(variances[0] * variances[1])))
