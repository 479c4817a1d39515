"""`minimind-ray train`: what is seen while it runs, and its exit code."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from minimind_ray.cli.progress import watching
from minimind_ray.data.storage import StoreError
from minimind_ray.train.context import PlainContext
from minimind_ray.train.run import RunDirectory
from tests.cli.conftest import Command
from tests.jobs import make_config, make_job, start

pytestmark = pytest.mark.slow


def test_a_run_that_was_stopped_is_no_success(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_config(tmp_path, rows=100)
    arguments = [
        "train", "pretrain", "--no-ray", "--train", tmp_path / "pretrain.jsonl", "--tokenizer", tmp_path / "tokenizer",
        "--preset", "tiny", "--pack-tokens", 256, "--batch-tokens", 512, "--max-seq-len", 64, "--max-steps", 3,
        "--wandb", "off", "--set", f"data.cache_dir={tmp_path / 'cache'}", "--out", tmp_path / "a [1]",
    ]  # fmt: skip
    monkeypatch.setattr(PlainContext, "should_stop", lambda self: True)
    stopped = command(*arguments)
    assert stopped.code == 130
    assert "stopped after 1 steps" in stopped.out and "the same command and --resume" in stopped.out
    assert f"-> {tmp_path}/a [1]\n" in stopped.out
    monkeypatch.undo()
    assert command(*arguments, "--resume").code == 0


def test_places_that_cannot_be_written_to_are_told_first(command: Command, tmp_path: Path) -> None:
    make_config(tmp_path, rows=100)
    rows, tokenizer = tmp_path / "pretrain.jsonl", tmp_path / "tokenizer"
    told = command("train", "pretrain", "--no-ray", "--train", rows, "--tokenizer", tokenizer, "--out", rows)
    assert told.code == 1 and "is a file: name a directory" in told.err
    before = (tokenizer / "tokenizer.json").read_bytes()
    told = command("tokenizer", "train", rows, "--out", tokenizer)
    assert told.code == 1 and "holds a tokenizer already" in told.err
    assert (tokenizer / "tokenizer.json").read_bytes() == before


def test_a_store_that_stays_away_does_not_keep_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path, rows=60)
    start(job)

    def away(run: RunDirectory, name: str) -> Path:
        raise StoreError("away")

    monkeypatch.setattr(RunDirectory, "file", away)
    with pytest.raises(KeyboardInterrupt), watching(job, Console()):
        raise KeyboardInterrupt
