"""The real `train` command on a Ray of its own: a signal stops it after the step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minimind_ray.config.errors import UserError
from minimind_ray.config.load import to_yaml
from minimind_ray.on_ray.versions import private_parts
from minimind_ray.train.run import GONE, RunDirectory, read_jsonl
from tests.faults import signal_group
from tests.jobs import make_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]

COMMAND = [sys.executable, "-c", "from minimind_ray.cli.main import run; run()", "train", "pretrain", "--config"]


def start(config: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [*COMMAND, str(config), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env=environment,
    )  # fmt: skip


def wait_for_step(run: RunDirectory, step: int, process: subprocess.Popen[str]) -> None:
    while max((line["step"] for line in read_jsonl(run.path / "metrics.jsonl")), default=0) < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


@pytest.mark.long
def test_signals_leave_a_checkpoint_and_a_crash_no_running_run(tmp_path: Path) -> None:
    config = make_config(tmp_path, rows=200, train__epochs=500, eval__every=10**6, checkpoint__every=10**6)
    file, run, done = tmp_path / "config.yaml", RunDirectory(config.out), 0
    file.write_text(to_yaml(config))
    for sent in (signal.SIGTERM, signal.SIGHUP if private_parts() else signal.SIGINT):
        process = start(file, *(["--resume"] if done else []))
        wait_for_step(run, done + 2, process)
        with pytest.raises(UserError, match=f"is in use by process {process.pid} on .*, since "):
            run.check(config, resume=True)
        signal_group(process, sent)
        text, _ = process.communicate(timeout=120)
        info = run.info()
        assert process.returncode == 128 + sent, text
        assert run.state() == "stopped" and info["steps"] >= done + 2, text
        assert run.checkpoints()[-1].name == f"step-{info['steps']:08d}"
        assert text.rstrip().endswith("the same command with --resume") and "***" not in text
        done = info["steps"]
    process = start(file, "--resume")
    wait_for_step(run, done + 1, process)
    assert run.state() == "running"
    process.kill()
    process.communicate(timeout=120)
    assert run.state() == GONE
    steps = [line["step"] for line in run.metrics()]
    assert steps == list(range(1, len(steps) + 1))


def test_a_closed_terminal_stops_a_run(tmp_path: Path) -> None:
    config = make_config(tmp_path, rows=200, train__epochs=500, eval__every=10**6, checkpoint__every=10**6)
    file, run = tmp_path / "config.yaml", RunDirectory(config.out)
    file.write_text(to_yaml(config))
    process, terminal = os.forkpty()
    if process == 0:
        os.execvp(COMMAND[0], [*COMMAND, str(file), "--no-ray"])
    while not (run.path / "metrics.jsonl").exists():
        os.set_blocking(terminal, False)
        try:
            os.read(terminal, 1 << 16)
        except BlockingIOError:
            time.sleep(0.05)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 129
    assert run.state() == "stopped" and run.checkpoints()
