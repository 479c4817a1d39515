"""Estimate how important each axis of a sweep is: its share of the variance of the metric between the points.

Functional ANOVA (Hoeffding 1948; for learners' settings Hutter, Hoos & Leyton-Brown 2014) writes the metric as a mean,
plus a function of each axis, plus a function of each pair of axes, and so on. The variances of these functions add up
to the variance of the metric. Here each function is a sum of a few orthonormal columns times coefficients, so that its
variance is the sum of the squared coefficients.

*On a full grid* the columns describe every function of the levels, and the coefficients follow from the points' values.
*On other points*, such as drawn ones, the columns are polynomials, and a least-squares fit gives the coefficients.

Errors make squares larger on average, by the errors' variance. So this variance is subtracted. The intervals come from
draws of the errors: those of `judge` on a full grid, and the fit's own errors on other points.

    P points, B draws, K columns
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minimind_ray.sweep.axes import Drawn

DEGREES = (2, 3, 4)
"""The degrees of the polynomials to choose from. A straight line would miss an optimum between an axis's ends."""
LEAST_POINTS, LEAST_FREE = 8, 3
"""A fit needs at least so many points (or draws), and so many more than coefficients."""
LEAST_PER_LEVEL = 2
"""A fit needs so many points on each level of an axis whose values have no order."""
TIMES = " × "
"""Stands between the keys of a pair of axes."""


@dataclass(frozen=True)
class Importance:
    """The share of an axis `key`, or of a pair "a × b" beyond what its two axes explain, with its 95 % interval."""

    key: str
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """The points' values; draws of the values' errors [B, P]; and the variances of the differences' errors [P, P]."""

    value_P: np.ndarray
    draws_BP: np.ndarray
    variance_PP: np.ndarray


@dataclass(frozen=True)
class _Model:
    """How the values' effects are computed: `estimators` map values to coefficients [K, P], by the effect's key.

    `measured` has the errors of these coefficients. `rest` is the variance that no effect explains, and `rest_B` its
    draws.
    """

    estimators: dict[str, np.ndarray]
    measured: Measured
    rest: float
    rest_B: np.ndarray


def importance_of(
    points: Sequence[Mapping[str, Any]], measured: Measured, drawn: Mapping[str, Drawn] | None = None
) -> tuple[list[Importance], str]:
    """Return the importance of the axes and their pairs, largest first; and why there is none, or an empty text.

    Nothing is returned for fewer than two axes with several values: a single axis explains everything. `drawn` are the
    axes whose values were drawn from a range.
    """
    keys = [key for key in points[0] if len({repr(point[key]) for point in points}) > 1] if points else []
    if len(keys) < 2:
        return [], ""
    columns = {key: [point[key] for point in points] for key in keys}
    model = _grid_model(columns, measured) if _is_full_grid(columns) else _fitted(columns, measured, drawn or {})
    if isinstance(model, str):
        return [], model
    found = _shares(model)
    if not found:
        return [], "The points differ no more than their errors, so nothing shows which axis is important."
    return sorted(found, key=lambda each: -each.share), ""


def _shares(model: _Model) -> list[Importance]:
    """Return every effect's share of the sum of all variances; nothing if this sum is 0."""
    measured, squares, squares_B = model.measured, dict[str, float](), dict[str, np.ndarray]()
    for key, estimator_KP in model.estimators.items():
        # The sum of the variances of the coefficients' errors. A column has the sum 0, so differences are enough.
        noise = -0.5 * float((estimator_KP.T @ estimator_KP * measured.variance_PP).sum())
        coefficient_K = estimator_KP @ measured.value_P
        drawn_BK = coefficient_K + measured.draws_BP @ estimator_KP.T
        squares[key] = max(0.0, float(coefficient_K @ coefficient_K) - noise)
        squares_B[key] = (drawn_BK**2).sum(1) - 2 * noise  # The draws have the errors a second time.
    total = sum(squares.values()) + max(0.0, model.rest)
    total_B = np.sum(list(squares_B.values()), axis=0) + model.rest_B
    if total <= ROUNDING * float(np.abs(measured.value_P).max()) ** 2:
        return []
    known_B = total_B > 0
    found: list[Importance] = []
    for key, square in squares.items():
        share_B = np.clip(squares_B[key] / np.where(known_B, total_B, 1.0), 0.0, 1.0)
        # In a draw without any variance, a share may be anything.
        low = np.quantile(np.where(known_B, share_B, 0.0), 0.025)
        high = np.quantile(np.where(known_B, share_B, 1.0), 0.975)
        share = square / total
        found.append(Importance(key, share, min(share, float(low)), max(share, float(high))))
    return found


