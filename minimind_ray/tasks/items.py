"""The results of tasks, one row for each item and metric: the table in tasks.parquet and in `eval --out`.

Rows of one task and metric are together and in the order of the items. The metrics of a task have the task's own order,
and the first metric is the one that the task is judged by.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from minimind_ray.config.errors import UserError
from minimind_ray.config.search import TASK_PREFIX as PREFIX

__all__ = ["FILE", "PREFIX", "Item", "Scores", "metrics_of", "mode_of", "read_items", "scores_of", "write_items"]

FILE = "tasks.parquet"
"""The name in a run directory: the results of the best checkpoint."""

SCHEMA = pa.schema(
    [
        ("task", pa.string()), ("item", pa.int64()), ("cluster", pa.int64()), ("metric", pa.string()),
        ("value", pa.float64()), ("weight", pa.float64()),
        ("question", pa.string()), ("answer", pa.string()), ("target", pa.string()),
    ]
)  # fmt: skip

LESS_IS_BETTER = frozenset(
    {"bits_per_byte", "byte_perplexity", "word_perplexity", "perplexity", "brier_score", "repeated", "ter"}
)
"""Metrics whose smaller values are better. Larger values of all other metrics are better."""


class Item(NamedTuple):
    """The result of one item of a task by one metric. The metric is sum(value) / sum(weight) over the items.

    `weight` is 1 where the metric is a mean over items. `item` is the item's number in its task, the same for every
    model. Items with the same `cluster` are not independent, such as questions about one text.
    """

    task: str
    item: int
    cluster: int
    metric: str
    value: float
    weight: float
    question: str
    answer: str
    target: str


class Scores(NamedTuple):
    """The items of one task and one metric, as arrays: `item_E` and `cluster_E` int64, the others float64."""

    item_E: np.ndarray
    cluster_E: np.ndarray
    value_E: np.ndarray
    weight_E: np.ndarray

    @property
    def mean(self) -> float:
        """The metric: sum(value) / sum(weight)."""
        return float(self.value_E.sum() / self.weight_E.sum())


def mode_of(metric: str) -> Literal["min", "max"]:
    """Return whether smaller ("min") or larger ("max") values of a task's metric are better."""
    return "min" if metric in LESS_IS_BETTER else "max"


def items_table(items: Iterable[Item]) -> pa.Table:
    """Return the items as a table."""
    rows = list(items)
    return pa.table([[row[i] for row in rows] for i in range(len(SCHEMA))], schema=SCHEMA)


def write_items(path: Path, items: Iterable[Item]) -> None:
    """Write the items as a Parquet file."""
    pq.write_table(items_table(items), path)


def read_items(path: Path) -> pa.Table:
    """Return the table of a file that `write_items` wrote.

    Raises:
        UserError: the file does not exist, or has other columns.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if missing := [name for name in SCHEMA.names if name not in table.column_names]:
        raise UserError(f"{path} has no column {missing[0]}: give a file that `eval --tasks … --out` wrote")
    return table.select(SCHEMA.names)


def metrics_of(table: pa.Table) -> dict[str, list[str]]:
    """Return the metrics of each task in `table`, in their order: the first is the one that the task is judged by."""
    found: dict[str, list[str]] = {}
    for task, metric in zip(table["task"].to_pylist(), table["metric"].to_pylist(), strict=True):
        metrics = found.setdefault(str(task), [])
        if metric not in metrics:
            metrics.append(str(metric))
    return found


def scores_of(table: pa.Table, task: str, metric: str | None = None) -> Scores:
    """Return the items of one task, by `metric` or the metric that the task is judged by, in the order of the items.

    Raises:
        UserError: the table has no such task, or no such metric of the task.
    """
    known = metrics_of(table)
    if task not in known:
        raise UserError(f"there are no results of task {task}, only of {', '.join(known) or 'none'}")
    metric = metric or known[task][0]
    if metric not in known[task]:
        raise UserError(f"task {task} has no metric {metric}, only {', '.join(known[task])}")
    task_E, metric_E = (np.array(table[name].to_pylist(), dtype=object) for name in ("task", "metric"))
    rows = np.flatnonzero((task_E == task) & (metric_E == metric))
    item_E, cluster_E, value_E, weight_E = (
        table[name].to_numpy()[rows] for name in ("item", "cluster", "value", "weight")
    )
    order = np.argsort(item_E, kind="stable")
    return Scores(item_E[order], cluster_E[order], value_E[order], weight_E[order])
