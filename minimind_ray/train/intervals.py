"""Quantiles, and the interval of a share such as an accuracy."""

from __future__ import annotations

import math
from statistics import NormalDist

NORMAL = NormalDist().inv_cdf(0.975)
"""The 97.5 % quantile of the normal distribution."""


def wilson(share: float, count: float, level: float = 0.95) -> tuple[float, float]:
    """Return the bounds of the score interval of a share of `count` independent examples (Wilson 1927)."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


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
