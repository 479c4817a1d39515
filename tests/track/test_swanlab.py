"""What SwanLab gets: read back from the files written offline, and from what a server on loopback was sent."""

from __future__ import annotations

import getpass
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from swanlab.proto.swanlab.record.v1.record_pb2 import Record
from swanlab.sdk.internal.core_python.store import DataStoreReader

from minimind_ray.config.errors import UserError
from minimind_ray.config.load import load_config
from minimind_ray.config.schema import Config
from minimind_ray.track.registry import Trackers, check_trackers
from minimind_ray.track.swanlab import SwanlabTracker
from minimind_ray.track.tracker import TrackedRun
from tests.track.runs import line
from tests.track.swanlab_endpoint import SwanlabEndpoint

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key, no settings of this machine's user, no proxy."""
    for name in [name for name in os.environ if name.startswith("SWANLAB_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    monkeypatch.chdir(tmp_path)  # SwanLab reads settings in the working directory, too.


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., SwanlabEndpoint]]:
    """Makes new processes talk to a new server with a key."""
    servers: list[SwanlabEndpoint] = []

    def begin(refuses: bool = False) -> SwanlabEndpoint:
        servers.append(SwanlabEndpoint(refuses))
        monkeypatch.setenv("SWANLAB_API_HOST", servers[-1].url)
        monkeypatch.setenv("SWANLAB_API_KEY", "k" * 21)
        return servers[-1]

    yield begin
    for server in servers:
        server.close()


def config_of(out: Path, mode: str = "offline", **track: Any) -> Config:
    keys = {f"track.{key}": value for key, value in {"to": ["swanlab"], "swanlab": mode, **track}.items()}
    return load_config("sft", overrides={"out": str(out), "optim.lr": 1e-4, **keys})


def start(
    out: Path,
    mode: str = "offline",
    info: dict[str, Any] | None = None,
    lines: Sequence[dict[str, Any]] = (),
    samples: dict[int, list[str]] | None = None,
    **track: Any,
) -> tuple[SwanlabTracker, dict[str, Any]]:
    """A tracker of a run in `out`, begun or, with an identity in `info`, continued after `lines`; and its identity."""
    out.mkdir(exist_ok=True)
    tracker, texts = SwanlabTracker(), samples or {}
    run = TrackedRun(config_of(out, mode, **track), info or {}, lambda: [(x, texts.get(x["step"], [])) for x in lines])
    identity = tracker.open(run)
    assert identity
    return tracker, {"swanlab": identity}


def records(out: Path) -> list[Any]:
    """All that SwanLab has written offline for a run, by its own reader."""
    [file] = out.glob("swanlab/offline-*/run-*.swanlab")
    reader = DataStoreReader()
    reader.open(file)
    return [Record.FromString(data) for data in reader]


def curve(out: Path, key: str) -> list[tuple[int, float]]:
    found = [record.scalar for record in records(out) if record.HasField("scalar")]
    return [(scalar.step, scalar.value.number) for scalar in found if scalar.key == key]


def texts(out: Path) -> set[str]:
    return {file.read_text(encoding="utf-8") for file in out.glob("swanlab/*/media/text/*")}


def sync(directory: Path) -> None:
    """Run the command that a user is given."""
    command = SwanlabTracker().send_command(directory)
    assert command
    command = command.replace("swanlab sync", f"{sys.executable} -m swanlab sync")
    subprocess.run(command, shell=True, check=True, timeout=60, cwd=directory, capture_output=True)


