"""The settings of a sweep besides the config of its runs: how to search, the metric, the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from minimind_ray.config.errors import UserError
from minimind_ray.config.load import read_yaml
from minimind_ray.config.section import PositiveFloat, PositiveInt, Section
from minimind_ray.config.stages import STAGES, Mode, StageName, one_of

SchedulerName = Literal["none", "asha", "median", "pbt"]

ASHA_FIRST, ASHA_KEEP = 20, 3
"""Asynchronous successive halving (Li et al. 2020): rungs at 20 and 60 % of a run's steps keep the best third."""
PBT_EVERY = 20
"""Population based training (Jaderberg et al. 2017): exploit and explore at every 20 % of a run's steps."""

TASK_PREFIX = "task/"
"""The results of benchmark tasks are named task/NAME in metrics.jsonl and in `--metric`."""

LESS_IS_BETTER = ("mm_repetition",)
"""The tasks of our own whose smaller results are better."""

METRICS = dict.fromkeys(metric for record in STAGES.values() for metric in record.metrics)
"""The metrics of all stages."""


class SearchConfig(Section):
    """How to search the points of a sweep. Each field is an option of `tune`; its description is the option's help."""

    scheduler: SchedulerName = Field("none", description="none, asha, median or pbt")
    searcher: Literal["grid", "optuna"] = Field("grid", description="grid or optuna")
    trials: PositiveInt | None = Field(None, description="number of points to draw on log(), uniform(), int() axes")
    seeds: PositiveInt = Field(1, description="number of runs of every point")
    metric: str | None = Field(
        None, description="default: val/loss; for dpo val/accuracy; or task/NAME for a benchmark in eval.tasks"
    )
    mode: Mode | None = Field(None, description="min or max; default: the metric's own")
    margin: PositiveFloat | None = Field(None, description="call points equal that differ by less than this")
    fuse: Literal["auto", "off"] | PositiveInt = Field(
        "auto", description="LoRA trials to train in one process: a number, auto or off"
    )
    concurrent: PositiveInt | None = Field(None, description="most trials at once; default: as many as fit")
    budget_hours: PositiveFloat | None = Field(None, description="stop the sweep cleanly after this many hours")
    budget_tokens: PositiveInt | None = Field(None, description="most tokens for all trials together; shortens runs")
    price_per_hour: float | None = Field(None, ge=0, description="price of the resources of one trial")

    @field_validator("fuse", mode="before")
    @classmethod
    def _number_or_word(cls, value: Any) -> Any:
        if isinstance(value, bool) or (isinstance(value, str) and value not in ("auto", "off")):
            raise ValueError("should be a number, auto or off")
        return value

    @field_validator("metric", mode="before")
    @classmethod
    def _known_metric(cls, value: Any) -> Any:
        if value is not None and not (isinstance(value, str) and (value in METRICS or value.startswith(TASK_PREFIX))):
            raise ValueError(f"Input should be {one_of([*map(repr, METRICS), f'{TASK_PREFIX}NAME of a task'])}")
        return value

    def judged_by(self, stage: StageName) -> tuple[str, Mode]:
        """Return the metric that judges runs of a stage, and its mode. The default is in the stage's record.

        Raises:
            UserError: the stage does not have this metric.
        """
        record = STAGES[stage]
        metric = self.metric or record.judged_by
        if metric.startswith(TASK_PREFIX):  # Planning the sweep checks the mode of other tasks.
            return metric, self.mode or ("min" if metric.removeprefix(TASK_PREFIX) in LESS_IS_BETTER else "max")
        if metric not in record.metrics:
            raise UserError(f"metric: {stage} has no {metric}; its metrics are {', '.join(record.metrics)}")
        return metric, self.mode or record.metrics[metric]


class SweepFile(SearchConfig):
    """A sweep as YAML: experiments/sweeps/*.yaml. `settings` is a config as in a recipe, `axes` has dotted keys."""

    stage: StageName
    settings: dict[str, Any] = Field(default_factory=dict)
    axes: dict[str, Any] = Field(default_factory=dict)


def read_sweep_file(path: str | Path) -> SweepFile:
    """Read a sweep's YAML file.

    Raises:
        UserError: the file cannot be read, or a key or value is wrong.
    """
    try:
        return SweepFile.model_validate(read_yaml(path))
    except ValidationError as error:
        raise _explained(error, f"{path}: ") from None


def search_config(values: dict[str, Any]) -> SearchConfig:
    """Check the search settings given by flags.

    Raises:
        UserError: a value is wrong.
    """
    try:
        return SearchConfig.model_validate(values)
    except ValidationError as error:
        raise _explained(error, "") from None


def _explained(error: ValidationError, origin: str) -> UserError:
    first = error.errors()[0]
    key = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return UserError(f"{origin}{key}: no such setting of a sweep; valid: {', '.join(SweepFile.model_fields)}")
    value = "" if first["type"] == "missing" else f", not {first['input']!r}"
    message = first["msg"].removeprefix("Value error, ")
    return UserError(f"{origin}{key}: {message[0].lower()}{message[1:]}{value}")
