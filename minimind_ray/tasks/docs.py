"""The items of a task in memory, in the form in which lm-eval reads a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Docs(list[dict[str, Any]]):
    """The items of a split. A field that an item lacks is None, as in a table."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.features: dict[str, None] = dict.fromkeys(name for row in rows for name in row)
        super().__init__({**self.features, **row} for row in rows)
