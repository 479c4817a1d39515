"""Rows out of source files, one bad line at a time: what cannot be read becomes a Reject, never an exception.

Sources are .jsonl, .jsonl.gz, .jsonl.zst and .parquet files, on a local disk or an object store. They are streamed:
memory holds a few MB and one row. Blank lines are no rows. A row's line number counts from 1; in Parquet it is the
row's number.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from fsspec.implementations.arrow import ArrowFSWrapper
from pyarrow import fs

from minimind_ray.config.errors import UserError
from minimind_ray.config.reading import deeper
from minimind_ray.data.files import locate, one_line
from minimind_ray.data.storage import is_url

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
LINE_LIMIT = 16 << 20
TOO_LONG = f"the row is longer than {LINE_LIMIT >> 20} MiB"
DEPTH_LIMIT = 64
TOO_DEEP = f"JSON nested deeper than {DEPTH_LIMIT} levels"
CHUNK = 4 << 20
BOM = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """A JSON object and where it stands. (A tuple is made in a third of a dataclass's time, and there are many.)"""

    file: str
    line: int
    value: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that cannot be used, and why, in words for the user."""

    file: str
    line: int
    reason: str


class Damage(Reject):
    """Where a file is damaged: nothing beyond can be read."""

    __slots__ = ()


class RawRow(NamedTuple):
    """A row before it is parsed: `content` is JSON, or should be."""

    line: int
    content: bytes


@dataclass(frozen=True, slots=True)
class Source:
    """One file to read: absolute path or URL, size in bytes, a mark that changes when the file does, and when it last
    did (seconds since 1970; 0 where that is not known)."""

    path: str
    size: int
    version: str
    modified: float

    @property
    def suffix(self) -> str:
        """The format, one of SUFFIXES."""
        return next(suffix for suffix in SUFFIXES if self.path.endswith(suffix))


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a source, from `start` up to `stop`: bytes of .jsonl (from one line's start to another's), row groups
    of .parquet. Compressed files have only one part, all of it (`stop` None). `first_line` is the number of its first
    line."""

    start: int = 0
    stop: int | None = None
    first_line: int = 1


def discover(sources: str | list[str]) -> list[Source]:
    """The files that paths, globs (`*`, `**`, `?`, `[…]`), folders (read recursively) and URLs of these stand for.

    Sorted by path, each once. In folders and globs hidden files and other formats are passed over.

    Raises:
        UserError: a path that matches nothing, a file of another format, an object store that cannot be read.
    """
    found: dict[str, Source] = {}
    for path in [sources] if isinstance(sources, str) else sources:
        try:
            matches = _expand(path)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: cannot be read: {one_line(error)}") from None
        found.update((source.path, source) for source in matches)
    return [found[path] for path in sorted(found)]


def _expand(path: str) -> list[Source]:
    filesystem, inner = locate(path)
    info = filesystem.get_file_info(inner)
    formats = ", ".join(SUFFIXES)
    if info.type == fs.FileType.File:
        if not path.endswith(SUFFIXES):
            raise UserError(f"{path}: not a format that can be read; the formats are {formats}")
        infos = [info]
    elif info.type == fs.FileType.Directory:
        infos = filesystem.get_file_info(fs.FileSelector(inner, recursive=True))
    elif any(wildcard in inner for wildcard in "*?["):
        infos = filesystem.get_file_info(ArrowFSWrapper(filesystem).glob(inner))
    else:
        raise UserError(f"{path}: no such file or folder")
    prefix = path.partition("://")[0] + "://" if "://" in path else ""
    matches = [
        Source(prefix + info.path, info.size, _version(filesystem, info), (info.mtime_ns or 0) / 1e9)
        for info in infos
        if info.type == fs.FileType.File
        and info.path.endswith(SUFFIXES)
        and (info.path == inner or not _hidden(info.path, inner))
    ]
    if not matches:
        what = "the folder has" if info.type == fs.FileType.Directory else "the pattern matches"
        raise UserError(f"{path}: {what} no files of the formats {formats}")
    return matches


def _hidden(path: str, root: str) -> bool:
    """A part of the path starts with a dot that the user did not spell out."""
    return any(part.startswith(".") and part not in root.split("/") for part in path.split("/"))


def _version(filesystem: fs.FileSystem, info: fs.FileInfo) -> str:
    if isinstance(filesystem, fs.PyFileSystem):  # The Hub has content hashes, and times only at a cost.
        return filesystem.handler.fs.ukey(info.path)
    return f"{info.size}:{info.mtime_ns}"


def current_version(source: Source) -> str:
    """What `source.version` would be now; another value means that the file has changed."""
    filesystem, path = locate(source.path)
    return _version(filesystem, filesystem.get_file_info(path))


def read_rows(source: Source, part: Part = Part()) -> Iterator[Row | Reject]:
    """Every row of a source, or of a part of it: parsed, or why not.

    Raises:
        UserError: the file cannot be opened or read at all.
    """
    for raw in read_raw(source, part):
        yield raw if isinstance(raw, Reject) else parse_row(source.path, raw)


def read_raw(source: Source, part: Part = Part()) -> Iterator[RawRow | Reject]:
    """As `read_rows`, with rows as they lie in the file. Rejects are lines too long, and a Damage at the end."""
    filesystem, path = locate(source.path)
    try:
        with filesystem.open_input_file(path) as file:
            if source.suffix == ".parquet":
                yield from _parquet_rows(source.path, file, part)
            else:
                yield from _lines(source.path, _chunks(source, file, part), part)
    except OSError as error:
        raise UserError(f"{source.path}: cannot be read: {one_line(error)}") from None


class _DamagedError(Exception):
    """A compressed file that breaks off or does not decompress."""


def _chunks(source: Source, file: pa.NativeFile, part: Part) -> Iterator[bytes]:
    if source.suffix == ".jsonl.gz":
        return _decompressed(file, lambda: zlib.decompressobj(wbits=31))
    if source.suffix == ".jsonl.zst":
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
    """The content of one compressed member or several, up to where it is damaged."""
    member = new()
    try:
        while chunk := file.read(CHUNK):
            # In small pieces, because zstd expands up to 32,768 times, and because a damaged piece is lost as a whole.
            for start in range(0, len(chunk), 1024):
                piece = chunk[start : start + 1024]
                while piece := piece.lstrip(b"\0") if member.eof else piece:
                    if member.eof:
                        member = new()
                    yield member.decompress(piece)
                    piece = member.unused_data if member.eof else b""
    except (zlib.error, zstandard.ZstdError) as error:
        raise _DamagedError(f"the compressed file is damaged from here on: {one_line(error)}") from None
    if not member.eof:
        raise _DamagedError("the compressed file is truncated: it ends in the middle")


def _lines(path: str, chunks: Iterator[bytes], part: Part) -> Iterator[RawRow | Reject]:
    """Cut chunks at newlines; of a line that is too long no more than the limit is ever held."""
    line = part.first_line
    pending: list[bytes] = []
    size = 0

    def finish() -> Iterator[RawRow | Reject]:
        content = b"".join(pending)
        if line == 1 and part.start == 0:
            content = content.removeprefix(BOM)
        if size > LINE_LIMIT:
            yield Reject(path, line, TOO_LONG)
        elif content := content.strip():
            yield RawRow(line, content)

    try:
        for chunk in chunks:
            for newlines, piece in enumerate(chunk.split(b"\n")):
                if newlines:
                    yield from finish()
                    line, pending, size = line + 1, [], 0
                size += len(piece)
                if size <= LINE_LIMIT:
                    pending.append(piece)
                else:
                    pending.clear()
        yield from finish()
    except _DamagedError as damage:
        yield Damage(path, line, str(damage))


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
        if isinstance(error, OSError) and is_url(path):  # What an object store does not give may come later.
            raise
        yield Damage(path, line, f"the Parquet file is damaged from here on: {one_line(error)}")


def _parquet_row(path: str, line: int, row: pa.StructScalar) -> RawRow | Reject:
    try:
        content = json.dumps(_without_nulls(row.as_py()), ensure_ascii=False, default=_json_value).encode()
    except (TypeError, ValueError, OverflowError) as error:  # OverflowError: a date that Python has no year for
        return Reject(path, line, f"not a row that JSON can hold: {one_line(error)}")
    return RawRow(line, content) if len(content) <= LINE_LIMIT else Reject(path, line, TOO_LONG)


def _without_nulls(value: Any) -> Any:
    """Parquet gives each struct all fields of its kind, null or NaN where a row has none; JSON leaves those out."""
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
    return str(value)  # Dates, decimals: fields that no stage reads.


def parse_row(path: str, raw: RawRow) -> Row | Reject:
    """A row's JSON object, or what is wrong with it."""
    try:
        value = _decode(raw.content.decode())
        if not isinstance(value, dict):
            reason = f"not a JSON object, but {type(value).__name__}"
        elif raw.content.count(b"[") + raw.content.count(b"{") > DEPTH_LIMIT and deeper(value, DEPTH_LIMIT):
            reason = TOO_DEEP
        else:
            if b"\\u" in raw.content:
                json.dumps(value, ensure_ascii=False).encode()
            return Row(path, raw.line, value)
    except UnicodeDecodeError as error:
        reason = f"invalid UTF-8 at byte {error.start + 1} of the line"
    except UnicodeEncodeError:
        reason = "half of a surrogate pair (\\ud800 to \\udfff), which is no character"
    except RecursionError:
        reason = TOO_DEEP
    except json.JSONDecodeError as error:
        reason = f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
    except ValueError as error:
        reason = f"not valid JSON: {one_line(error)}"
    return Reject(path, raw.line, reason)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_decode = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant).decode
