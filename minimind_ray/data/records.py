"""Find source files and read their rows. A bad row becomes a `Reject` with a reason, and the rows after it are read.

This is the first step of data preparation; `formats.py` then says what a row means. Sources are on a local disk or in
an object store. They are streamed: memory holds a few MB and one row of at most 16 MiB. All formats but Parquet may be
compressed (.gz, .zst).

    .jsonl      one object on each line; blank lines are skipped
    .json       an array of objects; or objects one after another, each on one line or pretty-printed
    .csv, .tsv  a header with the fields' names, then rows of strings; empty cells are left out
    .txt        {"text": …} for each line that is not blank, or for the whole file (`data.text_files`)
    .parquet    one field for each column; nulls and NaN are left out

A row's `line` is the line of the file on which the row begins, from 1. It is the row's number, from 1, in Parquet files
and in .json files whose second row begins on the first line.
"""

from __future__ import annotations

import csv
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from fsspec.implementations.arrow import ArrowFSWrapper
from pyarrow import fs

from minimind_ray.config.errors import UserError
from minimind_ray.config.reading import deeper
from minimind_ray.config.schema import DataConfig, TextFiles
from minimind_ray.data.files import locate, one_line, require_bucket
from minimind_ray.data.json_values import DamagedError, JsonValues
from minimind_ray.data.storage import is_url

COMPRESSED = (".gz", ".zst")
TEXT_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".txt")
SUFFIXES = (*(kind + packing for kind in TEXT_KINDS for packing in ("", *COMPRESSED)), ".parquet")
JSON_LINES = tuple(suffix for suffix in SUFFIXES if suffix.startswith(".jsonl"))
FORMATS = f"{', '.join(TEXT_KINDS)} (also with {' or '.join(COMPRESSED)}) and .parquet"
NO_ROWS = (
    "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "*config.json", "*.index.json",
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "readme*.txt", "license*.txt", "notice*.txt", "requirements*.txt",
)  # fmt: skip
"""Patterns, in lower case, of files without rows that often lie beside data."""
LINE_LIMIT = 16 << 20
FIRST_BYTES = 64 << 10  # bytes at a file's beginning that show how its rows are written
TOO_LONG = f"the row is longer than {LINE_LIMIT >> 20} MiB"
DEPTH_LIMIT = 64
TOO_DEEP = f"JSON nested deeper than {DEPTH_LIMIT} levels"
CHUNK = 4 << 20
BOM = b"\xef\xbb\xbf"
AN_ARRAY = (
    "a JSON array, not JSON lines (one object on each line); if the file is one array, name it .json instead of .jsonl"
)


class Row(NamedTuple):
    """A JSON object and its place. (There are many rows, and a tuple is three times as fast to make as a dataclass.)"""

    file: str
    line: int
    value: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reject:
    """A rejected row: its place, and the reason shown to the user."""

    file: str
    line: int
    reason: str


class Damage(Reject):
    """The place after which a damaged file cannot be read, and the reason shown to the user."""

    __slots__ = ()


class RawRow(NamedTuple):
    """A row before it is parsed: `content` should be JSON. See the module's docstring for `line`."""

    line: int
    content: bytes


