"""Losses for real, on a cluster of four nodes: each run ends with the model of its twin that nothing happened to."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from minimind_ray.config.load import to_yaml
from minimind_ray.stages.verify import check_checkpoint, compare_runs
from minimind_ray.track.wandb import log_records, parse_record
from minimind_ray.train.run import RunDirectory
from tests.faults import CONTROLLER, WORKER, LocalCluster, logged, wait_for
from tests.jobs import make_config

pytestmark = pytest.mark.cluster

STEPS, EVAL_EVERY, CHECKPOINT_EVERY = 40, 8, 3


@dataclass
class Scene:
    """A cluster, a config, and the run that nothing happens to. Two workers fit when any one node is gone."""

    cluster: LocalCluster
    directory: Path
    twin: Path

    def command(self, out: str, *more: str) -> list[str]:
        config = str(self.directory / "config.yaml")
        return ["train", "pretrain", "--config", config, "--out", str(self.directory / out), *more]

    def output(self, out: str) -> str:
        return (self.directory / f"{out}.log").read_text(encoding="utf-8")

    def run(self, out: str, *more: str) -> subprocess.Popen[bytes]:
        return self.cluster.driver(*self.command(out, *more), log=self.directory / f"{out}.log")


def restarts(run: Path) -> list[dict]:
    return RunDirectory(run).info().get("restarts", [])


def ends_well(scene: Scene, driver: subprocess.Popen[bytes], out: str) -> None:
    assert driver.wait(240) == 0, scene.output(out)
    run = scene.directory / out
    assert [line["step"] for line in RunDirectory(run).metrics()] == list(range(1, STEPS + 1))
    assert [finding for finding in check_checkpoint(run) if not finding.ok] == []


def is_the_twin(scene: Scene, out: str) -> None:
    assert compare_runs(scene.twin, scene.directory / out)[1] == []


def wandb_steps(run: Path) -> list[int]:
    """The steps of all history that W&B has of its one run, in the order in which it was written."""
    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert len({file.name for file in files}) == 1
    records = [parse_record(data) for file in files for data, _ in log_records(file.read_bytes())]
    return [record.history.step.num for record in records if record.HasField("history")]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("faults")
    config = make_config(
        directory, rows=2000, batch__tokens=4096, train__max_steps=STEPS, data__val_fraction=0.4, model__dropout=0.1,
        eval__samples=0, eval__every=EVAL_EVERY, checkpoint__every=CHECKPOINT_EVERY, checkpoint__keep=3,
        scale__workers=2,
    )  # fmt: skip
    (directory / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    cluster = LocalCluster(head_cpus=1)
    try:
        for _ in range(3):
            cluster.add(1)
        scene = Scene(cluster, directory, directory / "twin")
        with scene.run("twin") as driver:
            ends_well(scene, driver, "twin")
        yield scene
    finally:
        cluster.shutdown()


def kill(processes: Sequence[int]) -> None:
    for process in processes:
        os.kill(process, signal.SIGKILL)


def test_workers_killed_in_a_step_in_validation_and_while_they_write(scene: Scene) -> None:
    run = scene.directory / "workers"
    with scene.run("workers", "--wandb", "offline") as driver:
        wait_for(lambda: logged(run) == 5)
        kill(scene.cluster.processes(WORKER)[-1:])
        wait_for(lambda: len(restarts(run)) == 1)

        wait_for(lambda: logged(run) == EVAL_EVERY - 1)
        workers = scene.cluster.processes(WORKER)
        time.sleep(1.5 * list(RunDirectory(run).metrics())[-1]["timing"]["seconds"])
        kill(workers[:1])
        assert logged(run) == EVAL_EVERY - 1
        wait_for(lambda: len(restarts(run)) == 2)

        broken: list[Path] = []
        while not broken:
            seen = logged(run)
            wait_for(lambda seen=seen: logged(run) > seen)
            workers = scene.cluster.processes(WORKER)
            wait_for(lambda: list(run.glob("checkpoints/.writing-*")))
            kill(workers)
            lost = len(restarts(run))
            # It was in time where the directory never got its name.
            broken = list(run.glob("checkpoints/.writing-*"))
            wait_for(lambda lost=lost: len(restarts(run)) > lost)
        ends_well(scene, driver, "workers")
    assert [restart["step"] for restart in restarts(run)][:2] == [3, 6]
    assert scene.output("workers").count("; going on from step") >= 3
    is_the_twin(scene, "workers")
    assert wandb_steps(run) == list(range(1, STEPS + 1))


def test_controller_killed_then_the_driver(scene: Scene) -> None:
    run = scene.directory / "controller"
    with scene.run("controller") as driver:
        wait_for(lambda: logged(run) == 5)
        kill(scene.cluster.processes(CONTROLLER))
        wait_for(lambda: len(restarts(run)) == 1)
        assert "controller" in restarts(run)[0]["why"]
        wait_for(lambda: logged(run) == 14)
        driver.kill()
    with scene.run("controller", "--resume") as driver:
        ends_well(scene, driver, "controller")
    is_the_twin(scene, "controller")
