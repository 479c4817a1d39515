"""How a running sweep stands, from events and readings at known times."""

from __future__ import annotations

import math

import pytest

from minimind_ray.sweep.progress import Reading, Row, SweepProgress

pytestmark = pytest.mark.unit


def sweep(count: int = 4, **settings: object) -> SweepProgress:
    return SweepProgress(count, "val/loss", "min", **settings)  # pyright: ignore[reportArgumentType]


def start(progress: SweepProgress, *ids: str, now: float = 0.0) -> None:
    for id in ids:
        progress.started(id, 100, {}, now)


def found(loss: float, **metrics: float) -> dict[str, float]:
    return {"val/loss": loss, **metrics}


def test_a_row_says_how_far_a_trial_is() -> None:
    progress = sweep()
    start(progress, "lr=1,seed=0")
    assert progress.rows(1.0) == [Row("lr=1", "starting", "", "", "")]
    progress.read("lr=1,seed=0", Reading(10.0, 5, 5_000))
    assert progress.rows(10.0) == [Row("lr=1", "5/100", "", "", "")]
    progress.validated("lr=1,seed=0", found(2.34567))
    progress.read("lr=1,seed=0", Reading(20.0, 25, 25_000))
    # 20 steps and 20,000 tokens in 10 seconds; 75 steps left.
    assert progress.rows(20.0) == [Row("lr=1", "25/100", "2.3457", "2k", "0:38")]
    assert progress.rows(30.0)[0].left == "0:28"
    assert progress.rows(90.0)[0].left == "0:00"


def test_a_run_that_began_again_from_a_checkpoint_is_timed_anew() -> None:
    progress = sweep()
    start(progress, "a")
    for at, step in ((0.0, 50), (10.0, 60), (20.0, 50), (21.0, 51)):
        progress.read("a", Reading(at, step, 100 * step))
    assert progress.rows(21.0) == [Row("a", "51/100", "", "100", "0:49")]


def test_counts() -> None:
    progress = sweep(8)
    assert progress.counts() == "8 trials, no trial has started yet"
    start(progress, *"abcdef")
    for id, state in zip("abcd", ("finished", "failed", "early-stopped", "stopped")):
        progress.ended(id, state)
    progress.paused("e")
    assert progress.counts() == "1 running, 3 waiting, 4 of 8 ended (1 failed, 1 stopped early, 1 stopped)"
    assert [row.trial for row in progress.rows(0.0)] == ["f"]


def test_a_trial_that_failed_before_it_started_is_counted() -> None:
    progress = sweep()
    progress.ended("a", "failed")
    progress.paused("b")
    assert progress.counts() == "0 running, 3 waiting, 1 of 4 ended (1 failed)"
    assert progress.best is None and progress.seconds_left(0.0) is None


def test_the_best_is_neither_a_failed_trial_nor_a_value_that_is_no_number() -> None:
    progress = sweep()
    start(progress, "a", "b", "c")
    progress.validated("a", found(math.nan))
    assert progress.best is None and progress.rows(0.0)[0].value == ""
    progress.validated("b", found(3.0))
    progress.validated("c", found(2.0))
    assert progress.best == (2.0, "c")
    progress.validated("c", found(math.inf))
    assert progress.best == (2.0, "c")
    progress.ended("c", "failed")
    assert progress.best == (3.0, "b")


def test_the_best_is_by_mode() -> None:
    progress = SweepProgress(2, "val/accuracy", "max")
    start(progress, "a", "b")
    progress.validated("a", found(0.5, **{"val/accuracy": 0.7}))
    progress.validated("b", found(0.9, **{"val/accuracy": 0.6}))
    assert progress.best == (0.7, "a")
    assert [row.value for row in progress.rows(0.0)] == ["0.7000", "0.6000"]


def test_a_name_has_the_seed_where_there_are_several_and_the_point_where_pbt_moved_it() -> None:
    progress = sweep(seeds=2)
    progress.started("lr=0.001,beta=0.1,seed=0", 100, {"optim.lr": 0.001, "dpo.beta": 0.1}, 0.0)
    progress.started("seed=1", 100, {}, 0.0)
    progress.validated("lr=0.001,beta=0.1,seed=0", found(2.0))
    progress.paused("lr=0.001,beta=0.1,seed=0")
    progress.started("lr=0.001,beta=0.1,seed=0", 100, {"optim.lr": 0.001, "dpo.beta": 0.1}, 5.0)
    assert [row.trial for row in progress.rows(5.0)] == ["lr=0.001,beta=0.1,seed=0", "seed=1"]
    assert progress.best == (2.0, "lr=0.001,beta=0.1,seed=0")
    progress.started("lr=0.001,beta=0.1,seed=0", 100, {"optim.lr": 0.0012, "dpo.beta": 0.1}, 9.0)
    assert progress.rows(9.0)[0] == Row("lr=0.001,beta=0.1,seed=0 now lr=0.0012", "starting", "", "", "")
    assert progress.best is None


def test_the_end_is_when_the_last_waiting_trial_has_had_its_place() -> None:
    progress = sweep(5)
    start(progress, "a", "b")
    assert progress.seconds_left(0.0) is None
    for id, steps in (("a", 20), ("b", 60)):
        progress.read(id, Reading(0.0, 0, 0))
        progress.read(id, Reading(20.0, steps, steps))
    # 1 s and 1/3 s a step: 80 and 13.3 s left. The others take 66.7 s each, the mean of 100 and 33.3.
    # Two of them run in b's place, and the third in a's.
    assert progress.seconds_left(20.0) == pytest.approx(80 + 200 / 3)
    progress.ended("a", "early-stopped")  # After 20 s, so that the mean is 26.7 s. Two of three run in a's place.
    assert progress.seconds_left(20.0) == pytest.approx(160 / 3)
    progress.ends_by = 50.0
    assert progress.seconds_left(20.0) == 30.0
    assert progress.seconds_left(60.0) == 0.0


def test_a_paused_trial_has_only_the_rest_before_it() -> None:
    progress = sweep(2)
    start(progress, "a")
    progress.read("a", Reading(0.0, 0, 0))
    progress.read("a", Reading(50.0, 50, 50))
    progress.paused("a")
    start(progress, "b", now=50.0)
    assert progress.seconds_left(50.0) == pytest.approx(150.0)
