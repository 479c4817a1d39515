"""The table of experiment trackers: what the config and the code that copies run directories know of each.

track/registry.py maps each name to its implementation; track/__init__.py says how to add a tracker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AlertKind = Literal["failed", "not-finite", "sweep-finished", "budget"]
ALERTS: dict[AlertKind, str] = {
    "failed": "a run failed",
    "not-finite": "the loss is not finite",
    "sweep-finished": "a sweep has finished",
    "budget": "a budget is used up",
}
"""The events of which a tracker can alert the user, by their names in `track.alerts`, with the alerts' titles."""


@dataclass(frozen=True)
class TrackerRecord:
    """The record of a tracker.

    name: its value in `track.to`, and its key in run.json.
    folder: the folder of its files in a run directory, or in the working directory if it is used without a run.
    """

    name: str
    folder: str


TRACKER_RECORDS: dict[str, TrackerRecord] = {
    record.name: record
    for record in (
        TrackerRecord("wandb", "wandb"),
        TrackerRecord("swanlab", "swanlab"),
        TrackerRecord("tensorboard", "tensorboard"),
    )
}


def tracker_folders() -> tuple[str, ...]:
    """Return the folders of all trackers. They stay where the run was trained, and are not sent to a cluster."""
    return tuple(record.folder for record in TRACKER_RECORDS.values())
