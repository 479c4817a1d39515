"""Send the comparison of a sweep's points to its trackers.

The sweep is a tracked run of its own in the group of the trials' runs. It gets the whole comparison, also while the
sweep runs (see live.py). The run of each trial gets the facts of its point in its summary, so that the trials can be
sorted and filtered by them.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any

from minimind_ray.config.errors import UserError
from minimind_ray.config.load import load_config, validate
from minimind_ray.config.reading import read_json
from minimind_ray.config.trackers import TRACKER_RECORDS
from minimind_ray.data.storage import mirror_of, url_of
from minimind_ray.on_ray.session import Ending
from minimind_ray.sweep.answers import answer_records, answers_of
from minimind_ray.sweep.chart import is_logarithmic
from minimind_ray.sweep.cost import sweep_cost
from minimind_ray.sweep.export import to_json, to_records
from minimind_ray.sweep.report import PAGE
from minimind_ray.sweep.table import Comparison
from minimind_ray.sweep.trials import Sweep, Trial, update_info
from minimind_ray.track.registry import Trackers
from minimind_ray.track.tracker import SweepView, TrackedRun
from minimind_ray.train.run import RunDirectory

SECONDS, INTERRUPTED_SECONDS = 300.0, 15.0
"""The most seconds to begin to send trials' facts, after a sweep's own end and after a signal."""
NOT_SENT = "the comparison was not sent: {}"


class SweepRun:
    """The tracked run of the sweep in `path`, in the group of the trials' runs. Its trackers stay open until `finish`.

    The trackers' run is remembered in sweep.json, so that a resumed sweep sends its new comparison to the same run.

    Raises:
        UserError: a tracker is refused.
    """

    def __init__(self, sweep: Sweep, path: Path, seconds: float) -> None:
        self.path, self.before = path, _files(path)
        base = validate(sweep.info.config)
        self.group = base.track.group or sweep.name
        track = base.track.model_copy(update={"group": self.group, "name": sweep.name})
        config = base.model_copy(update={"out": str(path), "track": track})
        info = {"inputs": {}, **_known(read_json(path / "sweep.json"))}
        self.trackers = Trackers(TrackedRun(config, info, job_type="sweep", wait_seconds=seconds))
        if self.trackers.identities:
            update_info(path, **self.trackers.identities)

    def send(self, sweep: Sweep, comparison: Comparison, *, with_page: bool = True) -> None:
        """Send the tables, the facts about the whole sweep and, `with_page`, report.html if it was written."""
        sent = tables(comparison)
        for name, records in sent.items():
            self.trackers.log_table(name, records)
        self.trackers.summarize({name: value for name, value in facts(sweep, comparison).items() if name not in sent})
        if with_page and (page := self.path / PAGE).exists():
            self.trackers.log_page("report", page)

    def save_view(self, sweep: Sweep, comparison: Comparison) -> dict[str, str]:
        """Save a view of the sweep's runs in the trackers that can, unless they have one. Returns URLs by title."""
        axes = {
            key: is_logarithmic(spec, [row.point[key] for row in comparison.rows])
            for key, spec in sweep.info.axes.items()
        }
        view = SweepView(
            title=sweep.name,
            group=self.group,
            metric=sweep.info.metric,
            mode=sweep.info.mode,
            axes=axes,
            curves=list(dict.fromkeys((sweep.info.metric, "val/loss", "loss"))),
            tables=[name for name, records in tables(comparison).items() if records],
            pages=["report"],
        )
        urls = self.trackers.save_view(view)
        if urls:
            update_info(self.path, **self.trackers.identities)
        return urls

    def finish(self, state: str, result: Path | None = None) -> None:
        """Close the trackers. `result` is the winner's checkpoint. Raises StoreError, which is a UserError."""
        self.trackers.finish(state, result)
        if self.trackers.identities:
            _mirror_changes(self.path, self.before)


def tables(comparison: Comparison) -> dict[str, list[dict[str, Any]]]:
    """Return the tables of the sweep's run as records, by name. A table without results yet is an empty list."""
    return {
        "points": to_records(comparison),
        "importance": [asdict(each) for each in comparison.importance],
        "answers": answer_records(answers_of(comparison)),
    }


def facts(sweep: Sweep, comparison: Comparison) -> dict[str, Any]:
    """Return what a tracker shows of the whole sweep: the comparison as JSON, the winner's checkpoint, and the cost."""
    winner, trials, content = comparison.winner, sweep.trials, to_json(comparison)
    trained = {"tokens": sum(trial.tokens for trial in trials), "seconds": sum(trial.seconds for trial in trials)}
    return {
        "equal_within": content.pop("margin"),  # Trials of DPO have a metric of the name `margin`.
        **content,
        "checkpoint": url_of(winner.result) if winner and winner.result else None,
        "cost": sweep_cost(sweep),
        # W&B itself writes `tokens`, which is the axis of its charts.
        "trials": {"all": len(trials), **Counter(trial.state for trial in trials), **trained},
    }


