"""The arithmetic of a sweep's forecast, on numbers made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from minimind_ray.sweep.calibrate import DRIFT, Times, paces_of
from minimind_ray.sweep.estimate import asha_parts, clock, likely

pytestmark = pytest.mark.unit


def test_trials_start_when_a_place_is_free() -> None:
    assert clock([4.0], 2) == 4
    assert clock([4.0, 1.0, 1.0, 1.0], 2) == 4
    # Three trials on two places take as long as two after each other, not one and a half.
    assert clock([4.0, 4.0, 4.0], 2) == 8
    assert clock([1.0, 1.0, 4.0], 2) == 5


def test_paces_are_bounded_by_drift_and_the_error_of_the_mean() -> None:
    steps = [1.0, 2.0, 3.0, 4.0, 5.0]  # Their mean is 3, its standard error 2 ** -0.5.
    found = [Times(start=1.0, steps=steps, validations=[2.0, 2.0], checkpoints=[0.5], process=6.0)]
    paces = paces_of(found)
    low, high = paces.low, paces.high
    factor = 1 + (DRIFT**2 + 4 * 0.5 / 9) ** 0.5
    assert (low.step, high.step) == pytest.approx((3 / factor, 3 * factor))
    assert (low.validation, high.validation) == pytest.approx((2 / (1 + DRIFT), 2 * (1 + DRIFT)))
    assert (low.process, high.checkpoint) == pytest.approx((6 / (1 + DRIFT), 0.5 * (1 + DRIFT)))
    assert paces_of(found, workers=2).high.step == pytest.approx(high.step / 2)
    # Three processes that start on one CPU take three times as long as one.
    assert paces_of(found, crowding=3.0).low.alone == pytest.approx(low.process / 3)
    # The more steps were measured, the less their own spread matters: a sum of many steps depends on the mean.
    many = paces_of([Times(1.0, steps * 400, [2.0], [0.0], 6.0)])
    assert (many.low.step, many.high.step) == pytest.approx((3 / (1 + DRIFT), 3 * (1 + DRIFT)), rel=0.01)


@pytest.mark.parametrize(
    ("steps", "start", "later"),
    [([5.0, 90.0, 1.0, 2.0, 1.0], 11.0, [1.0, 2.0, 1.0]), ([5.0, 2.0], 10.0, [2.0]), ([5.0], 7.0, [5.0])],
)
def test_the_first_steps_are_no_measure_of_others(steps: list[float], start: float, later: list[float]) -> None:
    """torch may compile in the first two steps, and keeps the results for the sweep."""
    times = Times.after_warm_up(7.0, steps, [1.0], [0.0])
    assert (times.start, times.steps) == (start, later)


def test_uncertainties_that_are_independent_do_not_add_up() -> None:
    same_S, varied_S = np.ones(200), np.exp(np.random.default_rng(1).normal(0, 0.3, 200))
    # A sweep without early stopping is as uncertain as the pace.
    assert likely(100 * same_S, 200 * same_S) == pytest.approx((100, 200), rel=0.02)
    # With a certain pace, the quantiles of what is stopped are left.
    first, last = np.quantile(varied_S, (0.1, 0.9))
    assert likely(varied_S, varied_S) == pytest.approx((first, last))
    low, high = likely(varied_S / 1.4, varied_S * 1.4)
    assert first / 1.4 < low < first and last < high < last * 1.4


def test_asha_keeps_less_of_more_trials() -> None:
    # A single trial is never stopped; of many, 20 % + 1/3 of 40 % + 1/9 of 40 % is left.
    assert asha_parts(1).mean() == 1.0
    assert asha_parts(2).mean() > asha_parts(8).mean() > asha_parts(64).mean() > 0.2 + 0.4 / 3 + 0.4 / 9
    assert asha_parts(64).mean() < 0.5
