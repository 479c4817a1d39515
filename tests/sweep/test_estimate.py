"""The arithmetic of a sweep's forecast, on numbers made by hand."""

from __future__ import annotations

import pytest

from minimind_ray.sweep.calibrate import Times, paces_of
from minimind_ray.sweep.estimate import asha_parts, clock

pytestmark = pytest.mark.unit


def test_trials_start_when_a_place_is_free() -> None:
    assert clock([4.0], 2) == 4
    assert clock([4.0, 1.0, 1.0, 1.0], 2) == 4
    # Three trials on two places take as long as two after each other, not one and a half.
    assert clock([4.0, 4.0, 4.0], 2) == 8
    assert clock([1.0, 1.0, 4.0], 2) == 5


def test_paces_are_bounded_by_quantiles_and_processes() -> None:
    found = [
        Times(start=1.0, steps=[1.0, 2.0, 3.0, 4.0, 5.0], validations=[2.0, 9.0, 2.0], checkpoints=[0.5], process=6.0),
        Times(start=2.0, steps=[6.0, 7.0, 8.0, 9.0, 10.0, 11.0], validations=[3.0], checkpoints=[0.25], process=7.0),
    ]
    paces = paces_of(found)
    low, high = paces.low, paces.high
    assert (low.process, low.start, low.step, low.validation, low.checkpoint) == (6, 1, 2, 2, 0)
    assert (high.process, high.start, high.step, high.validation, high.checkpoint) == (7, 2, 10, 3, 0.5)
    assert paces_of(found, workers=2).high.step == 5
    # A few very slow steps raise the mean above the quantile: 20 steps take as long as 20 means.
    found = [Times(start=1.0, steps=[1.0] * 19 + [100.0], validations=[1.0], checkpoints=[0.0])]
    assert paces_of(found).high.step == pytest.approx(119 / 20)


def test_asha_keeps_less_of_more_trials() -> None:
    # A single trial is never stopped; of many, 20 % + 1/3 of 40 % + 1/9 of 40 % is left.
    assert asha_parts(1).mean() == 1.0
    assert asha_parts(2).mean() > asha_parts(8).mean() > asha_parts(64).mean() > 0.2 + 0.4 / 3 + 0.4 / 9
    assert asha_parts(64).mean() < 0.5
