"""Read the files of a sweep and the results of its trials.

sweep.json          SweepInfo: the axes, the metric, and counts of shared work
trials/<id>/        a run directory (train/run.py) for each trial, and in it
    trial.json          TrialInfo: the point on the axes and the seed
    lineage.jsonl       with pbt: the steps at which it took over weights from other trials
    validation.parquet  the validation of its result, one row per example; the result of a run is the checkpoint with
                        the lowest validation loss
    tasks.parquet       the results of the same checkpoint in tasks, one row per item (tasks/items.py)
report.html, report.png
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from minimind_ray.config.errors import UserError
from minimind_ray.config.load import read_yaml
from minimind_ray.config.paths import input_path
from minimind_ray.config.reading import read_json, require_own
from minimind_ray.config.stages import StageName
from minimind_ray.data.claim import live_writer
from minimind_ray.data.hub import hub_ref
from minimind_ray.data.storage import Copy, copy_of, mirror_of, url_of
from minimind_ray.tasks import items
from minimind_ray.train.best import best_validation
from minimind_ray.train.run import VALIDATION, RunDirectory, inside, read_jsonl

if TYPE_CHECKING:
    import pyarrow as pa

Value = bool | int | Annotated[float, Field(allow_inf_nan=False)] | str | None | list[str | int | float]
"""The types of an axis's values."""
State = Literal["waiting", "running", "finished", "early-stopped", "stopped", "failed"]
"""`early-stopped`: stopped for good by the scheduler. `stopped`: stopped by hand or a budget; can be resumed."""


class MoreSeeds(BaseModel):
    """A point that has more seeds than the other points of its sweep."""

    model_config = ConfigDict(strict=True, extra="ignore")

    point: dict[str, Value]
    seeds: int = Field(ge=1)


class Session(BaseModel):
    """A time in which a process ran the sweep, on `places` places (see `Layout.places`).

    `ended` is None while the process runs, and after a process that was killed.
    """

    model_config = ConfigDict(extra="ignore")

    began: AwareDatetime
    ended: AwareDatetime | None = None
    places: int = Field(ge=1, le=1_000_000)


class SweepInfo(BaseModel):
    """The content of sweep.json.

    `axes` are lists, or texts for drawn axes. `config` is the resolved config without the axes' values. `seeds` is the
    number of seeds of all points but those in `more_seeds`.
    """

    model_config = ConfigDict(strict=True, extra="ignore")

    stage: StageName
    metric: str
    mode: Literal["min", "max"]
    axes: dict[str, list[Value] | str]
    seeds: int = Field(ge=1)
    more_seeds: list[MoreSeeds] = Field(default_factory=list)
    shared: dict[str, Any] = Field(default_factory=dict)
    created: str
    config: dict[str, Any]
    price_per_hour: float | None = Field(None, ge=0, description="price of one place (see cost.py)")
    sessions: list[Session] = Field(default_factory=list)
    margin: float = Field(0.0, ge=0, allow_inf_nan=False, description="points that differ by less count as equal")


class Timing(BaseModel):
    """The time of a step, and of the validation and the samples after it."""

    model_config = ConfigDict(extra="ignore")

    seconds: float = Field(ge=0, allow_inf_nan=False)
    validation_seconds: float = Field(0.0, ge=0, allow_inf_nan=False)


class MetricsLine(BaseModel):
    """A line of metrics.jsonl. All keys that are not listed here have numbers."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | None]  # pyright: ignore[reportIncompatibleVariableOverride]

    step: int = Field(ge=0)
    tokens: int = Field(ge=0)
    timing: Timing | None = None
    warning: str | None = None


class LineageLine(BaseModel):
    """A line of lineage.jsonl: at this step, pbt gave the trial another trial's weights and moved it to `point`."""

    model_config = ConfigDict(strict=True, extra="ignore")

    step: int = Field(ge=0)
    point: dict[str, Value]


class SamplesLine(BaseModel):
    """A line of samples.jsonl. Step 0 is before the first step. Lines of earlier versions have no prompts."""

    model_config = ConfigDict(strict=True, extra="ignore")

    step: int = Field(ge=0)
    samples: list[str]
    prompts: list[str] = Field(default_factory=list)


