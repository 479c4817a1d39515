"""Loading tasks, and the summary of their results."""

from __future__ import annotations

from pathlib import Path

import pytest

from minimind_ray.config.errors import UserError
from minimind_ray.stages.benchmark import load_suite, summarise
from minimind_ray.tasks.items import Item

pytestmark = pytest.mark.slow  # lm-eval's import takes a second.

LOCAL = Path(__file__).parent / "local"


def test_a_task_without_examples_refuses_their_number() -> None:
    with pytest.raises(UserError, match="task mm_demo has no examples before its questions"):
        load_suite(["my_choice", "mm_demo"], LOCAL, 3)
    load_suite(["mm_demo"], None, 0)
    task = load_suite(["my_choice"], LOCAL, 3).parts["my_choice"][0]
    assert task.get_config("num_fewshot") == 3


def test_items_that_agree_give_no_interval_of_width_0() -> None:
    from minimind_ray.tasks.suite import TaskResults

    same = [Item("t", i, i, "repeated", 0.0, 5.0, "", "", "") for i in range(20)]
    right = [Item("u", i, i, "acc", 1.0, 1.0, "", "", "") for i in range(20)]
    repeated, share = summarise(TaskResults([*same, *right]))
    assert (repeated.value, repeated.low, repeated.high) == (0.0, None, None)
    assert share.low is not None and 0.8 < share.low < share.value == share.high == 1.0
