"""`data inspect`: its numbers are those of the encoded and packed rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import DataConfig
from minimind_ray.data.inspect import guess_stage, histogram, inspect_rows, runs
from minimind_ray.data.records import Reject, Row
from minimind_ray.data.tokenizer import Tokenizer, train_tokenizer

pytestmark = pytest.mark.unit

CONFIG = DataConfig(max_seq_len=16, pack_tokens=32)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([f"It is {i}." for i in range(100)], 400)


def rows(*values: dict[str, Any]) -> list[Row | Reject]:
    return [Row("f.jsonl", i, value) for i, value in enumerate(values, 1)]


def test_the_numbers_add_up(tokenizer: Tokenizer) -> None:
    texts = [f"It is {i}. " * (i % 5 + 1) for i in range(50)]
    bad = [{"text": ""}, {"text": 1}, {"text": " "}]
    inspection = inspect_rows("pretrain", rows(*({"text": t} for t in texts), *bad), tokenizer, CONFIG, samples=4)
    lengths = [len(ids) + 2 for ids in tokenizer.encode(texts)]
    assert inspection.lengths.tolist() == lengths
    parts = [-(-(n - 1) // 15) for n in lengths]  # each predicts 15 tokens at most
    assert (inspection.rows, inspection.tally.kept, inspection.tally.rejected) == (53, 50, 3)
    assert inspection.tally.split == sum(n > 1 for n in parts)
    assert inspection.documents == sum(parts)
    assert inspection.tokens == sum(lengths) + sum(parts) - 50
    assert inspection.counted == sum(lengths) - 50
    assert inspection.fill(32) == inspection.tokens / (inspection.packs * 32)
    assert 0.9 < inspection.fill(32) <= 1
    assert [(r.count, r.first.line, r.first.reason) for r in inspection.reasons] == [
        (2, 51, "text is empty"),
        (1, 52, "text is a number, not a string"),
    ]
    assert len(inspection.samples) == 4


def test_reasons_that_differ_in_numbers_are_one(tokenizer: Tokenizer) -> None:
    user = {"role": "user", "content": "It is"}
    values = [{"messages": [user] * n + [{"role": "user"}]} for n in range(3)]
    (reason,) = inspect_rows("sft", rows(*values), tokenizer, CONFIG).reasons
    assert (reason.count, reason.first.reason) == (3, "messages[0].content is missing")


@pytest.mark.parametrize(
    ("value", "stage"), [({"text": "a"}, "pretrain"), ({"messages": []}, "sft"), ({"chosen": [], "text": ""}, "dpo")]
)
def test_the_first_row_with_known_fields_tells_the_stage(value: dict[str, Any], stage: str) -> None:
    given = [Reject("f.jsonl", 1, "not valid JSON"), *rows({"prompt": "a"}, value, {"text": "a"})]
    guessed, again = guess_stage(iter(given), DataConfig())
    assert guessed == stage
    assert list(again) == given


def test_rows_without_known_fields_need_a_stage() -> None:
    with pytest.raises(
        UserError, match="none of the first 1 rows has a format that a stage learns from .*it has prompt.*--stage"
    ):
        guess_stage(rows({"prompt": "a"}), DataConfig())


def test_histogram_counts_every_document() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 1, 1000).astype(np.int32) + 2
    bins = histogram(lengths)
    assert sum(count for _, _, count in bins) == 1000
    assert (bins[0][0], bins[-1][1]) == (lengths.min(), lengths.max())
    assert all(before[1] + 1 == after[0] for before, after in zip(bins, bins[1:]))
    assert histogram(np.array([7, 7])) == [(7, 7, 2)]


def test_a_sample_is_cut_where_loss_begins_and_ends(tokenizer: Tokenizer) -> None:
    value = {"messages": [{"role": "user", "content": "It"}, {"role": "assistant", "content": "is"}]}
    config = DataConfig(max_seq_len=64, pack_tokens=64)
    ((document,),) = inspect_rows("sft", rows(value), tokenizer, config).samples
    assert runs(document, tokenizer) == [
        ("<|im_start|>user\nIt<|im_end|>\n<|im_start|>assistant\n", False),
        ("is<|im_end|>\n", True),
    ]


def test_the_commands(tmp_path: Path) -> None:
    from minimind_ray.cli import data
    from minimind_ray.cli import tokenizer as tokenizer_command

    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": f"It is {i}. 是{i}。"}) for i in range(200)]
    file.write_text("\n".join([*lines, "{", '{"text": ""}']), "utf-8")
    runner = CliRunner()
    trained = runner.invoke(
        tokenizer_command.app, ["train", str(file), "--out", str(tmp_path / "t"), "--vocab-size", "320"]
    )
    assert trained.exit_code == 0, trained.output
    assert "320 tokens" in trained.output
    assert "2 rows could not be read" in trained.output
    assert "in 4 held-out texts" in trained.output
    loaded = Tokenizer.load(tmp_path / "t")
    held_out = [f"It is {i}. 是{i}。" for i in (49, 99, 149, 199)]
    tokens = sum(map(len, loaded.encode(held_out)))
    assert f"{sum(map(len, held_out)) / tokens:.2f} characters" in trained.output

    shown = runner.invoke(data.app, ["inspect", str(file), "--tokenizer", str(tmp_path / "t"), "--max-seq-len", "12"])
    assert shown.exit_code == 0, shown.output
    assert "pretrain: 202 rows of format text = 200 kept + 2 rejected" in shown.output
    assert f"{file}:202: text is empty" in shown.output
    assert "data.max_seq_len 12" in shown.output


def test_text_per_token(tokenizer: Tokenizer) -> None:
    texts = ["It is 7.", "中文"]
    inspection = inspect_rows("pretrain", rows(*({"text": text} for text in texts)), tokenizer, CONFIG)
    assert inspection.per_token == (10 / inspection.tokens, 14 / inspection.tokens)
