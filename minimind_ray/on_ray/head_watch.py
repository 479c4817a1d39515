"""End the command with a helpful message if the cluster's head does not answer any more.

Ray itself would abort the process after a minute, without saying how to continue the run.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import threading
import time

PAUSE, ANSWER_SECONDS = 2.0, 5.0
PATIENCE = 45.0  # Seconds; Ray itself aborts the process after 60.
_left = threading.Event()


def watch_head(address: str, patience: float = PATIENCE) -> None:
    """Check every few seconds, in a thread, that the head at `address` answers, until `leave_head`.

    If the head does not answer for `patience` seconds, print how to continue and end this process with exit code 1.
    """
    global _left
    _left = threading.Event()
    host, _, port = address.rpartition(":")
    threading.Thread(target=_watch, args=(host.strip("[]"), int(port), patience, _left), daemon=True).start()


def leave_head() -> None:
    """Stop watching the head."""
    _left.set()


def _watch(host: str, port: int, patience: float, left: threading.Event) -> None:
    silent_since = None
    while not left.wait(PAUSE):
        try:
            socket.create_connection((host, port), ANSWER_SECONDS).close()
            silent_since = None
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # No free file here; the head may be fine.
                continue
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > patience and not left.is_set():
                _end(f"{host}:{port}", patience, error)


def _end(address: str, seconds: float, error: OSError) -> None:
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # A progress bar has hidden it.
    print(
        f"{show_cursor}error: Ray's head at {address} has not answered for {seconds:.0f} seconds ({error}). All saved "
        "files are kept: once Ray runs again, --resume continues a run or a sweep from its last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
