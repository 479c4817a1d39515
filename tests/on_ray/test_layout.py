"""How the trials of a sweep share a cluster, and what is said while they wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.core.generated.gcs_pb2 import JobTableData
from ray.tune.schedulers import PopulationBasedTraining

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import ScaleConfig
from minimind_ray.on_ray import private_ray, waiting
from minimind_ray.on_ray.layout import layout, trials_that_fit
from minimind_ray.on_ray.session import Machines
from minimind_ray.on_ray.tuner import _Exchange, _Watcher
from minimind_ray.on_ray.waiting import print_wait_reason, trial_needs, wait_reason

pytestmark = pytest.mark.unit

ONE, HALF, THREE_CPUS, NESTED = {}, {"gpus_per_worker": 0.5}, {"cpus_per_worker": 3.0}, {"workers": 2}


@pytest.mark.parametrize(
    ("cpus", "gpus", "scale", "count", "fuse", "concurrent", "expected"),
    [
        (1, 0, ONE, 4, 1, None, (1, 0, 1)),
        (2, 0, ONE, 4, 1, None, (2, 0, 1)),
        (4, 0, ONE, 4, 1, 3, (3, 0, 1)),
        (1, 0, ONE, 4, 4, None, (4, 1, 4)),
        (2, 0, ONE, 4, 4, None, (4, 2, 2)),
        (2, 0, ONE, 12, 7, None, (12, 2, 6)),
        (2, 0, ONE, 12, 4, 3, (3, 2, 2)),
        (4, 0, ONE, 2, 4, None, (2, 2, 1)),
        (2, 1, {"gpus_per_worker": 1.0}, 8, 8, None, (8, 1, 8)),
        (2, 1, HALF, 8, 1, None, (2, 0, 1)),
        (4, 0, THREE_CPUS, 2, 1, None, (1, 0, 1)),
        (4, 0, NESTED, 4, 1, None, (1, 0, 1)),
        (5, 0, NESTED, 4, 1, None, (1, 0, 1)),
        (6, 0, NESTED, 4, 1, None, (2, 0, 1)),
        (3, 0, NESTED, 4, 1, None, (1, 0, 1)),
        (1, 0, NESTED, 4, 1, None, None),
        (2, 0, NESTED, 4, 1, None, None),
        (2, 0, THREE_CPUS, 4, 4, None, None),
        (4, 0, HALF, 4, 1, None, None),
    ],
)
def test_what_is_held_is_there(
    cpus: int, gpus: int, scale: dict[str, Any], count: int, fuse: int, concurrent: int | None, expected: Any
) -> None:
    asked, found = ScaleConfig(**scale), Machines([{"CPU": cpus, "GPU": gpus}], 1)
    if expected is None:
        with pytest.raises(UserError, match=r"one trial needs .* cannot give"):
            trials_that_fit(found, asked)
        return
    spread = layout(trials_that_fit(found, asked), count, fuse=fuse, concurrent=concurrent)
    assert (spread.at_once, spread.groups, spread.size) == expected
    holders = (spread.groups or spread.at_once) * asked.most
    data_cpus = spread.at_once * (asked.most > 1)
    assert holders * asked.cpus_per_worker + data_cpus <= cpus and holders * asked.gpus_per_worker <= gpus
    assert spread.at_once <= max(1, spread.groups) * spread.size or not spread.groups


def test_workers_of_one_trial_lie_on_several_nodes() -> None:
    nodes = [{"CPU": 2.0}, {"CPU": 2.0}, {"CPU": 1.0}]
    assert trials_that_fit(Machines(nodes, 3), ScaleConfig(workers=2)) == 1
    assert trials_that_fit(Machines([*nodes, {"CPU": 1.0}], 4), ScaleConfig(workers=2)) == 2
    assert trials_that_fit(Machines(nodes, 2), ScaleConfig(workers=3)) == 1
    assert nodes[0] == {"CPU": 2.0}
    with pytest.raises(UserError, match="0 node"):
        trials_that_fit(Machines([], 0), ScaleConfig())


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What is free of a cluster of 2 CPUs and 1 GPU."""
    free: dict[str, float] = {"CPU": 1.0}
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 1.0})
    monkeypatch.setattr(ray, "available_resources", lambda: free)
    monkeypatch.setattr(waiting, "other_programs", lambda: ["process 7 on a"])
    return free


