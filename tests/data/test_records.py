from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import random
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind_ray.config.errors import UserError
from minimind_ray.data import records
from minimind_ray.data.records import Damage, Part, RawRow, Reject, Row, discover, parse_row, read_raw, read_rows

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
        (b'["text"]', "a JSON array, not JSON lines"),
        (b'"text"', "not a JSON object, but of type str"),
        (b"null", "not a JSON object, but of type NoneType"),
        (b'{"text": "\xff"}', "invalid UTF-8 at byte 11 of the row"),
        (b'\xff\xfe{\x00"\x00', "invalid UTF-8 at byte 1 of the row"),
        (b'["text"', "a JSON array, not JSON lines"),
        (b"{", "the object continues on the next line"),
        (b'{"text": "a",', "the object continues on the next line"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "not valid JSON: key 'c' appears twice"),
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
    assert reject.reason.startswith("JSON cannot hold this row: ")
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
    for name in [
        "b/2.jsonl",
        "b/c/3.parquet",
        "a/1.jsonl.gz",
        "a/.hidden/x.jsonl",
        "a/notes.md",
        "b/README.txt",
        "[d]/4.jsonl.zst",
    ]:
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
        ("notes.md", "notes.md: this format cannot be read; the formats are .jsonl, .json, .csv, "),
    ],
)
def test_what_matches_nothing_is_named(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UserError, match=message):
        discover([str(tmp_path / path)])
    with pytest.raises(UserError, match="ftp://host/x.jsonl is the address of a server"):
        discover("ftp://host/x.jsonl")


def test_a_change_changes_the_version(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"{}")
    (source,) = discover(str(path))
    assert records.current_version(source) == source.version
    path.write_bytes(b"{} ")
    assert records.current_version(source) != source.version


def test_numbers_that_are_not_finite_are_read(tmp_path: Path) -> None:
    (row,) = read_bytes(tmp_path, b'{"text": "a", "x": [NaN, Infinity, -Infinity]}')
    assert isinstance(row, Row)
    assert repr(row.value["x"]) == "[nan, inf, -inf]"


def test_byte_order_marks_of_joined_files_are_no_part_of_rows(tmp_path: Path) -> None:
    bom = b"\xef\xbb\xbf"
    rows = read_bytes(tmp_path, bom + b'{"n": 1}\n' + bom + b'{"n": 2}\n' + bom)
    assert [(row.line, row.value) for row in rows if isinstance(row, Row)] == [(1, {"n": 1}), (2, {"n": 2})]
    assert len(rows) == 2


OBJECTS = [
    {"text": "床前明月光"},
    {"a": [1, {"b": None}], "s": '\\"]},\n\U0001f600'},
    {},
    {"x": 1.5e300, "y": [[], {}]},
]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("array", [True, False])
def test_json_lines_named_otherwise_are_one_sentence(tmp_path: Path, array: bool, indent: int | None) -> None:
    content = json.dumps(OBJECTS * 2000 if array else OBJECTS[1], indent=indent).encode()
    if array or indent:
        with pytest.raises(UserError, match=r"x.jsonl: .*name (it|the file) .json instead of .jsonl$"):
            read_bytes(tmp_path, content)
    else:
        assert len(read_bytes(tmp_path, content)) == 1


# The other formats


def json_forms(rows: list[dict[str, Any]], **how: Any) -> list[bytes]:
    """The same rows as .json files have them."""
    texts = [json.dumps(row, **how) for row in rows]
    return [
        json.dumps(rows, **how).encode(),
        json.dumps(rows, indent=2, **how).encode(),
        ("[" + ",\n".join(texts) + "]\n").encode(),
        "\n".join(texts).encode(),
        "\n".join(json.dumps(row, indent="\t", **how) for row in rows).encode(),
    ]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('"\\[]{},:\n aé月\U0001f600', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('"\\[{a', max_size=3), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.dictionaries(st.text('"]a', max_size=3), json_values, min_size=1, max_size=3), min_size=2, max_size=5
    ),
    ascii=st.booleans(),
    bom=st.booleans(),
    chunk=st.integers(1, 30),
)
def test_json_files_have_the_same_rows_however_they_are_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], ascii: bool, bom: bool, chunk: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "forms.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "CHUNK", chunk)
        for content in json_forms(rows, ensure_ascii=ascii):
            path.write_bytes(b"\xef\xbb\xbf" * bom + content)
            assert [row.value if isinstance(row, Row) else row for row in read(path)] == rows


