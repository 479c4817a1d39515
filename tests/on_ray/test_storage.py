"""Ray runs and a sweep in an object store, by the commands a user gives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import fs

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
    """A bucket; the environment is that of a user of it."""
    patch = pytest.MonkeyPatch()
    cache = str(tmp_path_factory.mktemp("copies"))
    for name, value in {**server.environment, "MINIMIND_CACHE": cache, "WANDB_MODE": "disabled"}.items():
        patch.setenv(name, value)
    yield server.open()
    patch.undo()


def minimind(*arguments: str, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from minimind_ray.cli.main import run; run()", *arguments]
    return subprocess.Popen(command, stdout=log.open("ab"), stderr=subprocess.STDOUT, start_new_session=True)


def settings(directory: Path) -> list[str]:
    rows = write_jsonl(directory / "rows.jsonl", rows_of("pretrain", 300))
    tokenizer = make_tokenizer(directory / "tokenizer")
    sets = {"data.pack_tokens": 256, "data.val_fraction": 0.1, "eval.samples": 1, "data.cache_dir": directory / "cache"}
    flags = ["--train", str(rows), "--tokenizer", str(tokenizer), "--preset", "tiny", "--max-seq-len", "64",
             "--batch-tokens", "1024", "--wandb", "off"]  # fmt: skip
    return [*flags, *(part for key, value in sets.items() for part in ("--set", f"{key}={value}"))]


def content(store: fs.FileSystem, path: str) -> str:
    if store.get_file_info(path).type == fs.FileType.NotFound:
        return ""
    with store.open_input_stream(path) as f:
        return f.read().decode()


def test_train_is_stopped_and_goes_on_though_the_store_fails(
    store: fs.FileSystem, server: Store, tmp_path: Path
) -> None:
    run, log = "bucket/runs/x", tmp_path / "log"
    common = ["train", "pretrain", *settings(tmp_path), "--workers", "2", "--out", f"s3://{run}"]
    common += ["--set", "eval.every=50", "--max-steps", "1000"]
    process = minimind(*common, log=log)
    while "step-00000050/resume/sums.json" not in " ".join(names(store, run)):
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) in (0, 130), log.read_text()
    info = json.loads(content(store, f"{run}/run.json"))
    assert info["state"] == "stopped" and info["steps"] >= 50, log.read_text()
    assert ".stop" not in names(store, run)
    process = minimind(*common, "--resume", log=log)
    at = info["steps"] // 50 * 50 + 100
    while f"step-{at:08d}/resume/sums.json" not in " ".join(names(store, run)):
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)
    server.silent = True
    time.sleep(5)
    server.failing, server.silent = True, False
    time.sleep(10)
    server.failing = False
    assert process.wait(200) == 0, log.read_text()
    info = json.loads(content(store, f"{run}/run.json"))
    assert info["state"] == "finished" and f"{info['result']}/model.safetensors" in names(store, run)
    lines = [json.loads(line) for line in content(store, f"{run}/metrics.jsonl").splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 1001))
    assert "the object store fails and is tried again" in " ".join(line.get("warning", "") for line in lines)
    assert f"model: s3://{run}/{info['result']}" in log.read_text()


def test_a_sweep_is_compared_and_reported(store: fs.FileSystem, tmp_path: Path) -> None:
    sweep, log = "bucket/sweeps/lr", tmp_path / "log"
    command = [
        "tune",
        "pretrain",
        *settings(tmp_path),
        "--lr",
        "1e-3,3e-3",
        "--max-steps",
        "8",
        "--out",
        f"s3://{sweep}",
    ]
    assert minimind(*command, log=log).wait(200) == 0, log.read_text()
    there = names(store, sweep)
    assert {"sweep.json", "report.html", "report.png"} <= there
    trials = {name.split("/")[1] for name in there if name.startswith("trials/")}
    assert len(trials) == 2 and not [name for name in there if name.startswith(".")]
    for trial in trials:
        files = {name.removeprefix(f"trials/{trial}/") for name in there}
        assert {"trial.json", "run.json", "config.yaml", "metrics.jsonl", "validation.parquet"} <= files
    os.environ["MINIMIND_CACHE"] = str(tmp_path / "another machine")
    again = tmp_path / "again"
    assert minimind("compare", f"s3://{sweep}", "--json", log=again).wait(60) == 0, again.read_text()
    comparison = json.loads(again.read_text())
    winner = comparison["winner"]
    assert minimind(*command, log=again).wait(60) == 1
    assert f"s3://{sweep} already holds a sweep" in again.read_text(), winner
    resumed = tmp_path / "resumed"
    assert minimind("tune", "--resume", f"s3://{sweep}", log=resumed).wait(200) == 0, resumed.read_text()


def test_pbt_exchanges_checkpoints_over_the_store(store: fs.FileSystem, tmp_path: Path) -> None:
    sweep, log = "bucket/sweeps/pbt", tmp_path / "log"
    command = ["tune", "pretrain", *settings(tmp_path), "--axis", "optim.lr=1e-5,3e-5,1e-3,3e-3", "--scheduler", "pbt"]
    command += ["--max-steps", "40", "--concurrent", "2", "--out", f"s3://{sweep}", "--set", "eval.every=4"]
    assert minimind(*command, log=log).wait(300) == 0, log.read_text()
    there = names(store, sweep)
    assert any(name.endswith("lineage.jsonl") for name in there), sorted(there)
    for trial in {name.split("/")[1] for name in there if name.startswith("trials/")}:
        info = json.loads(content(store, f"{sweep}/trials/{trial}/run.json"))
        assert info["state"] == "finished"
        assert f"trials/{trial}/{info['result']}/resume/sums.json" in there
