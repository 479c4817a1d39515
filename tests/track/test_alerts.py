"""Alerts of runs and sweeps, as a tracker gets them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from minimind_ray.config.errors import UserError
from minimind_ray.config.load import load_config
from minimind_ray.config.schema import Config
from minimind_ray.config.trackers import ALERTS
from minimind_ray.on_ray.session import Ending
from minimind_ray.sweep.compare import compare
from minimind_ray.sweep.publish import publish
from minimind_ray.sweep.trials import read_sweep
from minimind_ray.track.registry import TRACKERS
from minimind_ray.track.tracker import TrackedRun
from minimind_ray.train.recorder import alert_of_lost_process
from minimind_ray.train.step import NonFiniteError
from tests.sweep.synthetic import make_sweep
from tests.train.test_loop import drive, make_run

pytestmark = pytest.mark.unit


class Alerted:
    """A tracker that keeps the alerts."""

    title, stop_requested = "Alerted", False

    def __init__(self) -> None:
        self.alerts: list[tuple[str, str]] = []

    def check(self, config: Config) -> None: ...

    def open(self, run: TrackedRun) -> Mapping[str, Any] | None:
        return {"id": "1"}

    def log(self, metrics: Mapping[str, Any], samples: Sequence[str]) -> None: ...

    def log_table(self, name: str, records: Sequence[Mapping[str, Any]]) -> None: ...

    def log_page(self, name: str, path: Path) -> None: ...

    def alert(self, title: str, text: str) -> None:
        self.alerts.append((title, text))

    def summarize(self, facts: Mapping[str, Any]) -> None: ...

    def finish(self, state: str, result: Path | None) -> None: ...

    def send_command(self, directory: Path) -> str | None:
        return None


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> Alerted:
    tracker = Alerted()
    monkeypatch.setitem(TRACKERS, "wandb", lambda: tracker)
    return tracker


@pytest.mark.parametrize(
    ("wanted", "kinds"),
    [(False, []), (True, ["not-finite", "failed"]), (["failed"], ["failed"]), (["not-finite"], ["not-finite"])],
)
def test_a_run_that_fails_alerts_the_user_once(
    wanted: bool | list[str], kinds: list[str], tracker: Alerted, tmp_path: Path
) -> None:
    run, directory = make_run(tmp_path, track__alerts=wanted)
    with pytest.raises(UserError, match="step 1: the loss is nan"), run:
        drive(run, [NonFiniteError(0, float("nan"), 1.0)])
    run, directory = make_run(tmp_path, track__alerts=wanted, out=str(tmp_path / "other"))
    with pytest.raises(ZeroDivisionError), run:
        raise ZeroDivisionError
    assert [title for title, _ in tracker.alerts] == [ALERTS[kind] for kind in kinds]
    texts = {"not-finite": f"{tmp_path}/run-pretrain: step 1: the loss is nan", "failed": "other: ZeroDivisionError"}
    assert all(texts[kind] in text for kind, (_, text) in zip(kinds, tracker.alerts, strict=True))


def test_a_run_that_is_interrupted_alerts_nobody(tracker: Alerted, tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, track__alerts=True)
    with pytest.raises(KeyboardInterrupt), run:
        raise KeyboardInterrupt
    assert tracker.alerts == []


@pytest.mark.parametrize(("wanted", "count"), [(True, 1), (["not-finite"], 0)])
def test_a_run_whose_process_is_lost_alerts_the_user(
    wanted: bool | list[str], count: int, tracker: Alerted, tmp_path: Path
) -> None:
    run, directory = make_run(tmp_path, track__alerts=wanted)
    with run:
        pass
    alert_of_lost_process(directory, run.config, "a machine ran out of memory")
    assert tracker.alerts == [(ALERTS["failed"], f"{directory.where}: a machine ran out of memory")] * count


@pytest.mark.parametrize(
    ("ending", "kind", "said"),
    [
        ("by itself", "sweep-finished", "trials: 6 finished. Winner: "),
        ("out of time", "budget", "Best so far: "),
        ("interrupted", None, ""),
        (None, None, ""),
    ],
)
def test_the_end_of_a_sweep_alerts_the_user(
    ending: Ending | None, kind: str | None, said: str, tracker: Alerted, tmp_path: Path
) -> None:
    path = make_sweep(tmp_path / "betas", axes={"dpo.beta": "0.1,0.2"}, seeds=3, steps=10, examples=40)
    content = json.loads((path / "sweep.json").read_text())
    content["config"]["track"]["alerts"] = True
    (path / "sweep.json").write_text(json.dumps(content))
    sweep = read_sweep(path)
    publish(sweep, compare([sweep]), ending=ending)
    if kind is None:
        assert tracker.alerts == []
        return
    [(title, text)] = tracker.alerts
    assert title == ALERTS[kind] and text.startswith(f"{path}: ") and said in text  # pyright: ignore[reportArgumentType]
    assert ("tune --resume" in text) == (kind == "budget")


@pytest.mark.parametrize("alerts", ["failed", ["fails"], ["failed", {"budget": 1}], None])
def test_an_unknown_kind_of_alert_is_refused(alerts: Any) -> None:
    with pytest.raises(UserError, match="track.alerts: write true, false, or a list of failed, not-finite, "):
        load_config("sft", overrides={"track.alerts": alerts})


def test_titles_of_alerts_keep_to_the_limit_of_w_and_b() -> None:
    assert all(len(title) < 64 for title in ALERTS.values())