class TrialInfo(BaseModel):
    """The content of trial.json."""

    model_config = ConfigDict(strict=True, extra="ignore")

    id: str
    point: dict[str, Value]
    seed: int


class RunInfo(BaseModel):
    """The part of run.json that is read here."""

    model_config = ConfigDict(extra="ignore")

    state: State = "waiting"
    error: str | None = None
    steps: Annotated[int, Field(ge=0)] | None = None
    planned_steps: Annotated[int, Field(ge=1)] | None = None
    tokens: Annotated[int, Field(ge=0)] | None = None
    result: str | None = None
    inputs: dict[str, str | None] = Field(default_factory=dict)
    updated: AwareDatetime | None = None


LARGEST = 1e100
"""A trial with a number of at least this size has diverged: sums of squares of such numbers may not be finite."""
NOT_FINITE = re.compile(r"the loss is \S+ and the gradient norm \S+;")
"""The error of a trial whose loss or gradient is not finite (train/loop.py) contains this."""


@dataclass(frozen=True)
class Validation:
    """Per-example results, sorted by example (see `Evaluation` in train/evaluate.py).

    `cluster_E` int64 is the cluster of each example. In a file of an older version, which has no clusters, each example
    is its own cluster. `columns` are float64: `loss` (nats) and the objective's metrics, each summed over the example's
    `count` tokens or pairs (1); and for tokens `bytes`, the length of their text. `not_numbers` names the user's other
    columns, such as texts.
    """

    path: Path
    example_E: np.ndarray
    cluster_E: np.ndarray
    columns: dict[str, np.ndarray]
    not_numbers: tuple[str, ...] = ()

    def finite(self, names: Iterable[str]) -> bool:
        """Whether every number in these columns is finite, and small enough (LARGEST) for the statistics."""
        found = (self.columns[name] for name in names if name in self.columns)
        return all(bool((np.abs(values) < LARGEST).all()) for values in found)


@dataclass(frozen=True)
class TaskResults(Validation):
    """The results of a task, sorted by item. The columns are `value` and `weight`; the ratio of their sums is `metric`.

    `metric` is the metric that the task is judged by, such as "acc".
    """

    metric: str = ""


@dataclass(frozen=True)
class Trial:
    """A run of a sweep, finished or not. `result` is its best checkpoint; `validated_on` names its validation set.

    `length` is the number of steps that the run has when it is finished; None if it is unknown, as for unfinished runs
    of earlier versions. `tasks` has the results of tasks, by their names.
    """

    id: str
    path: Path
    point: dict[str, Any]
    seed: int
    state: State
    error: str | None
    steps: int
    length: int | None
    tokens: int
    seconds: float
    result: Path | None
    validated_on: str | None
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    lineage: list[dict[str, Any]]
    validation: Validation | None
    updated: datetime | None
    tasks: Mapping[str, TaskResults] = field(default_factory=dict[str, TaskResults])

    @property
    def status(self) -> str:
        """The state, with the reason if the run stopped because of an error."""
        return f"{self.state} ({self.error})" if self.state == "stopped" and self.error else self.state

    @property
    def diverged(self) -> bool:
        """Whether the loss or the gradient was not finite: in training, which then fails, or in the validation."""
        if self.state == "failed":
            return bool(NOT_FINITE.search(self.error or ""))
        return self.validation is not None and not self.validation.finite(["loss"])

    def best(self, metric: str) -> float | None:
        """Return the metric's value at the best validation so far (see train/best.py); None if it was not measured."""
        value = (best_validation(self.metrics) or {}).get(metric) if metric.startswith(MEASURED) else None
        return None if value is None else float(value)


MEASURED = ("val/", items.PREFIX)
"""The beginnings of the metrics that a validation during training measures."""


@dataclass(frozen=True)
class Sweep:
    """A sweep and its trials, in the order of their ids."""

    path: Path
    info: SweepInfo
    trials: list[Trial]

    @property
    def name(self) -> str:
        """The name of the sweep's directory."""
        return self.path.name