def publish(
    sweep: Sweep, comparison: Comparison, *, seconds: float = SECONDS, ending: Ending | None = None
) -> dict[str, str]:
    """Send the comparison of a sweep that does not train now. Returns the URLs of saved views, by tracker's title.

    If a tracker cannot be used, a message on stderr says so.

    After `seconds`, no further trial's run is begun; a message counts those left out. `ending` says how the sweep ended
    just now; unless the user interrupted it, trackers send an alert if the config asks for it.
    """
    deadline, views = time.monotonic() + seconds, dict[str, str]()
    try:
        run = SweepRun(sweep, sweep.path, seconds)
        run.send(sweep, comparison)
        if ending in ("by itself", "out of time"):
            title = "budget" if ending == "out of time" else "sweep-finished"
            run.trackers.alert(title, _news(sweep, comparison, ending))
            views = run.save_view(sweep, comparison)
        unfinished = any(trial.state in ("waiting", "running", "stopped") for trial in sweep.trials)
        run.finish("stopped" if unfinished else "finished", _result(comparison.winner))
        _send_trials(sweep, comparison, deadline, seconds)
    except UserError as error:
        print(NOT_SENT.format(error), file=sys.stderr)
    return views


def _send_trials(sweep: Sweep, comparison: Comparison, deadline: float, seconds: float) -> None:
    """Send the facts of their points to the trials' runs, until `seconds` are over. Raises as `_send_trial`."""
    of_trials = _facts_of_trials(comparison)
    known = [trial for trial in sweep.trials if trial.state not in ("waiting", "running")]
    known = [trial for trial in known if trial.id in of_trials and _known(RunDirectory(trial.path).info())]
    for number, trial in enumerate(known):
        if (left := deadline - time.monotonic()) <= 0:
            print(
                f"the comparison was sent, but not to the runs of {len(known) - number} trial(s): it would take "
                f"more than {seconds:g} s; minimind-ray tune --resume {url_of(sweep.path)} sends it to all",
                file=sys.stderr,
            )
            return
        _send_trial(sweep, trial, of_trials[trial.id], left)


def _news(sweep: Sweep, comparison: Comparison, ending: Ending) -> str:
    """Return how the sweep ended, in a sentence for an alert."""
    states = Counter(trial.state for trial in sweep.trials).most_common()
    where, trials = url_of(sweep.path), ", ".join(f"{count} {state}" for state, count in states)
    text = f"{where}: trials: {trials}."
    if winner := comparison.winner:
        text += f" {'Best so far' if ending == 'out of time' else 'Winner'}: {winner.id}."
    if ending == "out of time":
        text += f" The time budget is used up; minimind-ray tune --resume {quote(where)} continues."
    return text


def _send_trial(sweep: Sweep, trial: Trial, facts: Mapping[str, Any], seconds: float) -> None:
    """Add facts to the summary of a trial's tracked run, which is continued for this.

    The run's lines are sent as in a resume: a tracker that works offline writes all that it has not sent into one new
    part (see track/wandb.py). Raises UserError if a tracker is refused.
    """
    directory, before = RunDirectory(trial.path), _files(trial.path)
    config = load_config(sweep.info.stage, [trial.path / "config.yaml"])
    config = config.model_copy(update={"out": str(trial.path)})
    trackers = Trackers(TrackedRun(config, directory.info(), directory.lines, wait_seconds=seconds))
    trackers.summarize(facts)
    trackers.finish(trial.state, _result(trial))
    if trackers.identities:
        directory.update(**trackers.identities)
        _mirror_changes(trial.path, before)


def _result(trial: Trial | None) -> Path | None:
    """Return a trial's checkpoint if it is on this machine."""
    return trial.result if trial and trial.result and trial.result.is_dir() else None


def _facts_of_trials(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Return, by a trial's id, the record of its point, as in the CSV, with names that W&B can sort and filter."""
    left_out = {"sweep", *comparison.keys}  # The trial's config and group have these already.
    facts = [
        {f"point/{name.replace(' ', '_')}": value for name, value in record.items() if name not in left_out}
        for record in to_records(comparison)
    ]
    return {trial.id: of_point for row, of_point in zip(comparison.rows, facts) for trial in row.trials}


def _known(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run.json or sweep.json holds for the trackers."""
    return {name: content[name] for name in TRACKER_RECORDS if name in content}


def _files(directory: Path) -> set[str]:
    """Return the trackers' files in a directory."""
    folders = [directory / record.folder for record in TRACKER_RECORDS.values()]
    return {str(path.relative_to(directory)) for folder in folders for path in folder.rglob("*") if path.is_file()}


def _mirror_changes(directory: Path, before: set[str]) -> None:
    """Bring the trackers' files in the object store up to date. Raises StoreError, which is a UserError."""
    if mirror := mirror_of(directory):
        after = _files(directory)
        mirror.put(*sorted(after))
        mirror.delete(before - after)
