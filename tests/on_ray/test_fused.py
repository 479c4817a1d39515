"""Tune's trials trained together in one process: stopped early, failing, replaced and resumed each by itself."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind_ray.config.search import SearchConfig
from minimind_ray.stages.run import Host, run_here
from minimind_ray.sweep.axes import parse_axis
from minimind_ray.sweep.plan import Preparation, SweepPlan, create_sweep, plan_sweep
from minimind_ray.sweep.resume import reopen_sweep
from minimind_ray.sweep.trials import Trial, read_sweep
from minimind_ray.train.run import RunDirectory, sound
from tests.jobs import make_config, make_job, start
from tests.on_ray.test_tuner import assert_nothing_is_left, lines_of, states

pytestmark = pytest.mark.ray


def sweep(plan: SweepPlan, *, resume: bool = False) -> dict[str, Trial]:
    from minimind_ray.sweep.run import run_sweep

    said: list[str] = []
    run_sweep(plan, resume=resume, say=said.append, watch=lambda *event: None)
    assert any("together in one process: fuse is " in line for line in said)
    assert_nothing_is_left()
    return {trial.id: trial for trial in read_sweep(plan.path).trials}


@pytest.mark.long
def test_each_trial_is_stopped_fails_and_is_resumed_by_itself(tmp_path: Path, ray_session: None) -> None:
    base = make_job(tmp_path, rows=200, eval__samples=0, train__max_steps=5)
    start(base)
    run_here(base)
    settings: dict[str, Any] = {
        "init_from": base.config.out, "eval__samples": 0, "eval__every": 1, "data__val_fraction": 0.2,
        "lora__targets": "all-linear", "optim__clip": 0.0, "batch__tokens": 512,
    }  # fmt: skip
    # In one group of two, which takes all CPUs; the others take the places that become free.
    axes, search = {"optim.lr": "1e-2,1e30,1e-9,5e-3"}, SearchConfig(fuse=2, concurrent=2, scheduler="asha")
    config = make_config(tmp_path, "lora", 120, scale__cpus_per_worker=8.0, **settings)
    plan = plan_sweep(tmp_path / "sweep", config, [parse_axis(key, spec) for key, spec in axes.items()], search)
    found = sweep(plan)
    ends = {id.removeprefix("lr=").partition(",")[0]: state for id, state in states(found).items()}
    assert ends.pop("0.005") in ("finished", "early-stopped")  # As near to the first as it is.
    assert ends == {"0.01": "finished", "1e30": "failed", "1e-9": "early-stopped"}
    assert "the loss is" in str(found["lr=1e30,seed=0"].error)
    stopped = found["lr=1e-9,seed=0"]
    assert stopped.result and sound(stopped.result)
    alone = make_job(tmp_path, "lora", 120, out=str(tmp_path / "alone"), optim__lr=1e-2, **settings)
    start(alone)
    run_here(alone)
    ours, theirs = list(found["lr=0.01,seed=0"].metrics), list(RunDirectory(tmp_path / "alone").metrics())
    assert stopped.steps < len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for key in ("loss", "val/loss"):
            assert a[key] == pytest.approx(b[key], abs=1e-5)

    # Going on trains nothing that is done, and the failed ones once more.
    before = {id: lines_of(trial.path / "metrics.jsonl") for id, trial in found.items()}
    again = sweep(reopen_sweep(plan.path), resume=True)
    assert states(again) == states(found)
    assert before == {id: lines_of(trial.path / "metrics.jsonl") for id, trial in again.items()}


def test_a_trial_whose_process_is_gone_stays_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minimind_ray.on_ray import fused

    monkeypatch.setattr(fused, "granted_device", lambda: torch.device("cpu"))
    base = make_job(tmp_path, rows=120, eval__samples=0, train__max_steps=2)
    start(base)
    run_here(base)
    config = make_config(tmp_path, "lora", 120, init_from=base.config.out, eval__samples=0, eval__every=1)
    plan = plan_sweep(tmp_path / "sweep", config, [parse_axis("optim.lr", "1e-4,1e-3")], SearchConfig())
    preparation = Preparation(plan.base, Host())
    jobs = [preparation.job(trial.config) for trial in plan.trials]
    create_sweep(plan, jobs, {})
    group = fused.Group(2, str(plan.path), threads=1)
    dying, living = (job.config.out for job in jobs)
    first = Future[Any]()
    threading.Thread(target=lambda: first.set_result(group.begin(jobs[0], {})), daemon=True).start()
    answer = group.begin(jobs[1], {})
    first.result(60)
    RunDirectory(dying).fail("its process ended: killed")
    group.leave(dying)
    steps = []
    while isinstance(answer, dict):
        steps.append(answer["step"])
        answer = group.continue_run(living, True)
    assert answer is None and steps == list(range(1, jobs[1].plan.steps + 1))
    assert RunDirectory(living).info()["state"] == "finished"
    info = RunDirectory(dying).info()
    assert (info["state"], info["error"]) == ("failed", "its process ended: killed")