@dataclass(frozen=True, slots=True)
class Source:
    """One file to read.

    `path` is an absolute path or a URL, `size` is in bytes. `version` changes when the file's content changes;
    `modified` is the time of its last change (seconds since 1970; 0 if unknown). `text_files` is as in the config.
    """

    path: str
    size: int
    version: str
    modified: float
    text_files: TextFiles = "lines"

    @property
    def suffix(self) -> str:
        """The format, one of SUFFIXES."""
        return next(suffix for suffix in SUFFIXES if self.path.endswith(suffix))

    @property
    def kind(self) -> str:
        """The format without compression, such as .jsonl."""
        return self.suffix.removesuffix(".gz").removesuffix(".zst")

    @property
    def compressed(self) -> bool:
        """Whether the whole file is compressed. False for Parquet, which compresses its columns."""
        return self.suffix.endswith(COMPRESSED)

    @property
    def whole(self) -> bool:
        """Whether the file is a single document."""
        return self.kind == ".txt" and self.text_files == "whole"

    @property
    def by_lines(self) -> bool:
        """Whether the file can be cut at any line's end into parts that can be read separately."""
        return self.suffix in (".jsonl", ".txt") and not self.whole


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a source, from `start` up to `stop` (None: the end). `first_line` is the number of its first line.

    `start` and `stop` are bytes at the beginnings of lines for a source that is `by_lines`, and row groups for Parquet.
    Other sources have a single part.
    """

    start: int = 0
    stop: int | None = None
    first_line: int = 1


def discover(sources: str | list[str], text_files: TextFiles = "lines") -> list[Source]:
    """Find the source files named by paths, globs (`*`, `**`, `?`, `[…]`), folders (searched recursively) and URLs.

    Returns each file once, sorted by path. In folders and globs, skips hidden files, files of other formats, and files
    without rows such as README.txt, config.json and dataset_info.json (NO_ROWS). `text_files` is as in the config.

    Raises:
        UserError: a path matches nothing, a file has another format, or an object store cannot be read.
    """
    found: dict[str, Source] = {}
    for path in [sources] if isinstance(sources, str) else sources:
        try:
            matches = _expand(path, text_files)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: cannot be read: {one_line(error)}") from None
        found.update((source.path, source) for source in matches)
    return [found[path] for path in sorted(found)]


def require_files(data: DataConfig) -> None:
    """Check that the training and validation files exist.

    Raises:
        UserError: see `discover`.
    """
    for files in (data.train, data.val):
        if files is not None:
            discover(files, data.text_files)


def _expand(path: str, text_files: TextFiles) -> list[Source]:
    filesystem, inner = locate(path)
    info = filesystem.get_file_info(inner)
    if info.type == fs.FileType.File:
        if not path.endswith(SUFFIXES):
            raise UserError(f"{path}: this format cannot be read; the formats are {FORMATS}")
        infos = [info]
    elif info.type == fs.FileType.Directory:
        infos = filesystem.get_file_info(fs.FileSelector(inner, recursive=True))
    elif any(wildcard in inner for wildcard in "*?["):
        infos = filesystem.get_file_info(ArrowFSWrapper(filesystem).glob(inner))
    else:
        require_bucket(path)
        raise UserError(f"{path}: no such file or folder")
    prefix = path.partition("://")[0] + "://" if "://" in path else ""
    matches = [
        Source(prefix + info.path, info.size, _version(filesystem, info), (info.mtime_ns or 0) / 1e9, text_files)
        for info in infos
        if info.type == fs.FileType.File
        and info.path.endswith(SUFFIXES)
        and (info.path == inner or not (_hidden(info.path, inner) or _beside_data(info.base_name)))
    ]
    if not matches:
        subject = "the folder has" if info.type == fs.FileType.Directory else "the pattern matches"
        raise UserError(f"{path}: {subject} no files of the formats {FORMATS}")
    return matches


def _beside_data(name: str) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in NO_ROWS)


def _hidden(path: str, root: str) -> bool:
    """Whether a part of the path starts with a dot and is not in the path that the user gave."""
    return any(part.startswith(".") and part not in root.split("/") for part in path.split("/"))


def _version(filesystem: fs.FileSystem, info: fs.FileInfo) -> str:
    if isinstance(filesystem, fs.PyFileSystem):  # The Hub lists content hashes; times need further requests.
        return filesystem.handler.fs.ukey(info.path)
    return f"{info.size}:{info.mtime_ns}"


def current_version(source: Source) -> str:
    """Return the file's version now. The file has changed if it differs from `source.version`."""
    filesystem, path = locate(source.path)
    return _version(filesystem, filesystem.get_file_info(path))


def read_rows(source: Source, part: Part = Part()) -> Iterator[Row | Reject]:
    """Read and parse every row of a source or a part of it. A row that cannot be used is a Reject.

    Raises:
        UserError: the file cannot be opened or read at all, or its name says another format.
    """
    for raw in read_raw(source, part):
        yield raw if isinstance(raw, Reject) else parse_row(source.path, raw)


def read_raw(source: Source, part: Part = Part()) -> Iterator[RawRow | Reject]:
    """Read rows as `read_rows` does, but do not parse them. Rows of formats other than JSON are converted to JSON.

    Rejects are rows that are too long or that JSON cannot hold. The last item of a damaged file is a Damage.
    """
    filesystem, path = locate(source.path)
    try:
        with filesystem.open_input_file(path) as file:
            if source.kind == ".parquet":
                yield from _parquet_rows(source.path, file, part)
            else:
                yield from _text_rows(source, _chunks(source, file, part), part)
    except OSError as error:
        raise UserError(f"{source.path}: cannot be read: {one_line(error)}") from None


