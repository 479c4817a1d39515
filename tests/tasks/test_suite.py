"""Loading tasks, and the summary of their results."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from minimind_ray.config.errors import UserError
from minimind_ray.stages.benchmark import load_suite, summarise
from minimind_ray.tasks.items import Item

pytestmark = pytest.mark.slow  # lm-eval's import takes a second.

LOCAL = Path(__file__).parent / "local"


def test_a_number_of_examples_without_effect_is_refused() -> None:
    with pytest.raises(UserError, match="mm_demo: no examples come before"):
        load_suite(["mm_demo"], None, 3)
    load_suite(["mm_demo"], None, 0)
    parts = load_suite(["my_choice", "mm_demo"], LOCAL, 3).parts
    assert [parts[name][0].get_config("num_fewshot") for name in parts] == [3, 0]


def test_items_that_agree_give_no_interval_of_width_0() -> None:
    from minimind_ray.tasks.suite import TaskResults

    same = [Item("t", i, i, "repeated", 0.0, 5.0, "", "", "") for i in range(20)]
    right = [Item("u", i, i, "acc", 1.0, 1.0, "", "", "") for i in range(20)]
    repeated, share = summarise(TaskResults([*same, *right]))
    assert (repeated.value, repeated.low, repeated.high) == (0.0, None, None)
    assert share.low is not None and 0.8 < share.low < share.value == share.high == 1.0


def test_a_task_without_the_package_that_it_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from minimind_ray.tasks import suite

    def evaluate(*_: object, **__: object) -> None:
        raise ImportError("antlr4 is not installed")

    monkeypatch.setattr(suite, "evaluate", evaluate)
    with pytest.raises(UserError, match="task mm_arithmetic: antlr4 is not installed"):
        suite.run_tasks(cast(Any, None), load_suite(["mm_arithmetic"], None, None), converses=False)