def open_sweep(path: str | Path, kind: Copy = "read") -> Path:
    """Return the local directory of a sweep or a run. Download one in an object store, except its checkpoints.

    A relative path that does not exist here is looked up in the storage (see config/paths.py). `kind` names the local
    copy of an object store.
    """
    path = input_path(path)
    if mirror := mirror_of(path, kind):
        mirror.pull(wanted=lambda name: not set(name.split("/")) & {"checkpoints", ".ray"})
        return mirror.path
    return Path(path)


def read_sweep(path: str | Path, kind: Copy = "read") -> Sweep:
    """Read a sweep that is finished, stopped or still running. `kind` names the local copy of an object store.

    Raises:
        UserError: the directory holds no sweep or no trials yet, or a file is damaged.
    """
    path = open_sweep(path, kind)
    if not (path / "sweep.json").exists():
        raise UserError(f"{url_of(path)} holds no sweep.json: give a directory that minimind-ray tune has made")
    info = _read(path / "sweep.json", SweepInfo)
    trials = [read_trial(directory) for directory in sorted((path / "trials").glob("*/"))]
    if not trials:
        raise UserError(f"{path}/trials holds no trial: no trial has started yet")
    for trial in trials:
        if trial.point.keys() != info.axes.keys():
            raise UserError(
                f"{trial.path}/trial.json: the trial's axes are {', '.join(trial.point) or 'none'}, but the axes of "
                f"sweep.json are {', '.join(info.axes) or 'none'}; the trial belongs to another sweep"
            )
    return Sweep(path, info, trials)


def update_info(path: Path, **facts: Any) -> None:
    """Add `facts` to the sweep.json of the sweep in `path`. Several threads of the sweep's process may do so."""
    with _updating:
        content = {**read_json(path / "sweep.json"), **facts}
        RunDirectory(path).write("sweep.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")


_updating = threading.Lock()


def read_sweeps(paths: Iterable[str | Path]) -> list[Sweep]:
    """Read several sweeps. A sweep with two names, such as `s` and `s/`, is read once. Raises as `read_sweep`."""
    return [read_sweep(path) for path in {copy_of(input_path(path)).resolve(): path for path in paths}.values()]


def read_trial(path: Path) -> Trial:
    """Read a trial. Fields that it has not written yet are empty or None. Raises as `read_sweep`."""
    return _read_trial(path, _read(path / "trial.json", TrialInfo))


def is_sweep(path: str | Path) -> bool:
    """Whether a directory or URL holds a sweep."""
    return _holds(path, "sweep.json")


def is_run(path: str | Path) -> bool:
    """Whether a directory or URL holds a run."""
    return _holds(path, "config.yaml") and not is_sweep(path)


def _holds(path: str | Path, file: str) -> bool:
    return hub_ref(path) is None and RunDirectory(input_path(path)).file(file).exists()


def read_run(path: str | Path) -> tuple[Trial, dict[str, Any]]:
    """Read a single run in the form of a trial without axes, and its resolved config.

    Raises:
        UserError: the directory holds no run, or a file is damaged.
    """
    path = open_sweep(path)
    if not (path / "config.yaml").exists():
        raise UserError(f"{url_of(path)} holds no run: give the directory of a run, which has a config.yaml")
    config = read_yaml(path / "config.yaml")
    train = config.get("train")
    seed = train.get("seed") if isinstance(train, dict) else None
    return _read_trial(path, TrialInfo(id=path.name, point={}, seed=seed if type(seed) is int else 0)), config