def test_every_cut_into_chunks_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for content in json_forms(OBJECTS):
        for chunk in [*range(1, 40), len(content)]:
            monkeypatch.setattr(records, "CHUNK", chunk)
            assert [row.value for row in read_bytes(tmp_path, content, ".json") if isinstance(row, Row)] == OBJECTS


def test_the_place_of_a_json_row_is_its_line_or_its_number(tmp_path: Path) -> None:
    lines = [[row.line for row in read_bytes(tmp_path, content, ".json")] for content in json_forms(OBJECTS)]
    assert lines == [[1, 2, 3, 4], [2, 5, 14, 15], [1, 2, 3, 4], [1, 2, 3, 4], [1, 4, 13, 14]]


def test_tables_and_texts_have_the_rows_of_json_lines(tmp_path: Path) -> None:
    rows = [{"text": text, "n": "042"} for text in ["a", "b, c", 'say "hi"', "two\nlines", "tab\t月", " blanks "]]
    rows.append({"text": "no number"})
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        stream = io.StringIO()
        table = csv.DictWriter(stream, ["text", "n"], delimiter=delimiter)
        table.writeheader()
        table.writerows(rows)
        for bom in (b"", b"\xef\xbb\xbf"):
            for pack in ("", ".gz", ".zst"):
                content = COMPRESS[".jsonl" + pack](bom + stream.getvalue().encode())
                found = read_bytes(tmp_path, content, suffix + pack)
                assert [row.value for row in found if isinstance(row, Row)] == rows
                assert [row.line for row in found] == [2, 3, 4, 5, 7, 8, 9]
    texts = ["a", " b\t", "床前明月光"]
    content = "a\r\n \n b\t\n\ufeff床前明月光".encode()
    for suffix in (".txt", ".txt.gz", ".txt.zst"):
        found = read_bytes(tmp_path, COMPRESS[suffix.replace("txt", "jsonl")](content), suffix)
        assert [(row.line, row.value) for row in found if isinstance(row, Row)] == [
            (line, {"text": text}) for line, text in zip((1, 3, 4), texts, strict=True)
        ]
    pq.write_table(pa.table({"text": texts}), tmp_path / "x.parquet")
    assert [row.value for row in read(tmp_path / "x.parquet") if isinstance(row, Row)] == [{"text": t} for t in texts]


def test_a_text_file_can_be_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(content: bytes) -> list[Row | Reject]:
        (tmp_path / "x.txt").write_bytes(content)
        (source,) = discover(str(tmp_path / "x.txt"), "whole")
        return list(read_rows(source))

    assert [row.value for row in whole("\ufeffa\n\n月\r\n".encode()) if isinstance(row, Row)] == [{"text": "a\n\n月"}]
    assert whole(b" \n\n") == []
    (reject,) = whole(b"a\xff")
    assert isinstance(reject, Reject) and reject.reason == "invalid UTF-8 at byte 2 of the row"
    monkeypatch.setattr(records, "LINE_LIMIT", 20)
    assert len(whole(b"x" * 20)) == 1
    (reject,) = whole(b"x" * 21)
    assert isinstance(reject, Reject) and "set data.text_files to lines" in reject.reason


