"""Learning rates against values worked out by hand."""

import pytest

from minimind_ray.config.schema import ScheduleConfig
from minimind_ray.train.schedule import lr_factor, shortfall

pytestmark = pytest.mark.unit


def factors(steps: int, **settings) -> list[float]:
    return [lr_factor(ScheduleConfig(**settings), s, steps) for s in range(steps)]


def test_cosine_is_minimind_s() -> None:
    # MiniMind: lr (0.1 + 0.45 (1 + cos(pi s / S))); at s = 0, S/4, S/2, 3S/4.
    expected = [1.0, 0.1 + 0.45 * (1 + 0.5**0.5), 0.55, 0.1 + 0.45 * (1 - 0.5**0.5)]
    assert factors(4, name="cosine") == pytest.approx(expected)


def test_warmup_then_linear() -> None:
    assert factors(6, name="linear", warmup=2, final=0.0) == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_constant() -> None:
    assert factors(3, name="constant", warmup=1) == [1.0, 1.0, 1.0]


def test_wsd_is_flat_then_falls_to_final() -> None:
    # Ten steps, the last half decaying: 0.8 lost over five steps.
    expected = [1.0] * 6 + [0.84, 0.68, 0.52, 0.36]
    assert factors(10, name="wsd", decay=0.5, final=0.2) == pytest.approx(expected)


def test_edges() -> None:
    assert factors(1, name="cosine", warmup=5) == [0.2]
    assert factors(2, name="wsd", decay=0.0) == [1.0, 1.0]


def test_a_warmup_longer_than_the_run_is_told() -> None:
    assert shortfall(ScheduleConfig(warmup=5), 5) is None
    assert "schedule.warmup 6 is longer than the run's 5 steps" in (shortfall(ScheduleConfig(warmup=6), 5) or "")
