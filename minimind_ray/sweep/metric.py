"""What sweeps are judged by: the metric, whether less or more of it is better, and its values for each example."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

import numpy as np

from minimind_ray.config.errors import UserError
from minimind_ray.config.stages import STAGES, Mode
from minimind_ray.sweep.trials import Sweep, Trial, Validation
from minimind_ray.tasks.items import PREFIX, mode_of


def judged_by(
    sweeps: Sequence[Sweep], metric: str | None, mode: str | None, margin: float | None
) -> tuple[str, Mode, float]:
    """Return the metric, its mode and the margin of a comparison: as given, or else the sweeps' own.

    A stage's metric may be given without its "val/". The name of a task is given as task/NAME. Other columns of
    validation.parquet need a mode. The margin 0 means none.

    Raises:
        UserError: a value is wrong, the mode is missing or contradicts a stage's metric, or the sweeps do not agree on
            what is not given.
    """
    if mode is not None and mode not in get_args(Mode):
        raise UserError(f"mode {mode}: give min if less of the metric is better, or max if more is better")
    if margin is not None and not (margin >= 0 and math.isfinite(margin)):
        raise UserError(
            f"margin {margin:g}: give a number above 0, in units of the metric, such as 0.01; or 0 for no margin"
        )
    if margin is None:
        margin = _common_margin(sweeps)
    if metric is None:
        if mode is not None:
            raise UserError(f"mode {mode} needs a metric: name the column of validation.parquet to judge by")
        return *_common_metric(sweeps), margin
    known = STAGES[sweeps[0].info.stage].metrics
    name = f"val/{metric}" if f"val/{metric}" in known else metric
    found = _mode_of_task(sweeps, name) if name.startswith(PREFIX) else known.get(name, mode)
    if mode not in (None, found):
        raise UserError(
            f"mode {mode} contradicts metric {name}: {'smaller' if found == 'min' else 'larger'} values of it are "
            f"better; leave out the mode, or give {found}"
        )
    if found is None:
        raise UserError(f"metric {metric} needs a mode: min if less of it is better, or max if more is better")
    return name, "min" if found == "min" else "max", margin


def _mode_of_task(sweeps: Sequence[Sweep], metric: str) -> Mode:
    """Return whether less or more of a task's metric is better, by the name of the metric that it is judged by."""
    task, trials = metric.removeprefix(PREFIX), [trial for sweep in sweeps for trial in sweep.trials]
    for trial in trials:
        if task in trial.tasks:
            return mode_of(trial.tasks[task].metric)
    known = ", ".join(sorted({PREFIX + name for trial in trials for name in trial.tasks}))
    raise UserError(
        f"no trial has results of task {task}; "
        + (f"judge the sweep by one of {known}" if known else "name tasks with eval.tasks when you start a sweep")
    )


def _common_metric(sweeps: Sequence[Sweep]) -> tuple[str, Mode]:
    first = sweeps[0].info
    for sweep in sweeps[1:]:
        if (sweep.info.metric, sweep.info.mode) != (first.metric, first.mode):
            raise UserError(
                f"{sweeps[0].path} is judged by {first.metric} ({first.mode}), {sweep.path} by {sweep.info.metric} "
                f"({sweep.info.mode}); only sweeps with the same metric fit in one table: give a metric and a mode"
            )
    return first.metric, first.mode


def _common_margin(sweeps: Sequence[Sweep]) -> float:
    margins = {sweep.info.margin for sweep in sweeps}
    if len(margins) > 1:
        raise UserError(f"the sweeps have the margins {', '.join(f'{m:g}' for m in sorted(margins))}: give a margin")
    return margins.pop()


BITS = "val/bits_per_byte"


def examples_of(trial: Trial, metric: str) -> Validation | None:
    """Return the results from which a metric is computed: of the validation examples, or of a task's items.

    None if the trial has none.
    """
    return trial.tasks.get(metric.removeprefix(PREFIX)) if metric.startswith(PREFIX) else trial.validation


def examples_noun(metric: str) -> str:
    """Return what the examples of a metric are called."""
    return "items" if metric.startswith(PREFIX) else "validation examples"


def columns_of(metric: str) -> list[str]:
    """Return the columns of `examples_of` from which a metric is computed: numerator and denominator, if any."""
    if metric.startswith(PREFIX):
        return ["value", "weight"]
    name = metric.removeprefix("val/")
    return ["loss", "bytes"] if metric == BITS else [name] if name == metric else [name, "count"]


def terms(trial: Trial, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the metric's numerator and denominator for each example. The metric is the ratio of their sums.

    For a stage's metrics ("val/…") this is the mean over tokens or pairs, for a task's metric that over its items. Any
    other column is averaged over examples.

    Raises:
        UserError: the per-example results lack a column for the metric, or it has no numbers.
    """
    validation, needed = examples_of(trial, metric), columns_of(metric)
    assert validation
    if texts := [column for column in needed if column in validation.not_numbers]:
        raise UserError(
            f"{validation.path}: the column {texts[0]} has no numbers; judge the sweep by another metric: val/loss, or "
            f"one of {', '.join(sorted(validation.columns))}"
        )
    if missing := [column for column in needed if column not in validation.columns]:
        raise UserError(
            f"{validation.path} has no {' and '.join(missing)} for each example, which {metric} needs; judge the sweep "
            f"by another metric: val/loss, or one of {', '.join(sorted(validation.columns))}"
        )
    numerator_E, *denominators = (validation.columns[column] for column in needed)
    scale = 1 / math.log(2) if metric == BITS else 1.0
    return numerator_E * scale, denominators[0] if denominators else np.ones(len(numerator_E))


def trial_metric(trial: Trial, metric: str) -> float:
    """Return the metric of a trial's validation. Raises UserError if the per-example results lack a column for it."""
    numerator_E, denominator_E = terms(trial, metric)
    return float(numerator_E.sum() / denominator_E.sum())
