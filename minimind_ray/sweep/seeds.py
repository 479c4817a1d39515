"""Model what the seed does to a trial's metric: an effect on all points, and an effect on each point alone.

    V_ps = m_p + e_s + r_ps

`m_p` is the value of point p that a comparison is about. `e_s` is the effect of seed s on all points (for example the
order of the data), with one variance. `r_ps` is the rest, with a variance for each point.

    P points, S seeds, T trials (a point with a seed), B draws
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

PRIOR_FREE, PRIOR_RATIO = 3.0, 2.0
"""The weight of the other points' variance in a point's variance: at most 3 degrees of freedom, and at most twice the
point's own ones. See `_moderated`."""
MEDIAN_FREE = 0.5
"""The part of the other points' degrees of freedom that their median variance holds. See `_moderated`."""
ODD = 0.05
"""The level of the test that a point's spread over seeds is larger than the other points' spread."""
ROUNDING = 1e-9
"""A spread that is smaller than this part of the values is due to rounding."""


@dataclass(frozen=True)
class Seeds:
    """The estimates that `fit_seeds` makes.

    `weight_PT` maps the trials' values to the points' estimates. `own_P` is the variance of a point's rest for a single
    seed, with `own_free_P` degrees of freedom; `shared` marks that all points use one estimate of this variance.
    `common` is the variance of the seeds' effects on all points, with `common_free` degrees of freedom. `extra_T` is
    the known variance of single trials' values. Zero degrees of freedom mean that a variance is unknown. `odd_P` marks
    points whose spread over seeds is significantly larger than the other points' spread.
    """

    point_T: np.ndarray
    seed_T: np.ndarray
    extra_T: np.ndarray
    weight_PT: np.ndarray
    own_P: np.ndarray
    own_free_P: np.ndarray
    shared_P: np.ndarray
    common: float
    common_free: int
    odd_P: np.ndarray

    def draw(self, draws: int, rng: np.random.Generator) -> np.ndarray:
        """Draw the error of each point's estimate that is due to the seeds: [B, P].

        Each variance is divided by a draw of chi-squared over its degrees of freedom, so that the error has the tails
        of Student's t: a variance that was estimated from few seeds is uncertain itself.
        """
        free_P = np.maximum(self.own_free_P, 1)
        chi_BP = rng.chisquare(free_P, (draws, len(free_P))) / free_P
        if self.shared_P.any():
            chi_BP[:, self.shared_P] = chi_BP[:, [self.shared_P.argmax()]]
        error_BT = rng.standard_normal((draws, len(self.point_T)))
        error_BT *= np.sqrt(self.own_P / chi_BP)[:, self.point_T]
        common_free = max(self.common_free, 1)
        scale_B = np.sqrt(self.common / (rng.chisquare(common_free, draws) / common_free))
        error_BT += (rng.standard_normal((draws, self.seed_T.max() + 1)) * scale_B[:, None])[:, self.seed_T]
        if self.extra_T.any():
            error_BT += rng.standard_normal(error_BT.shape) * np.sqrt(self.extra_T)
        return error_BT @ self.weight_PT.T

    def covariance(self) -> np.ndarray:
        """Return the covariance of the points' estimates that is due to the seeds: [P, P]."""
        same_TT = self.seed_T[:, None] == self.seed_T
        covariance_TT = np.diag(self.own_P[self.point_T] + self.extra_T) + self.common * same_TT
        return self.weight_PT @ covariance_TT @ self.weight_PT.T