@pytest.mark.parametrize(
    ("content", "places", "reason"),
    [
        (b'[{"a": 1}, {"a": 2}, {"a"', [1, 2, 3], "truncated: it ends inside the row"),
        (b'[{"a": 1},\n{"a": 2},\n{"a": "', [1, 2, 3], "truncated: it ends inside the row"),
        (b'[{"a": 1},\n{"a": 2},\n', [1, 2, 3], "truncated: its JSON array does not end"),
        (b'[{"a": 1},\n{"a": 2}\n', [1, 2, 3], "truncated: its JSON array does not end"),
        (b'[{"a": 1},\n\n{"a": 2}\n{"a": 3}]', [1, 3, 4], "a comma is missing in the array before this row"),
        (b'[{"a": 1},\n{"a": 2},\n]', [1, 2, 3], "] where a row should begin"),
        (b'[{"a": 1}, {"a": 2}}]', [1, 2, 2], "a comma is missing"),
        (b'[{"a": 1},\n{"a": 2}]\n[]', [1, 2, 3], "there is more text after the end of the array"),
        (b'{\n"a": 1}\n{\n"a": 2}\n,', [1, 3, 5], ", where a row should begin"),
        (b"[", [1], "truncated"),
    ],
)
def test_where_an_array_is_damaged_reading_ends(tmp_path: Path, content: bytes, places: list[int], reason: str) -> None:
    *rows, damage = read_bytes(tmp_path, content, ".json")
    assert all(isinstance(row, Row) for row in rows)
    assert [row.line for row in [*rows, damage]] == places
    assert isinstance(damage, Damage)
    assert reason in damage.reason


def test_a_bad_item_of_an_array_is_rejected_alone(tmp_path: Path) -> None:
    items = [
        '{"a": 1}',
        '"b"',
        "3",
        "[{}]",
        "nul",
        '{"a": 1\n"b": 2}',
        '{"a": "\xff"}',
        '{"c": 1, "c": 2}',
        '{"z": "]"}',
    ]
    separator = ",\n"
    first, *rejects, last = read_bytes(tmp_path, f"[{separator.join(items)}]".encode("latin-1"), ".json")
    assert isinstance(first, Row) and isinstance(last, Row)
    assert [reject.line for reject in rejects] == [2, 3, 4, 5, 6, 8, 9]
    reasons = " ".join(reject.reason for reject in rejects if isinstance(reject, Reject))
    for reason in ("type str", "type int", "type list", "at line 2 of the row, column 1", "invalid UTF-8", "twice"):
        assert reason in reasons


@pytest.mark.slow
def test_an_array_of_any_size_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.write(b'[{"text": "before"}')
        for _ in range(60):
            file.write(b', {"text": "' + b"\\u6708\\n" * (1 << 17) + b'"}')
        file.write(b', {"text": "' + b"x" * (40 << 20) + b'"}, {"text": "after"}]')
    (source,) = discover(str(path))
    tracemalloc.start()
    rows = [raw._replace(content=b"") if isinstance(raw, RawRow) else raw for raw in read_raw(source)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row.line for row in rows] == list(range(1, 64))
    assert rows[61] == Reject(str(path), 62, "the row is longer than 16 MiB")
    assert peak < 40 << 20


