"""Several trackers of one run, used as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import minimind_ray
from minimind_ray.config.errors import UserError
from minimind_ray.config.load import load_config
from minimind_ray.config.schema import Config
from minimind_ray.config.trackers import TRACKER_RECORDS, tracker_folders
from minimind_ray.data.package import UNUSED
from minimind_ray.track.registry import TRACKERS, Trackers, send_commands
from minimind_ray.track.tracker import TrackedRun
from minimind_ray.train.bundle import EXCLUDED

pytestmark = pytest.mark.unit


class Fake:
    """Notes what it is told; fails in the method named `failing`."""

    def __init__(self, title: str, failing: str = "") -> None:
        self.title, self.failing, self.stops = title, failing, False
        self.told: list[Any] = []

    def tell(self, method: str, *what: Any) -> None:
        if method == self.failing:
            raise RuntimeError("gone")
        self.told.append(what)

    @property
    def stop_requested(self) -> bool:
        if self.failing == "stop_requested":
            raise RuntimeError("gone")
        return self.stops

    def check(self, config: Config) -> None:
        self.tell("check")

    def open(self, run: TrackedRun) -> Mapping[str, Any] | None:
        self.tell("open")
        return {"id": self.title}

    def log(self, metrics: Mapping[str, Any], samples: Sequence[str]) -> None:
        self.tell("log", metrics["step"])

    def finish(self, state: str, result: Path | None) -> None:
        self.tell("finish", state)

    def send_command(self, directory: Path) -> str | None:
        return f"send {self.title} {directory}"


def trackers_of(monkeypatch: pytest.MonkeyPatch, *fakes: Fake) -> Trackers:
    for fake in fakes:
        monkeypatch.setitem(TRACKERS, fake.title, lambda fake=fake: fake)
    config = load_config("sft")
    track = config.track.model_copy(update={"to": [fake.title for fake in fakes]})
    return Trackers(TrackedRun(config.model_copy(update={"track": track}), {}))


@pytest.mark.parametrize("failing", ["open", "log", "finish", "stop_requested"])
def test_a_tracker_that_fails_silences_no_other(
    failing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, other = Fake("broken", failing), Fake("other")
    trackers = trackers_of(monkeypatch, broken, other)
    for step in (1, 2):
        trackers.log({"step": step}, [])
        assert not trackers.stop_requested
    trackers.finish("finished")
    trackers.finish("failed")  # Both are closed, or left alone, already.
    assert other.told == [(), (1,), (2,), ("finished",)]
    assert capsys.readouterr().err == ("broken cannot be used: gone; the run continues without it\n")
    assert set(trackers.identities) == ({"other"} if failing == "open" else {"broken", "other"})


def test_a_tracker_that_the_config_insists_on_closes_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Insisting(Fake):
        def open(self, run: TrackedRun) -> Mapping[str, Any] | None:
            raise UserError("there is no key")

    other = Fake("other")
    with pytest.raises(UserError, match="there is no key"):
        trackers_of(monkeypatch, other, Insisting("insisting"))
    assert other.told == [(), ("failed",)]


def test_any_tracker_can_ask_for_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Fake("first"), Fake("second")
    trackers = trackers_of(monkeypatch, first, second)
    assert not trackers.stop_requested
    second.stops = True
    assert trackers.stop_requested


def test_what_waits_is_named_by_tracker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(TRACKERS, "other", lambda: Fake("Other"))
    assert send_commands(tmp_path) == {"Other": f"send Other {tmp_path}"}


@pytest.mark.parametrize(
    ("names", "message"),
    [(["wandd"], "there is no tracker wandd; known are: wandb"), (["wandb", "wandb"], "names a tracker twice")],
)
def test_the_config_refuses_names_of_no_tracker(names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config("sft", overrides={"track.to": names})


def test_the_config_knows_the_trackers_there_are() -> None:
    assert set(TRACKER_RECORDS) == set(TRACKERS)
    assert all(name == record.name for name, record in TRACKER_RECORDS.items())


def test_files_of_a_tracker_are_copied_neither_to_a_cluster_nor_from_it() -> None:
    for folder in tracker_folders():
        assert folder in EXCLUDED and f"/{folder}/" in UNUSED


def test_only_the_table_of_trackers_and_track_name_a_tracker() -> None:
    package = Path(minimind_ray.__file__).parent
    quoted = [f'"{name}"' for name in TRACKER_RECORDS]
    files = [path for path in package.rglob("*.py") if path.parent.name != "track"]
    naming = {path.name for path in files if any(name in path.read_text(encoding="utf-8") for name in quoted)}
    # TrackConfig has the default of `track.to`.
    assert naming == {"trackers.py", "schema.py"}
