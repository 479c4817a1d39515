"""Sweeps on a real Ray: the same metrics in any order, resumed after any end, stopped early, exchanged, failing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from minimind_ray.config.errors import UserError
from minimind_ray.config.load import read_yaml
from minimind_ray.config.schema import ScaleConfig
from minimind_ray.config.search import SearchConfig
from minimind_ray.data.claim import require_free
from minimind_ray.stages.run import Host, Job, run_here
from minimind_ray.sweep.axes import parse_axis
from minimind_ray.sweep.plan import Preparation, SweepPlan, create_sweep, plan_sweep
from minimind_ray.sweep.resume import reopen_sweep, with_seeds
from minimind_ray.sweep.trials import Trial, read_sweep
from minimind_ray.train.checkpoint import read_state
from minimind_ray.train.run import RunDirectory, read_jsonl, sound
from tests.faults import signal_group
from tests.jobs import make_config, make_job, start

pytestmark = pytest.mark.ray


def planned(directory: Path, axes: dict[str, Any], *, stage: str = "pretrain", out: str = "sweep", search=None, **set_):
    base = make_config(directory, stage, 200, **{"eval__samples": 0, **set_})
    return plan_sweep(
        directory / out, base, [parse_axis(k, v) for k, v in axes.items()], SearchConfig(**(search or {}))
    )


def jobs_of(plan: SweepPlan) -> list[Job]:
    preparation = Preparation(plan.base, Host())
    return [preparation.job(trial.config) for trial in plan.trials]


def run(plan: SweepPlan, jobs: Sequence[Job] | None = None, **options: Any) -> dict[str, Trial]:
    from minimind_ray.on_ray.tuner import Search, put_bases, run_trials

    if jobs is None:
        jobs = jobs_of(plan)
        create_sweep(plan, jobs, {})
    metric, mode = plan.search.judged_by(plan.base.stage)
    search = Search(metric, mode, plan.search.scheduler, plan.search.concurrent, options.pop("explore", None))
    run_trials(jobs, plan.base.scale, plan.path, search, put_bases(jobs), **options)
    assert_nothing_is_left()
    return {trial.id: trial for trial in read_sweep(plan.path).trials}


def assert_nothing_is_left() -> None:
    """Every placement group removed, every CPU given back."""
    import ray
    from ray.util import placement_group_table

    deadline = time.monotonic() + 20
    while True:
        groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
        if not groups and ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]:
            return
        assert time.monotonic() < deadline, (groups, ray.available_resources())
        time.sleep(0.2)


def metrics(trial: Trial) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "timing"} for line in trial.metrics]


def test_any_order_and_concurrency_give_the_same_metrics_as_a_plain_process(tmp_path: Path, ray_session: None) -> None:
    axes = {"optim.lr": "3e-3,1e-2"}
    settings = {"model__dropout": 0.1}
    plan = planned(tmp_path, axes, search={"seeds": 2, "concurrent": 1}, **settings)
    first = run(plan)
    assert {t.state for t in first.values()} == {"finished"} and len(first) == 4
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
    plain = make_job(tmp_path, rows=200, optim__lr=1e-2, train__seed=1, out=str(tmp_path / "plain"), **settings)
    start(plain)
    run_here(plain)
    lines = [{k: v for k, v in line.items() if k != "timing"} for line in read_jsonl(tmp_path / "plain/metrics.jsonl")]
    assert lines == metrics(first["lr=0.01,seed=1"])


def trained(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key != "timing" and "val/" not in key}


def states(trials: dict[str, Trial]) -> dict[str, str]:
    return {id: trial.state for id, trial in trials.items()}


def test_a_failing_trial_is_marked_and_the_others_go_on(
    tmp_path: Path, ray_session: None, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = planned(tmp_path, {"optim.lr": "1e30,3e-3"}, optim__clip=0.0, eval__every=1, search={"concurrent": 1})
    jobs = jobs_of(plan)
    create_sweep(plan, jobs, {})
    events: list[tuple[str, str]] = []
    found = run(plan, jobs, watch=lambda trial, event, metrics: events.append((trial.name, event)))
    assert states(found) == {"lr=1e30,seed=0": "failed", "lr=0.003,seed=0": "finished"}
    assert "the loss is" in (found["lr=1e30,seed=0"].error or "")
    assert "Traceback" not in capfd.readouterr().err
    assert [e for e in events if e[1] != "validated"] == [
        ("lr=1e30,seed=0", "started"), ("lr=1e30,seed=0", "ended"),
        ("lr=0.003,seed=0", "started"), ("lr=0.003,seed=0", "ended"),
    ]  # fmt: skip


class DyingJob(Job):
    """Takes its whole process with it."""

    def run(self, context: Any, data: Any) -> None:
        os._exit(7)


def test_a_trial_whose_process_dies_is_marked_too(tmp_path: Path, ray_session: None) -> None:
    plan = planned(tmp_path, {"optim.lr": "1e-3,3e-3"}, search={"concurrent": 1})
    jobs = jobs_of(plan)
    create_sweep(plan, jobs, {})
    found = run(plan, [DyingJob(**vars(jobs[0])), jobs[1]])
    assert states(found) == {"lr=0.001,seed=0": "failed", "lr=0.003,seed=0": "finished"}
    assert "its process ended" in (found["lr=0.001,seed=0"].error or "")


def test_asha_stops_what_falls_behind_and_keeps_what_it_found(tmp_path: Path, ray_session: None) -> None:
    plan = planned(
        tmp_path, {"optim.lr": "1e-2,5e-3,1e-6,3e-3"}, search={"concurrent": 1, "scheduler": "asha"}, eval__every=1
    )
    found = run(plan)
    bad = found["lr=1e-6,seed=0"]
    assert bad.state == "early-stopped" and found["lr=0.01,seed=0"].state == "finished"
    steps = found["lr=0.01,seed=0"].steps
    assert bad.steps == len(bad.metrics) == -(-steps // 5)
    assert bad.result and sound(bad.result) and (bad.result / "README.md").exists()
    kept = pq.read_table(bad.path / "validation.parquet").to_pydict()
    assert sum(kept["loss"]) / sum(kept["count"]) == pytest.approx(bad.metrics[-1]["val/loss"])

    # Going on runs nothing again, but the scheduler hears of all that was found.
    before = {file: file.read_bytes() for file in plan.path.glob("trials/*/*.*") if file.suffix != ".json"}
    plan = reopen_sweep(plan.path)
    heard: list[float] = []
    again = run(plan, jobs_of(plan), watch=lambda trial, event, metrics: heard.append(metrics.get("percent", 0.0)))
    assert states(again) == states(found)
    assert before == {file: file.read_bytes() for file in before}
    assert sum(percent > 0 for percent in heard) == sum(len(trial.metrics) for trial in found.values())


def test_nothing_is_stopped_while_there_is_too_little_to_compare_it_with(tmp_path: Path, ray_session: None) -> None:
    """Tune's rule would have the first of two wait for the second, and it could not go on."""
    plan = planned(tmp_path, {"optim.lr": "1e-2,1e-6"}, search={"concurrent": 1, "scheduler": "median"}, eval__every=1)
    assert set(states(run(plan)).values()) == {"finished"}


