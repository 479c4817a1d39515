"""Load tasks by their names, and run a model on them through lm-eval.

A name is one of our own offline tasks (own.py), a task of a local folder (local.py), or any task, group or tag of
lm-eval, such as arc_easy or cmmlu. The parts of a group count as one task with all their items.
"""

from __future__ import annotations

import io
import logging
import math
import os
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # Read when the hub's package is imported.

from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from minimind_ray.config.errors import UserError
from minimind_ray.data.files import one_line
from minimind_ray.data.hub import cache_if_unreachable
from minimind_ray.tasks.items import Item
from minimind_ray.tasks.lm import RaggedLM
from minimind_ray.tasks.local import local_tasks
from minimind_ray.tasks.own import OWN, own_task

for package in ("lm_eval", "huggingface_hub"):  # Their warnings are for authors of tasks; errors are raised, too.
    logging.getLogger(package).setLevel(logging.ERROR)

FEWSHOT_SEED = 1234
"""The seed of lm-eval's own command for the choice of examples before a question."""

WHOLE = (
    "word_perplexity", "byte_perplexity", "perplexity", "f1", "mcc", "brier_score", "likelihood", "bleu", "ter", "chrf",
)  # fmt: skip
"""Metrics of lm-eval that are no ratio of sums over items."""


@dataclass(frozen=True)
class Suite:
    """The tasks of a command: by the name that the user gave, the parts of each, which are one for most names."""

    parts: dict[str, list[Any]]

    @property
    def names(self) -> list[str]:
        """The names that the user gave."""
        return list(self.parts)

    def judged_by(self, name: str) -> str | None:
        """Return the metric that a task is judged by: its first metric with a value for each item; None without one."""
        return next((metric for metric in self.parts[name][0].aggregation() if metric not in WHOLE), None)


@dataclass
class TaskResults:
    """The results of a model.

    `totals` are the metrics whose value is not a ratio of sums over items, such as an F1 score or a perplexity, by task
    and metric. `chance` is the share of right answers of a guess, for tasks with choices.
    """

    items: list[Item] = field(default_factory=list[Item])
    totals: dict[tuple[str, str], float] = field(default_factory=dict[tuple[str, str], float])
    chance: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def values(self) -> dict[str, float]:
        """The value of each task by the metric that the task is judged by: the first metric of its items."""
        sums: dict[str, list[float]] = {}
        judged: dict[str, str] = {}
        for item in self.items:
            if item.metric == judged.setdefault(item.task, item.metric):
                value, weight = sums.get(item.task, [0.0, 0.0])
                sums[item.task] = [value + item.value, weight + item.weight]
        return {task: value / weight for task, (value, weight) in sums.items() if weight}


