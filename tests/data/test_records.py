from __future__ import annotations

import datetime
import gzip
import json
import random
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind_ray.config.errors import UserError
from minimind_ray.data import records
from minimind_ray.data.records import Damage, Part, Reject, Row, discover, parse_row, read_raw, read_rows

pytestmark = pytest.mark.unit


def read(path: Path) -> list[Row | Reject]:
    (source,) = discover(str(path))
    return list(read_rows(source))


def read_bytes(tmp_path: Path, content: bytes, suffix: str = ".jsonl") -> list[Row | Reject]:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    return read(path)


COMPRESS = {
    ".jsonl": lambda content: content,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [True, False])
def test_rows_and_their_lines(tmp_path: Path, suffix: str, newline: bytes, bom: bytes, end: bool) -> None:
    lines = [b'{"text": "a"}', b"", b"  \t", '{"text": "床前明月光 "}'.encode(), b'{"n": 1e5}']
    content = bom + newline.join(lines) + newline * end
    rows = read_bytes(tmp_path, COMPRESS[suffix](content), suffix)
    path = str(tmp_path / f"x{suffix}")
    assert rows == [
        Row(path, 1, {"text": "a"}),
        Row(path, 4, {"text": "床前明月光 "}),
        Row(path, 5, {"n": 1e5}),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not valid JSON: Expecting ',' delimiter at column 13"),
        (b'{"text": "a"} x', "not valid JSON: Extra data at column 15"),
        (b'{"text": "a\x01"}', "not valid JSON: Invalid control character at column 12"),
        (b'["text"]', "not a JSON object, but list"),
        (b'"text"', "not a JSON object, but str"),
        (b"null", "not a JSON object, but NoneType"),
        (b'{"text": "\xff"}', "invalid UTF-8 at byte 11 of the line"),
        (b'\xff\xfe{\x00"\x00', "invalid UTF-8 at byte 1 of the line"),
        (b'\xef\xbb\xbf{"text": "a"}', "not valid JSON: Expecting value at column 1"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "not valid JSON: key 'c' appears twice"),
        (b'{"text": NaN}', "not valid JSON: NaN is not JSON"),
        (b'{"text": -Infinity}', "not valid JSON: -Infinity is not JSON"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b'{"\\uDFFF": 1}', "half of a surrogate pair"),
        (b'{"n": ' + b"1" * 5000 + b"}", "not valid JSON: Exceeds the limit"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper than 64"),
        (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", "nested deeper than 64"),
    ],
)
def test_a_bad_line_is_rejected_alone(tmp_path: Path, line: bytes, reason: str) -> None:
    good = b'{"text": "good"}\n'
    first, bad, last = read_bytes(tmp_path, good + line + b"\n" + good)
    assert isinstance(first, Row)
    assert isinstance(last, Row)
    assert last.line == 3
    assert isinstance(bad, Reject)
    assert (bad.file, bad.line) == (str(tmp_path / "x.jsonl"), 2)
    assert reason in bad.reason


def test_whole_surrogate_pairs_and_deep_but_sane_nesting_are_rows(tmp_path: Path) -> None:
    pair = b'{"text": "\\ud83d\\ude00"}\n'
    nested = b'{"a": ' + b"[" * 63 + b"]" * 63 + b"}\n"
    wide = b'{"a": [' + b",".join([b"[[]]"] * 200) + b"]}\n"
    rows = read_bytes(tmp_path, pair + nested + wide)
    assert all(isinstance(row, Row) for row in rows)
    assert isinstance(rows[0], Row)
    assert rows[0].value == {"text": "\U0001f600"}


def test_a_long_line_is_skipped_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "before"}\n{"text": "')
        for _ in range(60):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"text": "after"}\n')
    tracemalloc.start()
    rows = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [type(row) for row in rows] == [Row, Reject, Row]
    assert rows[1] == Reject(str(path), 2, "the row is longer than 16 MiB")
    assert rows[2].line == 3
    assert peak < 40 << 20


