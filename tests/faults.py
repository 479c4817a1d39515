"""A Ray cluster of several nodes on this machine, and processes of it to kill; a disk to fill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from minimind_ray.on_ray.versions import private_parts
from minimind_ray.train.run import RunDirectory

WORKER, COORDINATOR = "ray::RayTrainWorker", "ray::SplitCoordinator"


class LocalCluster:
    """Nodes that this process started; drivers are processes of their own, so that they can be killed as well."""

    def __init__(self, head_cpus: int) -> None:
        from ray._private.authentication.authentication_token_setup import (
            enable_token_auth_by_default,
            ensure_token_if_auth_enabled,
        )
        from ray.cluster_utils import Cluster

        # As ray.init does for a cluster on this machine: nodes and drivers need this user's token.
        enable_token_auth_by_default()
        ensure_token_if_auth_enabled()
        # A lost node is noticed within two seconds, not thirty.
        settings = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}
        head = {"num_cpus": head_cpus, "include_dashboard": False, "_system_config": settings}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes: list[Any] = []

    def add(self, cpus: int) -> Any:
        """One more node."""
        self.nodes.append(self.cluster.add_node(num_cpus=cpus))
        return self.nodes[-1]

    def lose(self, node: Any) -> None:
        """A node's processes are gone from one moment to the next."""
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def processes(self, title: str, nodes: Sequence[Any] | None = None) -> list[int]:
        """Ids of the nodes' processes (default: of all) whose title begins so."""
        nodes = [self.cluster.head_node, *self.nodes] if nodes is None else nodes
        raylets = {node.all_processes["raylet"][0].process.pid for node in nodes}
        return sorted(process for process, own in children(raylets).items() if own.startswith(title))

    def kill(self, title: str) -> int:
        """SIGKILL to the first process of that title; how many were there."""
        found = self.processes(title)
        if found:
            os.kill(found[0], signal.SIGKILL)
        return len(found)

    def drain(self, node: Any, seconds: float) -> None:
        """Give notice for a node, as the autoscaler does when a spot instance is about to be taken away."""
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        client = GcsClient(address=self.cluster.address)
        deadline = int((time.time() + seconds) * 1000)
        accepted, why = client.drain_node(
            node.node_id, DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "spot notice", deadline
        )
        assert accepted, why

    @contextmanager
    def driver(self, *arguments: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """`minimind-ray …` on this cluster; killed at the end if it still runs."""
        code = "from minimind_ray.cli.main import run; run()"
        quickly = {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}
        with log.open("ab") as f:
            process = subprocess.Popen(
                [sys.executable, "-c", code, *arguments],
                stdout=f, stderr=f, env={**os.environ, **quickly, "RAY_ADDRESS": self.cluster.address},
            )  # fmt: skip
            try:
                yield process
            finally:
                process.kill()
                process.wait()

    def shutdown(self) -> None:
        """End all nodes."""
        self.cluster.shutdown()


def children(parents: Collection[int]) -> dict[int, str]:
    """The processes that these started, by their ids: command lines, or the titles that Ray gives them."""
    found: dict[int, str] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) in parents:
                found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue  # It has just ended.
    return found


def session_processes(title: str) -> list[int]:
    """Ids of the processes of the tests' shared Ray whose title begins so."""
    return [process for process, own in children(children([os.getpid()])).items() if own.startswith(title)]


def signal_group(process: subprocess.Popen[Any], sent: signal.Signals) -> None:
    """Send a signal to a command's whole process group, as a closed terminal or Ctrl-C does.

    Without private parts of Ray all signals but Ctrl-C's would end Ray's processes, which are in the group. Then the
    command alone gets the signal.
    """
    send = os.killpg if private_parts() or sent == signal.SIGINT else os.kill
    send(process.pid, sent)


@contextmanager
def small_disk(at: Path) -> Iterator[Path]:
    """A file system of 16 MB, made there: a checkpoint of the tiny model has a little over 1."""
    at.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(at)], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


def fill(disk: Path) -> Path:
    """Leave room for less than a checkpoint; the file to delete to make room again."""
    filler = disk / "filler"
    with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as f:
        while True:
            f.write(bytes(4096))
    os.truncate(filler, filler.stat().st_size - 400_000)
    return filler


def wait_for(condition: Callable[[], Any], seconds: float = 120.0, what: str = "") -> Any:
    """Look every two milliseconds until it holds; its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what or condition}"
        time.sleep(0.002)
    return value


def logged(run: Path) -> int:
    """The last step in a run's metrics.jsonl, 0 before the first."""
    return max((line["step"] for line in RunDirectory(run).metrics()), default=0)
