"""Run a trained model on benchmark tasks, and summarise the results with intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from minimind_ray.stages.use import open_trained
from minimind_ray.tasks.extra import require_lm_eval
from minimind_ray.tasks.items import Item
from minimind_ray.train.intervals import clustered_mean, clustered_share

if TYPE_CHECKING:
    from minimind_ray.tasks.suite import Suite, TaskResults


class Score(NamedTuple):
    """A model's result in one task by one metric.

    `low` and `high` are the 95 % interval. They are None if the metric has no value for each item; and, if it is no
    share, for one item, or where all items have the same value.
    `chance` is the value of a guess, None if it is not known.
    """

    task: str
    metric: str
    value: float
    low: float | None
    high: float | None
    items: int
    chance: float | None

    @property
    def verdict(self) -> str:
        """How the value compares with a guess; empty if it is above chance, or chance is not known."""
        if self.chance is None or self.low is None or self.high is None or self.low > self.chance:
            return ""
        return "below chance" if self.high < self.chance else "not distinguishable from chance"


def load_suite(names: Sequence[str], folder: Path | None = None, num_fewshot: int | None = None) -> Suite:
    """Return the tasks with these names; `folder` has tasks of the user's own. See `suite.load_tasks`.

    Raises:
        UserError: lm-eval is not installed, or a task cannot be loaded.
    """
    require_lm_eval()
    from minimind_ray.tasks.suite import load_tasks

    return load_tasks(names, folder, num_fewshot)


def run_benchmark(
    model: str,
    suite: Suite,
    *,
    adapter: str | None = None,
    precision: str = "auto",
    limit: int | None = None,
    chat: bool = False,
    progress: Callable[[str, int, int], None] = lambda task, done, total: None,
) -> TaskResults:
    """Run a model on all tasks; see `suite.run_tasks`.

    `progress` is called with the name of the task under way, and how many of how many requests are answered.

    Raises:
        UserError: the model does not exist, or a task does not fit it.
    """
    from minimind_ray.tasks.lm import RaggedLM
    from minimind_ray.tasks.suite import run_tasks

    trained = open_trained(model, adapter=adapter, precision=precision)
    current = [""]
    lm = RaggedLM(
        trained.model, trained.tokenizer, trained.generation, trained.autocast,
        lambda done, total: progress(current[0], done, total),
    )  # fmt: skip
    talks = not trained.continues_texts
    return run_tasks(lm, suite, limit=limit, chat=chat, converses=talks, say=lambda name: current.__setitem__(0, name))


def summarise(results: TaskResults) -> list[Score]:
    """Return the scores of all tasks and metrics, in the order of the tasks."""
    by_metric: dict[tuple[str, str], list[Item]] = {}
    for item in results.items:
        by_metric.setdefault((item.task, item.metric), []).append(item)
    scores = [_score(items, results.chance.get(task)) for (task, _), items in by_metric.items()]
    for (task, metric), value in results.totals.items():
        count = len({item.item for item in results.items if item.task == task})
        scores.append(Score(task, metric, value, None, None, count, None))
    order = list(dict.fromkeys(score.task for score in scores))
    return sorted(scores, key=lambda score: order.index(score.task))


GUESSED = ("acc", "acc_norm", "acc_bytes")
"""The metrics that a guess reaches `chance` in."""
NO_WIDTH = 1e-9


def _score(items: Sequence[Item], chance: float | None) -> Score:
    value_E, weight_E = (np.array([getattr(item, name) for item in items]) for name in ("value", "weight"))
    cluster_E = np.array([item.cluster for item in items])
    value = float(value_E.sum() / weight_E.sum()) if weight_E.sum() else float("nan")
    low, high = None, None
    if bool((weight_E == 1).all()) and set(value_E.tolist()) <= {0.0, 1.0}:
        low, high = clustered_share(value_E, cluster_E)
    elif len(np.unique(cluster_E)) > 1 and weight_E.sum():
        low, high = clustered_mean(value_E, weight_E, cluster_E)
        if high - low <= NO_WIDTH * max(1.0, abs(value)):  # All items agree, which does not make the value exact.
            low, high = None, None
    first = items[0]
    return Score(first.task, first.metric, value, low, high, len(items), chance if first.metric in GUESSED else None)