def test_the_limit_is_the_same_however_the_file_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LINE_LIMIT", 20)
    fits, over = b'{"text": "12345678"}', b'{"text": "123456789"}'
    for chunk in range(1, 50):
        monkeypatch.setattr(records, "CHUNK", chunk)
        rows = read_bytes(tmp_path, fits + b"\n" + over + b"\n" + fits)
        assert [(type(row), row.line) for row in rows] == [(Row, 1), (Reject, 2), (Row, 3)]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_truncated_file_gives_the_rows_before_the_break(tmp_path: Path, suffix: str) -> None:
    numbers = random.Random(0)
    lines = [json.dumps({"text": f"{numbers.random()} bottles"}).encode() + b"\n" for _ in range(60_000)]
    whole = COMPRESS[suffix](b"".join(lines))
    *rows, reject = read_bytes(tmp_path, whole[: len(whole) // 2], suffix)
    assert 20_000 < len(rows) < 40_000
    assert [row.line for row in rows] == list(range(1, len(rows) + 1))
    assert all(isinstance(row, Row) for row in rows)
    assert reject == Damage(
        str(tmp_path / f"x{suffix}"), len(rows) + 1, "the compressed file is truncated: it ends in the middle"
    )


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_damage_is_one_reject(tmp_path: Path, suffix: str) -> None:
    (reject,) = read_bytes(tmp_path, b"this was never compressed", suffix)
    assert isinstance(reject, Damage)
    assert reject.reason.startswith("the compressed file is damaged from here on")


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_concatenated_and_padded_members_are_one_file(tmp_path: Path, suffix: str) -> None:
    compress = COMPRESS[suffix]
    content = compress(b'{"a": 1}\n{"a"') + compress(b": 2}\n") + b"\0" * 3000
    assert [row.value for row in read_bytes(tmp_path, content, suffix) if isinstance(row, Row)] == [{"a": 1}, {"a": 2}]


def test_zstd_bombs_are_read_in_bounded_memory(tmp_path: Path) -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(400 << 20))
    tracemalloc.start()
    (reject,) = read_bytes(tmp_path, bomb, ".jsonl.zst")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(reject, Reject)
    assert reject.reason == "the row is longer than 16 MiB"
    assert peak < 120 << 20


def test_parquet_has_the_same_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    conversations = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "你好", "tools": "[]"}], None]
    table = pa.table(
        {
            "conversations": conversations,
            "when": pa.array([datetime.date(2026, 1, 2), None]),
        }
    )
    pq.write_table(table, path)
    assert read(path) == [
        Row(str(path), 1, {"conversations": conversations[0], "when": "2026-01-02"}),
        Row(str(path), 2, {}),
    ]


def test_parquet_parts_are_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"n": list(range(10))}), path, row_group_size=3)
    (source,) = discover(str(path))
    rows = list(read_rows(source, Part(1, 3, first_line=4)))
    assert [(row.line, row.value) for row in rows if isinstance(row, Row)] == [(n + 1, {"n": n}) for n in range(3, 9)]


def test_parquet_rows_that_json_cannot_hold_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    invalid = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff"))
    pq.write_table(pa.table({"text": invalid}), path)
    assert [type(row) for row in read(path)] == [Reject]
    pq.write_table(pa.table({"text": [b"bytes"]}), path)
    (reject,) = read(path)
    assert isinstance(reject, Reject)
    assert "a column of bytes" in reject.reason
    when = pa.array([2**62, 0]).cast(pa.timestamp("us"))  # in the year 148108
    pq.write_table(pa.table({"when": when}), path)
    reject, row = read(path)
    assert isinstance(reject, Reject) and isinstance(row, Row)
    assert reject.reason.startswith("not a row that JSON can hold: ")
    # NaN is what pandas writes where there is nothing.
    pq.write_table(pa.table({"text": ["a", "b"], "score": [1.5, float("nan")]}), path)
    assert [row.value for row in read(path) if isinstance(row, Row)] == [{"text": "a", "score": 1.5}, {"text": "b"}]


