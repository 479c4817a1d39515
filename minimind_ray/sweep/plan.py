"""A sweep before it runs: its trials, what they share, and the directory that holds it all (see trials.py)."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from minimind_ray.config.errors import UserError
from minimind_ray.config.load import load_config, validate
from minimind_ray.config.paths import output_path
from minimind_ray.config.reading import read_json
from minimind_ray.config.schema import Config
from minimind_ray.config.search import SearchConfig
from minimind_ray.data.files import join, remove
from minimind_ray.data.plan import StepPlan
from minimind_ray.data.prepare import Encoding, Unit
from minimind_ray.data.shipped import resolve_paths
from minimind_ray.data.storage import copy_of, url_of
from minimind_ray.data.store import PackStore, UnitStats
from minimind_ray.stages.base import Base
from minimind_ray.stages.columns import FrozenColumn
from minimind_ray.stages.run import Host, Job, begin, changed_inputs, prepare_job
from minimind_ray.stages.stage import stage_of
from minimind_ray.stages.start import check_stage, effect, load_tokenizer, unused
from minimind_ray.sweep.axes import (
    Axis,
    Grid,
    PlannedTrial,
    check_axes,
    parse_axis,
    plan_trials,
    points_on,
    trial_config,
    trial_id,
)
from minimind_ray.sweep.searchers import Explorer, import_optuna
from minimind_ray.sweep.trials import SweepInfo, TrialInfo, open_sweep
from minimind_ray.train.run import RunDirectory

UNITS, REFERENCES = "pieces of them encoded for this sweep", "of these sets computed for this sweep"
BASES = "base models' weights in Ray's object store"
DONE = (UNITS, REFERENCES, BASES)
"""Work, which adds up over the times a sweep is gone on with."""


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep is to do. `trials` are all of them, or for optuna those that are known so far.

    `path` is the sweep's directory, or the local copy of one in an object store. `refused` are points of optuna's that
    could not be run, `equal` trials that are left out because they would be equal to others.
    """

    path: Path
    base: Config
    axes: tuple[Axis, ...]
    search: SearchConfig
    trials: tuple[PlannedTrial, ...]
    refused: tuple[dict[str, Any], ...] = ()
    equal: tuple[PlannedTrial, ...] = ()

    @property
    def count(self) -> int:
        """Trials in all."""
        return self.points * self.search.seeds if self.search.searcher == "optuna" else len(self.trials)

    @property
    def points(self) -> int:
        """Points for optuna to try: as many as asked for, or as the axes hold."""
        return int(min(self.search.trials or 0, points_on(self.axes)))

    @property
    def remark(self) -> str | None:
        """That there are fewer trials than the axes or --trials ask for, and why, in a sentence."""
        if self.equal:
            keys = sorted({key for trial in self.equal for key in trial.point if unused(trial.config, key)})
            return (
                f"left out {len(self.equal)} of {len(self.equal) + len(self.trials)} trials: they differ from others "
                f"only in {' and '.join(keys)}, which changes nothing in them"
            )
        if self.search.searcher != "optuna" or self.points == self.search.trials:
            return None
        return (
            f"the axes hold {self.points} points, fewer than the {self.search.trials} of --trials: each is tried once"
        )

    def in_place(self, trial: PlannedTrial) -> PlannedTrial:
        """The trial with its own directory in the sweep's, and in the sweep's W&B group."""
        track = trial.config.track.model_copy(update={"group": trial.config.track.group or self.path.name})
        out = join(url_of(self.path), "trials", trial.id)
        return replace(trial, config=trial.config.model_copy(update={"out": out, "track": track}))


