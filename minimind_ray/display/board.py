"""Show a running sweep: a live table of its trials on a terminal, and a line for each trial that ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from minimind_ray.config.errors import UserError
from minimind_ray.data.storage import TICK_S, mirror_of
from minimind_ray.sweep.plan import SweepPlan
from minimind_ray.sweep.progress import Reading, Row, SweepProgress
from minimind_ray.sweep.text import duration_text
from minimind_ray.sweep.trials import MetricsLine
from minimind_ray.train.run import RunDirectory

REFRESH_S = 0.5
DAY_S = 86400
IMPORTANT = ("value", "step", "left", "speed")
"""The table's columns after the trial's name, the most important first. A narrow terminal shows only the first ones."""
BETWEEN = 2
"""Spaces between two columns."""


class Board:
    """Shows a sweep while it runs. Enter it, and pass `watch` to the tuner."""

    def __init__(self, plan: SweepPlan, console: Console) -> None:
        hours, (metric, mode) = plan.search.budget_hours, plan.search.judged_by(plan.base.stage)
        ends_by = {"ends_by": time.monotonic() + hours * 3600} if hours else {}
        self.progress = SweepProgress(plan.count, metric, mode, seeds=plan.most_seeds, **ends_by)
        self.console, self.in_store = console, mirror_of(plan.path) is not None
        self.paths: dict[str, Path] = {}
        # Protects `progress`. Do not hold this lock while printing: printing also draws the table.
        self.lock = threading.Lock()
        self.leaving = threading.Event()
        self.follower = threading.Thread(target=self._follow, name="board", daemon=True)
        self.live = Live(
            console=console, get_renderable=self._view, refresh_per_second=1 / REFRESH_S, transient=True,
            vertical_overflow="crop",
        )  # fmt: skip

    def __enter__(self) -> Board:
        if self.console.is_terminal:
            self.live.start()
            self.follower.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.console.is_terminal:
            self.leaving.set()
            self.live.stop()

    def watch(self, trial: Path, event: str, metrics: Mapping[str, Any]) -> None:
        """Record an event of a trial. The tuner calls this method; see `Watch` there."""
        id = trial.name
        if event == "ended":
            self._ended(trial)
            return
        with self.lock:
            if event == "started":
                self.paths[id] = trial
                self.progress.started(id, metrics["steps"], metrics["point"], time.monotonic())
            elif event == "paused":
                self.progress.paused(id)
            else:
                self.progress.validated(id, metrics)

    def _ended(self, trial: Path) -> None:
        info = RunDirectory(trial).info()
        # The trial was stopped, but its process may not have written its state yet.
        state = "early-stopped" if info["state"] == "running" else info["state"]
        with self.lock:
            if state == "waiting":  # The sweep was stopped before the trial began.
                self.progress.paused(trial.name)
                return
            found = self.progress.ended(trial.name, state).value
            ended, count = self.progress.endings.total(), self.progress.count
        value = "" if found is None else f"  {self.progress.metric} {found:.4f}"
        error = f"  {info['error']}" if state == "failed" else ""
        text = f"{ended}/{count}  {state}  {trial.name}{value}{error}"
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _follow(self) -> None:
        """Read the progress of the running trials from the last lines of their metrics.jsonl.

        From an object store, read at most one trial a second. Trials send the file there every TICK_S seconds at most.
        """
        while not self.leaving.wait(max(TICK_S, len(self.progress.running)) if self.in_store else REFRESH_S):
            with self.lock:
                running = [self.paths[id] for id in self.progress.running]
            for trial in running:
                # Try again later; the trial itself reports errors.
                with suppress(UserError, OSError, ValueError):
                    if text := RunDirectory(trial).last_metrics():
                        line = MetricsLine.model_validate_json(text)
                        with self.lock:
                            self.progress.read(trial.name, Reading(time.monotonic(), line.step, line.tokens))

    def _view(self) -> Group:
        with self.lock:
            return view(self.progress, time.monotonic(), datetime.now(), self.console)


def view(progress: SweepProgress, now: float, clock: datetime, console: Console) -> Group:
    """Return what fits on the terminal: counts, the best trial so far, the expected end, and the running trials.

    `now` is the monotonic time in seconds, and `clock` is the time of day.
    """
    above = [Text(line, overflow="fold") for line in summary(progress, now, clock)]
    taken = sum(len(line.wrap(console, console.width)) for line in above)
    rows = progress.rows(now)
    return Group(*above, *running_trials(rows, progress.metric, console.width, console.height - taken))


def summary(progress: SweepProgress, now: float, clock: datetime) -> list[str]:
    """Return the lines above the table."""
    lines = [progress.counts()]
    if best := progress.best:
        lines.append(f"best so far: {progress.metric} {best.value:.4f}  {best.trial}")
    if (left := progress.seconds_left(now)) is not None:
        end = clock + timedelta(seconds=left)
        lines.append(f"about {duration_text(left)} left, until {end:{'%H:%M' if left < DAY_S / 2 else '%d %b %H:%M'}}")
    return lines


def running_trials(rows: Sequence[Row], metric: str, width: int, height: int) -> list[Table | Text]:
    """Return a table of as many trials as fit, and a line that counts the others.

    If the terminal is too narrow for all columns, leave out some. Never cut the name of a trial: wrap a name that takes
    more than half of the width, if necessary.
    """
    if not rows:
        return []
    heads = Row("trial", "step", metric, "tokens/s", "time left")._asdict()
    widths = {name: max(map(cell_len, [head, *(row._asdict()[name] for row in rows)])) for name, head in heads.items()}
    columns, free = ["trial"], width - min(widths["trial"], width // 2)
    for name in IMPORTANT:
        if (free := free - BETWEEN - widths[name]) < 0:
            break
        columns.append(name)
    columns = [name for name in heads if name in columns]
    name_width = width - sum(BETWEEN + widths[name] for name in columns[1:])
    # The table's head takes one line, and the cursor takes another.
    fitting = rows_that_fit([-(-cell_len(row.trial) // name_width) for row in rows], height - 2)
    table = Table(box=None, pad_edge=False, padding=(0, BETWEEN, 0, 0), header_style="bold")
    for name in columns:
        left = name == "trial"
        table.add_column(Text(heads[name]), justify="left" if left else "right", no_wrap=not left, overflow="fold")
    for row in rows[:fitting]:
        table.add_row(*(Text(row._asdict()[name]) for name in columns))
    others = len(rows) - fitting
    return [table, *([Text(f"and {others} more running", style="dim")] if others else [])]


def rows_that_fit(heights: Sequence[int], lines: int) -> int:
    """Return how many rows of these heights fit into `lines`. If not all fit, one line stays free for their count."""
    if sum(heights) <= lines:
        return len(heights)
    ends = accumulate(heights)
    return sum(end < lines for end in ends)
