"""Run a planned sweep on Ray: prepare the data and columns that trials share, then let Tune run the trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from minimind_ray.data.claim import claimed, require_free
from minimind_ray.data.storage import require_writable, url_of
from minimind_ray.on_ray.layout import layout
from minimind_ray.on_ray.session import Ending, local_cpus, ray_running
from minimind_ray.on_ray.trainer import RAY_HOST
from minimind_ray.on_ray.tuner import Event, Search, Watch, concurrent_trials, is_done, put_bases, run_trials
from minimind_ray.stages.run import Job
from minimind_ray.stages.start import require_sources
from minimind_ray.sweep.axes import PlannedTrial
from minimind_ray.sweep.cost import recorded_session
from minimind_ray.sweep.fuse import fusing_decision
from minimind_ray.sweep.live import LiveReport
from minimind_ray.sweep.plan import (
    BASES,
    Preparation,
    SweepPlan,
    create_sweep,
    create_trial,
    record_refused,
    within_budget,
)
from minimind_ray.sweep.resume import continue_sweep
from minimind_ray.sweep.searchers import Explorer, OptunaPoints
from minimind_ray.track.registry import check_trackers
from minimind_ray.train.run import GONE, RunDirectory


class Board(Protocol):
    """A display of a running sweep. See `Watch` for the arguments of `watch`."""

    def __enter__(self) -> Board:
        """Begin to display."""
        ...

    def __exit__(self, *error: object) -> None:
        """Stop displaying."""
        ...

    def watch(self, trial: Path, event: str, metrics: Mapping[str, Any]) -> None:
        """Display an event of a trial."""
        ...


def check_files(plan: SweepPlan, *, probe: bool) -> None:
    """Check that the sweep and its data can be written, and that the trials' files, tokenizers and bases exist.

    With `probe`, a small file is written to each object store and deleted.

    Raises:
        UserError: a file is missing or a directory cannot be written.
    """
    require_writable(url_of(plan.path), plan.base.data.cache_dir, probe=probe)
    require_sources([trial.config for trial in plan.trials] or [plan.base])


def sweep_on_ray(plan: SweepPlan, *, resume: bool, say: Callable[[str], None], board: Board) -> Ending:
    """Check the sweep's files, start Ray, run the sweep, and stop Ray. Returns how the sweep ended.

    Raises:
        UserError: another process writes to the sweep's directory; also as `check_files` and `run_sweep`.
    """
    check_files(plan, probe=True)
    require_free(url_of(plan.path))
    check_trackers(plan.base)
    if gone := [trial for trial in plan.trials if RunDirectory(trial.config.out).state() == GONE]:
        say(f"{len(gone)} trial(s) were running when the sweep's process ended; they resume from their checkpoints")
    # This file's imports import torch, which must happen before Ray joins a cluster; see on_ray/host.py.
    began = datetime.now(UTC)
    cpus = local_cpus(plan.base.scale) if plan.base.scale.most > 1 else None
    with ray_running(cpus), claimed(url_of(plan.path)), board, LiveReport(plan.path) as live:

        def watch(trial: Path, event: Event, metrics: Mapping[str, Any]) -> None:
            board.watch(trial, event, metrics)
            live.watch(event)

        return run_sweep(plan, resume=resume, say=say, watch=watch, began=began)


def run_sweep(
    plan: SweepPlan, *, resume: bool, say: Callable[[str], None], watch: Watch, began: datetime | None = None
) -> Ending:
    """Prepare the jobs, make the sweep's directory (with `resume`, use the existing one), and run the trials.

    `began` is when the sweep began, by default now. Its cost counts from then, its budget of hours too.

    Raises:
        UserError: the data cannot be prepared, the budget is too small, or no trial fits on the cluster.
    """
    began = began or datetime.now(UTC)
    fuse, why = fusing_decision(plan)
    spread = layout(concurrent_trials(plan.base.scale), plan.count, fuse=fuse, concurrent=plan.search.concurrent)
    preparation = Preparation(plan.base, RAY_HOST, say)
    # Points that optuna will propose share the base's data.
    jobs = [preparation.job(trial.config) for trial in plan.trials] or [preparation.job(plan.base)]
    bases = put_bases(jobs)
    shared = {**preparation.counts, BASES: len(bases)}
    say(f"shared by all trials: {', '.join(f'{count} {what}' for what, count in shared.items() if count)}")
    jobs = jobs[: len(plan.trials)]
    if resume:
        if added := continue_sweep(plan, jobs, shared):
            say(f"{added} trial(s) added")
    else:
        if plan.search.budget_tokens and jobs:
            jobs = within_budget(jobs, plan.search.budget_tokens)
        create_sweep(plan, jobs, shared)
    if plan.remark:
        say(plan.remark)
    waiting = "" if spread.at_once == plan.count else "; the other trials wait until resources are free"
    say(f"{plan.count} trials, {spread.at_once} at once{waiting} -> {url_of(plan.path)}")
    if fuse > 1:
        say(f"up to {fuse} of them together in one process: {why}")

    metric, mode = plan.search.judged_by(plan.base.stage)
    pbt = plan.search.scheduler == "pbt"
    search = Search(
        metric,
        mode,
        plan.search.scheduler,
        plan.search.concurrent,
        Explorer(plan.axes, plan.base.train.seed) if pbt else None,
    )
    if plan.search.searcher == "optuna":
        trials = _proposed(plan, preparation, jobs, mode == "max", watch)
    else:
        # Put finished trials first, so that the scheduler has their results when it judges the others.
        trials = sorted(jobs, key=lambda job: not is_done(RunDirectory(job.config.out), search.scheduler))
        left = [job for job in trials if not is_done(RunDirectory(job.config.out), search.scheduler)]
        if not left:
            return "by itself"
        trials = left if pbt else trials
    hours = plan.search.budget_hours
    seconds = hours and hours * 3600 - (datetime.now(UTC) - began).total_seconds()
    with recorded_session(plan.path, began, spread.places):
        ending = run_trials(trials, plan.base.scale, plan.path, search, bases, fuse=fuse, seconds=seconds, watch=watch)
    if isinstance(trials, OptunaPoints) and ending == "by itself" and trials.asked < plan.points:
        say(f"no untried point was found on the axes: {trials.asked} of {plan.points} points were tried")
    return ending


def _proposed(
    plan: SweepPlan, preparation: Preparation, jobs: Sequence[Job], maximize: bool, watch: Watch
) -> OptunaPoints:
    known, numbers = {job.config.out: job for job in jobs}, count(len(jobs) + len(plan.refused) * plan.search.seeds)
    # New points are prepared in this process: running trials hold the cluster's CPUs.
    preparation.work_here()

    def make(trial: PlannedTrial) -> Job:
        trial = plan.in_place(trial)
        if trial.config.out in known:
            return known[trial.config.out]
        job = preparation.job(trial.config)
        if plan.search.budget_tokens:
            [job] = within_budget([job], plan.search.budget_tokens // (plan.points * plan.search.seeds))
        create_trial(replace(trial, config=job.config), job, next(numbers))
        known[trial.config.out] = job
        return job

    def refuse(point: dict[str, Any], error: str) -> None:
        for path in record_refused(plan, point, error, next(numbers)):
            watch(path, "ended", {})

    points = {repr(point): point for point in [*(trial.point for trial in plan.trials), *plan.refused]}
    return OptunaPoints(
        plan.base,
        plan.axes,
        points=plan.points,
        seeds=plan.seeds_at,
        count=plan.count,
        maximize=maximize,
        make=make,
        refuse=refuse,
        known=list(points.values()),
    )
