"""What W&B has written for a run, read back: its file is LevelDB's log of protobuf records."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

FULL, LAST = 1, 4


def log_records(log: bytes) -> Iterator[tuple[bytes, int]]:
    """The whole records of a .wandb file and where each ends.

    After a header of 7 bytes the file is blocks of 32 KiB, header included. A block is chunks, and a record is one
    chunk, or a first, middle ones and a last. A chunk is its check sum (4 bytes), length (2), kind (1) and data; a
    chunk's 7 bytes never cross a block's end.
    """
    place, record = 7, b""
    while place + 7 <= len(log):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", log, place)
        place += 7 + length
        if kind == 0 or place > len(log):
            return
        record += log[place - length : place]
        if kind in (FULL, LAST):
            yield record, place
            record = b""


def parse_record(data: bytes) -> Any:
    """A record as W&B's protobuf message."""
    return Record.FromString(data)


def records(out: Path) -> list[Any]:
    """All that W&B has written for a run, oldest first."""
    files = sorted(out.glob("wandb/*run-*/*.wandb"), key=lambda file: file.parent.name.removeprefix("offline-"))
    return [parse_record(data) for file in files for data, _ in log_records(file.read_bytes())]


def values(items: Any) -> dict[str, Any]:
    """A row of the history, or a part of the config or summary; deeper keys are joined by dots."""
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def history(out: Path) -> list[dict[str, Any]]:
    return [values(r.history.item) for r in records(out) if r.HasField("history")]


def summary(out: Path) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for r in records(out):
        if r.HasField("summary"):
            merged |= values(r.summary.update)
    return merged
