"""Local tasks: what is refused, and that reading one runs no code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minimind_ray.config.errors import UserError
from minimind_ray.tasks.local import local_tasks
from tests.jobs import write_jsonl

pytestmark = pytest.mark.slow  # lm-eval's import takes a second.

TASK = """\
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["a", "b"]
doc_to_target: gold
"""


def write(folder: Path, text: str = TASK, name: str = "mine.yaml") -> Path:
    write_jsonl(folder / "rows.jsonl", [{"question": "one", "gold": 0}, {"question": "two", "gold": 1}])
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_a_task_is_read_with_its_items(tmp_path: Path) -> None:
    task = local_tasks(write(tmp_path))["mine"]()
    assert [row["question"] for row in task.eval_docs] == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TASK + "process_docs: !function utils.f\n", "!function would run Python code from the folder"),
        (TASK + "process_results: utils.f\n", "the key process_results is not supported"),
        (TASK + "metric_list: [{metric: ./code.py}]\n", "the metric ./code.py is none of lm-eval's"),
        (TASK + "metric_list: [{metric: acc, hf_evaluate: true}]\n", "the metric acc is none of lm-eval's"),
        (TASK + "metric_list: [{metric: acc, aggregation: most}]\n", "the aggregation most is none of lm-eval's"),
        (TASK + "include: /etc/hosts\n", "include /etc/hosts is outside the folder"),
        (TASK + "include: mine.yaml\n", "includes this file itself"),
        (TASK.replace("{{question}}", "{{question.__class__.__mro__}}"), "cannot be used: SecurityError"),
        (TASK.replace("{{question}}", "{{nothing}}"), "cannot be used: UndefinedError: 'nothing' is undefined"),
        (TASK.replace("rows.jsonl", "none.jsonl"), "none.jsonl: cannot be read"),
        (TASK.replace("json\n", "allenai/ai2_arc\n", 1), "dataset_path must be json"),
        ("- task\n", "a task is a mapping"),
        ("task: [\n", "cannot be read"),
    ],
)  # fmt: skip
def test_what_a_task_cannot_have_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as found:
        local_tasks(write(tmp_path, text))["mine"]()
    assert message in str(found.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "two", "gold": 2}, "the right choice is 2, but the choices have the numbers 0 to 1"),
        ({"question": "two", "gold": "c"}, "the right choice is 'c', which is not among the choices"),
        ({"gold": 0, "question": {"a": 1}}, "UndefinedError"),
        ({"question": "two", "gold": 0, "choices": None}, "must give a list of choices, not None"),
    ],
)
def test_each_item_is_tried_before_a_model_is_read(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    text = TASK.replace("{{question}}", "{{question.upper()}}").replace('["a", "b"]', "choices")
    write(tmp_path, text)
    write_jsonl(
        tmp_path / "rows.jsonl", [{"question": "one", "gold": 0, "choices": ["a", "b"]}, {"choices": ["a", "b"], **row}]
    )
    with pytest.raises(UserError, match="item 2 cannot be used") as found:
        local_tasks(tmp_path)["mine"]()
    assert message in str(found.value)


def test_a_folder_needs_tasks_of_different_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no .yaml file with a task"):
        local_tasks(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        local_tasks(tmp_path / "none")
    write(tmp_path)
    with pytest.raises(UserError, match="there are two tasks mine"):
        local_tasks(write(tmp_path, name="other.yaml"))
