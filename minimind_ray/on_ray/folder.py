"""Choose the folder for a Ray on this machine: for its sockets, its logs, and the objects that it spills to disk."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from minimind_ray.config.errors import UserError

SHORT = Path("/tmp")
SOCKET_BYTES = 107 if sys.platform == "linux" else 103
# Ray adds this to its folder: a session, and a socket in it.
SESSION_BYTES = len("/session_2026-01-31_12-00-00_000000_1234567/sockets/plasma_store")
LONGEST = SOCKET_BYTES - SESSION_BYTES - len("/ray")


def ray_folder() -> Path:
    """Return the folder, and make it if it is missing: `ray` in RAY_TMPDIR, or in TMPDIR, or in /tmp, as Ray chooses.

    Ray cannot use a folder with a long or non-ASCII path. If TMPDIR is such a folder, or another user has closed
    /tmp/ray, Ray gets a private folder in /tmp, and a message on stderr says so.

    Raises:
        UserError: Ray cannot use RAY_TMPDIR, or cannot use any folder in /tmp.
    """
    variable = next((name for name in _variables() if os.environ.get(name)), None)
    base = Path(os.environ[variable] if variable else SHORT).absolute()
    if (fault := _fault(base)) is None:
        return base / "ray"
    setting = f"{variable}={os.environ[variable]}" if variable else str(base / "ray")
    advice = f"set RAY_TMPDIR to a folder whose path has at most {LONGEST} bytes"
    if variable == "RAY_TMPDIR":
        raise UserError(f"{setting}: Ray cannot keep its files there: {fault}; {advice}")
    own = SHORT / f"minimind-ray-{os.getuid()}"
    if (own_fault := _private_fault(own) or _fault(own)) is not None:
        raise UserError(f"{setting}: Ray cannot keep its files there: {fault}, nor in {own}: {own_fault}; {advice}")
    print(f"{setting}: {fault}, so Ray keeps its files in {own}; for another place {advice}", file=sys.stderr)
    return own / "ray"


def _variables() -> tuple[str, ...]:
    return ("RAY_TMPDIR", "TMPDIR") if sys.platform == "linux" else ("RAY_TMPDIR",)


def _fault(base: Path) -> str | None:
    """Make `ray` in this folder. Return why Ray cannot use it, or None."""
    if not str(base).isascii():
        return "the path has characters that are not ASCII"
    if (size := len(str(base))) > LONGEST:
        return f"the path has {size} bytes, {size - LONGEST} too many for Ray's sockets"
    folder = base / "ray"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return error.strerror
    return None if os.access(folder, os.W_OK | os.X_OK) else "this user may not write there"


def _private_fault(folder: Path) -> str | None:
    """Make a private folder. Return why it is not private (such as a link made by another user), or None."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        return error.strerror
    found = folder.lstat()
    private = found.st_uid == os.getuid() and stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077
    return None if private else "other users can enter or change it"