def test_a_trial_that_had_no_time_to_say_that_it_was_stopped(tmp_path: Path) -> None:
    from minimind_ray.on_ray.tuner import _settle

    job = make_job(tmp_path, rows=100, checkpoint__every=1, train__max_steps=3)
    run = RunDirectory(start(job))
    run_here(job)
    run.update(state="running", result=None)
    shutil.rmtree(run.checkpoints()[-1])
    _settle(run)
    info = run.info()
    assert (info["state"], info["steps"]) == ("early-stopped", 2)
    assert sound(run.path / info["result"])
    assert "2 steps of 3 (early-stopped)" in (run.path / info["result"] / "README.md").read_text()


@pytest.mark.long
def test_out_of_time_and_again(tmp_path: Path, ray_session: None) -> None:
    axes = {"optim.lr": "3e-3,1e-2"}
    settings: dict[str, Any] = {"train__epochs": 3, "model__dropout": 0.1}
    whole = run(planned(tmp_path, axes, **settings))
    plan = planned(tmp_path, axes, out="parted", search={"concurrent": 1}, **settings)
    jobs = jobs_of(plan)
    create_sweep(plan, jobs, {})
    first = Path(jobs[0].config.out)

    def stop_soon() -> None:
        while len(list(read_jsonl(first / "metrics.jsonl"))) < 5:
            time.sleep(0.01)
        (plan.path / ".stop").touch()

    stopper = threading.Thread(target=stop_soon)
    stopper.start()
    parted = run(plan, jobs)
    stopper.join()
    assert states(parted) == {"lr=0.003,seed=0": "stopped", "lr=0.01,seed=0": "waiting"}
    assert 5 <= parted["lr=0.003,seed=0"].steps < whole["lr=0.003,seed=0"].steps
    from minimind_ray.on_ray.tuner import Search, run_trials

    assert run_trials(jobs, plan.base.scale, plan.path, Search("val/loss", "min"), {}, seconds=0.0) == "out of time"
    plan = reopen_sweep(plan.path)
    ended = run(plan, jobs_of(plan))
    assert {id: metrics(trial) for id, trial in ended.items()} == {id: metrics(trial) for id, trial in whole.items()}