ROUNDING = 1e-18
"""A variance that is smaller than this part of the squared values is due to rounding."""


def _is_full_grid(columns: Mapping[str, Sequence[Any]]) -> bool:
    """Whether each combination of the axes' values is there once."""
    combinations = set(zip(*(map(repr, values) for values in columns.values())))
    points, levels = len(next(iter(columns.values()))), (len(set(map(repr, values))) for values in columns.values())
    return len(combinations) == points == int(np.prod(list(levels)))


def _grid_model(columns: Mapping[str, Sequence[Any]], measured: Measured) -> _Model:
    """Return the exact decomposition of a full grid; effects of three axes and more are the rest."""
    points = len(measured.value_P)
    effects = {key: _level_columns(values) for key, values in columns.items()}
    effects |= _pairs(effects)
    estimators = {key: column_PK.T / points for key, column_PK in effects.items()}
    explained_PP = sum(column_PK @ estimators[key] for key, column_PK in effects.items())
    rest_PP = np.eye(points) - 1 / points - explained_PP
    noise = -0.5 * float((rest_PP * measured.variance_PP).sum()) / points
    value_P, drawn_BP = rest_PP @ measured.value_P, (measured.value_P + measured.draws_BP) @ rest_PP
    return _Model(estimators, measured, float(np.mean(value_P**2)) - noise, (drawn_BP**2).mean(1) - 2 * noise)


def _fitted(columns: Mapping[str, Sequence[Any]], measured: Measured, drawn: Mapping[str, Drawn]) -> _Model | str:
    """Return the least-squares fit that predicts points best which it has not seen; or why there is none.

    Each axis has a polynomial of one of DEGREES, the same for all axes, and a level of an axis without order has a
    value of its own. Pairs of axes have products of their linear terms, if these help.
    """
    points = len(measured.value_P)
    for key, values in columns.items():
        if not _has_order(values) and min(Counter(map(repr, values)).values()) < LEAST_PER_LEVEL:
            return f"Too few points to tell how important each axis is: {key} has a value with a single point."
    drawn_P = zip(*(map(repr, columns[key]) for key in columns if key in drawn)) if drawn.keys() & columns else None
    names_P = list(map(repr, drawn_P or range(points)))
    group_P = np.unique(names_P, return_inverse=True)[1]
    best: tuple[float, dict[str, np.ndarray], _Fit] | None = None
    for degree, with_pairs in itertools.product(DEGREES, (False, True)):
        effects = {key: _curve(values, drawn.get(key), degree) for key, values in columns.items()}
        if with_pairs:
            effects |= _pairs({key: _curve(values, drawn.get(key), 1) for key, values in columns.items()})
        fit = _Fit(np.hstack([np.ones((points, 1)), *effects.values()]), group_P, measured.value_P)
        error = fit.unseen_error() if fit.has_enough_points() else None
        if error is not None and (best is None or error < best[0]):
            best = error, effects, fit
    if best is None:
        groups = int(group_P.max()) + 1
        what = f"{points} points" if groups == points else f"{groups} draws"
        return f"Too few points to tell how important each axis is: {what}, and no full grid."
    return _model_of_fit(best[1], best[2], measured)


