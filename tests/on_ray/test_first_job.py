"""The first job of a cluster whose nodes share a machine, and with it the folder of the job's working directory."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs import make_tokenizer, rows_of, write_jsonl

pytestmark = pytest.mark.cluster


@pytest.fixture
def dashboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The dashboard's address of a head with 1 CPU and a node with 2."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("MINIMIND_STORAGE", str(tmp_path / "storage"))
    # Agents have a port of their own each: the usual one is taken where another Ray runs.
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        ports = [server.getsockname()[1] for server in (one, other)]
    head = {"num_cpus": 1, "include_dashboard": True, "dashboard_agent_listen_port": ports[0]}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=2, dashboard_agent_listen_port=ports[1])
    assert cluster.head_node
    yield f"http://{cluster.head_node.webui_url}"
    cluster.shutdown()


@pytest.mark.long
def test_the_first_job_trains_on_two_nodes_of_one_machine(dashboard: str, tmp_path: Path) -> None:
    work = tmp_path / "work"
    write_jsonl(work / "rows.jsonl", rows_of("pretrain", 100))
    make_tokenizer(work / "tokenizer")
    command = (
        "train pretrain --train rows.jsonl --tokenizer tokenizer --preset tiny --workers 2 --max-steps 2 --wandb off "
        "--max-seq-len 64 --pack-tokens 256 --batch-tokens 1024 --precision float32 --set eval.samples=0 --out runs/a"
    )
    done = subprocess.run(
        [sys.executable, "-m", "minimind_ray", *command.split()],
        cwd=work, env=os.environ | {"RAY_ADDRESS": dashboard}, timeout=300,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert json.loads((tmp_path / "storage/runs/a/run.json").read_text())["state"] == "finished"