def test_base_weights_come_out_of_the_object_store(tmp_path: Path, ray_session: None) -> None:
    from minimind_ray.on_ray.tuner import Search, put_bases, run_trials

    base = make_job(tmp_path, rows=200, eval__samples=0)
    start(base)
    run_here(base)
    settings: dict[str, Any] = {"init_from": base.config.out, "train__max_steps": 3}
    alone = make_job(tmp_path, "sft", 200, out=str(tmp_path / "alone"), eval__samples=0, optim__lr=1e-4, **settings)
    start(alone)
    run_here(alone)
    plan = planned(tmp_path, {"optim.lr": "1e-4,1e-3"}, stage="sft", **settings)
    jobs = jobs_of(plan)
    create_sweep(plan, jobs, {})
    bases = put_bases(jobs)
    assert len(bases) == 1
    for file in Path(base.config.out).glob("checkpoints/*/model.safetensors"):
        file.unlink()
    run_trials(jobs, plan.base.scale, plan.path, Search("val/loss", "min"), bases)
    trials = read_sweep(plan.path).trials
    assert [trial.state for trial in trials] == ["finished", "finished"]
    losses = {trial.id: [line["loss"] for line in trial.metrics] for trial in trials}
    assert losses["lr=1e-4,seed=0"] == [line["loss"] for line in read_jsonl(tmp_path / "alone" / "metrics.jsonl")]
    assert losses["lr=0.001,seed=0"][0] == losses["lr=1e-4,seed=0"][0]


def test_pbt_takes_over_the_better_trial_and_moves_on_from_it(tmp_path: Path, ray_session: None) -> None:
    from minimind_ray.sweep.searchers import Explorer

    # One that learns nothing, so that whichever trials have got how far, it is the worst.
    axes = {"optim.lr": "1e-7,3e-3,5e-3,1e-2"}
    plan = planned(
        tmp_path, axes, search={"concurrent": 2, "scheduler": "pbt"}, train__epochs=3, schedule__name="constant"
    )
    found = run(plan, explore=Explorer(plan.axes, 0))
    assert set(states(found).values()) == {"finished"}
    moved = 0
    for trial in found.values():
        for line in read_jsonl(trial.path / "lineage.jsonl"):
            moved += 1
            assert line["from"] in found and line["from"] != trial.id
            assert line["point"]["optim.lr"] in plan.axes[0].values
        lr = read_yaml(trial.path / "config.yaml")["optim"]["lr"]
        assert trial.metrics[-1]["lr"] == lr
        assert trial.result and sound(trial.result) and trial.validation
        losses = trial.validation.columns
        assert losses["loss"].sum() / losses["count"].sum() == pytest.approx(read_state(trial.result)["best_value"])
    assert moved
    # With its own learning rate it would have stayed where an untrained model is.
    worst = found["lr=1e-7,seed=0"]
    assert (worst.path / "lineage.jsonl").exists()
    assert worst.metrics[-1]["val/loss"] < 0.8 * worst.metrics[0]["loss"]
    steps = [line["step"] for line in worst.metrics]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("scheduler", ["none", "pbt"])
