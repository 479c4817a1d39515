"""Keep report.html, and the sweep's own run in its trackers, up to date while the sweep runs.

A thread reads the sweep's files after validations and after the ends of trials. It rests most of the time, so that it
does not slow the trials down, and no error in it reaches the sweep.
"""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from minimind_ray.config.errors import UserError
from minimind_ray.data.storage import url_of
from minimind_ray.sweep.compare import compare
from minimind_ray.sweep.publish import INTERRUPTED_SECONDS, NOT_SENT, SweepRun
from minimind_ray.sweep.report import write_page
from minimind_ray.sweep.table import Comparison
from minimind_ray.sweep.trials import Sweep, read_sweep

REST = 20
"""After an update, the thread rests this many times as long as the update took: it uses about 5 % of the time."""
LEAST_REST_S = 2.0
PAGE_EVERY_S = 600.0
"""Trackers keep each page that they are sent, so they get it at most once in this time while the sweep runs."""


class LiveReport:
    """Updates the report of the sweep in `path` until it is left. Pass the events of the trials to `watch`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.changed, self.leaving = threading.Event(), threading.Event()
        self.ended = False
        """Whether a trial has ended since the comparison was last sent to the trackers."""
        self.tracked: SweepRun | None = None
        self.tracking = True
        self.page_sent = time.monotonic()
        """When the trackers last got the page; at first, the sweep's beginning."""
        self.thread = threading.Thread(target=self._follow, name="live report", daemon=True)

    def __enter__(self) -> LiveReport:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop at the end of the current step, so that nothing is written after this call."""
        self.leaving.set()
        self.changed.set()
        self.thread.join()

    def watch(self, event: str) -> None:
        """Take note of an event of a trial; see `Watch` in on_ray/tuner.py."""
        if event in ("validated", "ended"):
            self.ended = self.ended or event == "ended"
            self.changed.set()

    def _follow(self) -> None:
        while self.changed.wait() and not self.leaving.is_set():
            self.changed.clear()
            began = time.monotonic()
            try:
                self.update()
            except (UserError, OSError):
                pass  # The sweep was read while it changed, or the disk is full. The next event tries again.
            except Exception as error:
                print(f"report.html is not updated any more while the sweep runs: {error!r}", file=sys.stderr)
                break
            self.leaving.wait(max(LEAST_REST_S, REST * (time.monotonic() - began)))
        if self.tracked:
            with suppress(UserError):  # The store fails.
                self.tracked.finish("stopped")  # The end of the sweep, which comes next, sends the sweep's real state.

    def update(self) -> None:
        """Rewrite the page. If a trial has ended, send the comparison to the trackers. Raises as `compare`."""
        sweep = read_sweep(url_of(self.path), "live")
        comparison = compare([sweep])
        if not self.leaving.is_set():
            write_page(sweep, comparison, self.path)
        if self.ended and self.tracking and not self.leaving.is_set():
            self.ended = False
            self._send(sweep, comparison)

    def _send(self, sweep: Sweep, comparison: Comparison) -> None:
        try:
            self.tracked = self.tracked or SweepRun(sweep, self.path, INTERRUPTED_SECONDS)
            with_page = time.monotonic() - self.page_sent >= PAGE_EVERY_S
            self.tracked.send(sweep, comparison, with_page=with_page)
            self.page_sent = time.monotonic() if with_page else self.page_sent
        except UserError as error:
            self.tracking = False
            print(NOT_SENT.format(error), file=sys.stderr)
