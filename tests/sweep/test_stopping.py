"""The predicted ends of trials that were stopped early, compared with numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minimind_ray.sweep.stopping import common_step, count_trials, curve_of, lengths_of, predicted_ends
from minimind_ray.sweep.trials import read_sweep
from minimind_ray.train.intervals import t_quantile
from tests.sweep.synthetic import make_sweep

pytestmark = pytest.mark.unit


def test_a_curve_holds_the_metric_of_the_best_validation_so_far() -> None:
    lines = [
        {"step": 1, "loss": 9.0},
        {"step": 2, "val/loss": 3.0, "val/accuracy": 0.5},
        {"step": 4, "val/loss": math.nan, "val/accuracy": 0.1},
        {"step": 6, "val/loss": 2.0, "val/accuracy": 0.4},
        {"step": 8, "val/loss": 2.5, "val/accuracy": 0.9},
    ]
    assert curve_of(lines, "val/accuracy") == {2: 0.5, 4: 0.5, 6: 0.4, 8: 0.4}
    assert curve_of(lines, "val/margin") == {}
    assert curve_of([{"step": 1, "val/loss": 3.0, "val/margin": None}], "val/margin") == {}
    # A column of the user's own has the name of a number of training.
    assert curve_of([{"step": 1, "val/loss": 3.0, "tokens": 100}], "tokens") == {}


def test_the_common_step_is_the_last_that_all_have() -> None:
    assert common_step([{1: 1.0, 2: 1.0, 3: 1.0}, {1: 1.0, 2: 1.0, 4: 1.0}]) == 2
    assert common_step([{1: 1.0}, {2: 1.0}]) is None
    assert common_step([]) is None


def test_with_two_or_three_finished_trials_the_mean_change_is_added() -> None:
    curves = [{1: 3.0, 2: 2.0, 3: 1.0}, {1: 4.0, 2: 3.0, 3: 2.5}, {1: 5.0}]
    shift_T, extra_T = predicted_ends(curves, [True, True, False])
    np.testing.assert_allclose(shift_T, [0, 0, -1.75])
    # The changes -2 and -1.5 have the variance 0.125 with 1 degree of freedom; the mean adds a half of it.
    np.testing.assert_allclose(extra_T, [0, 0, 0.125 * 1.5 * (12.7062 / 1.959964) ** 2])


def test_from_four_finished_trials_on_a_line_is_fitted() -> None:
    line = [{1: x, 2: 1 + x / 2} for x in (1.0, 2.0, 3.0, 4.0)]
    shift_T, extra_T = predicted_ends([*line, {1: 6.0}], [True] * 4 + [False])
    np.testing.assert_allclose(shift_T, [0, 0, 0, 0, 4 - 6])
    np.testing.assert_allclose(extra_T, 0, atol=1e-25)
    # Residuals of 0.1, -0.1, -0.1, 0.1 do not change the fitted line.
    off = [{1: c[1], 2: c[2] + r} for c, r in zip(line, (0.1, -0.1, -0.1, 0.1))]
    shift_T, extra_T = predicted_ends([*off, {1: 6.0}], [True] * 4 + [False])
    assert shift_T[4] == pytest.approx(-2)
    variance = 0.04 / 2 * (1 + 1 / 4 + 3.5**2 / 5)
    assert extra_T[4] == pytest.approx(variance * (4.3027 / 1.959964) ** 2)


def test_the_way_to_the_end_goes_over_the_later_stops() -> None:
    finished = [{1: 5.0, 2: 4.0, 3: 3.0}, {1: 6.0, 2: 5.0, 3: 4.0}]
    # This trial was stopped at step 2, having lost 3 since step 1.
    later = {1: 8.0, 2: 5.0}
    shift_T, extra_T = predicted_ends([*finished, later, {1: 9.0}], [True, True, False, False])
    assert shift_T[2] == pytest.approx(-1)
    assert extra_T[2] == 0
    # From step 1 to 2 three trials trained, which lost 1, 1 and 3.
    assert shift_T[3] == pytest.approx(-5 / 3 - 1)
    assert extra_T[3] == pytest.approx(4 / 3 * (1 + 1 / 3) * (4.3027 / 1.959964) ** 2)


def test_a_validation_at_the_stop_is_not_a_common_step() -> None:
    curves = [{2: 3.0, 4: 2.0}, {2: 3.0, 4: 2.0}, {2: 4.0, 3: 3.2}]
    shift_T, _ = predicted_ends(curves, [True, True, False])
    # Its end is 4 - 1, of which it has reached 3.2.
    assert shift_T[2] == pytest.approx(3.0 - 3.2)


@pytest.mark.parametrize(
    "curves, finished",
    [
        ([{1: 3.0, 2: 2.0}, {1: 4.0}], [True, False]),
        ([{1: 3.0}, {1: 4.0}], [False, False]),
        ([{2: 3.0, 4: 2.0}, {2: 3.0, 4: 2.0}, {3: 4.0}], [True, True, False]),
        ([{2: 3.0, 4: 2.0}, {2: 3.0, 4: 2.0}, {}], [True, True, False]),
    ],
)
def test_without_two_trials_that_trained_on_there_is_no_prediction(
    curves: list[dict[int, float]], finished: list[bool]
) -> None:
    shift_T, extra_T = predicted_ends(curves, finished)
    np.testing.assert_array_equal(np.isnan(shift_T), [not done for done in finished])
    np.testing.assert_array_equal(np.isnan(extra_T), [not done for done in finished])


@pytest.mark.parametrize("free, expected", [(1, 12.706), (4, 2.776), (5, 2.571), (10, 2.228), (60, 2.000)])
def test_quantiles_of_students_t(free: int, expected: float) -> None:
    assert t_quantile(free) == pytest.approx(expected, rel=2e-3)


def test_every_trial_counts_or_has_a_reason(tmp_path: Path) -> None:
    sweep = read_sweep(make_sweep(tmp_path / "sweep", failed=3, stopped=8, running=5))
    counts = {trial.state: count for trial, count in zip(sweep.trials, count_trials(sweep.trials, "val/loss"))}
    assert counts["finished"].how == "finished" and counts["finished"].shift == 0
    # Trained on for the other three fifths of its steps, its loss would have fallen further.
    assert counts["early-stopped"].how == "predicted"
    assert counts["early-stopped"].shift < 0 < counts["early-stopped"].extra
    assert (counts["failed"].how, counts["failed"].reason) == (None, "failed")
    # It says "running", but no process writes it.
    assert (counts["stopped"].how, counts["stopped"].reason) == (None, "stopped; no validation of it was saved")
    # The curves have no such metric, so that nothing is known about the end.
    counts = {trial.state: count for trial, count in zip(sweep.trials, count_trials(sweep.trials, "val/own"))}
    assert counts["early-stopped"].how is None
    assert counts["early-stopped"].reason == (
        "early-stopped; its end cannot be predicted, because val/own was not measured during training"
    )
    assert counts["finished"].how == "finished"


def test_ends_are_predicted_from_runs_of_the_same_length(tmp_path: Path) -> None:
    sweep = read_sweep(make_sweep(tmp_path / "sweep", axes={"dpo.beta": "0.02,0.05,0.1"}, seeds=3, stopped=0))
    # The stopped trial and those of the first two points plan 60 steps, and those of the last point 30.
    same = [replace(trial, length=60) for trial in sweep.trials if trial.point["dpo.beta"] != 0.1]
    short = [
        replace(trial, length=30, steps=30, metrics=trial.metrics[:30])
        for trial in sweep.trials
        if trial.point["dpo.beta"] == 0.1
    ]
    alone, both = count_trials(same, "val/loss"), count_trials([*same, *short], "val/loss")
    assert both[: len(same)] == alone and alone[0].how == "predicted"
    assert [count.how for count in both[len(same) :]] == ["finished"] * 3
    few = count_trials([same[0], *short], "val/loss")[0]
    assert few.reason == "early-stopped; too few trials of its length finished to predict its end"
    # A stopped run of an earlier version does not know its length; it is clear if all others have the same.
    assert lengths_of([replace(same[0], length=None), *same[1:]]) == [60] * len(same)
    assert lengths_of([replace(same[0], length=None), same[1], short[0]]) == [None, 60, 30]


def test_the_reason_is_the_steps_if_enough_trials_finished(tmp_path: Path) -> None:
    sweep = read_sweep(make_sweep(tmp_path / "sweep", axes={"dpo.beta": "0.02,0.05,0.1"}, stopped=0))
    stopped = [trial for trial in sweep.trials if trial.state == "early-stopped"]
    for line in stopped[0].metrics:
        line["step"] += 100
    [reason] = [count.reason for count in count_trials(sweep.trials, "val/loss") if not count.how]
    assert "no validation at a step at which all finished trials have one" in reason
    alone = [*stopped, *[trial for trial in sweep.trials if trial.state == "finished"][:1]]
    assert count_trials(alone, "val/loss")[0].reason == "early-stopped; too few trials finished to predict its end"
