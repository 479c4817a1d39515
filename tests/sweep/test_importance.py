"""The importance of axes: against numbers worked out by hand, and on functions with known shares and noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from minimind_ray.sweep.axes import Drawn
from minimind_ray.sweep.importance import Importance, Measured, importance_of

pytestmark = pytest.mark.unit

Point = dict[str, Any]


def grid(**levels: int) -> list[Point]:
    points: list[Point] = [{}]
    for key, count in levels.items():
        points = [{**point, key: level} for point in points for level in range(count)]
    return points


def measured(points: list[Point], truth: Callable[[Point], float], noise: float = 0.0, seed: int = 0) -> Measured:
    rng, count = np.random.default_rng(seed), len(points)
    value_P = np.array([truth(point) for point in points]) + rng.normal(0, noise, count)
    return Measured(value_P, rng.normal(0, noise, (1000, count)), 2 * noise**2 * (1 - np.eye(count)))


def shares(points: list[Point], values: Measured, **drawn: Drawn) -> dict[str, Importance]:
    found, why = importance_of(points, values, drawn)
    assert not why and [each.share for each in found] == sorted((each.share for each in found), reverse=True)
    assert all(0 <= each.low <= each.share <= each.high <= 1 for each in found)
    return {each.key: each for each in found}


def test_an_additive_grid() -> None:
    # The values are 0 1 5 and 3 4 8: variances 9/4 between rows, and (4 + 1 + 9) / 3 between columns.
    points = grid(a=2, b=3)
    found = shares(points, measured(points, lambda point: 3 * point["a"] + [0, 1, 5][point["b"]]))
    assert found["a"].share == pytest.approx(2.25 / (2.25 + 14 / 3))
    assert found["b"].share == pytest.approx(14 / 3 / (2.25 + 14 / 3))
    assert found["a × b"].share == pytest.approx(0)


def test_effects_that_exist_only_together() -> None:
    points = grid(a=2, b=2)
    assert shares(points, measured(points, lambda point: point["a"] ^ point["b"]))["a × b"].share == pytest.approx(1)
    # Of three axes, the effect is in no pair either. 1 of 9 parts of the variance is that of c alone.
    points = grid(a=2, b=2, c=2)
    odd = measured(points, lambda point: 2 * ((-1) ** sum(point.values())) + 2**0.5 / 2 * (-1) ** point["c"])
    found = shares(points, odd)
    assert found["c"].share == pytest.approx(1 / 9) and sum(each.share for each in found.values()) < 0.12


def test_the_variance_of_errors_is_no_effect() -> None:
    points, estimates = grid(a=3, b=4), list[float]()
    for seed in range(60):
        found = shares(points, measured(points, lambda point: [0, 1, 2][point["a"]], noise=0.5, seed=seed))
        assert found["b"].low == 0 < found["b"].high
        estimates.append(found["a"].share)
    # Without the correction it would be about 0.79: 2/3 and 0.04 of errors for a, 2/3 and 0.23 of errors for all.
    assert np.mean(estimates) > 0.85


def test_intervals_cover_the_truth() -> None:
    points, inside = grid(a=3, b=3, c=2), 0
    for seed in range(60):
        found = shares(points, measured(points, lambda p: [0, 0.5, 1][p["a"]] + [0, 0.3, 0][p["b"]], 0.1, seed))
        inside += found["a"].low <= 0.8929 <= found["a"].high
    assert inside >= 53


LR, DECAY, OTHER = Drawn("lr", "log", 1e-5, 1e-2), Drawn("decay", "uniform", 0, 0.2), Drawn("x", "uniform", 0, 1)


def drawn_points(count: int, seed: int) -> list[Point]:
    rng = np.random.default_rng(seed)
    return [{axis.key: axis.draw(rng) for axis in (LR, DECAY, OTHER)} for _ in range(count)]


def hump(point: Point) -> float:
    """A parabola of the logarithm of lr, a line of the decay, and nothing of x."""
    return 4 * ((math.log10(point["lr"]) + 5) / 3 - 0.6) ** 2 + 0.5 * point["decay"] / 0.2


def test_drawn_points_recover_a_function_with_noise() -> None:
    u = np.linspace(0, 1, 10_001)
    truth = np.var(4 * (u - 0.6) ** 2) / (np.var(4 * (u - 0.6) ** 2) + 0.25 / 12)
    inside, axes = 0, {axis.key: axis for axis in (LR, DECAY, OTHER)}
    for seed in range(10):
        points = drawn_points(30, seed)
        found = shares(points, measured(points, hump, 0.05, seed), **axes)
        inside += found["lr"].low <= truth <= found["lr"].high
        assert found["lr"].share > 0.7 and found["x"].share < 0.1
    assert inside >= 8


def combined(draws: int, seed: int) -> list[Point]:
    """Points of which each draw is combined with four values of another axis."""
    return [{**point, "name": name} for point in drawn_points(draws, seed) for name in "wxyz"]


def test_draws_count_once_however_many_grid_values_they_are_combined_with() -> None:
    axes = {axis.key: axis for axis in (LR, DECAY, OTHER)}
    values = measured(combined(9, 0), hump)
    assert importance_of(combined(9, 0), values, axes)[1].endswith("9 draws, and no full grid.")
    for seed in range(4):
        points = combined(14, seed)
        found = shares(points, measured(points, lambda p: hump(p) + 0.2 * (p["name"] == "z"), 0.02, seed), **axes)
        assert found["lr"].share > 0.6 and found["x"].low == 0 and found["x"].share < 0.2 and found["name"].low > 0.01


def test_a_grid_with_a_hole_is_fitted() -> None:
    points = grid(a=3, b=4)[1:]
    found = shares(points, measured(points, lambda point: point["a"] ** 2 + point["b"]))
    assert found["a"].share == pytest.approx(np.var([0, 1, 4]) / (np.var([0, 1, 4]) + 1.25))
    words = [{"a": "xyz"[point["a"]], "b": point["b"]} for point in points]
    assert shares(words, measured(points, lambda p: p["a"] ** 2 + p["b"]))["a"].share == pytest.approx(found["a"].share)


def test_what_too_few_points_cannot_tell() -> None:
    points = drawn_points(8, 0)
    assert importance_of(points, measured(points, hump)) == (
        [], "Too few points to tell how important each axis is: 8 points, and no full grid.",
    )  # fmt: skip
    points = drawn_points(19, 0)
    words = [{"lr": point["lr"], "name": f"n{i // 2}"} for i, point in enumerate(points)]
    assert "name has a value with a single point" in importance_of(words, measured(points, hump))[1]
    assert importance_of(grid(a=4), measured(grid(a=4), lambda point: point["a"])) == ([], "")
    assert importance_of(grid(a=4, b=1), measured(grid(a=4), lambda point: point["a"])) == ([], "")
    same = grid(a=2, b=2)
    assert "differ no more than their errors" in importance_of(same, measured(same, lambda point: 0.1))[1]
