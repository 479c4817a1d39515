"""Learning rates against values worked out by hand."""

import itertools
import math

import pytest

from minimind_ray.config.schema import ScheduleConfig
from minimind_ray.train.schedule import lr_factor, shortfall

pytestmark = pytest.mark.unit


def factors(steps: int, **settings) -> list[float]:
    return [lr_factor(ScheduleConfig(**settings), s, steps) for s in range(steps)]


def at(steps: int, *places: int, **settings) -> list[float]:
    return [lr_factor(ScheduleConfig(**settings), s, steps) for s in places]


ROOT = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"),
    [
        (0, 1, [1.0]),
        (0, 2, [1.0, 0.1]),
        (0, 3, [1.0, 0.55, 0.1]),
        (0, 5, [1.0, 0.55 + 0.45 * ROOT, 0.55, 0.55 - 0.45 * ROOT, 0.1]),
        (1, 3, [1.0, 0.55, 0.1]),
        (2, 3, [0.5, 1.0, 0.1]),
        (2, 6, [0.5, 1.0, 0.55 + 0.45 * ROOT, 0.55, 0.55 - 0.45 * ROOT, 0.1]),
        (5, 1, [0.2]),
        (3, 3, [1 / 3, 2 / 3, 1.0]),
    ],
)
def test_cosine(warmup: int, steps: int, expected: list[float]) -> None:
    assert factors(steps, name="cosine", warmup=warmup, final=0.1) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"),
    [
        (0, 1, [1.0]),
        (0, 2, [1.0, 0.0]),
        (0, 3, [1.0, 0.5, 0.0]),
        (0, 5, [1.0, 0.75, 0.5, 0.25, 0.0]),
        (2, 6, [0.5, 1.0, 0.75, 0.5, 0.25, 0.0]),
        (2, 2, [0.5, 1.0]),
    ],
)
def test_linear(warmup: int, steps: int, expected: list[float]) -> None:
    assert factors(steps, name="linear", warmup=warmup, final=0.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "steps", "expected"),
    [
        ({}, 1, [1.0]),
        ({}, 2, [1.0, 0.1]),
        ({}, 3, [1.0, 1.0, 0.1]),
        ({}, 5, [1.0, 1.0, 1.0, 1.0, 0.1]),
        ({}, 10, [1.0] * 8 + [0.55, 0.1]),
        ({"decay": 0.5, "final": 0.2}, 10, [1.0] * 5 + [0.84, 0.68, 0.52, 0.36, 0.2]),
        ({"decay": 1.0, "final": 0.0}, 5, [1.0, 0.75, 0.5, 0.25, 0.0]),
        ({"decay": 0.0}, 3, [1.0, 1.0, 1.0]),
        ({"warmup": 2}, 10, [0.5] + [1.0] * 7 + [0.55, 0.1]),
        ({"warmup": 4, "decay": 0.8, "final": 0.0}, 5, [0.25, 0.5, 0.75, 1.0, 0.0]),
        ({"warmup": 2, "decay": 1.0, "final": 0.0}, 4, [0.5, 1.0, 0.5, 0.0]),
        ({"warmup": 3}, 3, [1 / 3, 2 / 3, 1.0]),
    ],
)
def test_wsd(settings: dict[str, float], steps: int, expected: list[float]) -> None:
    assert factors(steps, name="wsd", **settings) == pytest.approx(expected)


def test_constant() -> None:
    assert factors(3, name="constant", warmup=2) == [0.5, 1.0, 1.0]


def test_long_runs() -> None:
    assert at(1001, 0, 500, 1000, name="cosine", final=0.1) == pytest.approx([1.0, 0.55, 0.1])
    assert at(1000, 0, 99, 999, name="cosine", warmup=100, final=0.1) == pytest.approx([0.01, 1.0, 0.1])
    assert at(1001, 0, 500, 1000, name="linear", final=0.2) == pytest.approx([1.0, 0.6, 0.2])
    assert at(1000, 799, 800, 899, 999, name="wsd", final=0.1) == pytest.approx([1.0, 0.9955, 0.55, 0.1])
    assert at(30, 23, 24, 29, name="wsd", final=0.1) == pytest.approx([1.0, 0.85, 0.1])


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup", [0, 10, 90])
def test_no_jump_and_the_final_rate_in_the_last_step(name: str, warmup: int) -> None:
    found = factors(100, name=name, warmup=warmup, final=0.1)
    assert found[-1] == pytest.approx(0.1)
    assert max(found) == 1.0
    # A cosine's steepest part falls pi / 2 times as fast as a line over the same steps.
    falling = 10 if warmup == 90 else 20 if name == "wsd" else 100 - warmup
    steepest = max(1.6 * 0.9 / falling, 1 / max(1, warmup))
    assert all(abs(b - a) <= steepest + 1e-9 for a, b in itertools.pairwise(found))


def test_a_warmup_longer_than_the_run_is_told() -> None:
    assert shortfall(ScheduleConfig(warmup=5), 5) is None
    assert "schedule.warmup 6 is longer than the run's 5 steps" in (shortfall(ScheduleConfig(warmup=6), 5) or "")