def test_a_finished_sweep_is_resumed_by_doing_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduler: str
) -> None:
    from minimind_ray.sweep import run as module

    plan = planned(tmp_path, {"optim.lr": "1e-3,1e-2"}, search={"scheduler": scheduler})
    create_sweep(plan, jobs_of(plan), {})
    for trial in plan.trials:
        RunDirectory(trial.config.out).update(state="finished")
    monkeypatch.setattr(module, "concurrent_trials", lambda scale: 2)
    monkeypatch.setattr(module, "run_trials", None)
    said: list[str] = []
    ending = module.run_sweep(reopen_sweep(plan.path), resume=True, say=said.append, watch=lambda *event: None)
    assert ending == "by itself" and "2 trials" in said[-1]


@pytest.mark.long
def test_the_board_sees_how_far_each_trial_is(tmp_path: Path, ray_session: None) -> None:
    """Under pbt with more trials than places: trials run, wait, run on, and end."""
    from io import StringIO

    from rich.console import Console

    from minimind_ray.display.board import Board
    from minimind_ray.sweep.searchers import Explorer

    search = {"concurrent": 2, "scheduler": "pbt"}
    plan = planned(tmp_path, {"optim.lr": "1e-7,3e-3,5e-3,1e-2"}, search=search, train__epochs=6)
    screen, events, seen = StringIO(), list[str](), dict[str, set[str]]()
    with Board(plan, Console(file=screen, force_terminal=True, width=100, height=30)) as board:

        def watch(trial: Path, event: Any, metrics: Any) -> None:
            events.append(event)
            board.watch(trial, event, metrics)
            for row in board.progress.rows(time.monotonic()):
                seen.setdefault(row.trial, set()).add(row.step)

        found = run(plan, explore=Explorer(plan.axes, 0), watch=watch)
    assert "paused" in events and set(states(found).values()) == {"finished"}
    assert board.progress.counts() == "0 running, 4 of 4 ended"
    assert board.progress.best and board.progress.best.value == pytest.approx(
        min(line["val/loss"] for trial in found.values() for line in trial.metrics if "val/loss" in line)
    )
    steps = found["lr=0.003,seed=0"].steps
    assert any(f"/{steps}" in step for steps_seen in seen.values() for step in steps_seen)
    assert any("now lr=" in name for name in seen)
    assert "4/4  finished" in screen.getvalue()


def test_optuna_proposes_points_and_hears_of_their_mean(tmp_path: Path, ray_session: None) -> None:
    from minimind_ray.sweep.run import run_sweep

    pytest.importorskip("optuna")
    plan = planned(
        tmp_path, {"optim.lr": "log(1e-4,1e-2)"}, train__max_steps=3,
        search={"searcher": "optuna", "trials": 3, "seeds": 2}, scale__cpus_per_worker=5.0,
    )  # fmt: skip
    assert plan.count == 6
    said: list[str] = []
    assert run_sweep(plan, resume=False, say=said.append, watch=lambda *event: None) == "by itself"
    # Two trials of 5 CPUs do not fit on 8: they wait for each other.
    assert said[-1].startswith("6 trials, 1 at once; the other trials wait")
    trials = read_sweep(plan.path).trials
    assert [trial.state for trial in trials] == ["finished"] * 6
    assert len({trial.point["optim.lr"] for trial in trials}) == 3
    assert {trial.seed for trial in trials} == {0, 1}
    # A second time there is nothing to do.
    before = {trial.id: (trial.path / "metrics.jsonl").read_bytes() for trial in trials}
    run_sweep(reopen_sweep(plan.path), resume=True, say=said.append, watch=lambda *event: None)
    again = read_sweep(plan.path).trials
    assert before == {trial.id: (trial.path / "metrics.jsonl").read_bytes() for trial in again}
    # One point gets a third seed. The other trials stay as they are.
    larger = with_seeds(reopen_sweep(plan.path), 3, ["best"])
    assert larger.count == 7
    run_sweep(larger, resume=True, say=said.append, watch=lambda *event: None)
    assert "1 trial(s) added" in said
    after = {trial.id: (trial.path / "metrics.jsonl").read_bytes() for trial in read_sweep(plan.path).trials}
    assert len(after) == 7 and before.items() <= after.items()
    assert {trial.state for trial in read_sweep(plan.path).trials} == {"finished"}
    assert reopen_sweep(plan.path) == larger