def fit_seeds(value_T: np.ndarray, point_T: np.ndarray, seed_T: np.ndarray, extra_T: np.ndarray) -> Seeds:
    """Estimate the model's variances, and the weights of the trials in the points' estimates.

    The variances come from the residuals of the two-way layout and from the reduction of squares by the seeds
    (Henderson's method 3; Searle, Casella & McCulloch, Variance Components, ch. 5). Points whose seeds differ much more
    than those of the others are left out of both: one diverged seed would hide all other differences. The points'
    estimates are generalised least squares with seeds as random effects: a point that lacks a seed is compared without
    that seed's effect as far as this effect is known, and if all points have the same seeds, the estimates are plain
    means.

    Args:
        value_T: the trials' metrics.
        point_T: each trial's point, 0 to P - 1.
        seed_T: each trial's seed, any whole numbers.
        extra_T: variances of single trials' values that are known besides, such as those of predictions.
    """
    points, (_, seed_T) = int(point_T.max()) + 1, np.unique(seed_T, return_inverse=True)
    point_TP, seed_TS = _indicators(point_T), _indicators(seed_T)
    layout, odd_P = _without_odd(value_T, point_T, seed_T)
    pooled, free, common, common_free = _pooled(value_T, layout, seed_TS)
    own_P, free_P, shared_P = np.full(points, pooled), np.full(points, float(free)), ~odd_P
    if layout.separate or odd_P.any():
        own_P, free_P = _moderated(_own_variances(value_T, layout, common), layout.free_P, odd_P)
        if layout.separate:
            shared_P = np.zeros(points, bool)
        else:  # The usual points cannot be told apart.
            own_P[shared_P], free_P[shared_P] = pooled, free
    weight_PT = _weights(point_TP, seed_TS, pooled, common, extra_T)
    return Seeds(point_T, seed_T, extra_T, weight_PT, own_P, free_P, shared_P, common, common_free, odd_P)


def _pooled(value_T: np.ndarray, layout: _Layout, seed_TS: np.ndarray) -> tuple[float, int, float, int]:
    """Return the mean variance of the rest and that of the seeds' effects on all points, with degrees of freedom.

    Odd points have no part in it.
    """
    usual_T = layout.usual_T
    free = round(np.trace(layout.residual_TT))
    pooled = float(((layout.residual_TT @ value_T) ** 2).sum() / free) if free else 0.0
    within_TT, seed_TS = layout.within_TT[np.ix_(usual_T, usual_T)], seed_TS[usual_T]
    common, common_free = 0.0, round(np.trace(within_TT)) - free
    if free and common_free:
        explained = ((within_TT @ value_T[usual_T]) ** 2).sum() - pooled * free
        common = max(0.0, (explained - common_free * pooled) / np.trace(seed_TS.T @ within_TT @ seed_TS))
    return pooled, free, common, common_free


def _weights(
    point_TP: np.ndarray, seed_TS: np.ndarray, pooled: float, common: float, extra_T: np.ndarray
) -> np.ndarray:
    """Return the weights of generalised least squares: [P, T]."""
    own = max(pooled, 1e-6 * common) or 1.0
    inverse_TT = np.linalg.inv(np.diag(1.0 + extra_T / own) + common / own * seed_TS @ seed_TS.T)
    return np.linalg.solve(point_TP.T @ inverse_TT @ point_TP, point_TP.T @ inverse_TT)


@dataclass(frozen=True)
class _Layout:
    """Which trials there are, and what their residuals say about each point's own variance.

    `within_TT` maps values to deviations from the points' means, `residual_TT` to residuals from points and seeds. The
    points `known_P` have residuals: their variances solve `equations_PP`. The points `alone_P` share no seed with other
    points that would give residuals; odd points are among them, so that they change nothing for the other points, whose
    trials are `usual_T`. `free_P` are the degrees of freedom of the points' variances. `separate` is False if the
    points' variances cannot be told apart.
    """

    point_TP: np.ndarray
    usual_T: np.ndarray
    within_TT: np.ndarray
    residual_TT: np.ndarray
    known_P: np.ndarray
    equations_PP: np.ndarray
    alone_P: np.ndarray
    free_P: np.ndarray
    separate: bool