def _text_rows(source: Source, chunks: Iterator[bytes], part: Part) -> Iterator[RawRow | Reject]:
    if source.whole:
        return _whole_text(source.path, chunks)
    if source.kind == ".txt":
        return _text_lines(source.path, chunks, part)
    if source.kind == ".json":
        return _json_rows(source.path, chunks)
    if source.kind == ".jsonl":
        return _json_lines(source.path, chunks, part)
    return _table_rows(source.path, chunks, "," if source.kind == ".csv" else "\t")


def _chunks(source: Source, file: pa.NativeFile, part: Part) -> Iterator[bytes]:
    if source.suffix.endswith(".gz"):
        return _decompressed(file, lambda: zlib.decompressobj(wbits=31))
    if source.suffix.endswith(".zst"):
        return _decompressed(file, lambda: zstandard.ZstdDecompressor().decompressobj())
    return _range(file, part.start, source.size if part.stop is None else part.stop)


def _range(file: pa.NativeFile, start: int, stop: int) -> Iterator[bytes]:
    file.seek(start)
    while chunk := file.read(min(CHUNK, stop - start)):
        start += len(chunk)
        yield chunk


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def _decompressed(file: pa.NativeFile, new: Callable[[], _Decompressor]) -> Iterator[bytes]:
    """Yield the uncompressed content of all members of a compressed file.

    Raises:
        DamagedError: the file is damaged or truncated. The content before the damage was yielded.
    """
    member = new()
    try:
        while chunk := file.read(CHUNK):
            # Use small pieces: zstd expands up to 32,768 times, and all of a damaged piece is lost.
            for start in range(0, len(chunk), 1024):
                piece = chunk[start : start + 1024]
                while piece := piece.lstrip(b"\0") if member.eof else piece:
                    if member.eof:
                        member = new()
                    yield member.decompress(piece)
                    piece = member.unused_data if member.eof else b""
    except (zlib.error, zstandard.ZstdError) as error:
        raise DamagedError(f"the compressed file is damaged from here on: {one_line(error)}") from None
    if not member.eof:
        raise DamagedError("the compressed file is truncated: it ends in the middle")


def _split_lines(chunks: Iterable[bytes]) -> Iterator[bytes | None]:
    """Yield lines without their newlines; None for a line over LINE_LIMIT. Holds at most LINE_LIMIT bytes of a line."""
    pending: list[bytes] = []
    size = 0
    for chunk in chunks:
        for newlines, piece in enumerate(chunk.split(b"\n")):
            if newlines:
                yield b"".join(pending) if size <= LINE_LIMIT else None
                pending, size = [], 0
            size += len(piece)
            if size <= LINE_LIMIT:
                pending.append(piece)
            else:
                pending.clear()
    yield b"".join(pending) if size <= LINE_LIMIT else None


def _lines(path: str, chunks: Iterable[bytes], part: Part) -> Iterator[RawRow | Reject]:
    """Yield the lines that are not blank, without byte order marks, which joined files have in the middle."""
    line = part.first_line
    try:
        for content in _split_lines(chunks):
            if content is None:
                yield Reject(path, line, TOO_LONG)
            elif (content := content.removeprefix(BOM)) and not content.isspace():
                yield RawRow(line, content)
            line += 1
    except DamagedError as damage:
        yield Damage(path, line, str(damage))


def _json_lines(path: str, chunks: Iterator[bytes], part: Part) -> Iterator[RawRow | Reject]:
    if part.start == 0:
        (first, second), chunks = _first_lines(chunks)
        if first.startswith(b"[") and not first.endswith(b"]"):
            raise UserError(f"{path}: {AN_ARRAY}")
        if _unfinished(first) and second and not second.startswith(b"{"):
            raise UserError(
                f"{path}: an object spans several lines, but JSON lines has each object on one line; name the file "
                ".json instead of .jsonl"
            )
    for raw in _lines(path, chunks, part):
        yield raw if isinstance(raw, Reject) else RawRow(raw.line, raw.content.strip())


def _unfinished(line: bytes) -> bool:
    """Whether the line begins an object that continues on the next line."""
    return line.startswith(b"{") and line.endswith((b"{", b"[", b","))


