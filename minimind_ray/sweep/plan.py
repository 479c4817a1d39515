"""Plan a sweep before it runs: check its trials, prepare the data and columns that they share, and make its directory.

`trials.py` describes the directory, `run.py` runs the plan.
"""

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

from minimind_ray.config.errors import UserError
from minimind_ray.config.paths import output_path
from minimind_ray.config.schema import Config
from minimind_ray.config.search import TASK_PREFIX, SearchConfig
from minimind_ray.data.files import join, remove
from minimind_ray.data.plan import StepPlan
from minimind_ray.data.prepare import Encoding, Unit
from minimind_ray.data.shipped import resolve_paths
from minimind_ray.data.storage import copy_of, url_of
from minimind_ray.data.store import PackStore, UnitStats
from minimind_ray.stages.base import Base
from minimind_ray.stages.columns import FrozenColumn
from minimind_ray.stages.run import Host, Job, begin, prepare_job
from minimind_ray.stages.stage import stage_of
from minimind_ray.stages.start import check_stage, effect, load_tokenizer, unused
from minimind_ray.sweep.axes import (
    Axis,
    Grid,
    PlannedTrial,
    check_axes,
    plan_trials,
    trial_config,
    trial_id,
)
from minimind_ray.sweep.more import MOST_SEEDS
from minimind_ray.sweep.searchers import Explorer, count_points, import_optuna
from minimind_ray.sweep.trials import MoreSeeds, SweepInfo, TrialInfo, open_sweep
from minimind_ray.tasks.measure import require_task
from minimind_ray.train.run import RunDirectory

UNITS, REFERENCES = "pieces of them encoded for this sweep", "of these sets computed for this sweep"
BASES = "base models' weights in Ray's object store"
DONE = (UNITS, REFERENCES, BASES)
"""Counts of work in sweep.json that add up when a sweep is resumed."""


@dataclass(frozen=True)
class SweepPlan:
    """A sweep to run. `trials` are all trials, or with optuna the trials known so far.

    `path` is the sweep's directory, or its local copy for an object store. `refused` are points from optuna that could
    not be run. `equal` are trials that were left out because they would repeat other trials. `more_seeds` are points
    that a resume gave more than `search.seeds` seeds.
    """

    path: Path
    base: Config
    axes: tuple[Axis, ...]
    search: SearchConfig
    trials: tuple[PlannedTrial, ...]
    refused: tuple[dict[str, Any], ...] = ()
    equal: tuple[PlannedTrial, ...] = ()
    more_seeds: tuple[MoreSeeds, ...] = ()

    @property
    def count(self) -> int:
        """The number of trials of the whole sweep."""
        if self.search.searcher != "optuna":
            return len(self.trials)
        return self.points * self.search.seeds + sum(more.seeds - self.search.seeds for more in self.more_seeds)

    def seeds_at(self, point: Mapping[str, Any]) -> int:
        """Return the number of seeds of a point."""
        return next((more.seeds for more in self.more_seeds if more.point == point), self.search.seeds)

    @property
    def most_seeds(self) -> int:
        """The largest number of seeds of a point."""
        return max([self.search.seeds, *(more.seeds for more in self.more_seeds)])

    @functools.cached_property
    def points(self) -> int:
        """The number of points for optuna to try: `--trials`, or all different points on the axes if they are fewer."""
        return count_points(self.base, self.axes, self.search.trials or 0)

    @property
    def remark(self) -> str | None:
        """A sentence that says why there are fewer trials than the axes or --trials ask for, or None."""
        if self.equal:
            keys = sorted({key for trial in self.equal for key in trial.point if unused(trial.config, key)})
            return (
                f"left out {len(self.equal)} of {len(self.equal) + len(self.trials)} trials: they differ from others "
                f"only in {' and '.join(keys)}, which has no effect on them"
            )
        if self.search.searcher != "optuna" or self.points == self.search.trials:
            return None
        asked = f"--trials {self.search.trials}"
        return f"the axes have {self.points} different points, fewer than {asked}: each is tried once"

    def in_place(self, trial: PlannedTrial) -> PlannedTrial:
        """Return the trial with its own directory inside the sweep's directory, and with the sweep's tracker group."""
        track = trial.config.track.model_copy(update={"group": trial.config.track.group or self.path.name})
        out = join(url_of(self.path), "trials", trial.id)
        return replace(trial, config=trial.config.model_copy(update={"out": out, "track": track}))


def check_seeds(seeds: int, already: int = 0) -> None:
    """Raise UserError if a point is to have too many seeds. A sweep that has `already` as many may keep them."""
    if seeds > max(MOST_SEEDS, already):
        raise UserError(f"--seeds {seeds}: give at most {MOST_SEEDS} seeds a point")


