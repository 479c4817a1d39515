"""The interface between a run, or a sweep, and its trackers.

A tracker copies a run's metrics and samples to a service or another format. The files of the run directory are the
reference: if a tracker joins late or has lost lines, `open` gives it the earlier lines again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from minimind_ray.config.errors import UserError
from minimind_ray.config.paths import in_job
from minimind_ray.config.schema import Config


@dataclass(frozen=True)
class TrackedRun:
    """A run at the moment its tracker is opened.

    `config.out` is the run's directory on this machine. `info` is the content of run.json. `lines()` gives the earlier
    lines of metrics.jsonl, each with the sample texts of the same step. `base` is the model directory that the run
    started from. `job_type` says what the run does; the comparison of a sweep is tracked as a run, too. `wait_seconds`
    is how long the tracker may wait for its service when it opens and when it finishes; None means its own limits.
    """

    config: Config
    info: Mapping[str, Any]
    lines: Callable[[], Iterable[tuple[Mapping[str, Any], Sequence[str]]]] = tuple
    base: Path | None = None
    job_type: str | None = None
    wait_seconds: float | None = None


@dataclass(frozen=True)
class SweepView:
    """What a saved view of a sweep's runs shows: the runs of `group`, best first by `metric`, and charts of them.

    `axes` are the config keys that the sweep varies, and whether their scale is logarithmic. `curves` are metrics to
    show over tokens. `tables` and `pages` are the names under which the sweep's own run has them.
    """

    title: str
    group: str
    metric: str
    mode: Literal["min", "max"]
    axes: Mapping[str, bool]
    curves: Sequence[str] = ()
    tables: Sequence[str] = ()
    pages: Sequence[str] = ()


def trains_elsewhere() -> bool:
    """Whether this command only starts a run on a cluster, whose machines have their own packages and environment."""
    return bool(os.environ.get("RAY_ADDRESS") or in_job())


def require_package(name: str) -> None:
    """Raise UserError if the package of a tracker is not installed. Tracker, package and extra have the same name."""
    found = find_spec(name)
    if found is None or found.origin is None:  # A folder of this name in the working directory has no origin.
        raise UserError(f"track.to names {name}, which is not installed: pip install 'minimind-ray[{name}]'")


class Tracker(Protocol):
    """Tracks one run, on rank 0 only. If any method but `check` fails, the run continues without the tracker."""

    title: str
    """The tracker's name for users."""

    @property
    def stop_requested(self) -> bool:
        """Whether a user asked the tracker to stop the run."""
        ...

    def check(self, config: Config) -> None:
        """Check, before a run is created, that it can be tracked as `config` asks.

        Raises:
            UserError: the run cannot be tracked as `config` asks.
        """
        ...

    def open(self, run: TrackedRun) -> Mapping[str, Any] | None:
        """Begin to track a run, or continue a resumed run. Log the earlier lines that the tracker does not have.

        Returns an entry for run.json under the tracker's name, which a resume needs; None if the tracker is turned off.

        Raises:
            UserError: the config requires something impossible. This error ends the run.
        """
        ...

    def log(self, metrics: Mapping[str, Any], samples: Sequence[str]) -> None:
        """Log one line of metrics.jsonl, and the sample texts of the same step."""
        ...

    def log_table(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Log a table; a later table of the same name replaces it. All records have the same keys, the columns."""
        ...

    def log_page(self, name: str, path: Path) -> None:
        """Log a file that is one HTML page. A tracker that cannot show pages does nothing."""
        ...

    def alert(self, title: str, text: str) -> None:
        """Tell the user of an event, as the service does: by e-mail, Slack, … A tracker without alerts does nothing."""
        ...

    def summarize(self, facts: Mapping[str, Any]) -> None:
        """Add facts to what the tracker shows of the whole run."""
        ...

    def save_view(self, view: SweepView) -> str | None:
        """Save a view of a sweep's runs at the service, if the sweep has none yet. Returns its URL.

        A tracker that cannot save views returns None.
        """
        ...

    def finish(self, state: str, result: Path | None) -> None:
        """End the tracking. `state` is the run's final state, `result` its best checkpoint."""
        ...

    def send_command(self, directory: Path) -> str | None:
        """Return the command that sends the unsent records of a run or a sweep in `directory`; None if all are sent."""
        ...