def _first_lines(chunks: Iterator[bytes]) -> tuple[tuple[bytes, bytes], Iterator[bytes]]:
    """Return the text's first two lines, and the whole text without its byte order mark.

    Skips blank lines before the first line. Reads only the first FIRST_BYTES, so a line may be cut or empty.
    """
    head = text = b""
    try:
        while len(head) < FIRST_BYTES and text.count(b"\n") < 2:
            head += next(chunks)
            text = head[:FIRST_BYTES].removeprefix(BOM).lstrip()
    except StopIteration:
        pass
    except DamagedError as damage:
        chunks = _raising(damage)  # Raise again, but only after the caller has read the undamaged head.
    first, second = [line.strip() for line in [*text.split(b"\n", 2), b""][:2]]
    return (first, second), chain([head.removeprefix(BOM)], chunks)


def _raising(error: DamagedError) -> Iterator[bytes]:
    yield b""
    raise error


def _json_rows(path: str, chunks: Iterator[bytes]) -> Iterator[RawRow | Reject]:
    (first, _), chunks = _first_lines(chunks)
    if not first.startswith(b"[") and (not first.startswith(b"{") or first.endswith(b"}")):
        yield from _json_lines(path, chunks, Part())
        return
    values = JsonValues(chunks, LINE_LIMIT)
    try:
        for content in values:
            yield Reject(path, values.place, TOO_LONG) if content is None else RawRow(values.place, content)
    except DamagedError as damage:
        yield Damage(path, values.place, str(damage))


def _text_lines(path: str, chunks: Iterator[bytes], part: Part) -> Iterator[RawRow | Reject]:
    for raw in _lines(path, chunks, part):
        yield raw if isinstance(raw, Reject) else _text_row(path, raw.line, raw.content.removesuffix(b"\r"))


def _whole_text(path: str, chunks: Iterator[bytes]) -> Iterator[RawRow | Reject]:
    content = bytearray()
    try:
        for chunk in chunks:
            content += chunk
            if len(content) > LINE_LIMIT:
                yield Reject(path, 1, f"the file is longer than {LINE_LIMIT >> 20} MiB; set data.text_files to lines")
                return
    except DamagedError as damage:
        yield Damage(path, 1, str(damage))
        return
    text = bytes(content).removeprefix(BOM)
    if text.strip():
        yield _text_row(path, 1, text.removesuffix(b"\n").removesuffix(b"\r"))


def _text_row(path: str, line: int, content: bytes) -> RawRow | Reject:
    try:
        return RawRow(line, _json_bytes({"text": content.decode()}))
    except UnicodeDecodeError as error:
        return Reject(path, line, _not_utf8(error))


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"invalid UTF-8 at byte {error.start + 1} of the row"


class _TableLines:
    """A table's lines for csv.reader. Bytes that are not UTF-8 become surrogates, which `_table_row` rejects later.

    The caller sets `size` to 0 before each row; more than LINE_LIMIT bytes in one row raise DamagedError. `ended` is
    True after the last line.
    """

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._lines = _split_lines(chunks)
        self.size = 0
        self.ended = False

    def __iter__(self) -> _TableLines:
        return self

    def __next__(self) -> str:
        try:
            line = next(self._lines)
        except StopIteration:
            self.ended = True
            raise
        if line is None or self.size + len(line) > LINE_LIMIT:
            raise DamagedError(f"{TOO_LONG}, or a quote in it is never closed: the rows after it cannot be found")
        self.size += len(line) + 1
        return line.decode(errors="surrogateescape") + "\n"


def _table_rows(path: str, chunks: Iterator[bytes], delimiter: str) -> Iterator[RawRow | Reject]:
    csv.field_size_limit(LINE_LIMIT)
    lines = _TableLines(_first_lines(chunks)[1])  # removes the byte order mark
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    line = 1
    try:
        while not lines.ended:
            line, lines.size = reader.line_num + 1, 0
            try:
                cells = next(reader, [])
            except csv.Error as error:
                if lines.ended:
                    raise DamagedError("the file is truncated: it ends inside a quoted cell of this row") from None
                if not header:
                    raise UserError(f"{path}:{line}: the header cannot be read: {error}") from None
                yield Reject(path, line, f"not a valid row of a table: {error}")
                continue
            if cells and header:
                yield _table_row(path, line, header, cells)
            elif cells:
                header = _table_header(f"{path}:{line}", cells)
    except DamagedError as damage:
        yield Damage(path, line, str(damage))


