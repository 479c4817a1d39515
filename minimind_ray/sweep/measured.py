"""The results of models on examples that all of them share: the items of tasks, or validation examples.

`models.py` compares them. A model here is whatever was measured: a run, a model directory, an adapter.

    E examples
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from minimind_ray.config.errors import UserError
from minimind_ray.config.stages import STAGES, Mode
from minimind_ray.sweep.metric import examples_of, terms
from minimind_ray.sweep.trials import Trial
from minimind_ray.tasks.items import Scores, metrics_of, mode_of, scores_of

VALIDATION = "validation"
"""What the validation examples of runs are called in the place of a task's name."""


@dataclass(frozen=True)
class Measured:
    """The results of one model, named `model`, on the examples of one task. `origin` is their file or model.

    `noun` says what the examples are called. `questions` are the texts of the items, to check that two models had the
    same; empty if they are not known.
    """

    model: str
    origin: str
    task: str
    metric: str
    mode: Mode
    scores: Scores
    questions: tuple[str, ...] = ()
    noun: str = "items"


def measured_items(
    model: str, origin: str, table: pa.Table, tasks: Sequence[str] = (), *, same_words: bool = True
) -> list[Measured]:
    """Return a model's results in each task of a table of items, by the metric that the task is judged by.

    With `same_words`, the texts of the items are compared with those of other models.

    Raises:
        UserError: the table has no item, or lacks one of `tasks`, which are taken alone if there are any.
    """
    metrics = metrics_of(table)
    if not metrics:
        raise UserError(f"{origin} holds no item: evaluate the model again")
    if missing := [task for task in tasks if task not in metrics]:
        raise UserError(f"{origin} has no results of task {missing[0]}, only of {', '.join(metrics)}")
    found: list[Measured] = []
    for task in tasks or metrics:
        metric = metrics[task][0]
        of_task = table.filter((pc.field("task") == task) & (pc.field("metric") == metric)).sort_by("item")
        questions = tuple(map(str, of_task["question"].to_pylist())) if same_words else ()
        found.append(Measured(model, origin, task, metric, mode_of(metric), scores_of(of_task, task), questions))
    return found


def measured_validation(model: str, run: Trial, stage: str, metric: str | None = None) -> list[Measured]:
    """Return a run's results on its validation examples; none if it has none, or if they cannot be compared.

    `metric` is one of the stage's metrics, by default that by which a sweep is judged.
    """
    metric = metric or STAGES[stage].judged_by
    validation, mode = examples_of(run, metric), STAGES[stage].metrics[metric]
    if not validation or run.diverged:
        return []
    scores = Scores(validation.example_E, validation.cluster_E, *terms(run, metric))
    return [Measured(model, str(run.path), VALIDATION, metric, mode, scores, noun="validation examples")]


def distinct_names(paths: Sequence[str]) -> list[str]:
    """Return short names of models: the shortest ends of their paths that differ from each other."""
    paths = [path.removesuffix(".parquet") for path in paths]
    parts = [[part for part in path.rstrip("/").split("/") if part] or [path] for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def by_task(measured: Sequence[Sequence[Measured]]) -> list[list[Measured]]:
    """Return the results of all models in each task, in the order of the first model's tasks.

    Raises:
        UserError: a model lacks a task, or two models were measured on different examples.
    """
    first = measured[0]
    tasks = [{found.task: found for found in of_model} for of_model in measured]
    for other, of_other in zip(measured[1:], tasks[1:]):
        if missing := sorted(of_other.keys() ^ tasks[0].keys()):
            has, lacks = (first, other) if missing[0] in tasks[0] else (other, first)
            raise UserError(
                f"{lacks[0].origin} has no results of task {missing[0]}, which {has[0].origin} has; name the tasks "
                "that all of them have with --tasks"
            )
    for task, a in tasks[0].items():
        for b in (of_model[task] for of_model in tasks[1:]):
            if difference := differ(a, b):
                advice = "evaluate both with the same --tasks, --limit and --num-fewshot"
                if task == VALIDATION:
                    advice = "compare runs with the same validation data and tokenizer"
                raise UserError(f"{a.origin} and {b.origin} cannot be compared in {task}: {difference}; {advice}")
    return [[of_model[task] for of_model in tasks] for task in tasks[0]]


def differ(first: Measured, other: Measured) -> str:
    """Return in which way the examples of two models differ; empty if they are the same."""
    a, b = first.scores, other.scores
    if first.metric != other.metric:
        return f"one is judged by {first.metric}, the other by {other.metric}"
    if len(a.item_E) != len(b.item_E):
        return f"one has {len(a.item_E):,} {first.noun}, the other {len(b.item_E):,}"
    if not np.array_equal(a.item_E, b.item_E):
        return f"they have different {first.noun}"
    if not np.array_equal(a.cluster_E, b.cluster_E):
        return f"they group the {first.noun} in different ways"
    if first.task == VALIDATION and not np.array_equal(a.weight_E, b.weight_E):
        return f"their {first.noun} have different lengths"
    if first.questions != other.questions and first.questions and other.questions:
        at = next(i for i, (p, q) in enumerate(zip(first.questions, other.questions)) if p != q)
        return f"item {a.item_E[at]} has another text, as with other examples in the prompt or another chat template"
    return ""
