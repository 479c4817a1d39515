"""Forecast what a sweep would do and cost: prepare its data, and measure a few steps in this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import ScaleConfig
from minimind_ray.on_ray.layout import trials_that_fit
from minimind_ray.on_ray.session import Machines, local_cpus
from minimind_ray.stages.run import Host, Job
from minimind_ray.sweep.estimate import Estimate, Pace, calibrate, estimate
from minimind_ray.sweep.fuse import fusing_decision
from minimind_ray.sweep.plan import Preparation, SweepPlan, within_budget


@dataclass(frozen=True)
class Forecast:
    """The jobs of a sweep's trials and their cost on this machine.

    `fused` trials share a process, for the reason `why_fused`. `at_once` trials run at the same time. `does_not_fit`
    is a sentence if not even one trial fits on this machine, otherwise None. `shared` counts the trials' common work.
    """

    jobs: Sequence[Job]
    fused: int
    why_fused: str
    at_once: int
    does_not_fit: str | None
    pace: Pace
    cost: Estimate
    shared: dict[str, int]

    @property
    def hours(self) -> float:
        """The hours that the sweep takes on this machine."""
        return self.cost.hours(self.at_once)


def forecast(plan: SweepPlan, say: Callable[[str], None]) -> Forecast:
    """Prepare the data of the sweep, train a few steps of its first trial here, and add up all trials.

    Raises:
        UserError: as `Preparation.job` and `within_budget`.
    """
    preparation = Preparation(plan.base, Host(), say)
    jobs = [preparation.job(trial.config) for trial in plan.trials]
    jobs = jobs or [preparation.job(plan.base)] * plan.count
    if plan.search.budget_tokens:
        jobs = within_budget(jobs, plan.search.budget_tokens)
    fused, why_fused = fusing_decision(plan)
    fitting, does_not_fit = _trials_that_fit_here(plan.base.scale)
    # The estimate leaves out the time that fused training saves.
    at_once = min(fitting, plan.search.concurrent or plan.count, plan.count)
    pace = calibrate(jobs[0])
    cost = estimate(jobs, pace, plan.search, at_once)
    return Forecast(jobs, fused, why_fused, at_once, does_not_fit, pace, cost, preparation.counts)


def _trials_that_fit_here(scale: ScaleConfig) -> tuple[int, str | None]:
    """Return how many trials fit on this machine, and None; or 1 and a sentence if not even one trial fits."""
    cpus = local_cpus(scale) if scale.most > 1 else os.cpu_count() or 1
    try:
        return trials_that_fit(Machines([{"CPU": cpus, "GPU": torch.cuda.device_count()}], 1), scale), None
    except UserError as error:
        return 1, str(error)
