"""Commands for a cluster, as far as they need none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Command

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


def told(directory: Path, *arguments: str, address: str | None = None) -> str:
    """What a command that is refused says; none of these gets as far as to import Ray."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    if address:
        environment["RAY_ADDRESS"] = address
    command = "import sys; from minimind_ray.cli.main import run; run(); assert 'ray' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", command, *arguments], cwd=directory, env=environment, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert done.returncode or "--help" in arguments
    return " ".join((done.stdout + done.stderr).split())


def test_what_is_wrong_is_told_before_anything_is_sent(tmp_path: Path) -> None:
    sent = ("--cluster", "mine.yaml")
    assert "--bet" in told(tmp_path, *sent, "tune", "dpo", "--bet", "1")
    assert "optim.lrr" in told(tmp_path, *sent, "train", "pretrain", "--set", "optim.lrr=1")
    assert "dpo.beta" in told(tmp_path, *sent, "tune", "dpo", "--beta", "0.1,none", "--init-from", "a", "--train", "a")
    assert "working directory" in told(tmp_path, *sent, "train", "pretrain", "--config", "/etc/mine.yaml")
    assert "working directory" in told(tmp_path, *sent, "run", "../mine.yaml")
    assert "No such command" in told(tmp_path, *sent, "data", "prep")
    assert "leave --cluster out" in told(tmp_path, *sent, "chat", "runs/a")
    assert "leave --cluster out" in told(tmp_path, *sent, "export", "runs/a", "there")
    assert "--out" in told(tmp_path, *sent, "eval", "runs/a", "a.jsonl", "--stage", "sft", "--out", "b")
    assert "Short names" in told(tmp_path, *sent, "train", "--help")


def test_results_do_not_come_over_a_run_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "runs" / "pretrain").mkdir(parents=True)
    command = ("train", "pretrain", "--train", "a.jsonl", "--tokenizer", "tokenizer")
    assert "choose another --out" in told(tmp_path, "--cluster=mine.yaml", *command)
    assert "choose another --out" in told(tmp_path, *command, address="http://127.0.0.1:9")


@pytest.mark.parametrize("command", [("jobs",), ("logs", "train-1"), ("stop", "train-1")])
def test_jobs_are_of_some_cluster(tmp_path: Path, command: tuple[str, ...]) -> None:
    assert "which cluster?" in told(tmp_path, *command)
    assert "which cluster?" in told(tmp_path, *command, address="10.0.0.1:6379")


def test_a_job_hears_its_stop_though_its_ray_ignores_interrupts(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for name, handler in {"SIGTERM": signal.SIG_IGN, "SIGINT": signal.default_int_handler}.items():
            monkeypatch.setenv("RAY_JOB_STOP_SIGNAL", name)
            command("--help")
            assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, before)
