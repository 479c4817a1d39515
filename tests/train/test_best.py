"""The validation that a run is judged by."""

import math

import pytest

from minimind_ray.train.best import best_validation

pytestmark = pytest.mark.unit


def test_the_lowest_loss_decides_and_of_equals_the_last() -> None:
    losses = [2.9, None, 2.6, math.nan, 2.6, 2.7, -math.inf]
    lines = [{"step": step, "val/loss": loss} for step, loss in enumerate(losses)] + [{"step": 9, "loss": 0.1}]
    assert best_validation(lines) == {"step": 4, "val/loss": 2.6}
    assert best_validation([]) is best_validation(lines[-1:]) is None
    # Step by step it is the same.
    best: dict[str, float] = {}
    for line in lines:
        best = best_validation([best, line]) or {}
    assert best == {"step": 4, "val/loss": 2.6}
