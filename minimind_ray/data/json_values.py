"""Split a stream of JSON bytes into its values: the items of an array, or values one after another.

`records.py` uses it for .json files that are too large to load at once. Values are not parsed here: the scanner follows
only strings and brackets. It takes time linear in the bytes, and memory for one chunk and one value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

BLANKS = re.compile(rb"[ \t\r\n]*+")
SCALAR = re.compile(rb'[^ \t\r\n",:\[\]{}]*+')
IN_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
BETWEEN_BRACKETS = re.compile(rb'[^"\[\]{}]*+(?:"(?:[^"\\]++|\\.)*+"[^"\[\]{}]*+)*+', re.DOTALL)
PUNCTUATION = (b",", b":", b"]", b"}")
END = b""
TRUNCATED = "the file is truncated: its JSON array does not end"
MISSING_COMMA = "not valid JSON: a comma is missing in the array before this row"


class DamagedError(Exception):
    """A file is damaged, and nothing after this place can be read. The message says why."""


class JsonValues:
    """Iterates over the values. Each item is a value's bytes, or None for a value of more than `limit` bytes.

    Raises:
        DamagedError: the array is truncated, lacks a comma, or is followed by more text. `place` says where.
    """

    def __init__(self, chunks: Iterable[bytes], limit: int) -> None:
        self._chunks = chunks
        self._limit = limit
        self._line = self._second_line = 1
        self._number = 0

    @property
    def place(self) -> int:
        """The line, from 1, on which the current value begins; the value's number if line 1 holds several values."""
        return self._number if self._number > 1 and self._second_line == 1 else self._line

    def __iter__(self) -> Iterator[bytes | None]:
        tokens = self._tokens()
        first = next(tokens, END)
        if first == b"[":
            yield from self._items(tokens)
        elif first != END:
            yield _value(first)
            yield from map(_value, tokens)

    def _items(self, tokens: Iterator[bytes | None]) -> Iterator[bytes | None]:
        token = next(tokens, END)
        if token != b"]":
            yield _value(token)
            while (separator := next(tokens, END)) != b"]":
                if separator != b",":
                    raise DamagedError(TRUNCATED if separator == END else MISSING_COMMA)
                yield _value(next(tokens, END))
        if next(tokens, END) != END:
            raise DamagedError("not valid JSON: there is more text after the end of the array")

    def _tokens(self) -> Iterator[bytes | None]:
        """Yield whole values and the punctuation between them. A `[` at the text's beginning counts as punctuation."""
        line, rest = 1, b""
        value: _Value | None = None
        opening = True
        for chunk in self._chunks:
            chunk, rest, at = rest + chunk, b"", 0
            while at < len(chunk):
                if value is None:
                    start = _end(BLANKS, chunk, at)
                    line, at = line + chunk.count(b"\n", at, start), start
                    mark = chunk[at : at + 1]
                    if mark == b"":
                        break
                    if mark in PUNCTUATION or (opening and mark == b"["):
                        self._line, at, opening = line, at + 1, False
                        yield mark
                        continue
                    self._begin(line)
                    value, opening = _Value(mark, self._limit), False
                stop = value.read(chunk, at)
                line, at = line + chunk.count(b"\n", at, stop), stop
                if value.ended:
                    yield value.content
                    value = None
                elif at < len(chunk):  # The chunk ends with a backslash; the escaped character is in the next chunk.
                    rest = chunk[at:]
                    break
        if value is None:
            self._begin(line)
        elif value.scalar:
            yield value.content
        else:
            raise DamagedError("the file is truncated: it ends inside the row that begins here")

    def _begin(self, line: int) -> None:
        self._line, self._number = line, self._number + 1
        if self._number == 2:
            self._second_line = line


def _value(token: bytes | None) -> bytes | None:
    if token == END:
        raise DamagedError(TRUNCATED)
    if token in PUNCTUATION:
        raise DamagedError(f"not valid JSON: {token.decode()} where a row should begin")
    return token


class _Value:
    """A value while it is read, chunk after chunk. Drops the bytes of a value that is too long."""

    def __init__(self, mark: bytes, limit: int) -> None:
        self.scalar = mark not in (b"{", b"[", b'"')
        self.ended = False
        self._limit = limit
        self._depth = 0
        self._in_string = False
        self._pieces: list[bytes] = []
        self._size = 0

    @property
    def content(self) -> bytes | None:
        return b"".join(self._pieces) if self._size <= self._limit else None

    def read(self, chunk: bytes, start: int) -> int:
        """Read the value's bytes from `start` on, up to its end or the chunk's. Returns where reading stopped."""
        stop = self._find_end(chunk, start)
        self._size += stop - start
        if self._size <= self._limit:
            self._pieces.append(chunk[start:stop])
        else:
            self._pieces.clear()
        return stop

    def _find_end(self, chunk: bytes, at: int) -> int:
        if self.scalar:
            at = _end(SCALAR, chunk, at)
            self.ended = at < len(chunk)
            return at
        while not self.ended:
            if self._in_string:
                at = _end(IN_STRING, chunk, at)
            elif self._depth:
                at = _end(BETWEEN_BRACKETS, chunk, at)
            mark = chunk[at : at + 1]
            if mark in (b"", b"\\"):
                break
            at += 1
            if mark == b'"':
                self._in_string = not self._in_string
            else:
                self._depth += 1 if mark in (b"{", b"[") else -1
            self.ended = not self._depth and not self._in_string
        return at


def _end(pattern: re.Pattern[bytes], text: bytes, start: int) -> int:
    """Return the end of the pattern's match at `start`. The patterns of this module always match."""
    found = pattern.match(text, start)
    return found.end() if found else start