def test_damaged_parquet_is_one_reject(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 but no more than that")
    (reject,) = read(path)
    assert isinstance(reject, Damage)
    assert "damaged" in reject.reason


def test_discover_takes_files_globs_folders_and_lists(tmp_path: Path) -> None:
    for name in ["b/2.jsonl", "b/c/3.parquet", "a/1.jsonl.gz", "a/.hidden/x.jsonl", "a/notes.txt", "[d]/4.jsonl.zst"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")

    def names(*sources: str) -> list[str]:
        found = discover([str(tmp_path / source) for source in sources])
        return [str(Path(source.path).relative_to(tmp_path)) for source in found]

    assert names("b/2.jsonl") == ["b/2.jsonl"]
    assert names("") == ["[d]/4.jsonl.zst", "a/1.jsonl.gz", "b/2.jsonl", "b/c/3.parquet"]
    assert names("b", "a", "b/2.jsonl") == ["a/1.jsonl.gz", "b/2.jsonl", "b/c/3.parquet"]
    assert names("*/*.jsonl") == ["b/2.jsonl"]
    assert names("**/*.parquet", "[[]d]/*") == ["[d]/4.jsonl.zst", "b/c/3.parquet"]
    assert names("[d]/4.jsonl.zst") == ["[d]/4.jsonl.zst"]
    assert names("a/.hidden") == ["a/.hidden/x.jsonl"]


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"{}")
    monkeypatch.chdir(tmp_path)
    assert discover("x.jsonl")[0].path == str(tmp_path / "x.jsonl")
    assert discover("file://" + str(tmp_path / "x.jsonl"))[0].size == 2


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.jsonl", "none.jsonl: no such file or folder"),
        ("*.jsonl", r"\*.jsonl: the pattern matches no files of the formats .jsonl"),
        ("empty", "empty: the folder has no files of the formats .jsonl"),
        ("notes.txt", "notes.txt: not a format that can be read; the formats are .jsonl, .jsonl.gz"),
    ],
)
def test_what_matches_nothing_is_named(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=message):
        discover([str(tmp_path / path)])
    with pytest.raises(UserError, match="no file system for ftp://"):
        discover("ftp://host/x.jsonl")


def test_a_change_changes_the_version(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"{}")
    (source,) = discover(str(path))
    assert records.current_version(source) == source.version
    path.write_bytes(b"{} ")
    assert records.current_version(source) != source.version


VALID = b"".join(
    json.dumps(value, ensure_ascii=False).encode() + b"\n"
    for value in [{"text": "床前明月光"}, {"a": [1, {"b": None}]}, {"s": "\U0001f600\\"}, {}, {"x": 1.5e300}]
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    content = bytearray(VALID)
    for _ in range(draw(st.integers(0, 8))):
        at = draw(st.integers(0, len(content)))
        end = min(len(content), at + draw(st.integers(0, 4)))
        content[at:end] = draw(st.sampled_from([b"\n", b"\r\n", b'"', b"{", b"[", b"\\ud800", b"NaN", b"\xff", b"\0"]))
    return bytes(content)


@settings(max_examples=300, deadline=None)
@given(content=st.one_of(st.binary(max_size=300), mutated()), chunk=st.integers(1, 40))
def test_whatever_the_bytes_every_line_is_accounted_for(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, chunk: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "CHUNK", chunk)
        rows = read(path)
    numbered = enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1)
    assert [row.line for row in rows] == [number for number, line in numbered if line.strip()]
    for row in rows:
        if isinstance(row, Row):
            json.dumps(row.value, ensure_ascii=False, allow_nan=False).encode()


@settings(max_examples=200, deadline=None)
@given(data=st.data(), suffix=st.sampled_from([".jsonl.gz", ".jsonl.zst", ".parquet"]))
def test_whatever_the_damage_nothing_is_raised(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": ["a", "b" * 100], "n": [1, 2]}), path)
    else:
        path.write_bytes(COMPRESS[suffix](VALID))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    (source,) = discover(str(path))
    for raw in read_raw(source):
        if not isinstance(raw, Reject):
            parse_row(source.path, raw)