def plan_sweep(path: str | Path, base: Config, axes: Sequence[Axis], search: SearchConfig) -> SweepPlan:
    """Check everything that can be checked before anything starts.

    Raises:
        UserError: see `plan_trials`, `SearchConfig.judged_by`, `Explorer` and `import_optuna`; no validation data.
    """
    path = copy_of(output_path(url_of(path)))
    base = resolve_paths(base)
    search.judged_by(base.stage)
    if not base.data.val and not base.data.val_fraction:
        raise UserError("a sweep compares trials on validation data: set data.val, or data.val_fraction above 0")
    if base.scale.fewest < base.scale.most:
        raise UserError(f"a sweep compares trials on the same number of workers: --workers {base.scale.most}, say")
    if not base.data.val and any(axis.key == "data.train" for axis in axes):
        raise UserError(
            "data.train is an axis, so data.val must be set: trials are compared on the same validation data"
        )
    for axis in axes:
        _require_effect(axis.key, base, axes)
    if base.checkpoint.every not in (None, base.eval.every):
        raise UserError(
            "a sweep judges a trial by its best checkpoint, so every validation has one: leave checkpoint.every out"
        )
    if not base.data.cache:
        raise UserError("data.cache is false, but trials share prepared data: leave it out")
    if search.searcher == "optuna":
        import_optuna()
        if search.scheduler == "pbt":
            raise UserError("pbt moves its points itself: leave --searcher optuna or --scheduler pbt out")
        if search.trials is None:
            raise UserError("--searcher optuna needs --trials, the number of points to try")
        if not axes:
            raise UserError("--searcher optuna needs an axis to search, such as --lr 'log(1e-6,1e-4)'")
        # The points come later.
        check_axes(base, axes)
        return SweepPlan(path, base, tuple(axes), search, ())
    trials = plan_trials(base, axes, draws=search.trials, seeds=search.seeds, sweep_seed=base.train.seed)
    if search.scheduler == "pbt":
        _check_pbt(base, axes)
    effects = [repr((trial.seed, effect(trial.config, trial.point))) for trial in trials]
    first = {known: trial.id for known, trial in zip(reversed(effects), reversed(trials))}
    different = set(first.values())
    plan = SweepPlan(path, base, tuple(axes), search, (), equal=tuple(t for t in trials if t.id not in different))
    return replace(plan, trials=tuple(plan.in_place(trial) for trial in trials if trial.id in different))


def _require_effect(key: str, base: Config, axes: Sequence[Axis]) -> None:
    """Raises UserError where neither the base nor any value of another axis makes a config that uses this key."""
    rule = unused(base, key)
    others = [{axis.key: value} for axis in axes if isinstance(axis, Grid) and axis.key != key for value in axis.values]
    for point in others if rule else ():
        with suppress(UserError):
            if not unused(trial_config(base, point, base.train.seed), key):
                return
    if rule:
        raise UserError(f"{key} changes nothing, so trials would be equal: {rule.otherwise(base)}")


def _check_pbt(base: Config, axes: Sequence[Axis]) -> None:
    Explorer(axes, 0)
    if base.scale.most > 1:
        raise UserError("pbt exchanges checkpoints between trials of one worker; set --workers 1")


class Preparation:
    """Prepares what trials share once for each distinct piece of data and base, and counts.

    All trials are validated on the data of the sweep's base, whatever of it an axis varies for training.
    """

    def __init__(self, base: Config, host: Host, say: Callable[[str], None] = lambda line: None) -> None:
        self.validation = base.data
        self.jobs: dict[Hashable, Job] = {}
        self.checked: set[Hashable] = set()
        self.bases: dict[str | None, Base | None] = {}
        self.units = self.columns = 0
        # Asked once: later, trials hold what a worker would need to be asked.
        dtype = functools.cache(host.dtype)
        self.host, self.own, self.say = Host(self._run_units, self._compute_column, dtype, self._base), host, say

    def work_here(self) -> None:
        """From now on, do what is left in this process."""
        self.own = Host()

    def job(self, config: Config) -> Job:
        """The job of a trial. Raises as `prepare_job`."""
        stage = repr(
            (config.stage, config.init_from, config.data.tokenizer, config.model, config.lora, config.own_section)
        )
        if stage not in self.checked:  # More of it than the data that trials share depends on.
            base = self.host.base(config)
            check_stage(config, load_tokenizer(config, base and base.local()), base and base.local())
            self.checked.add(stage)
        key = (
            config.stage, config.data, config.init_from, config.model, config.train.precision,
            config.scale.gpus_per_worker, [scored.column for scored in stage_of(config).columns(config)],
        )  # fmt: skip
        key = repr(key)
        if key not in self.jobs:
            self.jobs[key] = prepare_job(config, self.host, self.say, self.validation)
            if self.jobs[key].val is None:
                raise UserError(
                    "a sweep compares trials on validation data, and no row is left for it: give data.val, or raise "
                    f"data.val_fraction {self.validation.val_fraction:g}"
                )
            if len({job.val for job in self.jobs.values()}) > 1:
                raise UserError(
                    "the trials' tokenizers differ, and with them what the trials are validated on: trials can be "
                    "compared on the same tokens alone; start one sweep for each tokenizer"
                )
        return self.jobs[key].with_config(config)

    @property
    def counts(self) -> dict[str, int]:
        """How often the work that trials share was done, for sweep.json."""
        jobs = self.jobs.values()
        return {
            "prepared datasets": len({store for job in jobs for store in (job.train, job.val) if store}),
            UNITS: self.units,
            "sets of reference log-probabilities": len(
                {file for job in jobs for files in (job.train_columns, job.val_columns) for file in files.values()}
            ),
            REFERENCES: self.columns,
        }

    def _base(self, config: Config) -> Base | None:
        if not config.init_from or config.init_from not in self.bases:
            self.bases[config.init_from] = self.own.base(config)
        return self.bases[config.init_from]

    def _run_units(self, units: Sequence[Unit], encoding: Encoding) -> Iterator[UnitStats]:
        for stats in self.own.run_units(units, encoding):
            self.units += 1
            yield stats

    def _compute_column(self, frozen: FrozenColumn) -> Iterable[np.ndarray]:
        self.columns += 1
        return self.own.compute_column(frozen)


