"""The forms in which trackers take values."""

from __future__ import annotations

import math

import pytest

from minimind_ray.track.values import Best, markdown_table, numbers
from minimind_ray.train.best import best_validation

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("losses", [[math.nan, 2.0, 1.0, 1.0, 3.0], [3.0, math.inf], [math.nan], []])
def test_the_best_validation_is_that_of_the_training_loop(losses: list[float]) -> None:
    lines = [{"step": step, "tokens": 1, "val/loss": loss} for step, loss in enumerate(losses)]
    lines.append({"step": 9, "tokens": 1, "loss": 0.5})
    best, expected = Best(), best_validation(lines)
    for line in lines:
        best.see(line)
    found = best.facts()
    assert (found.get("best/step"), found.get("best/loss")) == (
        expected and expected["step"], expected and expected["val/loss"],
    )  # fmt: skip


def test_the_best_validation_has_the_values_of_tasks() -> None:
    best = Best()
    best.see({"step": 1, "tokens": 8, "loss": 3.0, "val/loss": 2.0, "task/mm_demo": 0.5})
    assert best.facts() == {"best/loss": 2.0, "best/task/mm_demo": 0.5, "best/step": 1, "best/tokens": 8}


def test_numbers_have_flat_names_and_leave_out_what_is_no_number() -> None:
    line = {"step": 1, "loss": 0.5, "timing": {"mfu": 0.1}, "warning": "slow", "flag": True, "none": None}
    assert numbers(line) == {"loss": 0.5, "timing/mfu": 0.1}


def test_a_cell_cannot_break_a_table() -> None:
    assert markdown_table(["a", "b"], [["x|y\nz", None], [1.5, [1, "春"]]]) == (
        '| a | b |\n| --- | --- |\n| x\\|y z |  |\n| 1.5 | [1, "春"] |'
    )
