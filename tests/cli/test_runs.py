"""`minimind-ray runs`: names are whole on every terminal, and columns go first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minimind_ray.cli.runs import COLUMNS, column_widths, fitting
from tests.cli.conftest import Command

pytestmark = pytest.mark.unit

NAMES = ["lr=0.0001,lora.rank=8,seed=0", "lr=0.0001,lora.rank=8,seed=1"]
ALL = list(COLUMNS)


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in NAMES:
        run = tmp_path / "sweep" / "trials" / name
        run.mkdir(parents=True)
        (run / "run.json").write_text(json.dumps({"state": "finished"}))
        (run / "config.yaml").write_text("stage: lora\n")
        (run / "metrics.jsonl").write_text(json.dumps({"step": 4, "loss": 8.71, "val/loss": 8.52}) + "\n")
    monkeypatch.chdir(tmp_path)
    return Path("sweep")


def row(name: str, state: str = "finished") -> dict[str, str]:
    return {title: "" for title in ALL} | {"run": name, "state": state, "loss": "8.7100", "step": "4"}


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (200, ALL),
        (80, ["run", "state", "step", "loss", "val loss"]),
        (60, ["run", "state", "val loss"]),
        (45, ["run"]),
        (20, ["run"]),
    ],
)
def test_the_least_important_columns_go_first(width: int, shown: list[str]) -> None:
    assert fitting(column_widths([row("a" * 38), row("b")]), width) == shown


def test_a_damaged_runs_sentence_takes_lines_and_no_column(sweep: Path) -> None:
    assert fitting(column_widths([row("a" * 20, state="damaged: " + "x" * 90)]), 90) == ALL


def test_names_in_wide_characters_count_as_wide() -> None:
    assert column_widths([row("月" * 10)])["run"] == 22


def test_names_are_whole_in_a_pipe_and_on_a_terminal(
    command: Command, sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    piped = command("runs", sweep).out
    assert all(title in piped for title in ALL) and "narrow" not in piped
    assert all(f"sweep/trials/{name} " in piped for name in NAMES)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("rich.console.Console.width", 60)
    narrow = command("runs", sweep).out
    assert all(f"sweep/trials/{name} " in narrow for name in NAMES)
    assert "the terminal is too narrow for stage, step, loss, val loss, last checkpoint; --json has all" in narrow
