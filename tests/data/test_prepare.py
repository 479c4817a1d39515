from __future__ import annotations

import gzip
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import DataConfig
from minimind_ray.data import prepare as module
from minimind_ray.data.pack import Pack
from minimind_ray.data.prepare import (
    Encoding,
    Prepared,
    Progress,
    Unit,
    find_prepared,
    plan_units,
    prepare,
    run_units_here,
)
from minimind_ray.data.records import Row, discover, read_rows
from minimind_ray.data.store import PackStore, UnitStats
from minimind_ray.data.tokenizer import Tokenizer, train_tokenizer

pytestmark = pytest.mark.unit

TEXTS = [f"the {noun} number {i} 月" for i, noun in enumerate(["fox", "river", "lantern", "poem"] * 60)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, vocab_size=320)


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of about 20 rows; and files count as old enough at once."""
    monkeypatch.setattr(module, "UNIT_BYTES", 800)
    monkeypatch.setattr(module, "FRESH_SECONDS", -1)


def jsonl(texts: Sequence[str]) -> bytes:
    return b"".join(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def config(tmp_path: Path, train: Path | list[Path], **fields: Any) -> DataConfig:
    files = [str(path) for path in (train if isinstance(train, list) else [train])]
    defaults = {"val_fraction": 0.0, "cache_dir": str(tmp_path / "cache"), "max_seq_len": 32, "pack_tokens": 64}
    return DataConfig(train=files, **{**defaults, **fields})


def texts_of(store: PackStore, tokenizer: Tokenizer) -> list[str]:
    """The text of every document."""

    def documents(pack: Pack) -> Iterator[str]:
        start = 0
        for length in pack.lengths:
            yield tokenizer.decode(pack.tokens[start + 1 : start + length - 1].tolist())
            start += length

    return [text for pack in store for text in documents(pack)]


def rejects_of(prepared: Prepared) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(prepared.rejects).read_text("utf-8").splitlines()]


class Runner:
    """Runs units here and remembers which."""

    def __init__(self) -> None:
        self.ran: list[Unit] = []

    def __call__(self, units: Sequence[Unit], encoding: Encoding) -> Iterator[UnitStats]:
        for unit in units:
            self.ran.append(unit)
            yield from run_units_here([unit], encoding)


SUFFIXES = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".json", ".json.gz", ".csv", ".tsv.zst", ".txt", ".txt.gz"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_document_is_in_the_packs_once(tmp_path: Path, tokenizer: Tokenizer, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=50)
    else:
        lines = "\n".join(TEXTS)
        content = {
            ".jsonl": jsonl(TEXTS),
            ".json": json.dumps([{"text": text} for text in TEXTS]).encode(),
            ".csv": f"text\n{lines}".encode(),
            ".tsv": f"text\n{lines}".encode(),
            ".txt": lines.encode(),
        }[suffix.removesuffix(".gz").removesuffix(".zst")]
        write(path, gzip.compress(content) if suffix.endswith(".gz") else content)
        if suffix.endswith(".zst"):
            write(path, zstandard.compress(content))
    prepared = prepare("pretrain", config(tmp_path, path), "train", tokenizer)
    store = PackStore(prepared.path)
    assert Counter(texts_of(store, tokenizer)) == Counter(TEXTS)
    total = prepared.manifest.total
    assert (total("rows"), total("kept"), total("rejected"), total("held_out")) == (240, 240, 0, 0)
    assert (store.n_documents, store.n_packs) == (240, prepared.manifest.n_packs)
    assert store.n_tokens == sum(len(pack.tokens) for pack in store)
    assert store.manifest.total("counted_tokens") == sum(pack.counted for pack in store)
    assert max(len(pack.tokens) for pack in store) <= 64
    assert 0.8 < prepared.fullness <= 1
    assert prepared.made == {".jsonl": 11, ".parquet": 5, ".txt": 8}.get(suffix, 1)


def test_what_is_prepared_is_found_without_a_write(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "x.jsonl", jsonl(TEXTS))
    settings = config(tmp_path, path)

    def find() -> Any:
        before = sorted(tmp_path.rglob("*"))
        found = find_prepared("pretrain", settings, "train", tokenizer)
        assert sorted(tmp_path.rglob("*")) == before
        return found

    assert find() is None
    prepared = prepare("pretrain", settings, "train", tokenizer)
    assert find() == prepared.manifest
    write(path, jsonl(TEXTS[1:]))
    assert find() is None


def test_rejects_have_their_true_lines(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = jsonl(TEXTS).splitlines(keepends=True)
    bad = {3: b"{\n", 100: b'{"text": 1}\r\n', 101: b"\xff\n", 200: b'{"text": " "}\n', 240: b'{"other": 1}'}
    lines = [bad.get(number, line) for number, line in enumerate(lines, 1)]
    lines.insert(50, b" \r\n")  # Blank lines count as lines, not as rows.
    path = write(tmp_path / "x.jsonl", b"\xef\xbb\xbf" + b"".join(lines))
    prepared = prepare("pretrain", config(tmp_path, path, max_reject_fraction=0.1), "train", tokenizer)
    total = prepared.manifest.total
    assert (total("rows"), total("kept"), total("rejected")) == (240, 235, 5)
    rejects = {reject["line"]: reject["reason"] for reject in rejects_of(prepared)}
    assert sorted(rejects) == [3, 101, 102, 201, 241]
    assert "not valid JSON" in rejects[3]
    assert "text is a number" in rejects[101]
    assert "invalid UTF-8" in rejects[102]
    assert {reject["file"] for reject in rejects_of(prepared)} == {str(path)}


def test_a_second_run_has_nothing_to_do(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    settings_ = config(tmp_path, write(tmp_path / "x.jsonl", jsonl(TEXTS)))
    first = prepare("pretrain", settings_, "train", tokenizer)
    monkeypatch.setattr(module, "_scan", None)  # Nor are files hashed again.
    runner = Runner()
    second = prepare("pretrain", settings_, "train", tokenizer, runner)
    assert (second.path, second.manifest) == (first.path, first.manifest)
    assert (second.made, second.reused, runner.ran) == (0, 11, [])
    assert "nothing to do" in second.summary()


def test_a_change_redoes_only_what_it_changed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    a, b = write(tmp_path / "a.jsonl", jsonl(TEXTS[:120])), write(tmp_path / "b.jsonl", jsonl(TEXTS[120:]))
    settings_ = config(tmp_path, [a, b])
    first = prepare("pretrain", settings_, "train", tokenizer)
    assert first.made == 12

    write(b, jsonl([*TEXTS[120:], "appended"]))
    appended = prepare("pretrain", settings_, "train", tokenizer, runner := Runner())
    assert [unit.source.path for unit in runner.ran] == [str(b)]
    assert (appended.made, appended.reused) == (1, 11)
    assert Counter(texts_of(PackStore(appended.path), tokenizer)) == Counter([*TEXTS, "appended"])

    write(a, jsonl(["the cat number 0 月", *TEXTS[1:120]]))
    os.utime(a, ns=(0, 0))
    changed = prepare("pretrain", settings_, "train", tokenizer, runner := Runner())
    assert {unit.source.path for unit in runner.ran} == {str(a)}
    assert (changed.made, changed.reused) == (1, 11)

    moved = tmp_path / "c.jsonl"
    b.rename(moved)
    assert prepare("pretrain", config(tmp_path, [a, moved]), "train", tokenizer).made == 0


def test_the_same_bytes_elsewhere_keep_their_own_name_and_lines(tmp_path: Path, tokenizer: Tokenizer) -> None:
    content = b"{\n" + jsonl(TEXTS[:40])
    a, b = write(tmp_path / "a.jsonl", content), write(tmp_path / "b.jsonl", content)
    prepared = prepare("pretrain", config(tmp_path, [a, b], max_reject_fraction=0.1), "train", tokenizer)
    assert prepared.made == 2  # The two units of either file, once.
    assert [(reject["file"], reject["line"]) for reject in rejects_of(prepared)] == [(str(a), 1), (str(b), 1)]
    assert PackStore(prepared.path).n_documents == 80


def test_whatever_decides_the_packs_is_in_their_key(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "x.jsonl", jsonl(TEXTS[:10]))

    def keys(
        stage: Any = "pretrain", with_: Tokenizer = tokenizer, split: Any = None, **fields: Any
    ) -> tuple[str, ...]:
        encoding = Encoding(stage, config(tmp_path, path, **fields), with_, split)
        (unit,) = plan_units(discover(str(path)), encoding)
        return unit.key

    variants = [
        keys(),
        keys("sft"),
        keys(with_=train_tokenizer(TEXTS, 330)),
        keys(split="train", val_fraction=0.1),
        keys(split="val", val_fraction=0.1),
        keys(split="val", val_fraction=0.2),
        keys(max_seq_len=31),
        keys(pack_tokens=65),
        keys(long_documents="truncate"),
    ]
    assert keys() == variants[0]
    assert keys(max_reject_fraction=0.5, val_fraction=0.1, cache_dir=str(tmp_path / "other")) == variants[0]
    assert keys(text_files="whole") == variants[0]
    monkeypatch.setattr(module, "ENCODING_VERSION", -1)
    assert len({*variants, keys()}) == 10


def test_text_files_by_lines_or_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "x.txt", "\n".join(TEXTS[:30]).encode())
    by_lines = prepare("pretrain", config(tmp_path, path), "train", tokenizer)
    whole = prepare("pretrain", config(tmp_path, path, text_files="whole"), "train", tokenizer)
    assert (by_lines.made, by_lines.manifest.total("rows")) == (1, 30)
    assert (whole.made, whole.manifest.total("rows")) == (1, 1)
    assert "".join(texts_of(PackStore(whole.path), tokenizer)).count("\n") == 29
    assert prepare("pretrain", config(tmp_path, path), "train", tokenizer).made == 0


@pytest.mark.parametrize("indent", [None, 1])
def test_a_rejected_row_of_an_array_has_its_place(tmp_path: Path, tokenizer: Tokenizer, indent: int | None) -> None:
    rows = [{"text": text} if number != 100 else {"text": 1} for number, text in enumerate(TEXTS)]
    path = write(tmp_path / "x.json", json.dumps(rows, indent=indent).encode())
    prepared = prepare("pretrain", config(tmp_path, path), "train", tokenizer)
    (reject,) = rejects_of(prepared)
    assert (reject["file"], reject["line"]) == (str(path), 302 if indent else 101)


def test_the_validation_split_is_by_content(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shuffled = [*TEXTS, *TEXTS]
    random.Random(0).shuffle(shuffled)
    a, b = write(tmp_path / "a.jsonl", jsonl(TEXTS)), write(tmp_path / "b.jsonl", jsonl(shuffled))
    sides: dict[Any, Counter[str]] = {}
    for path, n in ((a, 240), (b, 480)):
        settings_ = config(tmp_path, path, val_fraction=0.2)
        for split in ("train", "val"):
            prepared = prepare("pretrain", settings_, split, tokenizer)
            total = prepared.manifest.total
            assert total("rows") == total("kept") + total("held_out") == n
            sides[path, split] = Counter(texts_of(PackStore(prepared.path), tokenizer))
            assert sides[path, split].total() == total("kept")
    train, val = sides[a, "train"], sides[a, "val"]
    assert train + val == Counter(TEXTS)
    assert 24 < val.total() < 72
    assert sides[b, "val"] == Counter({text: 2 for text in val})
    assert sides[b, "train"] == Counter({text: 2 for text in train})


def test_with_validation_files_nothing_is_held_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    train, val = write(tmp_path / "t.jsonl", jsonl(TEXTS[:200])), write(tmp_path / "v.jsonl", jsonl(TEXTS[200:]))
    settings_ = config(tmp_path, train, val=str(val), val_fraction=0.5)
    assert prepare("pretrain", settings_, "train", tokenizer).manifest.total("kept") == 200
    assert prepare("pretrain", settings_, "val", tokenizer).manifest.total("kept") == 40


def test_too_many_rejects_stop_with_the_commonest_reason(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "x.jsonl", b'{"text": 1}\n' + b"{]\n" * 3 + jsonl(TEXTS))
    with pytest.raises(UserError) as error:
        prepare("pretrain", config(tmp_path, path), "train", tokenizer)
    assert "data.train: 4 of 244 rows cannot be used, more than data.max_reject_fraction 0.01" in str(error.value)
    assert (
        f"3 times: not valid JSON: Expecting property name enclosed in double quotes at column 2 (as in {path}:2)"
        in (str(error.value))
    )
    rejects = str(error.value).split("correct the rows that ")[1].split(" lists")[0]
    assert len(Path(rejects).read_text().splitlines()) == 4
    prepared = prepare("pretrain", config(tmp_path, path, max_reject_fraction=0.02), "train", tokenizer)
    assert (prepared.made, prepared.rejects) == (0, rejects)
    with pytest.raises(UserError, match="cannot be used"):  # What is in the cache is held to the limit too.
        prepare("pretrain", config(tmp_path, path), "train", tokenizer)


def test_a_file_in_both_splits_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "rows" / "t.jsonl", jsonl(TEXTS[:200]))
    val = write(tmp_path / "rows" / "v.jsonl", jsonl(TEXTS[200:]))
    with pytest.raises(UserError, match=r"v.jsonl is in data.train and in data.val, but .* without it$"):
        prepare("pretrain", config(tmp_path, tmp_path / "rows", val=str(val)), "train", tokenizer)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".parquet"])
def test_a_damaged_file_stops_whatever_is_lost(tmp_path: Path, tokenizer: Tokenizer, suffix: str) -> None:
    whole = write(tmp_path / "whole.jsonl", jsonl([f"{i}" for i in range(5000)]))
    path = tmp_path / f"x{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=20)
        content = bytearray(path.read_bytes())
        content[len(content) // 4 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 4)
    else:
        content = gzip.compress(jsonl(TEXTS))[:100]
    write(path, bytes(content))
    for fraction in (0.0, 0.5):  # It is one row of thousands that cannot be used; how many are lost is not known.
        with pytest.raises(UserError, match=rf"damaged: {path}; .*data.max_reject_fraction to 1") as error:
            prepare("pretrain", config(tmp_path, [whole, path], max_reject_fraction=fraction), "train", tokenizer)
        assert str(whole) not in str(error.value)
    prepared = prepare("pretrain", config(tmp_path, [whole, path], max_reject_fraction=1.0), "train", tokenizer)
    assert prepared.manifest.total("kept") > 5000 and "damaged" in Path(prepared.rejects).read_text()


def test_a_truncated_file_keeps_the_rows_before_the_break(tmp_path: Path, tokenizer: Tokenizer) -> None:
    numbers = random.Random(0)
    content = gzip.compress(jsonl([str(numbers.random()) for _ in range(5000)]))
    path = write(tmp_path / "x.jsonl.gz", content[: len(content) // 2])
    prepared = prepare("pretrain", config(tmp_path, path, max_reject_fraction=1.0), "train", tokenizer)
    assert prepared.manifest.total("kept") > 2000
    (reject,) = rejects_of(prepared)
    assert reject["line"] == prepared.manifest.total("rows")
    assert "truncated" in reject["reason"]


def test_empty_files_among_others_do_no_harm_and_alone_are_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    empty = write(tmp_path / "empty.jsonl", b"")
    blank = write(tmp_path / "blank.jsonl", b"\n \r\n")
    nothing = write(tmp_path / "nothing.jsonl.gz", b"")
    full = write(tmp_path / "full.jsonl", jsonl(TEXTS))
    prepared = prepare("pretrain", config(tmp_path, [empty, blank, nothing, full]), "train", tokenizer)
    assert prepared.manifest.total("kept") == 240
    with pytest.raises(UserError, match="data.train: no rows, only empty files, in .*blank.jsonl"):
        prepare("pretrain", config(tmp_path, [empty, blank, nothing]), "train", tokenizer)


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "x.parquet", b"not Parquet")
    with pytest.raises(UserError, match="x.parquet: cannot be read"):
        prepare("pretrain", config(tmp_path, path), "train", tokenizer)


def test_a_broken_run_leaves_whole_units_only(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings_ = config(tmp_path, write(tmp_path / "x.jsonl", jsonl(TEXTS)))
    table, calls = module.packs_table, Counter[str]()

    def breaks(*args: Any) -> pa.Table:
        calls["packs_table"] += 1
        if calls["packs_table"] == 5:
            raise KeyboardInterrupt
        return table(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "packs_table", breaks)
        prepare("pretrain", settings_, "train", tokenizer)
    units = list((tmp_path / "cache" / "units").iterdir())
    assert len(units) == 4 * 3
    assert not (tmp_path / "cache" / "datasets").exists()
    prepared = prepare("pretrain", settings_, "train", tokenizer)
    assert (prepared.made, prepared.reused) == (7, 4)
    assert Counter(texts_of(PackStore(prepared.path), tokenizer)) == Counter(TEXTS)


def test_what_a_killed_process_left_goes_after_a_day(tmp_path: Path, tokenizer: Tokenizer) -> None:
    old, new = (write(tmp_path / "cache" / "units" / f"{name}.parquet.tmp", b"half") for name in ("old", "new"))
    os.utime(old, times=(time.time() - 90_000,) * 2)
    prepare("pretrain", config(tmp_path, write(tmp_path / "x.jsonl", jsonl(TEXTS))), "train", tokenizer)
    assert not old.exists()
    assert new.exists()


def test_a_cache_whose_store_does_not_tell_the_time(tmp_path: Path, tokenizer: Tokenizer) -> None:
    fsspec.register_implementation("untimed", MemoryFileSystem, clobber=True)
    fsspec.filesystem("untimed").pipe("/untimed/units/half.parquet.tmp", b"half")
    path = write(tmp_path / "x.jsonl", jsonl(TEXTS))
    prepared = prepare("pretrain", config(tmp_path, path, cache_dir="untimed://untimed"), "train", tokenizer)
    assert prepared.manifest.total("kept") == 240


def test_damage_to_the_cache_is_mended(tmp_path: Path, tokenizer: Tokenizer) -> None:
    settings_ = config(tmp_path, write(tmp_path / "x.jsonl", jsonl(TEXTS)))
    first = prepare("pretrain", settings_, "train", tokenizer)
    shards = sorted((tmp_path / "cache" / "units").glob("*.parquet"))
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    shards[2].with_suffix(".json").write_text("{}")
    for scan in (tmp_path / "cache" / "sources").iterdir():
        scan.write_bytes(b"\xff")
    again = prepare("pretrain", settings_, "train", tokenizer)
    assert (again.made, again.reused, again.path) == (3, 8, first.path)
    assert Counter(texts_of(PackStore(again.path), tokenizer)) == Counter(TEXTS)


def test_two_at_once_do_each_other_no_harm(tmp_path: Path, tokenizer: Tokenizer) -> None:
    settings_ = config(tmp_path, write(tmp_path / "x.jsonl", jsonl(TEXTS)))
    with ThreadPoolExecutor(4) as threads:
        runs = [threads.submit(prepare, "pretrain", settings_, "train", tokenizer) for _ in range(4)]
        paths = {run.result().path for run in runs}
    (path,) = paths
    assert Counter(texts_of(PackStore(path), tokenizer)) == Counter(TEXTS)
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_a_source_that_changes_meanwhile_is_not_cached(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "x.jsonl", jsonl(TEXTS))

    def changes(units: Sequence[Unit], encoding: Encoding) -> Iterator[UnitStats]:
        write(path, jsonl(reversed(TEXTS)))  # pyright: ignore[reportArgumentType]
        os.utime(path, ns=(1, 1))
        return run_units_here(units, encoding)

    with pytest.raises(UserError, match="x.jsonl: it has changed while it was read"):
        prepare("pretrain", config(tmp_path, path), "train", tokenizer, changes)
    assert not list((tmp_path / "cache" / "units").iterdir())


def test_a_fresh_file_is_hashed_again(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two writes within one tick of the clock give the same time; so a time this young proves nothing."""
    monkeypatch.setattr(module, "FRESH_SECONDS", 60)
    path = write(tmp_path / "x.jsonl", jsonl(["one"]))
    settings_ = config(tmp_path, path)
    stat = path.stat()
    prepare("pretrain", settings_, "train", tokenizer)
    write(path, jsonl(["two"]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    prepared = prepare("pretrain", settings_, "train", tokenizer)
    assert texts_of(PackStore(prepared.path), tokenizer) == ["two"]


def test_units_that_other_machines_keep_to_themselves_are_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    settings_ = config(tmp_path, write(tmp_path / "x.jsonl", jsonl(TEXTS)))

    def elsewhere(units: Sequence[Unit], encoding: Encoding) -> Iterator[UnitStats]:
        there = settings_.model_copy(update={"cache_dir": str(tmp_path / "local to the node")})
        return run_units_here(units, Encoding(encoding.stage, there, encoding.tokenizer, encoding.split))

    with pytest.raises(UserError, match="give a directory that all nodes share"):
        prepare("pretrain", settings_, "train", tokenizer, elsewhere)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "x.jsonl", jsonl(TEXTS))
    with pytest.raises(UserError, match="data.cache_dir .*x.jsonl"):
        prepare("pretrain", config(tmp_path, path, cache_dir=str(path)), "train", tokenizer)


def test_progress_goes_from_nothing_to_all(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "x.jsonl", jsonl(TEXTS))
    seen: list[Progress] = []
    prepare("pretrain", config(tmp_path, path), "train", tokenizer, report=seen.append)
    size = path.stat().st_size
    assert (seen[0], seen[-1]) == (Progress(0, 0, size), Progress(240, size, size))
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert len(seen) == 12


def test_pairs_share_a_pack(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def turns(answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "fox?"}, {"role": "assistant", "content": answer}]

    rows = [{"chosen": turns(f"river {i}"), "rejected": turns(f"poem {i}")} for i in range(50)]
    path = write(tmp_path / "x.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    prepared = prepare("dpo", config(tmp_path, path, max_seq_len=64, pack_tokens=256), "train", tokenizer)
    texts = texts_of(PackStore(prepared.path), tokenizer)
    assert len(texts) == 100
    for chosen, rejected in zip(texts[::2], texts[1::2], strict=True):
        assert chosen.replace("river", "poem") == rejected


@settings(max_examples=200, deadline=None)
@given(content=st.text("ab\n\r ", max_size=200).map(str.encode), unit=st.integers(1, 30), chunk=st.integers(1, 40))
def test_units_add_up_to_the_file(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, unit: int, chunk: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch, pa.OSFile(str(path)) as file:
        patch.setattr(module, "UNIT_BYTES", unit)
        patch.setattr(module, "CHUNK", chunk)
        cuts = list(module._cut_lines(file))
    assert b"".join(content[cut.start : cut.stop] for cut in cuts) == content
    for cut in cuts:
        assert cut.first_line == 1 + content[: cut.start].count(b"\n")
        assert content[: cut.start].endswith(b"\n") or cut.start == 0
        # As small as can be: without its last line it is less than a unit.
        piece = content[cut.start : cut.stop]
        assert len(piece[: piece.rstrip(b"\n").rfind(b"\n") + 1]) < unit or piece.endswith(b"\n\n")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_real_text(tmp_path: Path, corpus: Path, stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UNIT_BYTES", 100_000)
    minimind = Tokenizer.load(corpus.parent / "tokenizer" / "minimind")
    files = config(tmp_path, corpus / stage / "val-00000-of-00001.jsonl", max_seq_len=512, pack_tokens=2048)
    prepared = prepare(stage, files, "train", minimind)
    rows = [row for source in discover(files.train or []) for row in read_rows(source)]
    assert all(isinstance(row, Row) for row in rows)
    total = prepared.manifest.total
    assert (total("rows"), total("kept")) == (len(rows), len(rows))
    store = PackStore(prepared.path)
    assert store.n_packs == sum(1 for _ in store)
    assert prepared.fullness > 0.8
