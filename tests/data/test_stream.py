"""Packs made while training; what trains on them is tested with the stages."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import DataConfig
from minimind_ray.data import prepare
from minimind_ray.data.prepare import encoding_of, plan_units
from minimind_ray.data.stream import Stream
from minimind_ray.data.tokenizer import train_tokenizer

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("good", "bad", "fraction"), [(5, 1, 0.01), (300, 3, 0.01)])
def test_a_bad_row_in_a_short_piece_is_no_reason_to_stop(tmp_path: Path, good: int, bad: int, fraction: float) -> None:
    stream = make_stream(tmp_path, good, bad, fraction)
    assert stream.check_first()[1].startswith(f"{good + bad} rows = {good} kept + {bad} rejected + 0 held out")
    assert len(list((tmp_path / "rejects").iterdir())) == 1


@pytest.mark.parametrize(("good", "bad", "fraction"), [(5, 2, 0.01), (300, 4, 0.01), (300, 1, 0.0)])
def test_too_many_bad_rows_in_a_piece(tmp_path: Path, good: int, bad: int, fraction: float) -> None:
    stream = make_stream(tmp_path, good, bad, fraction)
    with pytest.raises(UserError, match=rf"rows.jsonl:{good + 1}: .*; {bad} of {good + bad} rows of this piece"):
        stream.check_first()


def test_a_damaged_file_stops(tmp_path: Path) -> None:
    whole = gzip.compress("".join(f'{{"text": "It is {i}."}}\n' for i in range(300)).encode())
    (tmp_path / "rows.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"damaged: .*rows.jsonl.gz; the rows after the damage are lost"):
        stream_of(tmp_path, "rows.jsonl.gz", 0.5).check_first()
    assert "1 rejected" in stream_of(tmp_path, "rows.jsonl.gz", 1.0).check_first()[1]


@pytest.mark.slow
def test_the_first_piece_says_what_a_token_takes(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, 3000, 0, 0.01)
    (unit,) = stream.units
    tokens = sum(len(table["tokens"][0]) for table in stream.unit_tables(0))
    assert stream.check_first()[0].bytes_per_token == pytest.approx(unit.size / tokens)
    # Less than a pack says nothing.
    few = make_stream(tmp_path, 3, 0, 0.01)
    assert few.check_first()[0] == few


@pytest.mark.parametrize("cached", [True, False])
def test_pieces_of_one_file_have_one_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool) -> None:
    monkeypatch.setattr(prepare, "UNIT_BYTES", 400)
    rows = [{"prompt": "a" * 40, "completion": "b"}] * 12 + [{"instruction": "a" * 40, "output": "b"}] * 12
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(train=str(path), val_fraction=0.0, cache_dir=str(tmp_path / "cache"))
    tokenizer = train_tokenizer(["It is 1."], 300)
    with pytest.raises(UserError, match=r"rows.jsonl:1\d: a row of format alpaca, but line 1 has format completion"):
        if cached:
            prepare.prepare("sft", config, "train", tokenizer)
        else:
            encoding, sources = encoding_of("sft", config, "train", tokenizer)
            stream = Stream(tuple(plan_units(sources, encoding)), encoding, 0, str(tmp_path / "rejects"))
            for unit in range(1, len(stream.units)):  # The first piece may be read by another process.
                list(stream.unit_tables(unit))


def make_stream(directory: Path, good: int, bad: int, fraction: float) -> Stream:
    lines = [f'{{"text": "It is {i}."}}\n' for i in range(good)] + ['{"txt": ""}\n'] * bad
    (directory / "rows.jsonl").write_text("".join(lines))
    return stream_of(directory, "rows.jsonl", fraction)


def stream_of(directory: Path, name: str, fraction: float) -> Stream:
    config = DataConfig(train=str(directory / name), val_fraction=0.0, max_reject_fraction=fraction)
    encoding, sources = encoding_of("pretrain", config, "train", train_tokenizer(["It is 1."], 300))
    return Stream(tuple(plan_units(sources, encoding)), encoding, 0, str(directory / "rejects"))
