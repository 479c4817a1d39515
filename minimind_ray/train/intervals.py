"""Quantiles, and the interval of a share such as an accuracy.

E examples, C clusters of examples
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

NORMAL = NormalDist().inv_cdf(0.975)
"""The 97.5 % quantile of the normal distribution."""


def wilson(share: float, count: float, level: float = 0.95) -> tuple[float, float]:
    """Return the bounds of the score interval of a share of `count` independent examples (Wilson 1927)."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def effective_count(share: float, variance: float, count: int, clusters: int) -> float:
    """Return how many independent examples are worth as much as `count` examples in `clusters` clusters.

    This is `count` over the design effect: the share's real variance over that of independent examples (Kish 1965).
    If all examples are right, or all wrong, the design effect is unknown: each cluster then counts as one example.
    """
    independent = share * (1 - share) / count
    if variance <= 0 or independent <= 0:
        return float(clusters)
    return min(float(count), max(independent / variance * count, 1.0))


def clustered_share(right_E: np.ndarray, cluster_E: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the share of right examples, which come in clusters.

    `right_E` holds 1 for a right example and 0 for a wrong one, `cluster_E` the ids of the clusters. It is Wilson's
    interval for the effective number of examples. The variance over clusters is that of a ratio (Cochran 1977, ch. 11).
    """
    count, share = len(right_E), float(right_E.mean())
    _, cluster_E = np.unique(cluster_E, return_inverse=True)
    off_C = np.bincount(cluster_E, right_E - share)
    clusters = len(off_C)
    # The last factor makes the design effect 1 if each example is its own cluster.
    variance = float(off_C @ off_C) / count**2 * clusters / max(clusters - 1, 1) * (count - 1) / count
    return wilson(share, effective_count(share, variance if clusters > 1 else 0.0, count, clusters))


def t_quantile(free: int) -> float:
    """Return the 97.5 % quantile of Student's t. From 5 degrees of freedom on: Cornish and Fisher's expansion."""
    if free <= 4:
        return (12.7062, 4.3027, 3.1824, 2.7764)[free - 1]
    z = NORMAL
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / free ** (k + 1) for k, term in enumerate(terms))


def clustered_mean(total_E: np.ndarray, count_E: np.ndarray, cluster_E: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of a mean over items, such as tokens, whose examples come in clusters.

    An example has `count_E` items with the sum `total_E`. The variance is that of a ratio of sums over clusters, which
    must be at least two (Cochran 1977, ch. 11); the quantile is Student's.
    """
    mean = float(total_E.sum() / count_E.sum())
    _, cluster_E = np.unique(cluster_E, return_inverse=True)
    off_C = np.bincount(cluster_E, total_E - mean * count_E)
    clusters = len(off_C)
    error = math.sqrt(float(off_C @ off_C) * clusters / (clusters - 1)) / float(count_E.sum())
    half = t_quantile(clusters - 1) * error
    return mean - half, mean + half