def _table_header(where: str, cells: list[str]) -> list[str]:
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: the header is not valid UTF-8; save the table as UTF-8 text") from None
    for number, name in enumerate(cells, 1):
        if not name.strip():
            raise UserError(
                f"{where}: column {number} of the header has no name; name it or remove it (pandas writes such a "
                "column unless to_csv has index=False)"
            )
        if name in cells[: number - 1]:
            raise UserError(f"{where}: two columns of the header are named {name!r}; give them different names")
    return cells


def _table_row(path: str, line: int, header: list[str], cells: list[str]) -> RawRow | Reject:
    if len(cells) != len(header):
        return Reject(path, line, f"the row has {len(cells)} cells, but the header has {len(header)}")
    try:
        return RawRow(line, _json_bytes({name: cell for name, cell in zip(header, cells) if cell}))
    except UnicodeEncodeError:
        return Reject(path, line, "invalid UTF-8 in the row")


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, default=_json_value).encode()


def _parquet_rows(path: str, file: pa.NativeFile, part: Part) -> Iterator[RawRow | Reject]:
    line = part.first_line
    try:
        parquet = pq.ParquetFile(file)
        groups = range(part.start, parquet.num_row_groups if part.stop is None else part.stop)
        for batch in parquet.iter_batches(batch_size=256, row_groups=list(groups), use_threads=False):
            for row in batch.to_struct_array():
                yield _parquet_row(path, line, row)
                line += 1
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and is_url(path):  # A failing object store is not a damaged file.
            raise
        yield Damage(path, line, f"the Parquet file is damaged from here on: {one_line(error)}")


def _parquet_row(path: str, line: int, row: pa.StructScalar) -> RawRow | Reject:
    try:
        content = _json_bytes(_without_nulls(row.as_py()))
    except (TypeError, ValueError, OverflowError) as error:  # OverflowError: a date outside of Python's years
        return Reject(path, line, f"JSON cannot hold this row: {one_line(error)}")
    return RawRow(line, content) if len(content) <= LINE_LIMIT else Reject(path, line, TOO_LONG)


def _without_nulls(value: Any) -> Any:
    """Remove nulls and NaN: Parquet gives a struct every field of its type, and null or NaN for the missing ones."""
    if isinstance(value, dict):
        return {
            key: _without_nulls(item)
            for key, item in value.items()
            if item is not None and not (isinstance(item, float) and math.isnan(item))
        }
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _json_value(value: Any) -> str:
    if isinstance(value, bytes):
        raise TypeError("a column of bytes; make it a string column")
    return str(value)  # Dates and decimals; no stage reads such fields.


def parse_row(path: str, raw: RawRow) -> Row | Reject:
    """Parse a row's JSON object. Return a Reject with the reason if this fails. Numbers may be NaN or infinite."""
    try:
        value = _decode(raw.content.decode())
        if isinstance(value, list) and path.endswith(JSON_LINES):
            reason = AN_ARRAY
        elif not isinstance(value, dict):
            reason = f"not a JSON object, but of type {type(value).__name__}"
        elif raw.content.count(b"[") + raw.content.count(b"{") > DEPTH_LIMIT and deeper(value, DEPTH_LIMIT):
            reason = TOO_DEEP
        else:
            if b"\\u" in raw.content:
                json.dumps(value, ensure_ascii=False).encode()
            return Row(path, raw.line, value)
    except UnicodeDecodeError as error:
        reason = _not_utf8(error)
    except UnicodeEncodeError:
        reason = "half of a surrogate pair (\\ud800 to \\udfff), which is not a character"
    except RecursionError:
        reason = TOO_DEEP
    except json.JSONDecodeError as error:
        reason = _not_json(path, error, raw.content)
    except ValueError as error:
        reason = f"not valid JSON: {one_line(error)}"
    return Reject(path, raw.line, reason)


def _not_json(path: str, error: json.JSONDecodeError, content: bytes) -> str:
    if content.startswith(b"[") and path.endswith(JSON_LINES):
        return AN_ARRAY
    if _unfinished(content):
        return "not valid JSON: the object continues on the next line, but JSON lines has each object on one line"
    line = f"line {error.lineno} of the row, " if error.lineno > 1 else ""
    return f"not valid JSON: {error.msg.removesuffix(' at')} at {line}column {error.colno}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return value


_decode = json.JSONDecoder(object_pairs_hook=_unique).decode
