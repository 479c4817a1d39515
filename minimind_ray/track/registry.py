"""The trackers by name, and those of one run used as one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import Config
from minimind_ray.track.tracker import TrackedRun, Tracker
from minimind_ray.track.wandb import WandbTracker

TRACKERS: dict[str, Callable[[], Tracker]] = {"wandb": WandbTracker}
"""What `track.to` can name. A tracker's files in a run directory lie in a folder of its name."""


class Trackers:
    """The trackers that a run's `track.to` names.

    A tracker that fails is named on stderr once and then left alone; the run and the other trackers go on.
    `identities` is what run.json remembers of each, by name.

    Raises:
        UserError: the config insists on a tracker that cannot be used.
    """

    def __init__(self, run: TrackedRun) -> None:
        self.trackers: list[Tracker] = []
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
            _say_failed(tracker, error)
            return
        if identity is not None:
            self.trackers.append(tracker)
            self.identities[name] = identity

    @property
    def stop_requested(self) -> bool:
        """Whether somebody asked for a stop of the run in one of the trackers."""
        return any(tracker.stop_requested for tracker in self.trackers)

    def log(self, metrics: Mapping[str, Any], samples: Sequence[str]) -> None:
        """Give all trackers one line of metrics.jsonl, and the texts that the model wrote after the same step."""
        self._each(lambda tracker: tracker.log(metrics, samples))

    def finish(self, state: str, result: Path | None = None) -> None:
        """Close all trackers that are still open, with the run's `state` and result."""
        self._each(lambda tracker: tracker.finish(state, result))
        self.trackers = []

    def _each(self, work: Callable[[Tracker], None]) -> None:
        for tracker in list(self.trackers):
            try:
                work(tracker)
            except Exception as error:
                self.trackers.remove(tracker)
                _say_failed(tracker, error)


def check_trackers(config: Config) -> None:
    """Check, before a run is made, that it can be tracked as `config` asks. Raises UserError."""
    for name in config.track.to:
        TRACKERS[name]().check(config)


def send_commands(directory: str | Path) -> dict[str, str]:
    """Return, by tracker's title, the commands that send what waits in a run's or sweep's `directory`."""
    trackers = [make() for make in TRACKERS.values()]
    commands = {tracker.title: tracker.send_command(Path(directory)) for tracker in trackers}
    return {title: command for title, command in commands.items() if command}


def _say_failed(tracker: Tracker, error: Exception) -> None:
    why = " ".join(str(error).split()) or type(error).__name__
    print(f"{tracker.title} cannot be used: {why}; the run is no longer logged to it, and goes on", file=sys.stderr)
