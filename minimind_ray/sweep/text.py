"""Format values, counts and times for people, in ids, tables and pictures."""

from __future__ import annotations

import json
from typing import Any

import numpy as np


def value_text(value: Any) -> str:
    """Return a config value as short text."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int | float):
        return number_text(value)
    if isinstance(value, list):
        return "+".join(value_text(v) for v in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def number_text(x: float) -> str:
    """Return the shortest text that means exactly `x`: 0.05, 8, 1e-5."""
    if isinstance(x, int) or not x or 1e-3 <= abs(x) < 1e6:
        return np.format_float_positional(x, trim="-")
    return np.format_float_scientific(x, trim="-", exp_digits=1).replace("e+", "e")


def shorten(text: str, longest: int) -> str:
    """Shorten a text in the middle: paths differ at their ends."""
    half = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[:half]}…{text[-half:]}"


def count_text(count: float) -> str:
    """Return a count with three digits and a unit: 950, 12.5k, 1.2M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"


def duration_text(seconds: float) -> str:
    """Return a time as hours, minutes and seconds: 1:02:03 or 2:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