def test_nesting_in_an_array_is_bounded(tmp_path: Path) -> None:
    for depth, kind in ((62, Row), (64, Reject), (200_000, Reject)):
        content = b'[{"a": ' + b"[" * depth + b"]" * depth + b'}, {"a": 1}]'
        assert [type(row) for row in read_bytes(tmp_path, content, ".json")] == [kind, Row]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"text,text", "x.csv:1: two columns of the header are named 'text'"),
        (b",text", "x.csv:1: column 1 of the header has no name"),
        (b"te\xffxt", "x.csv:1: the header is not valid UTF-8"),
        (b'"a"b,text', "x.csv:1: the header cannot be read"),
    ],
)
def test_a_bad_header_is_one_sentence(tmp_path: Path, header: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_bytes(tmp_path, header + b"\na,b\n", ".csv")


def test_a_bad_row_of_a_table_is_rejected_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b'text,n\na,1\n\nb\nc,1,2\n\xff,1\n"d"x,1\ne 5",2\n'
    rows = read_bytes(tmp_path, content, ".csv")
    assert [(type(row), row.line) for row in rows] == [
        (Row, 2), (Reject, 4), (Reject, 5), (Reject, 6), (Reject, 7), (Row, 8),
    ]  # fmt: skip
    reasons = [row.reason for row in rows if isinstance(row, Reject)]
    assert reasons[:3] == [
        "the row has 1 cells, but the header has 2",
        "the row has 3 cells, but the header has 2",
        "invalid UTF-8 in the row",
    ]
    (row, damage) = read_bytes(tmp_path, b'text\na\n"b\nc\n', ".csv")
    assert isinstance(damage, Damage) and damage.line == 3
    assert "truncated: it ends inside a quoted cell" in damage.reason
    monkeypatch.setattr(records, "LINE_LIMIT", 20)
    for bad in (b"x" * 21, b'"' + b"x\n" * 20):
        row, damage = read_bytes(tmp_path, b"text\na\n" + bad + b"\nb\n", ".csv")
        assert isinstance(row, Row) and isinstance(damage, Damage) and damage.line == 3


@pytest.mark.parametrize("suffix", [".json.gz", ".csv.gz", ".txt.zst"])
def test_other_formats_that_break_off_keep_the_rows_before(tmp_path: Path, suffix: str) -> None:
    numbers = random.Random(0)
    texts = [f"{numbers.random()} bottles" for _ in range(20_000)]
    kind, pack = suffix.rsplit(".", 1)
    content = json.dumps([{"text": text} for text in texts]) if kind == ".json" else "\n".join(["text", *texts])
    whole = COMPRESS[f".jsonl.{pack}"](content.encode())
    *rows, damage = read_bytes(tmp_path, whole[: len(whole) // 2], suffix)
    assert 5_000 < len(rows) < 15_000
    assert all(isinstance(row, Row) for row in rows)
    assert isinstance(damage, Damage) and damage.line == rows[-1].line + 1
    # Damage before the first line's end is told, too.
    *rows, damage = read_bytes(tmp_path, whole[:40], suffix)
    assert isinstance(damage, Damage) and "truncated" in damage.reason


def test_files_beside_data_are_passed_over_unless_named(tmp_path: Path) -> None:
    names = ["README.txt", "dataset_infos.json", "tokenizer.json", "tokenizer_config.json", "model.index.json"]
    for name in [*names, "rows.json", "rows.csv", "rows.txt.gz"]:
        (tmp_path / name).write_bytes(b"")
    for pattern in ("", "*"):
        found = discover(str(tmp_path / pattern))
        assert [Path(source.path).name for source in found] == ["rows.csv", "rows.json", "rows.txt.gz"]
    assert len(discover([str(tmp_path / name) for name in names])) == len(names)


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
        try:
            rows = read(path)
        except UserError as error:  # It begins as an array, or as an object over several lines.
            assert "name the file .json" in str(error) or "name it .json" in str(error)
            return
    numbered = enumerate((line.removeprefix(b"\xef\xbb\xbf") for line in content.split(b"\n")), 1)
    assert [row.line for row in rows] == [number for number, line in numbered if line.strip()]
    for row in rows:
        if isinstance(row, Row):
            json.dumps(row.value, ensure_ascii=False).encode()


@settings(max_examples=200, deadline=None)
@given(data=st.data(), suffix=st.sampled_from([".jsonl.gz", ".jsonl.zst", ".parquet", ".json", ".csv", ".txt"]))
def test_whatever_the_damage_nothing_is_raised(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": ["a", "b" * 100], "n": [1, 2]}), path)
    else:
        plain = {".json": json.dumps(OBJECTS).encode(), ".csv": b'text,n\na,"1\n"\nb,2\n', ".txt": b"a\nb\n"}
        path.write_bytes(plain[suffix] if suffix in plain else COMPRESS[suffix](VALID))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    (source,) = discover(str(path))
    with suppress(UserError):  # a table's header
        for raw in read_raw(source):
            if not isinstance(raw, Reject):
                parse_row(source.path, raw)
