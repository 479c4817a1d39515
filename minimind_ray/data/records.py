"""Rows out of source files, one bad line at a time: what cannot be read becomes a Reject, never an exception."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """A JSON object and where it stands: `line` counts from 1 (in Parquet: the row's number)."""

    file: str
    line: int
    value: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that cannot be used, and why, in words for the user."""

    file: str
    line: int
    reason: str