def test_what_a_trial_waits_for_is_said(free: dict[str, float]) -> None:
    def said(**scale: Any) -> str:
        return str(wait_reason("a trial needs", trial_needs(ScaleConfig(**scale))))

    assert said() == "None"
    free["CPU"] = 0.0
    assert "a trial needs 1 CPUs, and 0 of 2 CPUs are free; other programs on the cluster: process 7 on a." in said()
    free["CPU"] = 2.0
    on_gpu = said(gpus_per_worker=1.0)
    assert "a trial needs 1 CPUs and 1 GPUs, and 2 of 2 CPUs and 0 of 1 GPUs are free" in on_gpu
    assert "needs 3 CPUs" in said(workers=2)  # One for Ray Data.


def test_a_wait_names_other_programs_without_those_of_ray_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def job(number: int, namespace: str, *, dead: bool = False) -> bytes:
        table = JobTableData(job_id=bytes([number]), is_dead=dead, driver_pid=number, entrypoint="minimind-ray tune")
        table.driver_address.ip_address = "a"
        table.config.ray_namespace = namespace
        return table.SerializeToString()

    table = [job(1, ""), job(2, "f00d"), job(3, "_ray_internal_dashboard"), job(4, "f00d", dead=True)]
    accessor = SimpleNamespace(get_job_table=lambda **skipped: table)
    monkeypatch.setattr(private_ray.state, "_connect_and_get_accessor", lambda: accessor)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_job_id=lambda: "01"))
    monkeypatch.setattr(waiting, "private_parts", lambda: True)
    assert waiting.other_programs() == ["process 2 on a (minimind-ray tune)"]


@pytest.mark.parametrize(("pending", "said"), [({}, False), ({"CPU": 3.0}, True)])
def test_a_sweep_says_what_the_workers_of_its_trials_wait_for(
    pending: dict[str, float], said: bool, free: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "pending_resources", lambda: pending)
    watcher = _Watcher(lambda *event: None, "val/loss", [])
    watcher.running.add("a")
    why = watcher.waits_for(ScaleConfig(workers=2))
    assert bool(why) == said
    assert not said or "workers and Ray Data's tasks need 3 CPUs, and 1 of 2 CPUs are free" in str(why)
    assert watcher.waits_for(ScaleConfig()) is None


def test_rows_that_do_not_come_are_told_of(
    free: dict[str, float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Slow:
        def iter_rows(self) -> Iterator[dict[str, Any]]:
            yield {"id": 0}
            said.wait(10)
            yield {"id": 1}

    def say(who: str, need: Mapping[str, float]) -> str | None:
        reason = wait_reason(who, need)
        if reason:
            said.set()
        return reason

    said = threading.Event()
    free["CPU"] = 0.0
    monkeypatch.setattr(waiting, "wait_reason", say)
    monkeypatch.setattr(waiting, "print_wait_reason", partial(print_wait_reason, first=0.01))
    assert [row["id"] for row in waiting.rows_of(Slow(), "preparing data needs", {"CPU": 1})] == [0, 1]
    assert said.is_set()


def test_it_is_said_after_a_while_and_again(capsys: pytest.CaptureFixture[str]) -> None:
    asked = threading.Semaphore(0)

    def why() -> str:
        asked.release()
        return "waiting for room"

    with print_wait_reason(why, first=0.01, again=0.01):
        for _ in range(8):
            asked.acquire(timeout=10)
    assert capsys.readouterr().err.count("waiting for room\n") >= 2
    with print_wait_reason(why, first=60):
        time.sleep(0.02)
    assert not capsys.readouterr().err


def test_a_trial_that_takes_over_another_keeps_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    def take_over(self: object, controller: object, trial: Any, result: dict[str, Any]) -> str:
        trial.set_config(custom_explore_fn({"trial": {"job": "theirs", "point": {"optim.lr": 1.0}}}))
        return "NOOP"

    def keep(self: object, *, custom_explore_fn: Any, **settings: Any) -> None:
        kept.append(custom_explore_fn)

    kept: list[Any] = []
    monkeypatch.setattr(PopulationBasedTraining, "__init__", keep)
    monkeypatch.setattr(PopulationBasedTraining, "on_trial_result", take_over)
    exchange = _Exchange(lambda point: {"optim.lr": 2 * point["optim.lr"]})  # pyright: ignore
    (custom_explore_fn,) = kept
    trial = SimpleNamespace(config={"trial": {"job": "ours", "point": {"optim.lr": 9.0}}})
    trial.set_config = lambda config: setattr(trial, "config", config)
    assert exchange.on_trial_result(None, trial, {}) == "NOOP"
    assert trial.config == {"trial": {"job": "ours", "point": {"optim.lr": 2.0}}}