def load_tasks(names: Sequence[str], folder: Path | None = None, num_fewshot: int | None = None) -> Suite:
    """Return the tasks with these names.

    `num_fewshot` examples come before each question, in tasks that may have examples; default: as the task says.

    Raises:
        UserError: there is no such task, its data cannot be downloaded, or it is broken.
    """
    local = local_tasks(folder) if folder is not None else {}
    parts: dict[str, list[Any]] = {}
    for name in dict.fromkeys(names):
        if name in local:
            parts[name] = [local[name]()]
        elif name in OWN:
            parts[name] = [own_task(name)]
    if others := [name for name in dict.fromkeys(names) if name not in parts]:
        parts |= _known_tasks(others, [*OWN, *local])
    if num_fewshot and not any(_has_examples(task) for tasks in parts.values() for task in tasks):
        raise UserError(
            f"{', '.join(parts)}: no examples come before these tasks' questions (num_fewshot: 0); leave --num-fewshot "
            "out"
        )
    for task in (task for tasks in parts.values() for task in tasks):
        if num_fewshot is not None and _has_examples(task):
            task.set_config("num_fewshot", num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
    return Suite({name: parts[name] for name in dict.fromkeys(names)})


def _has_examples(task: Any) -> bool:
    """Whether examples may come before the questions. As in lm-eval, a task that says 0 never has any."""
    return task.get_config("num_fewshot") != 0


@cache
def _manager() -> TaskManager:
    """Return lm-eval's index of tasks, which takes seconds to make."""
    return TaskManager()


def _known_tasks(names: Sequence[str], ours: Sequence[str]) -> dict[str, list[Any]]:
    manager = _manager()
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise UserError(
            f"there is no task {unknown[0]}: give a task of lm-eval, such as arc_easy, or one of {', '.join(ours)}; "
            "tasks of your own are found with --task-path"
        )
    parts: dict[str, list[Any]] = {}
    with cache_if_unreachable():  # The hub's client would try again for half a minute for each part of a task.
        for name in names:
            try:
                loaded = cast("dict[str, Any]", manager.load([name]))
            except Exception as error:  # Whatever datasets, the hub's client or a task's own code raises.
                raise UserError(
                    f"task {name}: its data could not be loaded ({type(error).__name__}: {one_line(error)}); the first "
                    "use downloads the data from a hub, so it needs a network (HF_ENDPOINT may name a mirror). Later "
                    "uses do not"
                ) from error
            parts[name] = list(loaded["tasks"].values())
    return parts


def run_tasks(
    lm: RaggedLM,
    suite: Suite,
    *,
    limit: int | None = None,
    chat: bool = False,
    converses: bool = True,
    say: Callable[[str], None] = lambda name: None,
) -> TaskResults:
    """Run the model on all tasks. `limit` is the most items of a task, `say` is called with the name of each task.

    With `chat`, prompts are turns of a conversation. The tasks of our own that ask questions are conversations anyway,
    if the model `converses` and the tokenizer has a chat template.

    Raises:
        UserError: a task does not fit the model.
    """
    results = TaskResults()
    for name, tasks in suite.parts.items():
        say(name)
        talks = chat or (name in OWN and OWN[name].talks and converses and lm.ids.chat_template is not None)
        share = None if limit is None else math.ceil(limit / len(tasks))
        found = _evaluated(lm, tasks, share, talks, name)
        _collect(results, name, tasks, found, limit)
    return results


def _evaluated(lm: RaggedLM, tasks: Sequence[Any], limit: int | None, chat: bool, name: str) -> dict[str, Any]:
    """Return lm-eval's results and samples of the parts of a task."""
    by_name: dict[str, Task] = {task.task_name: task for task in tasks}
    for task in tasks:
        task.set_fewshot_seed(FEWSHOT_SEED)
    try:
        with redirect_stderr(io.StringIO()):  # lm-eval's own progress bars.
            found = evaluate(
                lm, cast("Any", {"tasks": by_name, "groups": {}}), limit=limit, bootstrap_iters=0,
                apply_chat_template=chat,
            )  # fmt: skip
    except UserError:
        raise
    except (ValueError, ImportError) as error:  # Some tasks of lm-eval import packages of their own when they score.
        raise UserError(f"task {name}: {error}") from error
    return cast("dict[str, Any]", found)


def _collect(results: TaskResults, name: str, tasks: Sequence[Any], found: dict[str, Any], limit: int | None) -> None:
    """Add the results of one task to `results`, its items in the order of metrics, parts and items."""
    rows: list[Item] = []
    choices: list[int] = []
    before = 0
    for task in tasks:
        samples: list[dict[str, Any]] = found["samples"][task.task_name]
        for sample in samples:
            rows += _items(name, before + int(sample["doc_id"]), sample)
        first = {sample["doc_id"]: sample for sample in samples}
        if task.OUTPUT_TYPE == "multiple_choice":
            choices += [len(task.doc_to_choice(sample["doc"])) for sample in first.values()]
        before += len(first) if limit is None else len(task.eval_docs)
    metrics = list(dict.fromkeys(row.metric for row in rows))
    results.items += sorted(rows, key=lambda row: (metrics.index(row.metric), row.item))
    if choices:
        results.chance[name] = sum(1 / count for count in choices) / len(choices)
    if len(tasks) == 1:
        for key, value in found["results"][tasks[0].task_name].items():
            metric = _metric_name(*key.split(",", 1)) if "," in key else ""
            if metric and metric not in metrics and "_stderr" not in key and isinstance(value, int | float):
                results.totals[name, metric] = float(value)


def _items(task: str, number: int, sample: dict[str, Any]) -> list[Item]:
    """Return the rows of one item: one for each metric that is a ratio of sums over items."""
    doc = sample["doc"]
    cluster = int(doc["cluster"]) if isinstance(doc, dict) and "cluster" in doc else number
    texts = (_question(sample), _answer(sample), str(sample["target"]))
    rows: list[Item] = []
    for metric in sample["metrics"]:
        ratio = _ratio(metric, sample[metric])
        if ratio is not None:
            rows.append(Item(task, number, cluster, _metric_name(metric, sample["filter"]), *ratio, *texts))
    return rows


def _metric_name(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def _ratio(metric: str, found: Any) -> tuple[float, float] | None:
    """Return an item's numerator and denominator; None if the metric is no ratio of sums over items."""
    if metric in WHOLE:
        return None
    if metric == "bits_per_byte":
        return -found[0] / math.log(2), float(found[1])
    if metric == "repeated":
        return float(found[0]), float(found[1])
    if isinstance(found, int | float):
        return float(found), 1.0
    return None


def _question(sample: dict[str, Any]) -> str:
    return str(sample["arguments"][0][0])


def _answer(sample: dict[str, Any]) -> str:
    """Return what the model wrote, or the continuation that it found the most probable."""
    first = sample["filtered_resps"][0]
    if isinstance(first, str):
        return first
    if len(sample["arguments"]) > 1:
        likelihoods = [found[0] for found in sample["filtered_resps"] if isinstance(found, tuple | list)]
        return str(sample["arguments"][likelihoods.index(max(likelihoods))][1]).strip()
    return ""
