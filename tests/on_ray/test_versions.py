"""When the private parts of Ray are used."""

from __future__ import annotations

import pytest
import ray

from minimind_ray.on_ray import versions

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("version", "setting", "used"),
    [("2.60.0", None, True), ("2.60.0", "0", True), ("2.60.0", "1", False), ("2.61.0", None, False)],
)
def test_private_parts_need_a_tested_version(
    version: str, setting: str | None, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "__version__", version)
    monkeypatch.delenv("MINIMIND_PUBLIC_ONLY", raising=False)
    if setting is not None:
        monkeypatch.setenv("MINIMIND_PUBLIC_ONLY", setting)
    assert versions.private_parts() is used
