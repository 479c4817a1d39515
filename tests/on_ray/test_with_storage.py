"""Ray runs and a sweep in an object store, by the commands a user gives."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from pyarrow import fs

from minimind_ray.config.errors import UserError
from minimind_ray.data.claim import require_free
from minimind_ray.train.run import GONE, RunDirectory
from tests.jobs import make_tokenizer, rows_of, write_jsonl
from tests.store import Store, names

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    server = Store()
    yield server
    server.close()


@pytest.fixture(scope="module")
def store(server: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[fs.FileSystem]:
    """A bucket with data in it; the environment is that of a node of a cluster whose storage it is."""
    patch = pytest.MonkeyPatch()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cache = str(tmp_path_factory.mktemp("copies"))
    environment = {"MINIMIND_CACHE": cache, "MINIMIND_STORAGE": "s3://bucket", "PATH": path, "WANDB_MODE": "disabled"}
    environment["RAY_USAGE_STATS_ENABLED"] = "0"
    for name, value in (server.environment | environment).items():
        patch.setenv(name, value)
    filesystem = server.open()
    fs.copy_files(str(make_data(tmp_path_factory.mktemp("data"))), "bucket/data", destination_filesystem=filesystem)
    yield filesystem
    patch.undo()


@pytest.fixture
def cluster(store: fs.FileSystem) -> Iterator[str]:
    """The dashboard's address of a cluster whose storage is the bucket."""
    from ray.cluster_utils import Cluster

    # A port of its own: the agent of the tests' shared Ray has the usual one.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = {"num_cpus": 3, "include_dashboard": True, "dashboard_agent_listen_port": port}
    cluster = Cluster(initialize_head=True, head_node_args=arguments)
    yield f"http://{cluster.head_node.webui_url}"
    cluster.shutdown()


def make_data(directory: Path) -> Path:
    write_jsonl(directory / "rows.jsonl", rows_of("pretrain", 300))
    make_tokenizer(directory / "tokenizer")
    return directory


def minimind(*arguments: str, log: Path, address: str | None = None) -> subprocess.Popen[bytes]:
    """A command, in the log's folder; with an address as a job there."""
    command = [sys.executable, "-c", "from minimind_ray.cli.main import run; run()", *arguments]
    return subprocess.Popen(
        command, cwd=log.parent, env=os.environ | ({"RAY_ADDRESS": address} if address else {}),
        stdout=log.open("ab"), stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


DATA = ["--train", "data/rows.jsonl", "--tokenizer", "data/tokenizer"]
SETTINGS = [
    *("--preset", "tiny", "--max-seq-len", "64"),
    *("--pack-tokens", "256", "--batch-tokens", "1024", "--wandb", "off"),
    *("--set", "data.val_fraction=0.1", "--set", "eval.samples=1"),
]


# More than it gets to, however fast the machine.
STEPS = 3000


def content(store: fs.FileSystem, path: str) -> str:
    if store.get_file_info(path).type == fs.FileType.NotFound:
        return ""
    with store.open_input_stream(path) as f:
        return f.read().decode()


@pytest.mark.long
def test_train_is_killed_and_stopped_and_goes_on_though_the_store_fails(
    store: fs.FileSystem, server: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, log = "bucket/runs/x", tmp_path / "log"
    command = ["train", "pretrain", *DATA, *SETTINGS, "--workers", "2", "--out", "runs/x"]
    command += ["--set", "eval.every=20", "--max-steps", str(STEPS)]

    def until_saved(process: subprocess.Popen[bytes], step: int) -> None:
        while f"step-{step:08}/resume/sums.json" not in " ".join(names(store, run)):
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)

    process = minimind(*command, log=log)
    until_saved(process, 20)
    with pytest.raises(UserError, match=f"in use by process {process.pid} .* delete s3://bucket/runs/x/writer.json"):
        require_free("s3://bucket/runs/x")
    assert RunDirectory("s3://bucket/runs/x").state() == "running"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert json.loads(content(store, f"{run}/run.json"))["state"] == "running"
    assert RunDirectory("s3://bucket/runs/x").state() == GONE

    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "another machine"))
    process = minimind(*command, "--resume", log=log)
    until_saved(process, 40)

    def warned() -> bool:
        with suppress(FileNotFoundError):  # Copies go and come as they are made anew.
            copies = list((tmp_path / "another machine").rglob("metrics.jsonl"))
            return any("the object store fails and is tried again" in copy.read_text() for copy in copies)
        return False

    began = time.monotonic()
    while not warned():
        assert process.poll() is None, log.read_text()
        # For a while, and again: where steps wait for their data, no line of theirs can tell of it.
        server.failing = (time.monotonic() - began) % 20 < 15
        time.sleep(0.2)
    server.failing, server.silent = False, True
    time.sleep(2)
    server.silent = False
    process.send_signal(signal.SIGINT)
    assert process.wait(120) in (0, 130), log.read_text()
    info = json.loads(content(store, f"{run}/run.json"))
    assert info["state"] == "stopped" and 40 <= info["steps"] < STEPS, log.read_text()
    there = names(store, run)
    assert not {".stop", "writer.json"} & there and f"{info['result']}/model.safetensors" in there
    assert f"checkpoints/step-{info['steps']:08}/resume/sums.json" in there
    lines = [json.loads(line) for line in content(store, f"{run}/metrics.jsonl").splitlines()]
    assert [line["step"] for line in lines] == list(range(1, info["steps"] + 1))
    assert "the object store fails and is tried again" in " ".join(line.get("warning", "") for line in lines)


