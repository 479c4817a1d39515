"""The table of all trackers by name, and `Trackers`, which passes a run's records to each of its trackers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import Config
from minimind_ray.config.trackers import ALERTS, AlertKind
from minimind_ray.track.swanlab import SwanlabTracker
from minimind_ray.track.tensorboard import TensorboardTracker
from minimind_ray.track.tracker import SweepView, TrackedRun, Tracker
from minimind_ray.track.wandb import WandbTracker

TRACKERS: dict[str, Callable[[], Tracker]] = {
    "wandb": WandbTracker,
    "swanlab": SwanlabTracker,
    "tensorboard": TensorboardTracker,
}
"""The implementations of the trackers in `TRACKER_RECORDS` (config/trackers.py), by name."""


class Trackers:
    """The trackers that a run's `track.to` names.

    If a tracker fails, a message on stderr says so and the tracker is not used again. The run and the other trackers
    continue. `identities` holds, by tracker name, the entries to store in run.json for a resume.

    Raises:
        UserError: the config requires a tracker that cannot be used.
    """

    def __init__(self, run: TrackedRun) -> None:
        self.config = run.config
        self.trackers: dict[str, Tracker] = {}
        self.identities: dict[str, Mapping[str, Any]] = {}
        try:
            for name in run.config.track.to:
                self._open(name, run)
        except BaseException:
            self.finish("failed")
            raise

    def _open(self, name: str, run: TrackedRun) -> None:
        tracker = TRACKERS[name]()
        try:
            identity = tracker.open(run)
        except UserError:
            raise
        except Exception as error:
            _print_failure(tracker, error)
            return
        if identity is not None:
            self.trackers[name] = tracker
            self.identities[name] = identity

    @property
    def stop_requested(self) -> bool:
        """Whether a user asked one of the trackers to stop the run."""
        answers: list[bool] = []
        self._each(lambda tracker: answers.append(tracker.stop_requested))
        return any(answers)

    def log(self, metrics: Mapping[str, Any], samples: Sequence[str]) -> None:
        """Send one line of metrics.jsonl, and the sample texts of the same step, to all trackers."""
        self._each(lambda tracker: tracker.log(metrics, samples))

    def log_table(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Send a table to all trackers; see `Tracker.log_table`. A table without records is not sent."""
        if records:
            self._each(lambda tracker: tracker.log_table(name, records))

    def log_page(self, name: str, path: Path) -> None:
        """Send an HTML page to all trackers; see `Tracker.log_page`."""
        self._each(lambda tracker: tracker.log_page(name, path))

    def alert(self, kind: AlertKind, text: str) -> None:
        """Send an alert to all trackers if the config asks for alerts of this kind; see `Tracker.alert`."""
        if self.config.track.alerts_of(kind):
            self._each(lambda tracker: tracker.alert(ALERTS[kind], text))

    def summarize(self, facts: Mapping[str, Any]) -> None:
        """Add facts to the run's summary in all trackers."""
        self._each(lambda tracker: tracker.summarize(facts))

    def save_view(self, view: SweepView) -> dict[str, str]:
        """Save a view of a sweep's runs in all trackers that can; see `Tracker.save_view`. Returns URLs by title.

        The URL becomes the `view` of the tracker's entry in `identities`. If a view cannot be saved, a message on
        stderr says so.
        """
        urls: dict[str, str] = {}
        for name, tracker in self.trackers.items():
            try:
                url = tracker.save_view(view)
            except Exception as error:
                print(f"{tracker.title}: the view of the sweep was not saved: {_one_line(error)}", file=sys.stderr)
                continue
            if url:
                urls[tracker.title] = url
                self.identities[name] = {**self.identities[name], "view": url}
        return urls

    def finish(self, state: str, result: Path | None = None) -> None:
        """Close all trackers that are still open, with the run's `state` and result."""
        self._each(lambda tracker: tracker.finish(state, result))
        self.trackers = {}

    def _each(self, work: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.trackers.items()):
            try:
                work(tracker)
            except Exception as error:
                del self.trackers[name]
                _print_failure(tracker, error)


def check_trackers(config: Config) -> None:
    """Check, before a run is created, that it can be tracked as `config` asks. Raises UserError if it cannot."""
    for name in config.track.to:
        TRACKERS[name]().check(config)


def send_commands(directory: str | Path) -> dict[str, str]:
    """Return, by tracker's title, the commands that send the unsent records of a run or a sweep in `directory`."""
    trackers = [make() for make in TRACKERS.values()]
    commands = {tracker.title: tracker.send_command(Path(directory)) for tracker in trackers}
    return {title: command for title, command in commands.items() if command}


def _print_failure(tracker: Tracker, error: Exception) -> None:
    print(f"{tracker.title} cannot be used: {_one_line(error)}; the run continues without it", file=sys.stderr)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
