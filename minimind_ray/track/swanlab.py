"""The tracker for SwanLab. Each run directory has one SwanLab run, with every step once, even after resumes.

    swanlab/offline-ID/    waits for `swanlab sync`
    swanlab/online-ID/     was sent while the run was training

At each start of a run, SwanLab gets all lines of metrics.jsonl again: offline in a new folder in place of the earlier
one, online from the step on that SwanLab's server does not have. `swanlab sync --id ID` skips these steps, too.

SwanLab receives the run's config, metrics and samples. It receives no system data, code or console output.
"""

from __future__ import annotations

import json
import math
import os
import queue
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import Config
from minimind_ray.config.trackers import TRACKER_RECORDS
from minimind_ray.track.tracker import SweepView, TrackedRun, require_package, trains_elsewhere
from minimind_ray.track.values import Best, flatten, numbers

NAME = "swanlab"
FOLDER = TRACKER_RECORDS[NAME].folder
CONNECT_SECONDS = 20
FINISH_SECONDS = 60
NOT_ONLINE = "track.swanlab is online, but {}; or set track.swanlab to offline and send the run later"
NO_KEY = NOT_ONLINE.format("there is no key: run `swanlab login` or set SWANLAB_API_KEY")


class SwanlabTracker:
    """Logs metrics by steps, samples as texts, and a sweep's tables and pages; see `Tracker` for the methods.

    SwanLab has no alerts without a robot of the user's own.
    """

    title = "SwanLab"
    stop_requested = False

    def __init__(self) -> None:
        self.best = Best()
        self.step = 0

    def check(self, config: Config) -> None:
        """Raise UserError if SwanLab is not installed, or online without a key, unless the run trains on a cluster."""
        if trains_elsewhere():
            return
        require_package(NAME)
        if config.track.swanlab == "online":
            with _Process({"mode": "online", "only_check": True}) as process:
                if not process.answer(CONNECT_SECONDS)["has_key"]:
                    raise UserError(NO_KEY)

    def open(self, run: TrackedRun) -> Mapping[str, Any] | None:
        """Begin or continue a SwanLab run, and log the earlier lines. Return its id, mode and, online, its URL.

        With `auto`, SWANLAB_MODE decides if it is set. Otherwise SwanLab is online if there is a key, and offline if
        not. If SwanLab cannot be reached, it is offline, and a message on stderr says so.

        Raises:
            UserError: SwanLab is not installed; or `track.swanlab` is online, but there is no key or no connection.
        """
        require_package(NAME)
        asked = run.config.track.swanlab
        self.directory = Path(run.config.out)
        self.seconds = math.inf if run.wait_seconds is None else run.wait_seconds
        self.id = run.info.get(NAME, {}).get("id") or secrets.token_hex(8)
        for folder in self.directory.glob(f"{FOLDER}/*-{self.id}"):
            # A sweep logs its tables anew. SwanLab's server takes only steps above those that it has.
            self.step = max([self.step, *(int(file.name.partition("-")[0]) for file in folder.glob("media/*/*"))])
            shutil.rmtree(folder)
        try:
            answer = self._begin(run, asked)
        except Exception as error:
            if asked == "offline":
                raise
            problem = f"SwanLab cannot be used: {error}"
            if asked == "online":
                raise UserError(NOT_ONLINE.format(problem)) from None
            print(f"{problem}; logging offline", file=sys.stderr)
            answer = self._begin(run, "offline")
        if answer.get("has_key") is False:
            raise UserError(NO_KEY)
        if answer["mode"] == "off":
            return None
        self.mode = answer["mode"]
        for metrics, samples in run.lines():
            self.log(metrics, samples)
        where = {"url": answer["url"]} if answer["url"] else {}
        return {"id": self.id, "project": run.config.track.project, "mode": self.mode, **where}

    def _begin(self, run: TrackedRun, mode: str) -> dict[str, Any]:
        config, track = run.config, run.config.track
        facts = {key: run.info.get(key) for key in ("inputs", "commit", "versions")}
        opening = {
            "id": self.id,
            "log_dir": str(self.directory / FOLDER),
            "workspace": track.entity,
            "project": track.project,
            "name": track.name or self.directory.name,
            "group": track.group,
            "job_type": run.job_type or config.stage,
            "tags": track.tags,
            "config": {**config.model_dump(mode="json"), **facts},
        }
        self.process = _Process({"mode": mode, "run": opening})
        try:
            return self.process.answer(min(CONNECT_SECONDS, self.seconds))
        except BaseException:
            self.process.kill()
            raise

    def log(self, metrics: Mapping[str, Any], samples: Sequence[str] = ()) -> None:
        """Log the numbers of a line of metrics.jsonl, its warning, and the samples."""
        self.best.see(metrics)
        self.step = metrics["step"]
        texts = {"samples": list(samples)} if samples else {}
        if warning := metrics.get("warning"):
            texts["warning"] = [warning]
        self.process.send({"numbers": numbers(metrics), "texts": texts, "step": self.step})

    def log_table(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Log a table, which takes a step of its own."""
        self.step += 1
        rows = [list(record.values()) for record in records]
        self.process.send({"table": {"name": name, "columns": list(records[0]), "rows": rows}, "step": self.step})

    def log_page(self, name: str, path: Path) -> None:
        """Log an HTML page, which takes a step of its own."""
        self.step += 1
        self.process.send({"page": {"name": name, "path": str(path.absolute())}, "step": self.step})

    def alert(self, title: str, text: str) -> None:
        """Do nothing: SwanLab has no alerts without a robot of the user's own."""

    def summarize(self, facts: Mapping[str, Any]) -> None:
        """Add facts to the run's config: SwanLab has no other place for them, and shows them in its table of runs."""
        self.process.send({"config": flatten(facts, "/")})

    def save_view(self, view: SweepView) -> None:
        """Return None: SwanLab has no saved views that a program can make."""

    def finish(self, state: str, result: Path | None = None) -> None:
        """Close the SwanLab run, with its state, result and best validation in its config."""
        self.summarize({**self.best.facts(), "state": state, "result": result and str(result)})
        self.process.send({"finish": state, "error": "the run failed" if state == "failed" else None})
        seconds = min(FINISH_SECONDS, self.seconds)
        try:
            self.process.answer(seconds)
        except TimeoutError:
            folder = self.directory / FOLDER / f"{self.mode}-{self.id}"
            print(
                f"SwanLab did not receive the whole run within {seconds:.0f} s; send the rest with: "
                f"swanlab sync --id {self.id} {shlex.quote(str(folder))}",
                file=sys.stderr,
            )
        finally:
            self.process.kill()

    def send_command(self, directory: Path) -> str | None:
        """Return the command that sends the runs logged offline in `directory`; None if there is none.

        `swanlab sync` does not mark what it has sent. It may be used again: it leaves out what the server has.
        """
        folders = [file.parent for file in directory.glob(f"**/{FOLDER}/offline-*/run-*.swanlab")]
        if len(folders) <= 1:
            return next((f"swanlab sync --id {_id(folder)} {shlex.quote(str(folder))}" for folder in folders), None)
        patterns = {"*/" * len(folder.relative_to(directory).parts[:-2]) for folder in folders}
        top = shlex.quote(str(directory))
        found = " ".join(f"{top}/{pattern}{FOLDER}/offline-*" for pattern in sorted(patterns))
        return f'for run in {found}; do swanlab sync --id "${{run##*-}}" "$run"; done'


def _id(folder: Path) -> str:
    return folder.name.partition("-")[2]


class _Process:
    """A process that runs swanlab_process.py. It gets no signals from the terminal, and ends when this process ends.

    Two threads write and read, so that a network without an answer never holds up training.
    """

    def __init__(self, opening: Mapping[str, Any]) -> None:
        code = "from minimind_ray.track.swanlab_process import main; main()"
        self._popen = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)},
            start_new_session=True,
        )  # fmt: skip
        self._requests, self._answers = queue.SimpleQueue[str | None](), queue.SimpleQueue[str]()
        Thread(target=self._write, daemon=True).start()
        Thread(target=self._read, daemon=True).start()
        self.send(opening)

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def send(self, request: Mapping[str, Any]) -> None:
        """Send a request. It waits in memory while the process is busy. RuntimeError: the process has ended."""
        if self._popen.poll() is not None:
            self.answer(1)  # Raises the error that ended it.
        self._requests.put(json.dumps(request, ensure_ascii=False) + "\n")

    def answer(self, seconds: float) -> dict[str, Any]:
        """Return the next answer.

        Raises:
            TimeoutError: there is none within `seconds`.
            RuntimeError: the process reports an error, or has ended.
        """
        try:
            line = self._answers.get(timeout=None if seconds == math.inf else max(seconds, 0))
        except queue.Empty:
            raise TimeoutError(f"there was no answer within {seconds:.0f} s") from None
        answer: dict[str, Any] = json.loads(line or '{"error": "its process has ended"}')
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def kill(self) -> None:
        """End the process at once."""
        self._requests.put(None)
        self._popen.kill()
        self._popen.wait()

    def _write(self) -> None:
        assert self._popen.stdin
        with suppress(OSError), self._popen.stdin as pipe:
            for request in iter(self._requests.get, None):
                pipe.write(request)
                pipe.flush()

    def _read(self) -> None:
        assert self._popen.stdout
        with suppress(OSError, ValueError), self._popen.stdout as pipe:
            for line in pipe:
                self._answers.put(line)
        self._answers.put("")
