"""`minimind-ray diagnose`: words in two languages, JSON, and refusals; and what is printed at the end of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.diagnose.recorded import unpack
from tests.jobs import make_config
from tests.sweep.synthetic import make_sweep


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("recorded"))


def test_the_command_prints_words_in_two_languages_and_json(command: Command, runs: Path) -> None:
    run = runs / "overfitting"
    english, chinese = command("diagnose", run), command("diagnose", run, "--lang", "zh")
    assert english.code == chinese.code == 0
    assert "warning: over-fitting\n" in english.out and "try: Stop at about step" in english.out
    assert "警告: 过拟合\n" in chinese.out and "建议：" in chinese.out
    found = json.loads(command("diagnose", run, "--json").out)
    finding = next(each for each in found if each["rule"] == "overfitting")
    assert finding["setting"] == "train.max_steps" and finding["value"] == finding["steps"][0]
    assert finding["evidence"]["last"] > finding["evidence"]["lowest"]
    assert "no findings" in command("diagnose", runs / "sft").out


def test_what_is_no_run_is_refused(command: Command, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("stage: nonsense\n")
    for arguments, why in (
        ([tmp_path / "missing"], "holds no run"),
        ([tmp_path], "stage is 'nonsense'"),
        ([runs / "sft", "--lang", "fr"], "--lang is 'fr'"),
    ):
        refused = command("diagnose", *arguments)
        assert refused.code == 1 and why in refused.err and refused.err.count("\n") == 1


def test_a_sweep_is_recognised(command: Command, tmp_path: Path) -> None:
    path = make_sweep(tmp_path / "s", stage="sft", axes={"optim.lr": "1e-5,1e-4"}, quality=lambda point: 3.0, seeds=1)
    assert command("diagnose", path).out.startswith("note: one seed\n")
    assert json.loads(command("diagnose", path, "--json").out)["trials"] == 2


@pytest.mark.slow
def test_a_run_prints_its_findings_at_its_end(command: Command, tmp_path: Path) -> None:
    make_config(tmp_path, rows=100)
    done = command(
        "train", "pretrain", "--no-ray", "--train", tmp_path / "pretrain.jsonl", "--tokenizer", tmp_path / "tokenizer",
        "--preset", "tiny", "--pack-tokens", 128, "--batch-tokens", 128, "--max-seq-len", 64, "--max-steps", 20,
        "--warmup", 10, "--wandb", "off", "--set", f"data.cache_dir={tmp_path / 'cache'}", "--set", "eval.samples=0",
        "--set", "data.val_fraction=0.5", "--set", "eval.every=20", "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 0
    assert "  note: The warm-up takes 10 steps, 50% of the run's 20 steps.\n" in done.out
    assert f"minimind-ray diagnose {tmp_path / 'run'}\n" in done.out