@pytest.mark.parametrize("fuse", [1, 2])
def test_a_sweep_that_waits_for_room_can_be_stopped(tmp_path: Path, ray_session: None, fuse: int) -> None:
    import ray

    from minimind_ray.on_ray.tuner import Search, run_trials

    plan = planned(tmp_path, {"optim.lr": "1e-3,1e-2"})
    jobs = jobs_of(plan)
    create_sweep(plan, jobs, {})
    holder = ray.remote(threading.Event).options(num_cpus=8).remote()
    ray.get(holder.is_set.remote())
    threading.Timer(1.0, (plan.path / ".stop").touch).start()
    began = time.monotonic()
    assert run_trials(jobs, plan.base.scale, plan.path, Search("val/loss", "min"), {}, fuse=fuse) == "by itself"
    assert time.monotonic() - began < 60
    ray.kill(holder)
    assert {trial.state for trial in read_sweep(plan.path).trials} == {"waiting"}


def test_a_trial_whose_workers_wait_can_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minimind_ray.on_ray import tuner
    from minimind_ray.on_ray.reservation import StoppedError

    monkeypatch.setattr(tuner, "granted_device", lambda: torch.device("cpu"))
    job = make_job(tmp_path, rows=60, train__max_steps=4, scale__workers=2)
    trial = RunDirectory(start(job))

    def wait_for_workers(job: Job) -> None:
        while not (trial.path / ".stop").exists():
            time.sleep(0.01)
        trial.update(state="stopped")
        raise StoppedError("no room")

    monkeypatch.setattr(tuner, "train_on_ray", wait_for_workers)
    context = tuner.TuneContext(job, tuner.Search("val/loss", "min"), lambda: True, {})
    tuner._run_nested(job, trial, context, 0)
    assert trial.info()["state"] == "stopped" and not (trial.path / ".stop").exists()


def test_tune_hears_of_the_best_validation_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minimind_ray.on_ray import tuner

    monkeypatch.setattr(tuner, "granted_device", lambda: torch.device("cpu"))
    job = make_job(tmp_path, rows=60, train__max_steps=4)
    context = tuner.TuneContext(job, tuner.Search("val/accuracy", "max"), lambda: False, {})
    heard: list[tuple[int, float]] = []
    for step, (loss, accuracy) in enumerate([(0.6, 0.7), (0.5, 0.8), (0.7, 0.9), (0.4, 0.6)], 1):
        context.verdicts.put(True)
        values = {"val/loss": loss, "val/accuracy": accuracy, "task/mm_demo": accuracy}
        context.report({"step": step, "tokens": step, **values}, None)
        report = context.reports.get()
        assert report and (report["percent"], report["tokens"]) == (25 * step, step)
        assert report["task/mm_demo"] == report["val/accuracy"]
        heard.append((report["step"], report["val/accuracy"]))
    assert heard == [(1, 0.7), (2, 0.8), (3, 0.8), (4, 0.6)]


def test_a_sweep_that_is_stopped_asks_for_no_more_points() -> None:
    from ray.tune.search import Searcher

    from minimind_ray.on_ray.tuner import Search, _Asking

    class Points:
        count = 2

        def ask(self) -> list[Job]:
            raise AssertionError

        def tell(self, trial: Path, value: float | None) -> None: ...

    assert _Asking(Points(), Search("val/loss", "min"), lambda: True).suggest("a") == Searcher.FINISHED


@pytest.mark.long
@pytest.mark.public
def test_more_workers_a_trial_and_nothing_is_left_behind(tmp_path: Path, ray_session: None) -> None:
    settings: dict[str, Any] = {"optim__clip": 0.0, "eval__every": 2, "train__epochs": 2}
    axes, search = {"optim.lr": "3e-3,1e-7,1e30,1e-2"}, {"scheduler": "asha", "concurrent": 1}
    plan = planned(tmp_path, axes, search=search, scale__workers=2, **settings)
    last = plan.path / "trials" / "lr=0.01,seed=0"

    def stop_the_last() -> None:
        while lines_of(last / "metrics.jsonl") < 2:
            time.sleep(0.01)
        (plan.path / ".stop").touch()

    threading.Thread(target=stop_the_last, daemon=True).start()
    found = run(plan)  # It checks that nothing is left.
    assert states(found) == {
        "lr=0.003,seed=0": "finished", "lr=1e-7,seed=0": "early-stopped", "lr=1e30,seed=0": "failed",
        "lr=0.01,seed=0": "stopped",
    }  # fmt: skip
    alone = make_job(tmp_path, rows=200, out=str(tmp_path / "alone"), eval__samples=0, **settings)
    start(alone)
    run_here(alone)
    theirs = list(read_jsonl(tmp_path / "alone" / "metrics.jsonl"))
    assert found["lr=0.003,seed=0"].metrics[-1]["val/loss"] == pytest.approx(theirs[-1]["val/loss"], rel=1e-3)


