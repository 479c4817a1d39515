"""Find the validation by which a run is judged: the validation of its best checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any


def best_validation(lines: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the line of metrics.jsonl with the lowest val/loss; None if no line has a finite val/loss.

    If several lines have the lowest val/loss, return the last of them. Schedulers, searchers, progress lines, tables
    and reports take a trial's metric from this line. The training loop chooses the best checkpoint by the same rule.
    """
    best, lowest = None, math.inf
    for line in lines:
        loss = line.get("val/loss")
        if loss is not None and math.isfinite(loss) and loss <= lowest:
            best, lowest = line, loss
    return best
