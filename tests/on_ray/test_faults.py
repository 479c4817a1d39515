"""Losses for real, on a cluster of four nodes: each run ends with the model of its twin that nothing happened to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from minimind_ray.config.load import to_yaml
from minimind_ray.stages.verify import check_checkpoint, compare_runs
from minimind_ray.train.run import RunDirectory
from tests.faults import COORDINATOR, WORKER, LocalCluster, fill, logged, small_disk, wait_for
from tests.jobs import make_config
from tests.track.reading import history

pytestmark = [pytest.mark.cluster, pytest.mark.long]

STEPS, EVAL_EVERY, CHECKPOINT_EVERY = 40, 4, 3


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


def goes_on(run: Path, count: int) -> None:
    """Wait for a step of the attempt after so many restarts, which begins by dropping lines: the file is a new one."""
    metrics = run / "metrics.jsonl"
    wait_for(lambda: len(restarts(run)) == count)
    before = metrics.stat().st_ino
    wait_for(lambda: metrics.stat().st_ino != before)
    wait_for(lambda: logged(run) > restarts(run)[-1]["step"])


def ends_well(scene: Scene, driver: subprocess.Popen[bytes], out: str) -> None:
    assert driver.wait(240) == 0, scene.output(out)
    run = scene.directory / out
    assert [line["step"] for line in RunDirectory(run).metrics()] == list(range(1, STEPS + 1))
    last = RunDirectory(run).checkpoints()[-1]  # its ledger is of the whole run
    assert last.name == f"step-{STEPS:08d}" and [finding for finding in check_checkpoint(last) if not finding.ok] == []


def is_the_twin(scene: Scene, out: str) -> None:
    assert compare_runs(scene.twin, scene.directory / out)[1] == []


def wandb_history(run: Path) -> list[dict[str, Any]]:
    """All that W&B has of its one run, step by step as it was written, without times."""
    assert len({file.name for file in run.glob("wandb/offline-run-*/run-*.wandb")}) == 1
    return [
        {key: row[key] for key in sorted(row) if not key.startswith(("timing", "_r", "_t"))} for row in history(run)
    ]


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
        with scene.run("twin", "--wandb", "offline") as driver:
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

        wait_for(lambda: logged(run) == 2 * EVAL_EVERY - 1)
        workers = scene.cluster.processes(WORKER)
        time.sleep(1.5 * list(RunDirectory(run).metrics())[-1]["timing"]["seconds"])
        kill(workers[:1])
        assert logged(run) == 2 * EVAL_EVERY - 1
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
    assert scene.output("workers").count("; continuing from step") >= 3
    is_the_twin(scene, "workers")
    history = wandb_history(run)
    assert history == wandb_history(scene.twin)
    assert [row["step"] for row in history] == list(range(1, STEPS + 1)) and {"loss", "val/loss"} <= history[-1].keys()


def test_notice_for_a_node_then_one_lost_without_and_ray_datas_coordinator(scene: Scene) -> None:
    run, cluster = scene.directory / "nodes", scene.cluster
    with scene.run("nodes") as driver:
        wait_for(lambda: logged(run))
        noticed = next(node for node in cluster.nodes if cluster.processes(WORKER, [node]))
        cluster.drain(noticed, seconds=30)
        wait_for(lambda: restarts(run), 30)
        # Nothing is done twice: the checkpoint is of the last step.
        assert restarts(run)[0]["step"] == logged(run) < STEPS
        wait_for(lambda: logged(run) > restarts(run)[0]["step"])
        assert not cluster.processes(WORKER, [noticed])
        cluster.lose(noticed)
        cluster.add(1)

        lost = next(node for node in cluster.nodes if cluster.processes(WORKER, [node]))
        cluster.lose(lost)
        cluster.add(1)
        goes_on(run, 2)
        wait_for(lambda: cluster.processes(COORDINATOR), 30)
        assert cluster.kill(COORDINATOR) == 1
        ends_well(scene, driver, "nodes")
    why = [restart["why"] for restart in restarts(run)]
    assert len(why) == 3 and why[0] == "notice was given for 1 node(s)"
    assert all("'s process, a process of Ray Data, or the node" in reason for reason in why[1:])
    is_the_twin(scene, "nodes")


def test_the_driver_killed_checkpoints_damaged_and_the_last_word(scene: Scene) -> None:
    run = scene.directory / "driver"
    with scene.run("driver") as driver:
        wait_for(lambda: len(RunDirectory(run).checkpoints()) == 3)
        driver.kill()
    wait_for(lambda: not scene.cluster.processes(WORKER))
    *_, before, last = RunDirectory(run).checkpoints()
    content = bytearray((last / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (last / "model.safetensors").write_bytes(content)
    os.truncate(before / "resume" / "optimizer.safetensors", 1000)

    with scene.run("driver", "--resume", "--set", "scale.max_failures=0") as driver:
        wait_for(lambda: logged(run) < 9)
        for damaged in (last, before):
            assert f"{damaged} is damaged" in scene.output("driver")
        wait_for(lambda: logged(run) > 9)
        kill(scene.cluster.processes(WORKER)[:1])
        assert driver.wait(120) == 1
    word = scene.output("driver")[-1000:]
    assert "after 0 restart(s) with no checkpoint between (scale.max_failures)" in word and "--resume" in word
    assert RunDirectory(run).info()["state"] == "failed" and not restarts(run)

    with scene.run("driver", "--resume") as driver:
        ends_well(scene, driver, "driver")
    is_the_twin(scene, "driver")


def test_a_disk_that_is_full_for_a_while(scene: Scene) -> None:
    run = scene.directory / "disk"
    with small_disk(run / "checkpoints") as disk, scene.run("disk") as driver:
        wait_for(lambda: RunDirectory(run).checkpoints())
        filler = fill(disk)
        wait_for(lambda: any("No space left" in line.get("warning", "") for line in RunDirectory(run).metrics()))
        filler.unlink()
        ends_well(scene, driver, "disk")
        assert not restarts(run)
        is_the_twin(scene, "disk")


def test_as_many_workers_as_there_is_room_for(scene: Scene) -> None:
    run, cluster = scene.directory / "elastic", scene.cluster
    # Validation makes it last until the node that comes is seen.
    slow = ["--set", "scale.resize_seconds=2", "--set", "eval.every=1"]
    with scene.run("elastic", "--workers", "1:3", *slow) as driver:
        wait_for(lambda: logged(run) == 5)
        assert len(cluster.processes(WORKER)) == 3
        cluster.lose(cluster.nodes[-1])
        goes_on(run, 1)
        assert len(cluster.processes(WORKER)) == 2
        cluster.add(1)
        goes_on(run, 2)
        assert restarts(run)[1]["why"] == "the cluster has room for more workers"
        assert len(cluster.processes(WORKER)) == 3
        ends_well(scene, driver, "elastic")
    # Sums over other splits round otherwise; batches, schedule and data are the same.
    for ours, theirs in zip(RunDirectory(run).metrics(), RunDirectory(scene.twin).metrics(), strict=True):
        assert (ours["tokens"], ours["lr"], ours["epoch"]) == (theirs["tokens"], theirs["lr"], theirs["epoch"])
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)


def test_a_cluster_on_this_machine_is_joined_only_by_its_address(scene: Scene) -> None:
    code = "import ray; from minimind_ray.on_ray.session import start_ray; start_ray(2); print(len(ray.nodes()))"
    own = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    assert own.stdout.strip() == "1" and len(scene.cluster.nodes) == 3
