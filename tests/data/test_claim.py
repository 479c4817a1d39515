"""One writer at a time: who holds a directory, and how a claim ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minimind_ray.config.errors import UserError
from minimind_ray.data import claim
from minimind_ray.data.claim import Writer, claimed, find_writer, live_writer, require_free

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "LINGER_S", 0.02)


HOLD = """
import sys, time
from minimind_ray.data.claim import claimed
with claimed(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(where: str | Path) -> subprocess.Popen[str]:
    """Another process that has claimed a directory."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(where)], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def test_a_lock_names_its_process_and_ends_with_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    other = hold(run)
    try:
        (run / "config.yaml").touch()
        with pytest.raises(UserError, match=f"run is in use by process {other.pid} on .*, since 20.* UTC: wait"):
            require_free(run)
        with pytest.raises(UserError, match=f"process {other.pid} "), claimed(run):
            pass
        assert (writer := live_writer(run)) and writer.process == other.pid and not writer.is_gone()
    finally:
        other.kill()
        other.wait()
    assert live_writer(run) is None and writer.is_gone()
    with claimed(run):
        require_free(run)
        assert (writer := live_writer(run)) and writer.process == os.getpid()
    assert live_writer(run) is None and not (run / "writer.json").exists()


def test_a_directory_that_stays_empty_goes(tmp_path: Path) -> None:
    with pytest.raises(KeyError), claimed(tmp_path / "a" / "run"):
        raise KeyError
    assert not (tmp_path / "a" / "run").exists()


def test_a_sweep_is_claimed_with_its_trials(tmp_path: Path) -> None:
    trial = tmp_path / "sweep" / "trials" / "lr=1"
    trial.mkdir(parents=True)
    (tmp_path / "sweep" / "sweep.json").touch()
    other = hold(trial)
    try:
        for where in (trial, tmp_path / "sweep"):
            with pytest.raises(UserError, match=f"sweep is in use by process {other.pid} "):
                require_free(where)
    finally:
        other.kill()
        other.wait()
    with claimed(tmp_path / "sweep"):
        require_free(trial)
        assert live_writer(trial)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder as an object store, which has no locks; leases are short."""
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "copies"))
    monkeypatch.setattr(claim, "SETTLE_S", 0.02)
    monkeypatch.setattr(claim, "RENEW_S", 0.05)
    monkeypatch.setattr(claim, "LEASE_S", 0.5)
    return f"file://{tmp_path}/bucket"


def write(bucket: str, **facts: object) -> Writer:
    """The lease of a process on another machine."""
    writer = Writer(host="other", process=7, machine="another boot", since="noon").model_copy(update=facts)
    path = Path(bucket.removeprefix("file://")) / "run" / "writer.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(writer.model_dump_json())
    return writer


def test_a_lease_is_renewed_and_given_back(bucket: str) -> None:
    where = f"{bucket}/run"
    with claimed(where):
        first = find_writer(where)
        time.sleep(0.3)
        second = find_writer(where)
        assert first and second and first.until and second.until and second.until > first.until
        assert first.token == second.token
    assert find_writer(where) is None


def test_a_lease_is_refused_until_it_ends_or_its_process_is_known_to_be_gone(bucket: str) -> None:
    where = f"{bucket}/run"
    write(bucket, until=time.time() + 60)
    match = f"process 7 on other, since noon: .* expires at 20.* delete {where}/writer.json"
    with pytest.raises(UserError, match=match), claimed(where):
        pass
    write(bucket, until=time.time() - 1)
    with claimed(where):
        pass
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    write(bucket, until=time.time() + 60, machine=Writer.here().machine, process=ended.pid, started=1)
    with claimed(where):
        pass


def test_a_process_that_proc_does_not_show_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Writer.here()
    assert not own.is_gone() and own.model_copy(update={"started": 1}).is_gone()
    monkeypatch.setattr(claim, "_started", lambda process: None)  # as with hidepid=2
    assert not own.is_gone() and own.model_copy(update={"process": 1 << 40}).is_gone()

    def forbidden(process: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", forbidden)
    assert not own.is_gone()


def test_a_process_that_has_ended_is_gone_before_its_parent_looks() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert Writer.here().model_copy(update={"process": ended.pid, "started": None}).is_gone()
    ended.wait()


def test_whoever_loses_a_lease_ends(
    bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    where = f"{bucket}/run"
    with claimed(where):
        write(bucket, until=time.time() + 60)
        deadline = time.monotonic() + 5
        while not codes and time.monotonic() < deadline:
            time.sleep(0.02)
    assert codes[0] == 1
    assert "this process exits, because process 7 on other" in capsys.readouterr().err


def test_a_file_system_without_locks_has_leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(file: object, kind: int) -> None:
        raise OSError(claim.errno.ENOLCK, "no locks")

    monkeypatch.setattr(claim, "SETTLE_S", 0.02)
    monkeypatch.setattr(claim.fcntl, "flock", none)
    with claimed(tmp_path):
        assert (writer := live_writer(tmp_path)) and writer.until
    assert live_writer(tmp_path) is None