def plan_sweep(path: str | Path, base: Config, axes: Sequence[Axis], search: SearchConfig) -> SweepPlan:
    """Plan a sweep, and check everything that can be checked before it starts. `path` is the sweep's directory.

    Raises:
        UserError: there is no validation data, or there are too many seeds; also see `plan_trials`,
            `SearchConfig.judged_by`, `Explorer` and `import_optuna`.
    """
    path = copy_of(output_path(url_of(path)))
    base = resolve_paths(base)
    metric, mode = search.judged_by(base.stage)
    if metric.startswith(TASK_PREFIX):
        require_task(base.eval, metric, mode)
    check_seeds(search.seeds)
    if not base.data.val and not base.data.val_fraction:
        raise UserError("a sweep compares trials on validation data: set data.val, or data.val_fraction above 0")
    if base.scale.fewest < base.scale.most:
        raise UserError(
            f"all trials of a sweep need the same number of workers: give one, such as --workers {base.scale.most}"
        )
    if not base.data.val and any(axis.key == "data.train" for axis in axes):
        raise UserError(
            "data.train is an axis, so data.val must be set: trials are compared on the same validation data"
        )
    for axis in axes:
        _require_effect(axis.key, base, axes)
    if base.checkpoint.every not in (None, base.eval.every):
        raise UserError(
            "a sweep judges a trial by its best checkpoint, so it saves a checkpoint at each validation: leave "
            "checkpoint.every out"
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
        # Optuna proposes the points while the sweep runs.
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
    """Raise UserError if this key has no effect, with the base config and with every value of the other axes."""
    rule = unused(base, key)
    others = [{axis.key: value} for axis in axes if isinstance(axis, Grid) and axis.key != key for value in axis.values]
    for point in others if rule else ():
        with suppress(UserError):
            if not unused(trial_config(base, point, base.train.seed), key):
                return
    if rule:
        raise UserError(f"{key} has no effect, so trials would be equal: {rule.otherwise(base)}")


def _check_pbt(base: Config, axes: Sequence[Axis]) -> None:
    Explorer(axes, 0)
    if base.scale.most > 1:
        raise UserError("pbt exchanges checkpoints between trials of one worker; set --workers 1")


class Preparation:
    """Prepares the jobs of trials. Does shared work (encoding data, computing columns) only once, and counts it.

    All trials are validated on the data of the sweep's base config, even if an axis varies the training data.
    """

    def __init__(self, base: Config, host: Host, say: Callable[[str], None] = lambda line: None) -> None:
        self.validation = base.data
        self.jobs: dict[Hashable, Job] = {}
        self.checked: set[Hashable] = set()
        self.bases: dict[str | None, Base | None] = {}
        self.units = self.columns = 0
        # Ask a worker now: later, trials occupy the resources that the worker needs.
        dtype = functools.cache(host.dtype)
        self.host, self.own, self.say = Host(self._run_units, self._compute_column, dtype, self._base), host, say

    def work_here(self) -> None:
        """From now on, do all further work in this process."""
        self.own = Host()

    def job(self, config: Config) -> Job:
        """Return the job of a trial. Raises as `prepare_job`."""
        stage = repr(
            (config.stage, config.init_from, config.data.tokenizer, config.model, config.lora, config.own_section)
        )
        if stage not in self.checked:  # `stage` covers settings that the key of the shared data below leaves out.
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
            if len({job.val for job in self.jobs.values()}) > 1:
                raise UserError(
                    "the trials' tokenizers differ, so the trials would be validated on different tokens and cannot be "
                    "compared; start one sweep for each tokenizer"
                )
        return self.jobs[key].with_config(config)

    @property
    def counts(self) -> dict[str, int]:
        """How often each kind of shared work was done, for sweep.json."""
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
    """Return the number of token positions that a run trains on, over all its steps."""
    assert isinstance(job.plan, StepPlan)
    store = train_store(job)
    return round((store.n_tokens - store.n_documents) * job.plan.steps / job.plan.steps_per_epoch)


def train_store(job: Job) -> PackStore:
    """Return the store of the training packs. A sweep always has prepared packs."""
    assert isinstance(job.train, str)
    return PackStore(job.train, job.train_columns)


def within_budget(jobs: Sequence[Job], tokens: int) -> list[Job]:
    """Shorten all jobs by the same factor, so that together they train on at most `tokens` tokens.

    Raises:
        UserError: a run would end within its warm-up.
    """
    factor = min(1.0, tokens / sum(map(train_tokens, jobs)))
    shorter: list[Job] = []
    for job in jobs:
        steps = int(job.plan.steps * factor)
        if steps <= job.config.schedule.warmup:
            raise UserError(
                f"budget_tokens {tokens:,} leaves a trial {steps} of its {job.plan.steps} steps, of which "
                f"{job.config.schedule.warmup} are warm-up; raise budget_tokens, or try fewer points"
            )
        train = job.config.train.model_copy(update={"max_steps": steps})
        shorter.append(job.with_config(job.config.model_copy(update={"train": train})) if factor < 1 else job)
    return shorter


def create_sweep(plan: SweepPlan, jobs: Sequence[Job], shared: dict[str, int]) -> None:
    """Make the sweep's directory, with a directory for each known trial in the state `waiting`."""
    open_sweep(plan.path)
    (plan.path / "trials").mkdir(parents=True, exist_ok=True)
    for path in (plan.path / "trials").iterdir():
        # A trial without metrics was made by an earlier process that died before any trial began.
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
        margin=plan.search.margin or 0.0,
    )
    content = {**info.model_dump(mode="json"), "search": plan.search.model_dump(mode="json")}
    # Write sweep.json last: a directory without it is not a sweep.
    RunDirectory(plan.path).write("sweep.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def create_trial(trial: PlannedTrial, job: Job, number: int) -> None:
    """Make the run directory of a trial. `number` is the trial's position in the sweep, from 0."""
    facts = {**TrialInfo(id=trial.id, point=trial.point, seed=trial.seed).model_dump(mode="json"), "number": number}
    # Write trial.json first: a directory with a config but no trial.json would make the sweep unreadable.
    RunDirectory(job.config.out).write("trial.json", json.dumps(facts, ensure_ascii=False) + "\n")
    begin(job, resume=False).update(state="waiting")


def record_refused(plan: SweepPlan, point: dict[str, Any], error: str, number: int) -> list[Path]:
    """Record a point that cannot be run: make a directory for each of its trials, with the reason and without a config.

    `number` is the first trial's position in the sweep, from 0. Returns the directories.
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
    """Raise UserError if the directory already holds a sweep."""
    if RunDirectory(path).file("sweep.json").exists():
        raise UserError(
            f"{url_of(path)} already holds a sweep: continue it with minimind-ray tune --resume {url_of(path)}, or "
            "choose another --out"
        )
