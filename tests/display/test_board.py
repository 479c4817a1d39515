"""The live table at several sizes of a terminal, and what is read of running trials."""

from __future__ import annotations

import io
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from minimind_ray.display.board import Board, rows_that_fit, view
from minimind_ray.sweep.progress import Reading, SweepProgress
from minimind_ray.train.run import LONGEST_LINE, RunDirectory

pytestmark = pytest.mark.unit

NOON = datetime(2026, 1, 2, 12)


def screen(progress: SweepProgress, width: int, height: int = 24) -> list[str]:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)
    with console.capture() as capture:
        console.print(view(progress, 20.0, NOON, console))
    return [line.rstrip() for line in capture.get().splitlines()]


def sweep(*ids: str, count: int = 8) -> SweepProgress:
    progress = SweepProgress(count, "val/loss", "min", seeds=2)
    for id in ids:
        progress.started(id, 4000, {}, 0.0)
        progress.read(id, Reading(10.0, 1000, 1_000_000))
        progress.read(id, Reading(20.0, 1100, 1_412_000))
        progress.validated(id, {"val/loss": 2.5})
    return progress


def test_a_wide_terminal_shows_all() -> None:
    assert screen(sweep("lr=0.01,seed=0", "lr=0.003,seed=0", count=2), 100) == [
        "2 running, 0 of 2 ended",
        "best so far: val/loss 2.5000  lr=0.01,seed=0",
        "about 4:50 left, until 12:04",
        "trial                   step  val/loss  tokens/s  time left",
        "lr=0.01,seed=0   1,100/4,000    2.5000     41.2k       4:50",
        "lr=0.003,seed=0  1,100/4,000    2.5000     41.2k       4:50",
    ]


@pytest.mark.parametrize(
    ("width", "head"),
    [
        (80, "trial step val/loss tokens/s time left"),
        (56, "trial step val/loss time left"),
        (45, "trial step val/loss"),
        (30, "trial val/loss"),
        (18, "trial"),
    ],
)
def test_a_narrow_terminal_drops_columns_but_never_cuts_a_name(width: int, head: str) -> None:
    names = ("lr=0.01,wd=0.1,seed=0", "lr=0.01,wd=0.1,seed=1")
    lines = screen(sweep(*names), width)
    place = next(i for i, line in enumerate(lines) if line.startswith("trial"))
    assert " ".join(lines[place].split()) == head
    assert all(len(line) <= width for line in lines)
    first = [line.split()[0] for line in lines[place + 1 :]]
    assert "".join(first) == "".join(names)


def test_a_name_longer_than_the_terminal_goes_on_in_the_next_line() -> None:
    name = "train=" + 120 * "x" + ",seed=0"
    lines = screen(sweep(name), 60)
    place = next(i for i, line in enumerate(lines) if line.startswith("trial"))
    assert "val/loss" in lines[place]
    assert "".join(line.split()[0] for line in lines[place + 1 :]) == name


def test_a_low_terminal_shows_as_many_trials_as_fit_and_counts_the_others() -> None:
    progress = sweep(*(f"lr={i},seed=0" for i in range(20)), count=40)
    lines = screen(progress, 80, 12)
    # One line stays free for the cursor.
    assert len(lines) == 11 and lines[-1] == "and 14 more running"
    assert len(screen(progress, 80, 25)) == 24
    assert screen(progress, 80, 25)[-1].startswith("lr=19")
    assert screen(progress, 80, 4)[-1] == "and 20 more running"


def test_rows_of_several_lines() -> None:
    assert rows_that_fit([1, 1, 1], 3) == 3
    assert rows_that_fit([1, 1, 2], 3) == 2
    assert rows_that_fit([2, 2, 2], 3) == 1
    assert rows_that_fit([2, 2], 0) == 0


def test_the_end_of_metrics_jsonl_is_enough(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.last_metrics() is None
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "tok')
    assert run.last_metrics() is None
    lines = [json.dumps({"step": i, "tokens": 10 * i}) for i in range(LONGEST_LINE // 10)]
    file.write_text("\n".join(lines) + '\n{"step": 99')
    text = run.last_metrics()
    assert text and json.loads(text) == {"step": len(lines) - 1, "tokens": 10 * (len(lines) - 1)}
    stored = RunDirectory(f"file://{tmp_path}")
    assert stored.mirror and stored.last_metrics() == text


class Plan:
    """As much of a plan as the board looks at."""

    count, most_seeds = 2, 1

    def __init__(self, path: Path) -> None:
        from minimind_ray.config.load import load_config
        from minimind_ray.config.search import SearchConfig

        self.path, self.base, self.search = path, load_config("pretrain"), SearchConfig(budget_hours=1.0)


def board_on(path: Path, *, terminal: bool) -> tuple[Board, io.StringIO]:
    out = io.StringIO()
    plan: Any = Plan(path)
    return Board(plan, Console(file=out, force_terminal=terminal, width=100, height=20)), out


def test_without_a_terminal_there_is_a_line_for_each_trial_that_ends(tmp_path: Path) -> None:
    board, out = board_on(tmp_path, terminal=False)
    with board:
        for name, state in (("lr=1,seed=0", "finished"), ("lr=2,seed=0", "failed"), ("lr=3,seed=0", "waiting")):
            trial = tmp_path / "trials" / name
            RunDirectory(trial).write("run.json", json.dumps({"state": state, "error": "too hot"}))
            board.watch(trial, "started", {"steps": 10, "point": {}})
            for loss in (2.5, 2.0):
                board.watch(trial, "validated", {"val/loss": loss})
            board.watch(trial, "ended", {})
    assert out.getvalue().splitlines() == [
        "1/2  finished  lr=1,seed=0  val/loss 2.0000",
        "2/2  failed  lr=2,seed=0  val/loss 2.0000  too hot",
    ]


def test_on_a_terminal_running_trials_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minimind_ray.display import board as module

    monkeypatch.setattr(module, "REFRESH_S", 0.01)
    board, out = board_on(tmp_path, terminal=True)
    trial = tmp_path / "trials" / "lr=1,seed=0"
    trial.mkdir(parents=True)
    with board:
        board.watch(trial, "started", {"steps": 10, "point": {}})
        (trial / "metrics.jsonl").write_text("[damaged]\n")
        board.leaving.wait(0.03)
        (trial / "metrics.jsonl").write_text('{"step": 3, "tokens": 30, "loss": 1.0}\n')
        for _ in range(3000):
            if "3/10" in out.getvalue():
                break
            board.leaving.wait(0.01)
    assert "3/10" in out.getvalue()
    assert not board.live.is_started
