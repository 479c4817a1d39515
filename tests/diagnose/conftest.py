"""The recorded runs, which test_recorded.py describes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.diagnose.recorded import unpack


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("recorded"))