def train_tokens(job: Job) -> int:
    """Positions that a run trains on, in all its steps."""
    assert isinstance(job.plan, StepPlan)
    store = train_store(job)
    return round((store.n_tokens - store.n_documents) * job.plan.steps / job.plan.steps_per_epoch)


def train_store(job: Job) -> PackStore:
    """The training packs, which in a sweep are always prepared ones."""
    assert isinstance(job.train, str)
    return PackStore(job.train, job.train_columns)


def within_budget(jobs: Sequence[Job], tokens: int) -> list[Job]:
    """Each job shortened by the same factor, so that all together stay within `tokens`.

    Raises:
        UserError: nothing would be left of a run but its warm-up.
    """
    factor = min(1.0, tokens / sum(map(train_tokens, jobs)))
    shorter: list[Job] = []
    for job in jobs:
        steps = int(job.plan.steps * factor)
        if steps <= job.config.schedule.warmup:
            raise UserError(
                f"budget_tokens {tokens:,} leaves a trial {steps} of its {job.plan.steps} steps, of which "
                f"{job.config.schedule.warmup} are warm-up; raise it, or try fewer points"
            )
        train = job.config.train.model_copy(update={"max_steps": steps})
        shorter.append(job.with_config(job.config.model_copy(update={"train": train})) if factor < 1 else job)
    return shorter