@pytest.mark.long
def test_a_sweep_is_a_job_compared_and_its_report_fetched(
    store: fs.FileSystem, cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, log = "bucket/sweeps/lr", tmp_path / "log"
    make_data(tmp_path / "mine")  # Goes with the working directory.
    command = ["tune", "pretrain", *SETTINGS, "--lr", "1e-3,3e-3", "--max-steps", "8", "--out", "sweeps/lr"]
    command += ["--train", "mine/rows.jsonl", "--tokenizer", "mine/tokenizer"]
    assert minimind(*command, log=log, address=cluster).wait(200) == 0, log.read_text()
    there = names(store, sweep)
    assert {"sweep.json", "report.html", "report.png"} <= there
    trials = {name.split("/")[1] for name in there if name.startswith("trials/")}
    assert len(trials) == 2 and not [name for name in there if name.startswith(".")]
    for trial in trials:
        files = {name.removeprefix(f"trials/{trial}/") for name in there}
        assert {"trial.json", "run.json", "config.yaml", "metrics.jsonl", "validation.parquet"} <= files
    assert "train: s3://bucket/shipped/" in content(store, f"{sweep}/trials/{min(trials)}/config.yaml")

    assert "report: sweeps/lr/report.html" in log.read_text()
    fetched = {str(path.relative_to(tmp_path / "sweeps/lr")) for path in (tmp_path / "sweeps/lr").rglob("*")}
    assert "report.html" in fetched and not any(name.endswith(".safetensors") for name in fetched)
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "another machine"))
    winners = []
    for place in (f"s3://{sweep}", "sweeps/lr"):
        out = tmp_path / "comparison"
        out.unlink(missing_ok=True)
        assert minimind("compare", place, "--json", log=out).wait(60) == 0, out.read_text()
        winners.append(json.loads(out.read_text())["winner"])
    assert winners[0] == winners[1] is not None

    again = tmp_path / "again"
    assert minimind(*command[:-4], *DATA, "--out", f"s3://{sweep}", log=again).wait(60) == 1
    assert f"s3://{sweep} already holds a sweep" in again.read_text()
    assert minimind("tune", "--resume", "sweeps/lr", log=again, address=cluster).wait(200) == 0, again.read_text()


@pytest.mark.long
def test_pbt_exchanges_checkpoints_over_the_store(store: fs.FileSystem, tmp_path: Path) -> None:
    sweep, log = "bucket/sweeps/pbt", tmp_path / "log"
    command = ["tune", "pretrain", *DATA, *SETTINGS, "--axis", "optim.lr=1e-5,3e-5,1e-3,3e-3", "--scheduler", "pbt"]
    command += ["--max-steps", "20", "--concurrent", "2", "--out", f"s3://{sweep}", "--set", "eval.every=2"]
    assert minimind(*command, log=log).wait(300) == 0, log.read_text()
    there = names(store, sweep)
    assert any(name.endswith("lineage.jsonl") for name in there), sorted(there)
    for trial in {name.split("/")[1] for name in there if name.startswith("trials/")}:
        info = json.loads(content(store, f"{sweep}/trials/{trial}/run.json"))
        assert info["state"] == "finished"
        assert f"trials/{trial}/{info['result']}/resume/sums.json" in there
