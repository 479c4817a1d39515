"""Which validation a run is judged by: the one of the checkpoint that is kept as the best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any


def best_validation(lines: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The one with the lowest val/loss, of equals the last, among lines of metrics.jsonl; None without any.

    A trial's metric is its value there, for schedulers, searchers, the progress of a sweep, tables and reports. (The
    loop keeps the best checkpoint by the same rule, and in a sweep every validation has a checkpoint.)
    """
    best, lowest = None, math.inf
    for line in lines:
        loss = line.get("val/loss")
        if loss is not None and math.isfinite(loss) and loss <= lowest:
            best, lowest = line, loss
    return best
