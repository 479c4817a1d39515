"""Make and protect Ray's token, a file in the user's home. Anyone who can read it can run code on the cluster."""

from __future__ import annotations

import os
import secrets
import stat
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

TOKEN = "~/.ray/auth_token"


def keep_token_private() -> None:
    """Let only the owner read the token's file, if the file exists. Print a warning if this fails."""
    path = Path(TOKEN).expanduser()
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            path.chmod(0o600)
    except FileNotFoundError:
        return
    except OSError as error:
        print(
            f"warning: other users can read {path} and run code on the cluster: its permissions could not be changed: "
            f"{error.strerror}",
            file=sys.stderr,
        )


def ensure_token() -> None:
    """Make a token for a Ray on this machine if the user has no token. Only its owner can read the file.

    (Ray itself would make a file that every user can read.) If two processes make a token at the same time, both use
    the token of the first process.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    path = Path(TOKEN).expanduser()
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH") or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile("w", dir=path.parent) as file:  # Python gives this file mode 0600.
        file.write(secrets.token_hex(32))
        file.flush()
        with suppress(FileExistsError):
            os.link(file.name, path)