class _Fit:
    """A least-squares fit of the values to the columns of a design, and its errors.

    A draw may be combined with several values of the other axes. Such points are a group: what the curves miss of the
    drawn axes is the same for all of them, so the groups count, not the points, where drawn axes are concerned. Without
    such combinations each point is a group.
    """

    def __init__(self, design_PK: np.ndarray, group_P: np.ndarray, value_P: np.ndarray) -> None:
        self.design_PK, self.group_P = design_PK, group_P
        (points, columns), groups = design_PK.shape, int(group_P.max()) + 1
        first_G = np.unique(group_P, return_index=True)[1]
        between = int((design_PK == design_PK[first_G][group_P]).all(0).sum())
        self.free_groups, self.groups = groups - between, groups
        self.free_points = points - groups - (columns - between)
        self.inverse_KP = np.linalg.pinv(design_PK)
        self.residual_P = value_P - design_PK @ (self.inverse_KP @ value_P)
        mean_G = np.bincount(group_P, self.residual_P) / np.bincount(group_P)
        self.group_variance = float((mean_G**2).sum()) / max(1, self.free_groups)
        self.point_variance = float(((self.residual_P - mean_G[group_P]) ** 2).sum()) / max(1, self.free_points)

    def has_enough_points(self) -> bool:
        """Whether there are enough groups, and enough points in them, for the number of columns."""
        inside = len(self.group_P) == self.groups or self.free_points >= LEAST_FREE
        return self.groups >= LEAST_POINTS and self.free_groups >= LEAST_FREE and inside

    def unseen_error(self) -> float | None:
        """Return the mean squared error for each group by the fit to all other groups (PRESS: Allen 1974).

        None if the other groups do not determine the fit.
        """
        left_PP = np.eye(len(self.group_P)) - self.design_PK @ self.inverse_KP
        total = 0.0
        for group in range(self.groups):
            own_P = self.group_P == group
            left = left_PP[np.ix_(own_P, own_P)]
            if np.linalg.cond(left) > 1e9 or np.abs(left).max() < 1e-9:
                return None
            total += float((np.linalg.solve(left, self.residual_P[own_P]) ** 2).sum())
        return total / len(self.group_P)

    def draw(self, draws: int) -> tuple[np.ndarray, np.ndarray]:
        """Return draws of the points' errors [B, P], and of their variance [B]."""
        rng, points = np.random.default_rng(0), len(self.group_P)
        group_B = self.group_variance * self.free_groups / rng.chisquare(self.free_groups, draws)
        draws_BP = (rng.standard_normal((draws, self.groups)) * np.sqrt(group_B)[:, None])[:, self.group_P]
        if self.groups == points:
            return draws_BP, group_B
        point_B = self.point_variance * self.free_points / rng.chisquare(self.free_points, draws)
        draws_BP += rng.standard_normal((draws, points)) * np.sqrt(point_B)[:, None]
        return draws_BP, group_B + point_B


def _model_of_fit(effects: Mapping[str, np.ndarray], fit: _Fit, measured: Measured) -> _Model:
    points = len(fit.group_P)
    draws_BP, variance_B = fit.draw(len(measured.draws_BP))
    other_PP, group_PP = 1 - np.eye(points), fit.group_P[:, None] != fit.group_P
    variance_PP = 2 * (fit.point_variance * other_PP + fit.group_variance * group_PP)
    # What the points' own errors explain of the residuals is no effect.
    noise = float(measured.variance_PP.sum()) / (2 * points * (points - 1))
    starts = np.cumsum([1, *(column_PK.shape[1] for column_PK in effects.values())])
    estimators = {key: fit.inverse_KP[start:end] for key, start, end in zip(effects, starts, starts[1:])}
    rest = fit.group_variance + fit.point_variance - noise
    return _Model(estimators, Measured(measured.value_P, draws_BP, variance_PP), rest, variance_B - noise)


def _pairs(effects: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the products of all columns of two effects, for each pair of effects."""
    return {
        f"{a}{TIMES}{b}": (effects[a][:, :, None] * effects[b][:, None, :]).reshape(len(effects[a]), -1)
        for a, b in itertools.combinations(effects, 2)
    }


def _curve(values: Sequence[Any], axis: Drawn | None, degree: int) -> np.ndarray:
    """Return columns [P, K] for the polynomials of an axis up to `degree`; for values without order `_level_columns`.

    For a drawn axis the polynomials are Legendre's over its range, orthonormal for uniform draws. For levels they are
    polynomials of the levels' places, orthonormal on the levels.
    """
    if not _has_order(values):
        return _level_columns(values)
    if axis is None:
        level_L, place_P = np.unique(np.array(values, float), return_inverse=True)
        levels = len(level_L)
        power_LK = np.vander(np.linspace(-1, 1, levels), min(degree + 1, levels), increasing=True)
        return (np.linalg.qr(power_LK).Q[:, 1:] * np.sqrt(levels))[place_P]
    scale = np.log if axis.kind == "log" else np.asarray
    low, high, number_P = scale(axis.low), scale(axis.high), scale(np.array(values, float))
    columns_PK = np.polynomial.legendre.legvander(2 * (number_P - low) / (high - low) - 1, degree)
    return columns_PK[:, 1:] * np.sqrt(2 * np.arange(1, degree + 1) + 1)


def _level_columns(values: Sequence[Any]) -> np.ndarray:
    """Return orthonormal columns [P, levels - 1] that describe every function of the levels with the mean 0."""
    names = list(map(repr, values))
    place_P = np.unique(names, return_inverse=True)[1]
    levels = int(place_P.max()) + 1
    orthogonal_LL = np.linalg.qr(np.hstack([np.ones((levels, 1)), np.eye(levels)[:, 1:]])).Q
    return (orthogonal_LL[:, 1:] * np.sqrt(levels))[place_P]


def _has_order(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
