from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minimind_ray.cli import tokenizer
from minimind_ray.cli.data import app
from minimind_ray.config.errors import UserError
from minimind_ray.data.tokenizer import train_tokenizer

pytestmark = pytest.mark.unit

TEXTS = [f"the fox number {i}" for i in range(100)]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    train_tokenizer(TEXTS, vocab_size=300).save(tmp_path / "tokenizer")
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (tmp_path / "x.jsonl").write_text("".join([*lines, "{\n"]))
    return [
        "prepare", str(tmp_path / "x.jsonl"), "--stage", "pretrain", "--tokenizer", str(tmp_path / "tokenizer"),
        "--cache-dir", str(tmp_path / "cache"), "--no-ray", "--max-seq-len", "32", "--pack-tokens", "64",
    ]  # fmt: skip


def rows_of(output: str) -> dict[str, list[str]]:
    """The table's lines by their label."""
    table = [line.strip().rsplit(maxsplit=2) for line in output.splitlines() if line.startswith(" ")]
    return {label: values for label, *values in table[1:]}


def test_the_table_adds_up_and_a_second_run_says_that_it_did_nothing(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, [*arguments, "--set", "data.val_fraction=0.2"], catch_exceptions=False)
    assert result.exit_code == 0
    rows = rows_of(result.output)
    assert rows["rows read"] == ["101", "101"]
    for side in (0, 1):
        counts = [int(rows[label][side]) for label in ("= kept", "+ rejected", "+ held out")]
        assert sum(counts) == 101
    assert int(rows["= kept"][0]) + int(rows["= kept"][1]) == 100
    assert rows["units made now"] == ["1", "1"]
    assert "rejected rows: " in result.output
    assert "nothing to do" not in result.output

    again = CliRunner().invoke(app, [*arguments, "--set", "data.val_fraction=0.2"], catch_exceptions=False)
    assert rows_of(again.output)["units found in the cache"] == ["1", "1"]
    assert "nothing to do: all data was in the cache" in again.output


def test_a_bad_setting_is_the_users_error(arguments: list[str]) -> None:
    with pytest.raises(UserError, match="pack_tokens is 16, less than data.max_seq_len 32"):
        CliRunner().invoke(app, [*arguments, "--pack-tokens", "16"], catch_exceptions=False)


def test_relative_paths_lead_to_the_storage_of_a_cluster(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("MINIMIND_STORAGE", str(tmp_path))
    train = ["train", "x.jsonl", "--out", "own", "--vocab-size", "300"]
    made = CliRunner().invoke(tokenizer.app, train, catch_exceptions=False)
    assert f"{tmp_path}/own: 3" in made.output
    seen = CliRunner().invoke(app, ["inspect", "x.jsonl", "--tokenizer", "own"], catch_exceptions=False)
    assert "101 rows of format text = 100 kept + 1 rejected" in seen.output
    assert not list((tmp_path / "elsewhere").iterdir())


def test_inspect_reads_text_files_as_they_are_set(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "x.txt").write_text("one\n\ntwo\n")
    command = ["inspect", str(tmp_path / "x.txt"), "--tokenizer", str(tmp_path / "tokenizer")]
    assert "2 rows of format text" in CliRunner().invoke(app, command, catch_exceptions=False).output
    command += ["--set", "data.text_files=whole"]
    assert "1 rows of format text" in CliRunner().invoke(app, command, catch_exceptions=False).output