def _indicators(number_T: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return a column of ones and zeros for each number from 0 to the largest: [T, K]."""
    return (np.asarray(number_T)[:, None] == np.arange(max(number_T) + 1)).astype(float)


def _layout(point_TP: np.ndarray, seed_TS: np.ndarray, odd_P: np.ndarray | None = None) -> _Layout:
    seeds_P = point_TP.sum(0)
    odd_P = np.zeros(len(seeds_P), bool) if odd_P is None else odd_P
    usual_T = point_TP @ odd_P == 0
    within_TT, residual_TT = _residuals_of(point_TP), np.zeros((len(point_TP), len(point_TP)))
    usual_TT = np.ix_(usual_T, usual_T)
    residual_TT[usual_TT] = _residuals_of(np.hstack([point_TP, seed_TS])[usual_T])
    tells_seeds = np.trace(residual_TT) >= 0.5 and (~odd_P).sum() > 1
    if not tells_seeds:
        # Nothing tells the seeds' effects from chance, so the points' own variances contain these effects.
        residual_TT[usual_TT] = within_TT[usual_TT]
    free_P = point_TP.T @ np.diag(residual_TT)
    known_P = free_P > 1e-9
    equations_PP = (point_TP.T @ residual_TT**2 @ point_TP)[np.ix_(known_P, known_P)]
    separate = bool(known_P.any()) and bool(np.linalg.cond(equations_PP) < 1e6)
    if tells_seeds:  # The seeds' effects have taken an equal part of each point's degrees of freedom.
        free_P *= known_P.sum() / max(1, known_P.sum() - 1)
    alone_P = ~known_P & (seeds_P > 1)
    free_P = np.where(known_P, free_P, np.where(alone_P, seeds_P - 1, 0.0))
    return _Layout(point_TP, usual_T, within_TT, residual_TT, known_P, equations_PP, alone_P, free_P, separate)


def _residuals_of(design_TK: np.ndarray) -> np.ndarray:
    """Return the matrix that maps values to their residuals from the least-squares fit of a design: [T, T]."""
    return np.eye(len(design_TK)) - design_TK @ np.linalg.pinv(design_TK)


def _own_variances(value_BT: np.ndarray, layout: _Layout, common: float) -> np.ndarray:
    """Return each point's own variance: [B, P] for values [B, T].

    The expected squared residuals are linear in the variances, so the variances are the solution of linear equations
    (Grubbs 1948, "On estimating precision of measuring instruments"; MINQUE). A point that is alone with its seeds
    gets what its variance exceeds `common` by. No variance is below a twentieth of the pooled variance.
    """
    squares_BP = (value_BT @ layout.residual_TT) ** 2 @ layout.point_TP
    pooled_B = squares_BP.sum(-1, keepdims=True) / np.trace(layout.residual_TT)
    own_BP = np.broadcast_to(pooled_B, squares_BP.shape).copy()
    if layout.separate:
        own_BP[..., layout.known_P] = squares_BP[..., layout.known_P] @ np.linalg.inv(layout.equations_PP).T
    alone_BP = (value_BT @ layout.within_TT) ** 2 @ layout.point_TP[:, layout.alone_P]
    own_BP[..., layout.alone_P] = alone_BP / layout.free_P[layout.alone_P] - common
    return np.maximum(own_BP, 0.05 * pooled_B)


def typical_of_others(own_BP: np.ndarray, free_P: np.ndarray, odd_P: np.ndarray) -> np.ndarray:
    """Return the typical variance of all other points but odd ones, for each point: [B, P] for variances [B, P].

    The typical variance is the median, which a single large variance does not change. It is corrected for the skewness
    of variances from few seeds: the median of chi-squared over its degrees of freedom (Wilson & Hilferty 1931).
    """
    usual_P = (free_P > 0) & ~odd_P
    scaled_BN = (own_BP / (1 - 2 / (9 * np.maximum(free_P, 1))) ** 3)[..., usual_P]
    typical_BP, others = own_BP.copy(), int(usual_P.sum()) - 1
    if others >= 0:
        typical_BP[..., ~usual_P] = np.median(scaled_BN, axis=-1, keepdims=True)
    if others > 0:
        order_BN = np.argsort(scaled_BN, axis=-1)
        sorted_BN, rank_BN = np.take_along_axis(scaled_BN, order_BN, -1), np.argsort(order_BN, axis=-1)
        # The middle two (or one) of all but the point itself.
        middle = [k + (rank_BN <= k) for k in ((others - 1) // 2, others // 2)]
        typical_BP[..., usual_P] = sum(np.take_along_axis(sorted_BN, k, -1) for k in middle) / 2
    return typical_BP


def _moderated(own_P: np.ndarray, free_P: np.ndarray, odd_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return variances that use what the other points show, and their degrees of freedom.

    From two or three seeds a point's own variance is too uncertain to be used alone, and a common variance would be
    wrong for points that vary more than others. So the other points' typical variance enters with the weight of a few
    degrees of freedom (Smyth 2004, "Linear models and empirical Bayes methods"), but never makes a variance smaller
    than the point's own estimate. With many seeds the point's own variance decides, and with two seeds it keeps enough
    weight to show a point that varies more. The others say nothing about an odd point, and it says nothing about them.
    A point with a single seed uses the other points' variance. `docs/statistics.md` shows the simulation.
    """
    others_P = typical_of_others(own_P, free_P, odd_P)
    usual_free_P = np.where(odd_P, 0.0, free_P)
    free_others_P = usual_free_P.sum() - usual_free_P
    prior_P = np.minimum(np.minimum(PRIOR_FREE, PRIOR_RATIO * usual_free_P), MEDIAN_FREE * free_others_P)
    mixed_P = (prior_P * others_P + free_P * own_P) / np.maximum(prior_P + free_P, 1e-9)
    alone_P = free_P == 0
    return (
        np.where(alone_P, others_P, np.maximum(own_P, mixed_P)),
        np.where(alone_P, free_others_P, prior_P + free_P),
    )


def _without_odd(value_T: np.ndarray, point_T: np.ndarray, seed_T: np.ndarray) -> tuple[_Layout, np.ndarray]:
    """Return the layout without odd points, and which points are odd.

    Odd points vary significantly more over seeds than is typical of the other points. An odd point makes the variances
    of the others uncertain, too, so the points that seem odd are judged a second time, without each other.
    """
    point_TP, seed_TS = _indicators(point_T), _indicators(seed_T)
    layout = _layout(point_TP, seed_TS)
    odd_P, known_P = np.zeros(len(layout.free_P), bool), layout.free_P > 0
    if not layout.separate or known_P.sum() < 3:
        return layout, odd_P
    limit = _largest_ratio(tuple(point_T.tolist()), tuple(seed_T.tolist()))
    own_P, others_P = _own_and_others(value_T, layout, odd_P)
    seems_P = known_P & (own_P > (ROUNDING * np.abs(value_T).max()) ** 2) & (own_P > limit * others_P)
    for _ in range(2):
        if (seems_P == odd_P).all():
            break
        odd_P = seems_P
        layout = _layout(point_TP, seed_TS, odd_P)
        own_P, others_P = _own_and_others(value_T, layout, odd_P, common=_pooled(value_T, layout, seed_TS)[2])
        seems_P = odd_P & (own_P > limit * others_P)
    return layout, odd_P


@lru_cache(maxsize=8)
def _largest_ratio(point_T: tuple[int, ...], seed_T: tuple[int, ...]) -> float:
    """Return how large the largest ratio of a point's variance to the others' typical variance is by chance.

    In simulations of the same trials with equal variances, 5 % of sweeps have a larger ratio.
    """
    layout = _layout(_indicators(point_T), _indicators(seed_T))
    equal_BT = np.random.default_rng(0).standard_normal((2000, len(point_T)))
    own_BP, others_BP = _own_and_others(equal_BT, layout, np.zeros(len(layout.free_P), bool))
    return float(np.quantile((own_BP / others_BP)[:, layout.free_P > 0].max(1), 1 - ODD))


def _own_and_others(
    value_BT: np.ndarray, layout: _Layout, odd_P: np.ndarray, common: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Return each point's own variance, and the typical variance of the others: [B, P] each."""
    own_BP = _own_variances(value_BT, layout, common)
    return own_BP, typical_of_others(own_BP, layout.free_P, odd_P)