def create_sweep(plan: SweepPlan, jobs: Sequence[Job], shared: dict[str, int]) -> None:
    """Make the directory with all trials that are known, waiting."""
    open_sweep(plan.path)
    (plan.path / "trials").mkdir(parents=True, exist_ok=True)
    for path in (plan.path / "trials").iterdir():
        # Of a sweep that never was whole, so that no trial of it has begun.
        if (path / "trial.json").exists() and not any(RunDirectory(path).metrics()):
            shutil.rmtree(path)
            remove(url_of(path))
    for number, (trial, job) in enumerate(zip(plan.trials, jobs, strict=True)):
        create_trial(trial, job, number)
    metric, mode = plan.search.judged_by(plan.base.stage)
    info = SweepInfo(
        stage=plan.base.stage,
        metric=metric,
        mode=mode,
        axes={axis.key: axis.to_json() for axis in plan.axes},
        seeds=plan.search.seeds,
        shared=shared,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        config=plan.base.model_dump(mode="json"),
        price_per_hour=plan.search.price_per_hour,
    )
    content = {**info.model_dump(mode="json"), "search": plan.search.model_dump(mode="json")}
    # Last, so that a sweep is there whole or not at all.
    RunDirectory(plan.path).write("sweep.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def record_resume(plan: SweepPlan, shared: dict[str, int]) -> None:
    """Bring sweep.json up to date: what --resume was told, and what was done again for the sweep."""
    content = read_json(plan.path / "sweep.json")
    content["search"] = plan.search.model_dump(mode="json")
    before = content.get("shared", {})
    content["shared"] = {name: count + before.get(name, 0) * (name in DONE) for name, count in shared.items()}
    RunDirectory(plan.path).write("sweep.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def create_trial(trial: PlannedTrial, job: Job, number: int) -> None:
    """Make the run directory of a trial, the sweep's `number`th."""
    facts = {**TrialInfo(id=trial.id, point=trial.point, seed=trial.seed).model_dump(mode="json"), "number": number}
    # First: a directory with a config and without it would be no trial, and no sweep of it could be read.
    RunDirectory(job.config.out).write("trial.json", json.dumps(facts, ensure_ascii=False) + "\n")
    begin(job, resume=False).update(state="waiting")


def record_refused(plan: SweepPlan, point: dict[str, Any], error: str, number: int) -> list[Path]:
    """Make the directories of a point's trials that cannot be run, with the reason, and no config; the directories.

    The first one is the sweep's `number`th trial.
    """
    paths: list[Path] = []
    for seed in range(plan.base.train.seed, plan.base.train.seed + plan.search.seeds):
        info = TrialInfo(id=trial_id(point, seed), point=point, seed=seed)
        run = RunDirectory(join(url_of(plan.path), "trials", info.id))
        facts = {**info.model_dump(mode="json"), "number": number + len(paths)}
        run.write("trial.json", json.dumps(facts, ensure_ascii=False) + "\n")
        run.fail(error)
        paths.append(run.path)
    return paths


def check_free(path: Path) -> None:
    """Raises UserError where there is a sweep already."""
    if RunDirectory(path).file("sweep.json").exists():
        raise UserError(
            f"{url_of(path)} already holds a sweep: go on with minimind-ray tune --resume {url_of(path)}, or choose "
            "another --out"
        )


def reopen_sweep(path: str | Path) -> SweepPlan:
    """The plan of a sweep that was started; its trials as they stand, in their order.

    Raises:
        UserError: no sweep there, or a damaged file.
    """
    path = open_sweep(output_path(url_of(path)))
    if not (path / "sweep.json").exists():
        raise UserError(f"{url_of(path)} holds no sweep to go on with: leave --resume out to start one")
    content = read_json(path / "sweep.json")
    try:
        info, search = SweepInfo.model_validate(content), SearchConfig.model_validate(content["search"])
    except (ValidationError, KeyError) as error:
        raise UserError(f"{path / 'sweep.json'} is damaged: {str(error).splitlines()[0]}") from None
    found: list[tuple[int, PlannedTrial]] = []
    refused: list[dict[str, Any]] = []
    for file in (path / "trials").glob("*/trial.json"):
        facts = read_json(file)
        try:
            trial, number = TrialInfo.model_validate(facts), int(facts["number"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{file} is damaged: {str(error).splitlines()[0]}") from None
        if not file.with_name("config.yaml").exists():
            if RunDirectory(file.parent).info().get("state") == "failed" and trial.point not in refused:
                refused.append(trial.point)
            continue  # Else it was about to be made, and will be again.
        # What is trained, not what was planned: budgets and pbt change it. In the sweep's place, which may be another.
        config = load_config(info.stage, [file.with_name("config.yaml")])
        found.append((number, PlannedTrial(trial.id, trial.point, trial.seed, config)))
    trials = tuple(trial for _, trial in sorted(found, key=lambda pair: pair[0]))
    axes = tuple(parse_axis(key, spec) for key, spec in info.axes.items())
    for point in [*(trial.point for trial in trials), *refused]:
        _require_on_axes(point, axes, path)
    plan = SweepPlan(path, validate(info.config), axes, search, (), tuple(refused))
    return replace(plan, trials=tuple(map(plan.in_place, trials)))


def _require_on_axes(point: Mapping[str, Any], axes: Sequence[Axis], path: Path) -> None:
    """Raises UserError where the point of a trial is not on the axes of sweep.json."""
    for axis in axes:
        if axis.key not in point or isinstance(axis, Grid) and point[axis.key] not in axis.values:
            raise UserError(
                f"{url_of(path)}: a trial's {axis.key} is {point.get(axis.key)!r}, which is not on the axis in "
                f"sweep.json, {axis.to_json()}; start a new sweep"
            )


def check_same_inputs(job: Job) -> None:
    """Whether a trial that goes on has the data and base that it began with.

    Raises:
        UserError: it has not.
    """
    run = RunDirectory(job.config.out)
    if changed := changed_inputs(job, run):
        raise UserError(
            f"{run.where}: {' and '.join(changed)} has other content than when the sweep began, or another version of "
            "minimind-ray prepares it otherwise; start a new sweep, or put back what was there"
        )
