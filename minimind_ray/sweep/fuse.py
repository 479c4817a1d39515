"""Decide whether a sweep trains several LoRA trials in one process on a shared base, and how many at once."""

from __future__ import annotations

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import Config
from minimind_ray.stages.fused import SHARED, obstacle
from minimind_ray.stages.stage import stage_of
from minimind_ray.sweep.plan import SweepPlan
from minimind_ray.train.fused import PASS_TOKENS

MOST = 8
"""The largest number of trials in a process if `fuse` is auto."""


def fusing_decision(plan: SweepPlan) -> tuple[int, str]:
    """Return the number of trials to train in one process (1: each trial has its own process), and the reason.

    Raises:
        UserError: `fuse` is a number, but these trials cannot be trained together.
    """
    asked = plan.search.fuse
    if asked == "off":
        return 1, "fuse is off"
    why_not = _obstacle(plan)
    if why_not and asked != "auto":
        raise UserError(f"fuse is {asked}, but these trials cannot be trained together: {why_not}; leave it out")
    if why_not:
        return 1, why_not
    if asked != "auto":
        return asked, f"fuse is {asked}"
    return _chosen(plan)


def _obstacle(plan: SweepPlan) -> str | None:
    if plan.search.scheduler == "pbt":
        return "pbt changes settings in the middle of a run"
    # With optuna, `plan.trials` are not all trials: check the axes instead.
    found_later = plan.search.searcher == "optuna"
    decisive = (*SHARED, *UNKNOWN, plan.base.record.adapters, *stage_of(plan.base).column_keys)
    if found_later and (unknown := [axis.key for axis in plan.axes if axis.key in decisive]):
        return f"the points of {unknown[0]} are found while the sweep runs"
    return obstacle(_configs(plan))


def _configs(plan: SweepPlan) -> list[Config]:
    """Return the configs of the known trials, or the base config if no trial is known yet."""
    return [trial.config for trial in plan.trials] or [plan.base]


UNKNOWN = ("lora.dropout", "lora.dora")


def _chosen(plan: SweepPlan) -> tuple[int, str]:
    config = plan.base
    if not config.scale.gpus_per_worker:
        return (
            1,
            "on a CPU fusing gains at most 18 %, less than running more trials at once (docs/performance.md)",
        )
    step = max(each.batch.tokens for each in _configs(plan))
    size = min(MOST, PASS_TOKENS["cuda"] // step, plan.count)
    if size < 2:
        return 1, "one trial's steps keep the GPU busy"
    return size, "one trial's steps leave the GPU waiting"