def test_what_does_not_fit_is_refused(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from minimind_ray.on_ray import session
    from minimind_ray.on_ray.tuner import concurrent_trials

    assert concurrent_trials(ScaleConfig(cpus_per_worker=3.0)) == 2
    assert concurrent_trials(ScaleConfig(cpus_per_worker=0.5)) == 16
    assert concurrent_trials(ScaleConfig(workers=3, cpus_per_worker=1.0)) == 2
    halves = {"CPU": 8.0, "GPU": 2.0}
    nodes = [{"NodeID": "a", "Alive": True, "Resources": halves}, {"NodeID": "b", "Alive": False, "Resources": {}}]
    with monkeypatch.context() as patched:
        patched.setattr(ray, "nodes", lambda: nodes)
        patched.setattr(session, "_answers", lambda node: True)
        assert concurrent_trials(ScaleConfig(gpus_per_worker=0.25)) == 8
        assert concurrent_trials(ScaleConfig(gpus_per_worker=2.0)) == 1
    for scale in (ScaleConfig(cpus_per_worker=9.0), ScaleConfig(workers=8)):
        with pytest.raises(UserError, match="one trial needs .* cannot give"):
            concurrent_trials(scale)
    with pytest.raises(UserError, match="scale.gpus_per_worker asks for a GPU for a trial.* none; set it to 0"):
        concurrent_trials(ScaleConfig(gpus_per_worker=0.25))


def command(*arguments: str) -> subprocess.Popen[str]:
    """The real command with a Ray of its own, as a terminal starts it: signals reach the whole group."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-c", "from minimind_ray.cli.main import run; run()", "tune", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=environment,
    )  # fmt: skip


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def lines_of(path: Path) -> int:
    return len(list(read_jsonl(path)))


@pytest.mark.long
def test_a_signal_and_a_crash_lose_nothing(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"train__epochs": 5, "model__dropout": 0.1}
    config = make_config(tmp_path, rows=200, **settings)
    from minimind_ray.config.load import to_yaml

    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    arguments = ("pretrain", "--config", str(file), "--lr", "3e-3,1e-2", "--concurrent", "1", "--out")
    out = tmp_path / "parted"
    first, second = (out / "trials" / f"lr={lr},seed=0" for lr in ("0.003", "0.01"))

    process = command(*arguments, str(out))
    wait_for(lambda: lines_of(first / "metrics.jsonl") >= 5, process)
    with pytest.raises(UserError, match=f"{out} is in use by process {process.pid} "):
        require_free(first)
    signal_group(process, signal.SIGTERM)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 143, text
    assert f"continue with: minimind-ray tune --resume {out}" in text
    stopped = RunDirectory(first).info()
    assert stopped["state"] == "stopped" and stopped["steps"] >= 5, text

    process = command("--resume", str(out))
    wait_for(lambda: lines_of(second / "metrics.jsonl") >= 12, process)
    process.kill()
    process.wait()
    assert RunDirectory(first).state() == "finished"
    assert RunDirectory(second).state() == "stopped (its process is gone)"
    untouched = (first / "metrics.jsonl").read_bytes()

    process = command("--resume", str(out))
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert "1 trial(s) were running when the sweep's process ended" in text
    assert (first / "metrics.jsonl").read_bytes() == untouched
    assert "winner: lr=" in text and "minimind-ray generate" in text and str(out / "report.html") in text
    assert (out / "report.html").exists()

    for trial in read_sweep(out).trials:
        lr = trial.point["optim.lr"]
        whole = make_job(tmp_path, rows=200, out=str(tmp_path / f"alone-{lr}"), optim__lr=lr, **settings)
        run = RunDirectory(start(whole))
        run_here(whole)
        expected = [{k: v for k, v in line.items() if k != "timing"} for line in run.metrics()]
        assert metrics(trial)[-1] == expected[-1]
        # Where it was stopped there is a validation more.
        assert [trained(line) for line in trial.metrics] == [trained(line) for line in expected]
