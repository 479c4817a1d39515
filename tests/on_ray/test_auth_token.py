"""The token's file is its owner's alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from minimind_ray.on_ray.auth_token import ensure_token, keep_token_private

pytestmark = pytest.mark.unit


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the token is in a fresh home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / ".ray" / "auth_token"


def test_a_new_token_is_private_and_stays(token: Path) -> None:
    keep_token_private()
    assert not token.exists()
    ensure_token()
    made = token.read_text()
    assert len(made) >= 32 and token.stat().st_mode & 0o777 == 0o600
    ensure_token()
    assert token.read_text() == made


def test_a_token_that_others_can_read_is_tightened(token: Path) -> None:
    token.parent.mkdir()
    token.write_text("t" * 32)
    token.chmod(0o644)
    keep_token_private()
    assert token.stat().st_mode & 0o777 == 0o600 and token.read_text() == "t" * 32


@pytest.mark.parametrize(("name", "value"), [("RAY_AUTH_TOKEN", "t" * 32), ("RAY_AUTH_MODE", "disabled")])
def test_no_token_is_made_that_ray_would_not_read(
    token: Path, name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    ensure_token()
    assert not token.exists()
