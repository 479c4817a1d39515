"""The forms in which trackers take a run's values: flat names, numbers, tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def flatten(tree: Mapping[str, Any], separator: str, at: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping, with joined keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = at + key.replace(".", separator)
        flat |= flatten(value, separator, name + separator) if isinstance(value, Mapping) else {name: value}
    return flat


def is_number(value: Any) -> bool:
    """Whether a value is a number that a curve can show. True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of metrics.jsonl by flat names, such as `timing/mfu`. `step` is left out."""
    flat = flatten({name: value for name, value in metrics.items() if name != "step"}, "/")
    return {name: value for name, value in flat.items() if is_number(value)}


class Best:
    """The best validation among the lines of metrics.jsonl seen so far, by the rule of train/best.py."""

    def __init__(self) -> None:
        self._line: Mapping[str, Any] | None = None
        self._lowest = math.inf

    def see(self, metrics: Mapping[str, Any]) -> None:
        """Take the next line."""
        loss = metrics.get("val/loss")
        if loss is not None and math.isfinite(loss) and loss <= self._lowest:
            self._line, self._lowest = metrics, loss

    def facts(self) -> dict[str, float]:
        """Return `best/loss`, `best/step` and the other values of the best validation; empty without a validation."""
        if not (line := self._line):
            return {}
        judged = {best_name(name): value for name, value in line.items() if name.startswith(("val/", "task/"))}
        return {**judged, "best/step": line["step"], "best/tokens": line["tokens"]}


def best_name(metric: str) -> str:
    """Return the name of a metric's value at the best validation: best/loss for val/loss, best/task/x for task/x."""
    return f"best/{metric.removeprefix('val/')}" if metric.startswith(("val/", "task/")) else metric


def text_of(value: Any) -> str:
    """Return a value of a config, a summary or a table as text. None is empty."""
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table in markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(_cell(value) for value in line)} |" for line in lines)


def _cell(value: Any) -> str:
    return text_of(value).replace("|", "\\|").replace("\n", " ")
