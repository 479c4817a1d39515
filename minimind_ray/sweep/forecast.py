"""Forecast what a sweep would do and cost: prepare its data, and measure the first steps of its first trials."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import ScaleConfig
from minimind_ray.on_ray.layout import Layout, layout, trials_that_fit
from minimind_ray.on_ray.session import Machines, local_cpus
from minimind_ray.stages.run import Host, Job
from minimind_ray.sweep.calibrate import calibrate
from minimind_ray.sweep.estimate import Estimate, Paces, estimate
from minimind_ray.sweep.fuse import fusing_decision
from minimind_ray.sweep.plan import Preparation, SweepPlan, within_budget


@dataclass(frozen=True)
class Forecast:
    """The jobs of a sweep's trials and their cost on this machine.

    `fused` trials share a process, for the reason `why_fused`. `spread` says how many trials run at the same time. The
    paces were measured in `processes` processes at once. `does_not_fit` is a sentence if not even one trial fits on
    this machine, otherwise None. `shared` counts the trials' common work.
    """

    jobs: Sequence[Job]
    fused: int
    why_fused: str
    spread: Layout
    does_not_fit: str | None
    processes: int
    paces: Paces
    cost: Estimate
    shared: dict[str, int]


def forecast(plan: SweepPlan, say: Callable[[str], None]) -> Forecast:
    """Prepare the data of the sweep, train the first steps of its first trials here, and add up all trials.

    Raises:
        UserError: as `Preparation.job`, `within_budget` and `calibrate`.
    """
    preparation = Preparation(plan.base, Host(), say)
    jobs = [preparation.job(trial.config) for trial in plan.trials]
    jobs = jobs or [preparation.job(plan.base)] * plan.count
    if plan.search.budget_tokens:
        jobs = within_budget(jobs, plan.search.budget_tokens)
    fused, why_fused = fusing_decision(plan)
    fitting, does_not_fit = _trials_that_fit_here(plan.base.scale)
    spread = layout(fitting, len(jobs), fuse=fused, concurrent=plan.search.concurrent)
    groups = _calibration_groups(jobs, spread)
    paces = calibrate(groups, waiting=spread.at_once if spread.groups else 0)
    cost = estimate(jobs, paces, plan.search, spread)
    return Forecast(jobs, fused, why_fused, spread, does_not_fit, len(groups), paces, cost, preparation.counts)


def _calibration_groups(jobs: Sequence[Job], spread: Layout) -> list[list[Job]]:
    """Return the jobs of each process of the calibration: the first trial, or as many trials as share a process.

    There are as many processes as the sweep's workers, but no more than this machine's CPUs can hold.
    """
    scale = jobs[0].config.scale
    wanted = (spread.groups or spread.at_once) * scale.most
    holds = max(1, int((os.cpu_count() or 1) / scale.cpus_per_worker))
    return [list(jobs[: spread.size]) if spread.groups else [jobs[0]] for _ in range(min(wanted, holds))]


def _trials_that_fit_here(scale: ScaleConfig) -> tuple[int, str | None]:
    """Return how many trials fit on this machine, and None; or 1 and a sentence if not even one trial fits."""
    cpus = local_cpus(scale) if scale.most > 1 else os.cpu_count() or 1
    try:
        return trials_that_fit(Machines([{"CPU": cpus, "GPU": torch.cuda.device_count()}], 1), scale), None
    except UserError as error:
        return 1, str(error)
