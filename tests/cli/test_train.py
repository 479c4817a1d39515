"""`minimind-ray train`: what is seen while it runs, and its exit code."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from minimind_ray.config.load import to_yaml
from minimind_ray.data.storage import StoreError
from minimind_ray.display.progress import watching
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
    assert "stopped after 1 steps" in stopped.out and "the same command with --resume" in stopped.out
    assert f"-> {tmp_path}/a [1]\n" in stopped.out
    monkeypatch.undo()
    assert command(*arguments, "--resume").code == 0


def test_a_resume_says_how_to_go_on_and_the_commands_it_gives_work(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_config(tmp_path, rows=100)
    out = tmp_path / "a run"

    def again(*arguments: object) -> str:
        said = command("train", "pretrain", "--no-ray", *arguments, "--resume")
        assert said.code == 1 and said.err.count("\n") == 1
        return said.err

    def given(text: str, after: str) -> list[str]:
        """The arguments of the command in a sentence that stands behind these words."""
        words = shlex.split(text.partition(after)[2].partition("; for other")[0].partition(". The")[0])
        assert words[0] == "minimind-ray"
        return words[1:]

    settings = {"train.max_steps": 2, "data.cache_dir": tmp_path / "cache", "eval.samples": 0}
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    first = [
        "train", "pretrain", "--no-ray", "--train", tmp_path / "pretrain.jsonl", "--tokenizer", tmp_path / "tokenizer",
        "--preset", "tiny", "--pack-tokens", 256, "--batch-tokens", 512, "--max-seq-len", 64, *sets, "--out", out,
    ]  # fmt: skip
    assert command(*first).code == 0
    alone = again("--out", out)
    assert "cannot be resumed with other settings: batch.tokens, data.max_seq_len," in alone
    with monkeypatch.context() as patched:  # A finished run is finished without Ray.
        patched.setattr("minimind_ray.on_ray.host.host", lambda *_, **__: pytest.fail("starts Ray"))
        done = command(*given(alone, "its own settings: "))
    assert done.code == 0 and f"{out} is finished. " in done.out and "--set train.max_steps=N" in done.out

    config = out / "config.yaml"
    assert "optim.lr 0.1 (the run has 0.0005). To continue with its own" in again("--config", config, "--lr", 0.1)
    more = again("--config", config, "--max-steps", 3)
    assert "train.max_steps 3 (the run has 2)" in more
    longer = command(*given(more, "from its result: "), "--no-ray")
    assert longer.code == 0 and "finished after 3 steps" in longer.out
    assert RunDirectory(f"{out}-longer").info()["state"] == "finished"

    shutil.rmtree(out / "checkpoints")
    anew = command("train", "pretrain", "--no-ray", "--config", config, "--resume")
    assert (
        anew.code == 0 and f"{out}: finished; there is no checkpoint, so training starts at the first step" in anew.out
    )


def test_a_gpu_where_there_is_none_is_refused_before_anything_is_written(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, rows=100)
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    arguments = ["train", "pretrain", "--config", tmp_path / "config.yaml", "--gpus-per-worker", 1]
    said = command(*arguments, "--no-ray")
    assert said.code == 1 and "error: scale.gpus_per_worker is 1, and torch finds no GPU" in said.err
    assert not Path(config.out).exists() and not (tmp_path / "cache").exists()
    assert "this machine has no GPU" in command(*arguments, "--dry-run").out
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert "this machine has no GPU" not in command(*arguments, "--dry-run").out


def test_places_that_cannot_be_written_to_are_told_first(command: Command, tmp_path: Path) -> None:
    make_config(tmp_path, rows=100)
    rows, tokenizer = tmp_path / "pretrain.jsonl", tmp_path / "tokenizer"
    told = command("train", "pretrain", "--no-ray", "--train", rows, "--tokenizer", tokenizer, "--out", rows)
    assert told.code == 1 and "is a file: choose another directory" in told.err
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


def test_what_is_missing_is_said_before_ray_starts(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_ray(cpus: int | None = None) -> None:
        raise AssertionError("Ray starts")

    monkeypatch.setattr("minimind_ray.on_ray.session.start_ray", start_ray)
    make_config(tmp_path, rows=20)
    names = {"--train": "pretrain.jsonl", "--tokenizer": "tokenizer", "--val": "pretrain.jsonl"}
    sets = ["--set", f"data.cache_dir={tmp_path / 'cache'}", "--wandb", "off", "--out", tmp_path / "out"]
    for option in (*names, "--init-from"):
        given = {key: tmp_path / name for key, name in names.items()} | {option: tmp_path / "none"}
        words = [word for pair in given.items() for word in pair]
        for how in (["train", "pretrain"], ["train", "pretrain", "--dry-run"], ["tune", "pretrain", "--lr", "1,2"]):
            said = command(*how, *words, *sets)
            assert said.code == 1 and said.err.count("\n") == 1 and f"{tmp_path}/none" in said.err, (how, option)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["/dev/null", "/proc/none/run", "-", "~no-such-user/run", "n" * 300])
def test_a_dry_run_refuses_the_places_that_a_run_refuses(command: Command, tmp_path: Path, out: str) -> None:
    make_config(tmp_path, rows=20)
    arguments = ["--train", tmp_path / "pretrain.jsonl", "--tokenizer", tmp_path / "tokenizer", "--wandb", "off"]
    real, dry = (command("train", "pretrain", *how, *arguments, "--out", out) for how in (["--no-ray"], ["--dry-run"]))
    assert real.code == dry.code == 1 and real.err == dry.err and real.err.count("\n") == 1
