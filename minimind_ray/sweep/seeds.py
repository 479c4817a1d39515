"""Model what the seed does to a trial's metric: an effect on all points, and an effect on each point alone.

    V_ps = m_p + e_s + r_ps

`m_p` is the value of point p that a comparison is about. `e_s` is the effect of seed s on all points (for example the
order of the data), with one variance. `r_ps` is the rest, with a variance for each point.

    P points, S seeds, T trials (a point with a seed), B draws
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PRIOR_FREE = 3.0
"""The weight of the other points' variance in a point's variance, in degrees of freedom. See `_moderated`."""
ODD = 0.05
"""The level of the test that a point's spread over seeds is larger than the other points' spread."""


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
    shared: bool
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
        if self.shared:
            chi_BP[:] = chi_BP[:, :1]
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
    (Henderson's method 3; Searle, Casella & McCulloch, Variance Components, ch. 5). The points' estimates are
    generalised least squares with seeds as random effects: a point that lacks a seed is compared without that seed's
    effect as far as this effect is known, and if all points have the same seeds, the estimates are plain means.

    Args:
        value_T: the trials' metrics.
        point_T: each trial's point, 0 to P - 1.
        seed_T: each trial's seed, any whole numbers.
        extra_T: variances of single trials' values that are known besides, such as those of predictions.
    """
    points, (_, seed_T) = int(point_T.max()) + 1, np.unique(seed_T, return_inverse=True)
    point_TP = (point_T[:, None] == np.arange(points)).astype(float)
    seed_TS = (seed_T[:, None] == np.arange(seed_T.max() + 1)).astype(float)
    layout = _layout(point_TP, seed_TS)
    free = round(np.trace(layout.residual_TT))
    pooled = float(((layout.residual_TT @ value_T) ** 2).sum() / free) if free else 0.0
    common, common_free = 0.0, len(value_T) - points - free
    if free and common_free:
        explained = ((layout.within_TT @ value_T) ** 2).sum() - pooled * free
        common = max(0.0, (explained - common_free * pooled) / np.trace(seed_TS.T @ layout.within_TT @ seed_TS))

    own_P, free_P, odd_P = np.full(points, pooled), np.full(points, float(free)), np.zeros(points, bool)
    if layout.separate:
        own_P = _own_variances(value_T, layout, common)
        odd_P = _odd(own_P, layout)
        own_P, free_P = _moderated(own_P, layout.free_P)
    weight_PT = _weights(point_TP, seed_TS, pooled, common, extra_T)
    return Seeds(point_T, seed_T, extra_T, weight_PT, own_P, free_P, not layout.separate, common, common_free, odd_P)


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
    points that would give residuals. `free_P` are the degrees of freedom of the points' variances. `separate` is
    False if the points' variances cannot be told apart.
    """

    point_TP: np.ndarray
    within_TT: np.ndarray
    residual_TT: np.ndarray
    known_P: np.ndarray
    equations_PP: np.ndarray
    alone_P: np.ndarray
    free_P: np.ndarray
    separate: bool


def _layout(point_TP: np.ndarray, seed_TS: np.ndarray) -> _Layout:
    within_TT = _residuals_of(point_TP)
    residual_TT = _residuals_of(np.hstack([point_TP, seed_TS]))
    seeds_P = point_TP.sum(0)
    if np.trace(residual_TT) < 0.5 or len(seeds_P) == 1:
        # Nothing tells the seeds' effects from chance, so the points' own variances contain these effects.
        residual_TT = within_TT
    free_P = point_TP.T @ np.diag(residual_TT)
    known_P = free_P > 1e-9
    equations_PP = (point_TP.T @ residual_TT**2 @ point_TP)[np.ix_(known_P, known_P)]
    separate = bool(known_P.any()) and bool(np.linalg.cond(equations_PP) < 1e6)
    if residual_TT is not within_TT:  # The seeds' effects have taken an equal part of each point's degrees of freedom.
        free_P *= known_P.sum() / max(1, known_P.sum() - 1)
    alone_P = ~known_P & (seeds_P > 1)
    free_P = np.where(known_P, free_P, np.where(alone_P, seeds_P - 1, 0.0))
    return _Layout(point_TP, within_TT, residual_TT, known_P, equations_PP, alone_P, free_P, separate)


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
    own_BP[..., layout.known_P] = squares_BP[..., layout.known_P] @ np.linalg.inv(layout.equations_PP).T
    alone_BP = (value_BT @ layout.within_TT) ** 2 @ layout.point_TP[:, layout.alone_P]
    own_BP[..., layout.alone_P] = alone_BP / layout.free_P[layout.alone_P] - common
    return np.maximum(own_BP, 0.05 * pooled_B)


def _of_others(own_BP: np.ndarray, free_P: np.ndarray) -> np.ndarray:
    """Return the typical variance of all other points, for each point; `own_BP` may hold many sets of variances.

    The typical variance is the median, which a single odd point does not change. It is corrected for the skewness of
    variances from few seeds: the median of chi-squared over its degrees of freedom (Wilson & Hilferty 1931).
    """
    scaled_BP = own_BP / (1 - 2 / (9 * np.maximum(free_P, 1))) ** 3
    typical_BP = own_BP.copy()
    for p in range(len(free_P)):
        others_P = (free_P > 0) & (np.arange(len(free_P)) != p)
        if others_P.any():
            typical_BP[..., p] = np.median(scaled_BP[..., others_P], axis=-1)
    return typical_BP


def _moderated(own_P: np.ndarray, free_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return variances that use what the other points show, and their degrees of freedom.

    From two or three seeds a point's own variance is too uncertain to be used alone, and a common variance would be
    wrong for points that vary more than others. So the other points' typical variance enters with the weight of a few
    degrees of freedom (Smyth 2004, "Linear models and empirical Bayes methods"), but never makes a variance smaller
    than the point's own estimate. With many seeds the point's own variance decides. A point with a single seed uses
    the other points' variance. `docs/statistics.md` shows the simulation.
    """
    others_P, free_others_P = _of_others(own_P, free_P), free_P.sum() - free_P
    prior_P = np.minimum(PRIOR_FREE, free_others_P)
    mixed_P = (prior_P * others_P + free_P * own_P) / np.maximum(prior_P + free_P, 1e-9)
    alone_P = free_P == 0
    return (
        np.where(alone_P, others_P, np.maximum(own_P, mixed_P)),
        np.where(alone_P, free_others_P, prior_P + free_P),
    )


def _odd(own_P: np.ndarray, layout: _Layout) -> np.ndarray:
    """Return which points vary significantly more over seeds than is typical of the other points.

    The largest ratio of a point's variance to the others' typical variance is compared with what it is in simulations
    of the same trials with equal variances. So at most 5 % of sweeps with equal variances have an odd point.
    """
    known_P = layout.free_P > 0
    if known_P.sum() < 3:
        return np.zeros(len(own_P), bool)
    equal_BT = np.random.default_rng(0).standard_normal((2000, len(layout.point_TP)))
    equal_BP = _own_variances(equal_BT, layout, 0.0)
    ratio_BP = equal_BP / _of_others(equal_BP, layout.free_P)
    limit = np.quantile(ratio_BP[:, known_P].max(1), 1 - ODD)
    return known_P & (own_P > limit * _of_others(own_P, layout.free_P))
