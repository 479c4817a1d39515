"""The tracker for TensorBoard. It writes event files into the run directory; no process or service takes part.

    tensorboard/events.out.tfevents.TIME    the whole run, each step once

At each start of a run, a new file with all steps of metrics.jsonl replaces the earlier file. Each line is in the file
when `log` returns, so a killed run lacks nothing.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from minimind_ray.config.schema import Config
from minimind_ray.config.trackers import TRACKER_RECORDS
from minimind_ray.track.tracker import SweepView, TrackedRun, require_package, trains_elsewhere
from minimind_ray.track.values import Best, flatten, is_number, markdown_table, numbers, text_of

NAME = "tensorboard"
FOLDER = TRACKER_RECORDS[NAME].folder


class TensorboardTracker:
    """Logs metrics as curves by optimizer step, and samples, config and tables as texts; see `Tracker` for the methods.

    TensorBoard has no alerts and shows no HTML pages.
    """

    title = "TensorBoard"
    stop_requested = False

    def __init__(self) -> None:
        self.best = Best()
        self.step = 0

    def check(self, config: Config) -> None:
        """Raise UserError if TensorBoard is not installed, unless the run trains on a cluster."""
        if not trains_elsewhere():
            require_package(NAME)

    def open(self, run: TrackedRun) -> Mapping[str, Any]:
        """Write a new event file with the config and the earlier lines, in place of the earlier files."""
        require_package(NAME)
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = Path(run.config.out) / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self.times = _retire_events(folder)
        self.file = RecordWriter((folder / f"events.out.tfevents.{time.time_ns()}").open("wb"))
        event = _proto("event")
        self._write(event.Event(wall_time=time.time(), file_version="brain.Event:2"))
        # A TensorBoard that shows this run now forgets the steps of the earlier file.
        start = event.SessionLog(status=event.SessionLog.START)
        self._write(event.Event(wall_time=time.time(), step=0, session_log=start))
        self._log_config(run)
        for metrics, samples in run.lines():
            self.log(metrics, samples)
        self.times = {}
        return {"folder": FOLDER}

    def _log_config(self, run: TrackedRun) -> None:
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        facts = {key: run.info.get(key) for key in ("inputs", "commit", "versions")}
        config = {**run.config.model_dump(mode="json"), **facts}
        job = run.job_type or run.config.stage
        flat = {name: value for name, value in flatten({"job_type": job, **config}, ".").items() if value is not None}
        simple = {name: value if isinstance(value, int | float) else text_of(value) for name, value in flat.items()}
        name = run.config.track.name or Path(run.config.out).name
        self._write(_proto("event").Event(wall_time=time.time(), summary=hparams_pb(simple, trial_id=name)))
        self._add(0, {}, {"config": markdown_table(["key", "value"], list(flat.items()))})

    def log(self, metrics: Mapping[str, Any], samples: Sequence[str] = ()) -> None:
        """Log the numbers of a line of metrics.jsonl as curves, and its warning and each sample as texts."""
        self.best.see(metrics)
        self.step = metrics["step"]
        texts = {f"samples/{number}": _verbatim(text) for number, text in enumerate(samples, start=1)}
        if warning := metrics.get("warning"):
            texts["warning"] = warning
        self._add(self.step, numbers(metrics), texts)

    def log_table(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Log a table as text. TensorBoard shows the last one first."""
        self.step += 1
        rows = [list(record.values()) for record in records]
        self._add(self.step, {}, {name: markdown_table(list(records[0]), rows)})

    def log_page(self, name: str, path: Path) -> None:
        """Do nothing: TensorBoard shows no HTML pages."""

    def alert(self, title: str, text: str) -> None:
        """Do nothing: TensorBoard has no alerts."""

    def summarize(self, facts: Mapping[str, Any]) -> None:
        """Log numbers as curves of one step, which the tab HParams shows as columns, and the other facts as a text."""
        flat = flatten(facts, "/")
        rest = [(name, value) for name, value in flat.items() if not is_number(value)]
        texts = {"summary": markdown_table(["fact", "value"], rest)} if rest else {}
        self._add(self.step, {name: value for name, value in flat.items() if is_number(value)}, texts)

    def save_view(self, view: SweepView) -> None:
        """Return None: TensorBoard has no saved views."""

    def finish(self, state: str, result: Path | None = None) -> None:
        """Log the run's state, result and best validation, and close the file."""
        self.summarize({**self.best.facts(), "state": state, "result": result and str(result)})
        self.file.close()

    def send_command(self, directory: Path) -> str | None:
        """Return None: nothing is sent."""
        return None

    def _add(self, step: int, curves: Mapping[str, float], texts: Mapping[str, str]) -> None:
        """Write one event with numbers, and with texts in markdown."""
        value = _proto("summary").Summary.Value
        values = [value(tag=tag, simple_value=number) for tag, number in curves.items()]
        values += [value(tag=tag, tensor=_tensor(text), metadata=_text_metadata(tag)) for tag, text in texts.items()]
        summary = _proto("summary").Summary(value=values)
        self._write(_proto("event").Event(wall_time=self.times.get(step, time.time()), step=step, summary=summary))

    def _write(self, event: Any) -> None:
        self.file.write(event.SerializeToString())
        self.file.flush()


def _proto(name: str) -> Any:
    """Return a module of TensorBoard's messages, which have no types."""
    return import_module(f"tensorboard.compat.proto.{name}_pb2")


def _tensor(text: str) -> Any:
    return _proto("tensor").TensorProto(dtype=_proto("types").DT_STRING, string_val=[text.encode()])


def _text_metadata(tag: str) -> Any:
    from tensorboard.plugins.text.metadata import create_summary_metadata

    return create_summary_metadata(tag, "")


def _verbatim(text: str) -> str:
    """Return a text as a block of code in markdown, so that TensorBoard shows it as it is."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def _retire_events(folder: Path) -> dict[int, float]:
    """Remove the events of a run's earlier files. Return at which time each of their steps was logged, in seconds.

    The last file stays, empty: a TensorBoard that is reading a file does not go on to the next if the file is gone.
    """
    from google.protobuf.message import DecodeError

    times: dict[int, float] = {}
    for file in sorted(folder.glob("*tfevents*")):
        with suppress(DecodeError):  # The file is damaged: the rest of its steps get the present time.
            for event in _events(file):
                times.setdefault(event.step, event.wall_time)
        if file.stat().st_size:
            os.truncate(file, 0)
        else:
            file.unlink()
    return times


def _events(file: Path) -> Iterator[Any]:
    """Yield the events of a file, without an incomplete last event, which a killed process may leave.

    A record is its length (8 bytes), a check sum (4), the event, and a check sum (4).
    """
    data, place = file.read_bytes(), 0
    while place + 12 <= len(data):
        end = place + 12 + struct.unpack_from("<Q", data, place)[0]
        if end > len(data):
            return
        yield _proto("event").Event.FromString(data[place + 12 : end])
        place = end + 4
