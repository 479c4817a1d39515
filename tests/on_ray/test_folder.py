"""Where a Ray on this machine keeps its files, whatever TMPDIR says."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from minimind_ray.config.errors import UserError
from minimind_ray.on_ray import folder
from minimind_ray.on_ray.folder import LONGEST, ray_folder


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in the place of /tmp, with a path that leaves room for Ray's sockets, and no setting."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.delenv("TMPDIR", raising=False)
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        monkeypatch.setattr(folder, "SHORT", Path(directory))
        yield Path(directory)


def own(short: Path) -> Path:
    return short / f"minimind-ray-{os.getuid()}"


@pytest.mark.unit
@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
def test_the_settings_folder_is_used_and_made(short: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert ray_folder() == short / "ray"
    monkeypatch.setenv(name, str(short / "a b"))
    assert ray_folder() == short / "a b" / "ray" and (short / "a b" / "ray").is_dir()
    monkeypatch.chdir(short)
    monkeypatch.setenv(name, "here")
    assert ray_folder() == short / "here" / "ray"
    monkeypatch.setenv(name, "")
    assert ray_folder() == short / "ray"


@pytest.mark.unit
@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("/tmp/" + "x" * (LONGEST - 4), f"the path has {LONGEST + 1} bytes, 1 too many for Ray's sockets"),
        ("/tmp/größe", "the path has characters that are not ASCII"),
        ("/dev/null", "Not a directory"),
    ],
)
def test_a_folder_that_ray_refuses(
    short: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str, why: str
) -> None:
    monkeypatch.setenv("TMPDIR", value)
    assert ray_folder() == own(short) / "ray"
    assert own(short).stat().st_mode & 0o777 == 0o700
    assert f"TMPDIR={value}: {why}, so Ray keeps its files in {own(short)}" in capsys.readouterr().err
    monkeypatch.setenv("RAY_TMPDIR", value)
    with pytest.raises(UserError, match=f"RAY_TMPDIR=.*{why}; set RAY_TMPDIR to a folder .* at most {LONGEST} bytes"):
        ray_folder()


@pytest.mark.unit
def test_another_users_folder_is_not_used(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/dev/null")
    own(short).symlink_to(short)
    with pytest.raises(UserError, match=f"TMPDIR=/dev/null.*nor in {own(short)}: other users can .*; set RAY_TMPDIR"):
        ray_folder()
    own(short).unlink()
    own(short).mkdir(mode=0o777)
    own(short).chmod(0o777)
    with pytest.raises(UserError, match="other users can enter or change it"):
        ray_folder()


@pytest.mark.ray
def test_ray_starts_with_a_long_tmpdir(short: Path, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from minimind_ray.on_ray import folder, session; "
        f"folder.SHORT = Path({str(short)!r}); session.start_ray(1); import ray; "
        "print(ray.get(ray.remote(lambda: 7).remote())); session.stop_ray()"
    )
    long = tmp_path / ("long" * 25)
    environment = {**os.environ, "TMPDIR": str(long)}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "7\n", done.stderr
    assert (own(short) / "ray" / "session_latest").is_symlink()
