"""Made lines of metrics.jsonl, and a training run that fails."""

from __future__ import annotations

from typing import Any

import pytest

from minimind_ray.stages.run import Job
from minimind_ray.train.context import PlainContext
from minimind_ray.train.run import RunDirectory


def line(step: int, **metrics: Any) -> dict[str, Any]:
    return {"step": step, "tokens": step * 100, "loss": 1 / step, "timing": {"mfu": 0.5}, **metrics}


def fail_after_three_lines(job: Job, run: RunDirectory) -> None:
    """Train until metrics.jsonl has three lines; then the process that trains raises an error."""

    class Failing(PlainContext):
        def should_stop(self) -> bool:
            if len(list(run.metrics())) == 3:
                raise ZeroDivisionError
            return False

    context = Failing()
    with pytest.raises(ZeroDivisionError):
        job.run(context, job.data(context))