def _read_trial(path: Path, trial: TrialInfo) -> Trial:
    run = _read(path / "run.json", RunInfo) if (path / "run.json").exists() else RunInfo()
    gone = run.state == "running" and not live_writer(path)
    if run.result and not inside(run.result):
        raise UserError(f"{path}/run.json: its result {run.result!r} is not a path inside the run directory")
    metrics = _read_lines(path / "metrics.jsonl", MetricsLine)
    last = metrics[-1] if metrics else {"step": 0, "tokens": 0}
    timings = [m["timing"] for m in metrics if "timing" in m]
    timed = [timing["seconds"] + timing.get("validation_seconds", 0.0) for timing in timings]
    return Trial(
        id=trial.id,
        path=path,
        point=trial.point,
        seed=trial.seed,
        state="stopped" if gone else run.state,
        error="its process is gone" if gone else run.error,
        # A running trial has no totals yet.
        steps=last["step"] if run.steps is None else run.steps,
        length=run.planned_steps or (run.steps if run.state == "finished" else None),
        tokens=last["tokens"] if run.tokens is None else run.tokens,
        seconds=sum(timed),
        result=path / run.result if run.result else None,
        validated_on=Path(val).name if (val := run.inputs.get("data.val")) else None,
        metrics=metrics,
        samples=_read_lines(path / "samples.jsonl", SamplesLine),
        lineage=_read_lines(path / "lineage.jsonl", LineageLine),
        validation=read_validation(path / VALIDATION),
        updated=run.updated,
        tasks=read_tasks(path / items.FILE),
    )


def read_tasks(path: Path) -> dict[str, TaskResults]:
    """Read the results of tasks by their names; none if the file does not exist. Raises as `read_sweep`."""
    if not path.exists():
        return {}
    table, found = items.read_items(path), dict[str, TaskResults]()
    for task, metrics in items.metrics_of(table).items():
        scores = items.scores_of(table, task)
        columns = {"value": scores.value_E, "weight": scores.weight_E}
        found[task] = TaskResults(path, scores.item_E, scores.cluster_E, columns, metric=metrics[0])
    return found


def read_validation(path: Path) -> Validation | None:
    """Read the per-example results; None if the file does not exist. Raises as `read_sweep`."""
    if not path.exists():
        return None
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        require_own(path)
        file = pq.ParquetFile(path)
        if file.metadata.num_rows > MOST_EXAMPLES:
            raise pa.ArrowInvalid(f"{file.metadata.num_rows:,} rows")
        table = file.read().sort_by("example")
        numbers = [field.name for field in table.schema if field.name in IDS or _is_number(field.type)]
        columns: dict[str, np.ndarray] = {
            name: table[name].cast(pa.int64() if name in IDS else pa.float64()).combine_chunks().to_numpy(False)
            for name in numbers
        }
        example_E, _, _ = columns.pop("example"), columns["loss"], columns["count"]
        cluster_E = columns.pop("cluster", example_E)
        if cluster_E.dtype != np.int64:  # A column with nulls has become floats.
            raise pa.ArrowInvalid("column cluster has nulls")
    except (OSError, pa.ArrowException, KeyError) as error:
        detail = f"no column {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read: {detail}; delete it and resume the sweep to write it again") from None
    if not len(example_E):
        raise UserError(f"{path} holds no example; delete the file and resume the sweep to write it again")
    if len(np.unique(example_E)) != len(example_E):
        raise UserError(f"{path}: an example appears twice; delete the file and resume the sweep to write it again")
    return Validation(path, example_E, cluster_E, columns, tuple(set(table.column_names) - set(numbers)))


def _is_number(type: pa.DataType) -> bool:
    """Whether a column has numbers or truth values. A column with no value at all has the type null."""
    from pyarrow import types

    kinds = (types.is_floating, types.is_integer, types.is_boolean, types.is_decimal, types.is_null)
    return any(kind(type) for kind in kinds)


IDS = ("example", "cluster")
MOST_EXAMPLES = 10_000_000
Info = TypeVar("Info", bound=BaseModel)


def _read(path: Path, kind: type[Info]) -> Info:
    return _checked(read_json(path, "; the directory is not a trial of a sweep"), kind, str(path))


def _read_lines(path: Path, kind: type[BaseModel]) -> list[dict[str, Any]]:
    lines = list(read_jsonl(path))
    for number, line in enumerate(lines, 1):
        _checked(line, kind, f"{path}:{number}")
    return lines


def _checked(content: dict[str, Any], kind: type[Info], origin: str) -> Info:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(f"{origin}: {where}: {first['msg'][0].lower()}{first['msg'][1:]}") from None
