"""Send the comparison of a sweep's points to its trackers, as a run of its own in the group of the trials' runs."""

from __future__ import annotations

import json
import sys

from minimind_ray.config.errors import UserError
from minimind_ray.config.load import validate
from minimind_ray.config.reading import read_json
from minimind_ray.config.trackers import TRACKER_RECORDS
from minimind_ray.data.storage import mirror_of
from minimind_ray.sweep.export import to_json, to_records
from minimind_ray.sweep.table import Comparison
from minimind_ray.sweep.trials import Sweep
from minimind_ray.track.registry import Trackers
from minimind_ray.track.tracker import TrackedRun
from minimind_ray.train.run import RunDirectory


def publish(sweep: Sweep, comparison: Comparison) -> None:
    """Send the table of a sweep that has ended, and remember the trackers' runs in sweep.json.

    A resumed sweep sends its new table to the same runs. If a tracker cannot be used, a message on stderr says so.
    """
    content = read_json(sweep.path / "sweep.json")
    known = {name: content[name] for name in TRACKER_RECORDS if name in content}
    try:
        base = validate(sweep.info.config)
        track = base.track.model_copy(update={"group": base.track.group or sweep.name, "name": sweep.name})
        config = base.model_copy(update={"out": str(sweep.path), "track": track})
        trackers = Trackers(TrackedRun(config, {"inputs": {}, **known}, job_type="sweep"))
    except UserError as error:
        print(f"the comparison was not sent: {error}", file=sys.stderr)
        return
    facts = {name: value for name, value in to_json(comparison).items() if name != "points"}
    trackers.log_points(to_records(comparison), facts)
    trackers.finish("finished")
    if not trackers.identities:
        return
    run = RunDirectory(sweep.path)
    run.write("sweep.json", json.dumps({**content, **trackers.identities}, indent=2, ensure_ascii=False) + "\n")
    if mirror := mirror_of(sweep.path):
        folders = [mirror.path / TRACKER_RECORDS[name].folder for name in trackers.identities]
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        mirror.put(*(str(path.relative_to(mirror.path)) for path in files))
