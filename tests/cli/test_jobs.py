"""Commands for a cluster, as far as they need none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

from minimind_ray.cli import jobs
from minimind_ray.config.errors import UserError
from minimind_ray.data.package import package
from tests.cli.conftest import Command

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


EACH = """
import contextlib, io, json, sys
from minimind_ray.cli.main import run
for arguments in json.loads(sys.stdin.read()):
    sys.argv[1:] = arguments
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        try:
            code = run()
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, said.getvalue()]))
assert "ray" not in sys.modules
"""


def told(directory: Path, *commands: Sequence[str], address: str | None = None) -> list[str]:
    """What each command says as it is refused, one process for all; none of these gets as far as to import Ray."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    if address:
        environment["RAY_ADDRESS"] = address
    done = subprocess.run(
        [sys.executable, "-c", EACH], input=json.dumps(commands), cwd=directory, env=environment, capture_output=True,
        text=True, timeout=60, check=True,
    )  # fmt: skip
    answers: list[str] = []
    for line, arguments in zip(done.stdout.splitlines(), commands, strict=True):
        code, text = json.loads(line)
        assert bool(code) != ("--help" in arguments) and "Traceback" not in text
        answers.append(" ".join(text.split()))
    return answers


def test_what_is_wrong_is_told_before_anything_is_sent(tmp_path: Path) -> None:
    expected = {
        ("tune", "dpo", "--bet", "1"): "--bet",
        ("train", "pretrain", "--set", "optim.lrr=1"): "optim.lrr",
        ("tune", "dpo", "--beta", "0.1,none", "--init-from", "a", "--train", "a"): "dpo.beta",
        ("train", "pretrain", "--config", "/etc/mine.yaml"): "working directory",
        ("run", "../mine.yaml"): "working directory",
        ("run", "zero"): "mine.yaml",
        ("run", "zeroo"): "did you mean zero?",
        (
            "train",
            "sft",
            "--config",
            "sft",
        ): "sft needs a model to start from (--init-from) and training data (--train)",
        ("tune", "--sweep", "dpo", "--init-from", "a", "--train", "a"): "mine.yaml",
        ("recipes",): "leave --cluster out",
        ("data", "prep"): "No such command",
        ("report", "/shared/sweeps/x"): "mine.yaml",
        ("chat", "runs/a"): "leave --cluster out",
        ("export", "runs/a", "there"): "leave --cluster out",
        ("eval", "runs/a", "a.jsonl", "--stage", "sft", "--out", "b"): "--out",
        ("train", "--help"): "Short names",
    }
    assert "leave --ship out" in told(tmp_path, ("--ship", "a", "runs"))[0]
    answers = told(tmp_path, *(("--cluster", "mine.yaml", *arguments) for arguments in expected))
    for arguments, part, answer in zip(expected, expected.values(), answers, strict=True):
        assert part in answer, arguments


def test_results_do_not_come_over_a_run_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "runs" / "pretrain").mkdir(parents=True)
    command = ("train", "pretrain", "--train", "a.jsonl", "--tokenizer", "tokenizer")
    assert "choose another --out" in told(tmp_path, ("--cluster=mine.yaml", *command))[0]
    assert "choose another --out" in told(tmp_path, command, address="http://127.0.0.1:9")[0]


def test_what_is_fetched_of_one_directory_does_not_mix_with_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made: list[str] = []

    def fetch(client: object, out: str, target: Path) -> list[Path]:
        for name in made:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_text(out)
        return [target / name for name in made]

    monkeypatch.setattr("minimind_ray.on_ray.cluster.jobs.fetch", fetch)
    monkeypatch.setattr("minimind_ray.on_ray.cluster.jobs.follow", lambda client, job, write: info)

    def watch(out: str) -> set[str]:
        info.metadata = {"out": out}
        jobs._watch(None, 'a "job"', None)  # pyright: ignore[reportArgumentType]
        return {str(path.relative_to(tmp_path)) for path in (tmp_path / "fetched").rglob("*") if path.is_dir()}

    info = SimpleNamespace(status="SUCCEEDED", metadata={}, message=None)
    made[:] = ["sweep.json", "trials/a/trial.json", "trials/b/trial.json"]
    watch("s3://bucket/one/dpo")
    (tmp_path / "fetched/dpo/notes.txt").write_text("mine")
    made[:] = ["sweep.json", "trials/b/trial.json"]
    assert watch("s3://bucket/one/dpo") == {"fetched/dpo", "fetched/dpo/trials", "fetched/dpo/trials/b"}
    assert (tmp_path / "fetched/dpo/notes.txt").exists()
    assert watch("s3://bucket/one/dpo/") == {"fetched/dpo", "fetched/dpo/trials", "fetched/dpo/trials/b"}
    with pytest.raises(UserError, match="holds the results of s3://bucket/one/dpo/, not of s3://bucket/two/dpo"):
        watch("s3://bucket/two/dpo")
    with pytest.raises(UserError, match="leads out of the working directory"):
        watch("../dpo")


def test_a_failed_jobs_log_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "Job entrypoint command failed with exit code 3, last available logs (truncated to 20,000 chars):\nboom"
    info = SimpleNamespace(status="FAILED", metadata={}, message=message, driver_exit_code=3)
    monkeypatch.setattr("minimind_ray.on_ray.cluster.jobs.follow", lambda client, job, write: info)
    with pytest.raises(typer.Exit) as ended:
        jobs._watch(None, "a-job", None)  # pyright: ignore[reportArgumentType]
    assert ended.value.exit_code == 3
    assert capsys.readouterr().out == "job a-job: FAILED: Job entrypoint command failed with exit code 3\n"


def test_what_is_sent_and_what_stays_is_said(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"{number}.key").touch()
    (tmp_path / "a.jsonl").write_text("{}\n")
    text = jobs._summary(package(tmp_path))
    assert text.endswith("and 2 more; --ship PATH sends such a file")
    assert text.startswith("sending 1 files of this directory, 3 bytes; not sent (secrets): 0.key, 1.key")
    (tmp_path / "out").symlink_to("/")
    text = jobs._summary(package(tmp_path))
    assert text.endswith("and 2 more; not sent (links that lead out of it): out/; --ship PATH sends such a file")


@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_jobs_are_of_some_cluster(tmp_path: Path, address: str | None) -> None:
    for answer in told(tmp_path, ("jobs",), ("logs", "train-1"), ("stop", "train-1"), address=address):
        assert "which cluster?" in answer


def test_a_job_hears_its_stop_though_its_ray_ignores_interrupts(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for name in ("SIGTERM", "SIGINT"):
            monkeypatch.setenv("RAY_JOB_STOP_SIGNAL", name)
            command("--help")
            assert (signal.getsignal(signal.SIGINT) == signal.SIG_IGN) == (name == "SIGTERM")
    finally:
        signal.signal(signal.SIGINT, before)
