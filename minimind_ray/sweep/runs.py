"""Read single runs, which belong to no sweep, and find the results that can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minimind_ray.config.errors import UserError
from minimind_ray.config.stages import STAGES
from minimind_ray.data.storage import url_of
from minimind_ray.sweep.measured import Measured, by_task, distinct_names, measured_items, measured_validation
from minimind_ray.sweep.trials import Trial, read_run
from minimind_ray.tasks.items import FILE, read_items


@dataclass(frozen=True)
class Run:
    """A run with a short name of its own.

    `where` is its path or URL, `files` are what `read_trial` reads, `config` is the resolved config.
    """

    name: str
    where: str
    files: Trial
    config: dict[str, Any]

    @property
    def stage(self) -> str:
        """The stage that the run trained."""
        return str(self.config.get("stage"))


def read_runs(paths: Sequence[str]) -> list[Run]:
    """Read several runs.

    Raises:
        UserError: a path holds no run, a file is damaged, or a run is named twice.
    """
    found = [read_run(path) for path in paths]
    names = distinct_names([str(files.path) for files, _ in found])
    if len(set(names)) < len(names):
        raise UserError(f"{next(name for name in names if names.count(name) > 1)} is named twice: name each run once")
    return [Run(name, url_of(files.path), files, config) for name, (files, config) in zip(names, found)]


def shared_results(runs: Sequence[Run], metric: str | None = None) -> tuple[list[list[Measured]], list[str]]:
    """Return the results of each run that all runs have on the same examples: of the validation, and of tasks.

    `metric` is the metric of the validation, by default that by which a sweep of the stage is judged. Also return
    sentences on results that cannot be compared.

    Raises:
        UserError: the stage has no such metric.
    """
    notes: list[str] = []
    kinds = [_of_validation(runs, metric, notes), *_of_tasks(runs)]
    shared: list[list[Measured]] = [[] for _ in runs]
    for models in kinds:
        try:
            for found, model in zip(shared, by_task([[model] for model in models])[0] if models else []):
                found.append(model)
        except UserError as error:
            notes.append(f"{str(error).partition(';')[0]}.")
    return [found for found in shared if found], notes


def _of_validation(runs: Sequence[Run], metric: str | None, notes: list[str]) -> list[Measured]:
    stages = {run.stage for run in runs}
    if len(stages) > 1 or not stages <= STAGES.keys():
        notes.append(f"Validations of different stages cannot be compared: {', '.join(sorted(stages))}.")
        return []
    known = STAGES[stages.pop()].metrics
    name = metric if metric is None or metric in known else f"val/{metric}"
    if name is not None and name not in known:
        raise UserError(f"metric {metric}: runs of stage {runs[0].stage} are compared by one of {', '.join(known)}")
    found = [measured_validation(run.name, run.files, run.stage, name) for run in runs]
    if lacking := [run.name for run, of_run in zip(runs, found) if not of_run]:
        notes.append(f"Validations cannot be compared, because {lacking[0]} has none, or one without a finite loss.")
        return []
    return [of_run[0] for of_run in found]


def _of_tasks(runs: Sequence[Run]) -> list[list[Measured]]:
    """Return the runs' results in each task that all of them have."""
    found = [
        {of_task.task: of_task for of_task in measured_items(run.name, str(run.files.path), read_items(file))}
        if (file := run.files.path / FILE).exists()
        else {}
        for run in runs
    ]
    return [[of_run[task] for of_run in found] for task in found[0] if all(task in of_run for of_run in found)]
