"""Sweeps on a real Ray: the same metrics in any order, resumed after any end, stopped early, exchanged, failing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from minimind_ray.config.search import SearchConfig
from minimind_ray.stages.run import Host, Job, run_here
from minimind_ray.sweep.axes import parse_axis
from minimind_ray.sweep.plan import Preparation, SweepPlan, create_sweep, plan_sweep
from minimind_ray.sweep.trials import Trial, read_sweep
from minimind_ray.train.run import read_jsonl
from tests.jobs import make_config, make_job, start

pytestmark = pytest.mark.ray


def planned(directory: Path, axes: dict[str, Any], *, stage: str = "pretrain", out: str = "sweep", search=None, **set_):
    base = make_config(directory, stage, 200, **{"eval__samples": 0, **set_})
    return plan_sweep(
        directory / out, base, [parse_axis(k, v) for k, v in axes.items()], SearchConfig(**(search or {}))
    )


def jobs_of(plan: SweepPlan) -> list[Job]:
    preparation = Preparation(Host())
    return [preparation.job(trial.config) for trial in plan.trials]


def run(plan: SweepPlan, jobs: Sequence[Job] | None = None, **options: Any) -> dict[str, Trial]:
    from minimind_ray.on_ray.tuner import Search, put_bases, run_trials

    if jobs is None:
        jobs = jobs_of(plan)
        create_sweep(plan, jobs, {})
    metric, mode = plan.search.judged_by(plan.base.stage)
    search = Search(metric, mode, plan.search.scheduler, plan.search.concurrent, options.pop("explore", None))
    run_trials(jobs, plan.base.scale, plan.path, search, put_bases(jobs), **options)
    return {trial.id: trial for trial in read_sweep(plan.path).trials}


def metrics(trial: Trial) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "timing"} for line in trial.metrics]


def test_any_order_and_concurrency_give_the_same_metrics_as_a_plain_process(tmp_path: Path, ray_session: None) -> None:
    axes = {"optim.lr": "3e-3,1e-2", "optim.weight_decay": "0,0.1"}
    settings = {"model__dropout": 0.1}
    plan = planned(tmp_path, axes, search={"seeds": 2, "concurrent": 1}, **settings)
    first = run(plan)
    assert {t.state for t in first.values()} == {"finished"} and len(first) == 8
    other = planned(tmp_path, axes, out="other", search={"seeds": 2, "concurrent": 3}, **settings)
    jobs = jobs_of(other)
    create_sweep(other, jobs, {})
    second = run(other, jobs[::-1])
    for id, trial in first.items():
        assert metrics(trial) == metrics(second[id])
        assert (
            trial.validation
            and (trial.path / "validation.parquet").read_bytes()
            == (second[id].path / "validation.parquet").read_bytes()
        )
    # As many processes as trials at once, not as many as trials.
    plain = make_job(tmp_path, rows=200, optim__lr=1e-2, optim__weight_decay=0.1, train__seed=1, eval__samples=0,
                     out=str(tmp_path / "plain"), **settings)  # fmt: skip
    start(plain)
    run_here(plain)
    lines = [{k: v for k, v in line.items() if k != "timing"} for line in read_jsonl(tmp_path / "plain/metrics.jsonl")]
    assert lines == metrics(first["lr=0.01,weight_decay=0.1,seed=1"])
