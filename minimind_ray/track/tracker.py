"""What a run and a tracker say to each other, whatever the tracker is.

A tracker keeps a copy of a run's metrics and samples in some service or format. The files of the run directory stay
the truth: a tracker that joins late, or lost something, is given the earlier lines again by `open`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from minimind_ray.config.schema import Config


@dataclass(frozen=True)
class TrackedRun:
    """A run as it stands when its tracker is opened.

    `config.out` is the run's directory on this machine. `info` is the content of run.json. `lines()` are the earlier
    lines of metrics.jsonl, each with the texts that the model wrote after the same step. `base` is the model directory
    that the run started from.
    """

    config: Config
    info: Mapping[str, Any]
    lines: Callable[[], Iterable[tuple[Mapping[str, Any], Sequence[str]]]] = tuple
    base: Path | None = None


class Tracker(Protocol):
    """Tracks one run, on rank 0 only. Every method but `check` may fail: the run then goes on without the tracker."""

    title: str
    """The tracker's name for users."""

    @property
    def stop_requested(self) -> bool:
        """Whether somebody asked for a stop of the run in the tracker."""
        ...

    def check(self, config: Config) -> None:
        """Check, before a run is made, that it can be tracked as `config` asks.

        Raises:
            UserError: it cannot.
        """
        ...

    def open(self, run: TrackedRun) -> Mapping[str, Any] | None:
        """Begin to track, or continue: bring in the lines that the tracker does not have.

        Returns what run.json remembers under the tracker's name, for a resume; None if the tracker is turned off.

        Raises:
            UserError: the config insists on something that is not possible; this error ends the run.
        """
        ...

    def log(self, metrics: Mapping[str, Any], samples: Sequence[str]) -> None:
        """Take one line of metrics.jsonl, and the texts that the model wrote after the same step."""
        ...

    def finish(self, state: str, result: Path | None) -> None:
        """End the tracking. `state` is how the run ended, `result` the checkpoint to take from it."""
        ...

    def send_command(self, directory: Path) -> str | None:
        """Return the command that sends what waits in a run's or sweep's `directory`; None if nothing waits."""
        ...
