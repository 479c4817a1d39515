"""Estimate how many more seeds or examples would decide a pair of points that is not distinguishable."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from minimind_ray.train.intervals import NORMAL, t_quantile

MOST_SEEDS = 100
"""More seeds of a point are neither proposed nor accepted."""
NO_DIFFERENCE = "no difference was observed"


@dataclass(frozen=True)
class Needed:
    """The number of seeds for each of the two points, and the factor on the number of examples.

    Each is None if no number would do. `why` says what stands in the way; it is empty if both are known.
    """

    seeds: int | None
    examples_factor: float | None
    why: str


def needed(
    difference: float,
    half: float,
    examples_variance: float,
    seeds_variance: float,
    seeds: tuple[int, int],
    free: float,
    lost: tuple[int, int] = (0, 0),
) -> Needed:
    """Return what makes the half-width of a difference's interval smaller than the difference.

    The half-width is split as `half² = k² (z² examples_variance + t² seeds_variance)`: z is the normal quantile, t
    Student's for `free` degrees of freedom, and k the widening for several pairs. The first part falls with the number
    of examples; the second falls with the number of seeds, and each seed adds one degree of freedom. If the points have
    different numbers of seeds, the harmonic mean of the two numbers counts.

    Args:
        difference: the observed difference.
        half: the present half-width.
        examples_variance: the part of the difference's variance that is due to the examples.
        seeds_variance: the part that is due to the seeds; 0 with one seed, where it is unknown.
        seeds: the number of each point's seeds that count.
        free: the degrees of freedom of `seeds_variance`; 0 if it is unknown.
        lost: the number of each point's seeds that do not count. The number returned includes them, since they may
            fail again. It is above both points' present numbers.
    """
    if difference == 0:
        return Needed(None, None, NO_DIFFERENCE)

    now = _harmonic_mean(*seeds)

    def of_seeds(number: float) -> float:
        quantile = t_quantile(max(1, math.floor(free + number - now))) if free else 0.0
        return quantile**2 * seeds_variance * now / number

    of_examples = NORMAL**2 * examples_variance
    total = of_examples + of_seeds(now)
    if total <= 0:
        return Needed(None, None, "the uncertainty is unknown")
    target = (difference / half) ** 2 * total if half else math.inf
    factor = of_examples / left * (1 + 1e-9) if (left := target - of_seeds(now)) > 0 else None
    if not free:
        return Needed(None, factor, "with one seed, the uncertainty of the seeds is unknown")
    larger = range(max(map(sum, zip(seeds, lost))) + 1, MOST_SEEDS + 1)
    enough = (n for n in larger if of_examples + of_seeds(_harmonic_mean(*(n - m for m in lost))) < target)
    number = next(enough, None)
    examples_alone = of_examples >= target
    if examples_alone and factor is None:
        return Needed(None, None, "it takes more seeds and more examples together")
    reasons: list[str] = []
    if number is None:
        reasons.append(
            "more seeds are not enough: the uncertainty of the examples alone is too large"
            if examples_alone
            else f"it would take more than {MOST_SEEDS:,} seeds"
        )
    if factor is None:
        reasons.append("more examples are not enough: the uncertainty of the seeds alone is too large")
    return Needed(number, factor, "; ".join(reasons))


def _harmonic_mean(first: int, second: int) -> float:
    return 2 * first * second / (first + second)


def narrowing(seeds: int, free: float) -> float:
    """Return by what factor one more seed is expected to narrow the seeds' part of an interval."""
    return float(t_quantile(int(free) + 1) / t_quantile(int(free)) * np.sqrt(seeds / (seeds + 1)))