def test_an_offline_run_holds_config_metrics_samples_and_tables(
    online: Callable[..., SwanlabEndpoint], tmp_path: Path
) -> None:
    server, out, page = online(), tmp_path / "a run", tmp_path / "report"
    page.write_text("<html>春风</html>", encoding="utf-8")
    tracker, info = start(out, group="a sweep", tags=["x"], project="p")
    tracker.log(line(1, warning="too short"))
    tracker.log(line(2, **{"val/loss": 1.5, "val/perplexity": 4.5}), ["春风", "a fox"])
    tracker.log_table("points", [{"key": "a", "share": 0.5}, {"key": "b", "share": None}])
    tracker.log_page("report", page)
    tracker.summarize({"point": {"verdict": "best"}})
    tracker.finish("finished")
    begun = records(out)[0].start
    assert (begun.project, begun.group, begun.job_type, begun.name, list(begun.tags)) == (
        "p", "a sweep", "sft", "a run", ["x"],
    )  # fmt: skip
    assert (info["swanlab"]["mode"], info["swanlab"]["id"]) == ("offline", begun.id)
    assert curve(out, "loss") == [(1, 1.0), (2, 0.5)] and curve(out, "timing/mfu") == [(1, 0.5), (2, 0.5)]
    assert texts(out) == {"too short", "春风", "a fox"}
    assert {record.media.key: record.media.step for record in records(out) if record.HasField("media")} == {
        "warning": 1, "samples": 2, "points": 3, "report": 4,
    }  # fmt: skip
    [html] = out.glob("swanlab/*/media/html/*")
    assert html.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")
    [file] = out.glob("swanlab/*/files/config.yaml")
    config = {key: entry["value"] for key, entry in yaml.safe_load(file.read_text(encoding="utf-8")).items()}
    assert (config["optim"]["lr"], config["best/loss"], config["best/step"]) == (1e-4, 1.5, 2)
    assert (config["state"], config["point/verdict"]) == ("finished", "best")
    assert server.requests == []


@pytest.mark.long
def test_a_resumed_offline_run_has_each_step_once_and_is_sent_whole(
    online: Callable[..., SwanlabEndpoint], tmp_path: Path
) -> None:
    """After a kill: the steps after the checkpoint are dropped. The command may be used twice."""
    tracker, info = start(tmp_path / "run")
    for step in range(1, 7):
        tracker.log(line(step), ["old"] if step == 4 else [])
    tracker.process.kill()
    tracker, again = start(tmp_path / "run", "offline", info, [line(step) for step in range(1, 5)], {4: ["春风"]})
    assert again == info
    for step in range(5, 9):
        tracker.log(line(step))
    tracker.finish("finished")
    assert curve(tmp_path / "run", "loss") == [(step, 1 / step) for step in range(1, 9)]
    assert texts(tmp_path / "run") == {"春风"}

    server = online()
    for _ in range(2):
        sync(tmp_path / "run")
    [(name, run)] = server.runs.items()
    assert name == info["swanlab"]["id"]
    assert run.steps("loss") == list(range(1, 9))
    assert run.config["optim"]["lr"] == 1e-4 and run.states[-1] == "FINISHED"
    assert server.uploads == ["春风"]


def test_online_and_resumed_over_the_wire(online: Callable[..., SwanlabEndpoint], tmp_path: Path) -> None:
    server = online()
    tracker, info = start(tmp_path / "run", "auto", group="g")
    assert info["swanlab"]["mode"] == "online" and info["swanlab"]["url"].startswith(server.url)
    for step in range(1, 7):
        tracker.log(line(step), ["春风"] if step == 3 else [])
    tracker.finish("stopped")
    tracker, _ = start(tmp_path / "run", "online", info, [line(step) for step in range(1, 5)], group="g")
    for step in range(5, 9):
        tracker.log(line(step))
    tracker.finish("failed")

    [(name, run)] = server.runs.items()
    assert name == info["swanlab"]["id"]
    assert run.steps("loss") == run.steps("timing/mfu") == list(range(1, 9))
    assert {(given["cluster"], given["job"]) for given in run.creations} == {("g", "sft")}
    assert (run.config["optim"]["lr"], run.config["state"], run.states) == (1e-4, "failed", ["ABORTED", "CRASHED"])
    assert server.uploads == ["春风"]
    assert tracker.send_command(tmp_path) is None
    # Nothing but the run: nothing that tells the machine or its user.
    sent = "".join(f"{headers}{body}" for _, headers, body in server.requests)
    for private in (socket.gethostname(), getpass.getuser(), sys.executable):
        assert not re.search(rf"(?<![\w/+=]){re.escape(private)}(?![\w/+=])", sent)


