"""The report of a running sweep, and what the trackers get of it while it runs."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from minimind_ray.config.errors import UserError
from minimind_ray.sweep import live
from minimind_ray.sweep.live import LiveReport
from minimind_ray.sweep.publish import SweepRun
from minimind_ray.track.registry import TRACKERS
from minimind_ray.track.tracker import TrackedRun
from tests.sweep.synthetic import make_sweep

pytestmark = [pytest.mark.unit, pytest.mark.slow]
BETAS = {"dpo.beta": "0.1,0.3"}


class Recorder:
    """A tracker that keeps what it is sent, or fails at each table."""

    title = "a recorder"
    stop_requested = False
    sent = list[Any]()
    fails = False

    def open(self, run: TrackedRun) -> dict[str, str]:
        self.sent.append((run.job_type, run.info.get("wandb")))
        return {"id": "1"}

    def log_table(self, name: str, records: Sequence[Any]) -> None:
        if self.fails:
            raise RuntimeError("no room")
        self.sent.append((name, len(records)))

    def summarize(self, facts: dict[str, Any]) -> None:
        self.sent.append(("facts", facts))

    def log_page(self, name: str, path: Path) -> None:
        self.sent.append((name, path.read_text(encoding="utf-8")))

    def finish(self, state: str, result: Path | None) -> None:
        self.sent.append(("finish", state))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the only tracker is sent."""
    monkeypatch.setattr(Recorder, "sent", [])
    monkeypatch.setattr(Recorder, "fails", False)
    monkeypatch.setitem(TRACKERS, "wandb", Recorder)
    return Recorder.sent


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_validation_rewrites_the_page_and_an_end_is_sent(
    tmp_path: Path, sent: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_sweep(tmp_path / "betas", axes=BETAS, seeds=1, steps=10, examples=40, running=1)
    with LiveReport(path) as report:
        report.watch("started")
        report.watch("validated")
        wait_for(path / "report.html")
    assert "script" not in (path / "report.html").read_text(encoding="utf-8")
    assert not (path / "report.png").exists() and sent == []

    report = LiveReport(path)
    report.watch("ended")
    report.update()
    report.update()
    assert [kind for kind, _ in sent] == ["sweep", "points", "answers", "facts"]
    monkeypatch.setattr(live, "PAGE_EVERY_S", 0.0)
    report.watch("ended")
    report.update()
    assert [kind for kind, _ in sent[4:]] == ["points", "answers", "facts", "report"]
    by_kind = dict(sent)
    assert by_kind["points"] == 2 and by_kind["report"] == (path / "report.html").read_text(encoding="utf-8")
    facts = by_kind["facts"]
    assert facts["winner"] in facts["checkpoint"] and not {"points", "importance", "answers", "margin"} & set(facts)
    states = {name: value for name, value in facts["trials"].items() if name not in ("tokens", "seconds")}
    assert states == {"all": 2, "finished": 1, "stopped": 1} and facts["trials"]["tokens"] > 0
    assert json.loads((path / "sweep.json").read_text())["wandb"] == {"id": "1"}


def test_no_failure_reaches_the_sweep(
    tmp_path: Path, sent: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_sweep(tmp_path / "betas", axes=BETAS, seeds=1, steps=10, examples=40)
    monkeypatch.setattr(Recorder, "fails", True)
    report = LiveReport(path)
    report.watch("ended")
    report.update()
    assert "a recorder cannot be used: no room" in capsys.readouterr().err
    assert [kind for kind, _ in sent] == ["sweep"]

    def fails(*given: object) -> None:
        raise UserError("the store fails")

    uncaught: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", uncaught.append)
    monkeypatch.setattr(SweepRun, "finish", fails)
    report = LiveReport(path)
    report.watch("ended")
    report.update()
    with report:
        pass
    assert report.tracked and uncaught == []
    capsys.readouterr()

    (path / "sweep.json").rename(tmp_path / "away")
    with LiveReport(path) as report:  # As before the first trial, or in the midst of a write.
        report.watch("ended")
    assert capsys.readouterr().err == ""
    (tmp_path / "away").rename(path / "sweep.json")
    monkeypatch.setattr(live, "compare", lambda sweeps: 1 / 0)
    with LiveReport(path) as report:
        report.watch("ended")
        report.thread.join()
    assert "not updated any more while the sweep runs: ZeroDivisionError" in capsys.readouterr().err


def test_the_sweeps_own_run_is_closed_with_the_sweeps_state(tmp_path: Path, sent: list[Any]) -> None:
    path = make_sweep(tmp_path / "betas", axes=BETAS, seeds=1, steps=10, examples=40)
    sweep = live.read_sweep(path)
    run = SweepRun(sweep, path, 1.0)
    run.finish("stopped")
    assert sent == [("sweep", None), ("finish", "stopped")]
    SweepRun(sweep, path, 1.0)
    assert sent[-1] == ("sweep", {"id": "1"})
