"""Unpack the recorded runs, which test_recorded.py describes."""

from __future__ import annotations

import zipfile
from pathlib import Path


def unpack(folder: Path) -> Path:
    """Write each recorded run into a directory of its name in the folder. Returns the folder."""
    with zipfile.ZipFile(Path(__file__).with_name("runs.zip")) as archive:
        archive.extractall(folder)
    return folder
