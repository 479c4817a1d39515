"""Robust statistics of noisy curves: scatter, level and smooth course, which single outliers do not change."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

MAD_TO_SIGMA = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""
MEDIAN_ERROR = 1.2533
"""The standard error of a median over that of a mean, for normal noise: sqrt(pi / 2)."""


class Level(NamedTuple):
    """The median of some values, and its standard error."""

    value: float
    error: float


def scatter(values: np.ndarray) -> float:
    """Return the standard deviation of the values around their slow course; 0 for fewer than 3 values.

    From the differences of neighbours, so that a slope hardly counts, and by their median, so that spikes do not.
    """
    if len(values) < 3:
        return 0.0
    return float(MAD_TO_SIGMA * np.median(np.abs(np.diff(values))) / math.sqrt(2))


def level(values: np.ndarray) -> Level:
    """Return the median of values that hardly change, and its standard error. `values` are not empty."""
    return Level(float(np.median(values)), MEDIAN_ERROR * scatter(values) / math.sqrt(len(values)))


def difference(before: np.ndarray, after: np.ndarray) -> Level:
    """Return by how much the level of `after` is above that of `before`, and the standard error."""
    a, b = level(before), level(after)
    return Level(b.value - a.value, math.hypot(a.error, b.error))


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Return the median of the `width` values around each value. Near the ends, fewer values count."""
    half = width // 2
    if half < 1 or len(values) < 3:
        return values.astype(float)
    padded = np.pad(values.astype(float), half, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    return np.nanmedian(windows, axis=1)
