"""`minimind-ray doctor` on this machine, and on a cluster of several nodes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Command


@pytest.mark.slow
def test_the_command_here(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("MINIMIND_STORAGE", str(tmp_path))
    assert f"storage {tmp_path}: written and read on 1 of 1 node(s)" in " ".join(command("doctor").out.split())
    (tmp_path / "file").write_text("")
    outcome = command("doctor", "--storage", tmp_path / "file" / "below")
    assert outcome.code == 1
    assert "cannot use" in outcome.out


@pytest.fixture
def three_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A head as in the cluster files, without CPUs, and two workers; its address, in RAY_ADDRESS too."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "labels": {"minimind/role": "head"}})
    for _ in range(2):
        cluster.add_node(num_cpus=1, labels={"minimind/role": "cpu"})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster.address
    cluster.shutdown()


def doctor(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: the tests' shared Ray may run in this one, and Ray reads its token once."""
    return subprocess.run(
        [sys.executable, "-m", "minimind_ray", "doctor", *map(str, arguments)],
        env=os.environ | {"COLUMNS": "200"} | environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.cluster
def test_the_command_on_a_cluster(three_nodes: str, tmp_path: Path) -> None:
    """Every node answers, its storage is the one that is seen here, and the two workers train together."""
    said = doctor("--storage", tmp_path).stdout
    assert "written and read on 3 of 3 node(s)" in said
    assert said.count(" head ") == 1
    assert said.count(" cpu ") == 2
    assert "does not answer" not in said
    assert "cannot train together" not in said
    assert not list(tmp_path.iterdir())

    # Another token is refused in one sentence.
    other = doctor(RAY_AUTH_TOKEN="t" * 64)
    assert (other.returncode, other.stdout) == (1, "")
    assert other.stderr.startswith(f"error: RAY_ADDRESS={three_nodes}: the cluster does not take this machine's token")
    assert other.stderr.count("\n") == 1