@pytest.mark.long
def test_the_tables_of_a_sweep_are_sent_again(online: Callable[..., SwanlabEndpoint], tmp_path: Path) -> None:
    """A sweep that goes on, or a second `publish`, opens the sweep's run once more and sends new tables."""
    server = online()
    info: dict[str, Any] = {}
    for value in (1, 2):
        tracker, info = start(tmp_path / "sweep", "online", info)
        for part in (0, 1):
            tracker.log_table("points", [{"value": value + part}])
        tracker.finish("stopped")
    [run] = server.runs.values()
    assert [(item["key"], int(item["index"])) for item in run.media] == [("points", step) for step in (1, 2, 3, 4)]


def test_runs_in_one_process_stay_apart(tmp_path: Path) -> None:
    """As fused trials are. Each has a process, and this process keeps its handling of exceptions."""
    hook, runs = sys.excepthook, [start(tmp_path / name)[0] for name in "ab"]
    for step in range(1, 4):
        for k, tracker in enumerate(runs):
            tracker.log({"step": step, "tokens": 1, "loss": float(k)})
    for tracker in runs:
        tracker.finish("finished")
    assert [curve(tmp_path / name, "loss") for name in "ab"] == [[(s, k) for s in range(1, 4)] for k in (0.0, 1.0)]
    assert sys.excepthook is hook
    command = SwanlabTracker().send_command(tmp_path)
    assert command == f'for run in {tmp_path}/*/swanlab/offline-*; do swanlab sync --id "${{run##*-}}" "$run"; done'


def test_without_a_key_or_a_server(
    online: Callable[..., SwanlabEndpoint],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Never a prompt. Auto is offline; online is an error before the run is made."""
    with pytest.raises(UserError, match="track.swanlab is online, but there is no key: run `swanlab login`"):
        check_trackers(config_of(tmp_path, "online"))
    tracker, info = start(tmp_path / "auto", "auto")
    tracker.finish("finished")
    assert info["swanlab"]["mode"] == "offline"
    assert capfd.readouterr() == ("", "")
    online(refuses=True)
    with pytest.raises(UserError, match=r"track\.swanlab is online, but SwanLab cannot be used: .*API key"):
        start(tmp_path / "online", "online")
    tracker, info = start(tmp_path / "refused", "auto")
    tracker.finish("finished")
    assert info["swanlab"]["mode"] == "offline" and "logging offline" in capfd.readouterr().err
    monkeypatch.setenv("SWANLAB_MODE", "disabled")
    assert SwanlabTracker().open(TrackedRun(config_of(tmp_path / "off", "auto"), {})) is None


def test_a_process_that_fails_says_why_and_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trackers = Trackers(TrackedRun(config_of(tmp_path), {}))
    [tracker] = trackers.trackers.values()
    assert isinstance(tracker, SwanlabTracker)
    trackers.log_page("report", tmp_path / "nowhere.html")
    with pytest.raises(RuntimeError, match="HTML file not found"):
        tracker.process.answer(10)
    tracker.process.kill()
    for step in (1, 2):
        trackers.log(line(step), [])
    trackers.finish("finished")
    assert capsys.readouterr().err == "SwanLab cannot be used: its process has ended; the run continues without it\n"


def test_swanlab_that_is_not_installed_is_the_users_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("minimind_ray.track.tracker.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"swanlab, which is not installed: pip install 'minimind-ray\[swanlab\]'"):
        check_trackers(config_of(tmp_path))
