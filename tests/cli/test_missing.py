"""A command that lacks several things names all of them, and a command that would work with the files here."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest

from minimind_ray.config.stages import STAGES
from minimind_ray.stages.here import base_here, data_here, folder_here, tokenizer_here
from minimind_ray.stages.recipe import read_recipe
from minimind_ray.stages.recipe_plan import with_files_of
from tests.cli.conftest import Command
from tests.jobs import rows_of, write_jsonl

pytestmark = pytest.mark.unit


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_run(path: Path, stage: str, file: str = "config.json", age: int = 0) -> None:
    checkpoint = path / "checkpoints/step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / file).write_text("{}")
    (path / "config.yaml").write_text(f"stage: {stage}\n")
    (path / "run.json").write_text(json.dumps({"state": "finished"}))
    os.utime(path / "run.json", (1000 - age, 1000 - age))


def fill(here: Path) -> None:
    for name, stage in {"pre": "pretrain", "old": "sft", "chat": "sft"}.items():
        make_run(here / "runs" / name, stage, age={"old": 10}.get(name, 0))
    make_run(here / "runs/adapter", "lora", file="adapter_config.json")
    for name, stage in {"a": "sft", "dpo": "dpo", "pretrain": "pretrain", "val": "pretrain"}.items():
        write_jsonl(here / "dataset" / f"{name}.jsonl", rows_of(stage, 3))
    (here / "tokens").mkdir()
    (here / "tokens/tokenizer.json").write_text("{}")


def test_what_lies_here_is_found(here: Path) -> None:
    assert base_here(STAGES["dpo"]) is data_here(STAGES["dpo"]) is tokenizer_here() is folder_here([("a",)]) is None
    fill(here)
    bases = {name: base_here(record) for name, record in STAGES.items() if record.needs_base}
    assert bases == {"sft": "runs/pre", "lora": "runs/chat", "dpo": "runs/chat"}
    data = {name: data_here(record) for name, record in STAGES.items()}
    assert data == {
        "pretrain": "dataset/pretrain.jsonl", "sft": "dataset/a.jsonl", "lora": "dataset/a.jsonl",
        "dpo": "dataset/dpo.jsonl",
    }  # fmt: skip
    assert tokenizer_here() == "tokens"
    assert folder_here([("a.jsonl",), ("none", "d*.jsonl")]) == "dataset"


def test_all_that_is_missing_is_named_at_once(command: Command, here: Path) -> None:
    given = ["tune", "dpo", "--beta", "0.05,0.1"]
    said = command(*given)
    assert said.code == 1 and said.err == (
        "error: dpo needs a model to start from (--init-from) and training data (--train): minimind-ray tune dpo "
        "--beta 0.05,0.1 --init-from runs/sft --train dataset/dpo.jsonl (runs/sft and dataset/dpo.jsonl: "
        "only examples, nothing in this folder fits)\n"
    )
    fill(here)
    assert command(*given).err == (
        "error: dpo needs a model to start from (--init-from) and training data (--train): minimind-ray tune dpo "
        "--beta 0.05,0.1 --init-from runs/chat --train dataset/dpo.jsonl\n"
    )
    said = command("train", "pretrain", "--dry-run").err
    assert "pretrain needs training data (--train) and a tokenizer (--tokenizer): minimind-ray train pretrain" in said
    assert "--train dataset/pretrain.jsonl --tokenizer tokens\n" in said


def test_a_recipe_is_answered_with_a_command_for_the_files_here(command: Command, here: Path) -> None:
    (here / "r.yaml").write_text(
        "name: r\ntokenizer: nowhere\ninstead: {new.jsonl: a.jsonl}\nstages:\n"
        "- {name: pretrain, settings: {data: {train: pretrain.jsonl}}}\n"
        "- {name: sft, settings: {data: {train: new.jsonl}}}"
    )
    said = command("run", "r", "--no-ray")
    assert said.code == 1 and said.out == "recipe: ./r.yaml\n" and "with what is here" not in said.err
    assert (
        "pretrain.jsonl: no such file" in said.err and "new.jsonl: no such file" in said.err and "nowhere" in said.err
    )
    fill(here)
    (here / "dataset").rename(here / "other data")
    said = command("run", "r", "--no-ray").err
    assert said.endswith(
        "with what is here: minimind-ray run r --no-ray --data-dir 'other data' --set data.tokenizer=tokens\n"
    )
    words = shlex.split(said.partition("with what is here: minimind-ray ")[2])
    assert "no such file" not in command(*words).err


def test_an_older_file_is_used_where_only_it_is_here(here: Path) -> None:
    recipe = read_recipe(Path(__file__).parents[2] / "experiments/zero.yaml")
    for name in ("pretrain_hq.jsonl", "sft_mini_512.jsonl", "sft_t2t_mini.jsonl"):
        write_jsonl(here / "dataset" / name, [])
    notes: list[str] = []
    found = with_files_of(recipe, str(here / "dataset"), notes.append)
    assert [step.settings["data"]["train"] for step in found.stages] == ["pretrain_hq.jsonl", "sft_t2t_mini.jsonl"]
    assert notes == [f"data: {here}/dataset has no pretrain_t2t_mini.jsonl; using pretrain_hq.jsonl"]
