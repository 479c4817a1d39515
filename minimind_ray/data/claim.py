"""Make sure that only one process at a time writes to a run or a sweep, on a local disk and in an object store.

`writer.json` in the directory names the writing process, while it writes. The trials of a sweep share the sweep's file.

On a local disk the process holds a lock of the operating system on the file. The lock ends with the process. Object
stores and some file systems have no locks: there the file is a lease. The process renews the lease every RENEW_S. The
lease expires LEASE_S after the last renewal, or at once if the process ran on this machine and is gone.

A killed process leaves the file behind, and its Ray workers may write for another second. The next process therefore
waits LINGER_S before it writes.

Leases have limits. The clocks of the machines must agree to within a minute. If two processes claim a directory within
the same second, and one of them needs more than SETTLE_S to write the file, both may start. The process whose lease was
overwritten notices this at its next renewal and exits.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from minimind_ray.config.errors import UserError
from minimind_ray.data.background import in_background
from minimind_ray.data.files import atomic_output, join, locate
from minimind_ray.data.storage import WRITER, Mirror, copy_of, mirror_of, retry, url_of

if TYPE_CHECKING:
    from pyarrow import fs

LEASE_S, RENEW_S, SETTLE_S = 120.0, 30.0, 1.0
LINGER_S = 3.0
LOCK_SECONDS = 1.0
"""How long to try for a lock: a process that only looks at a run holds the lock for a moment."""
ENDED = -1
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_held = set[str]()


class Writer(BaseModel):
    """The content of writer.json.

    `started` is the process's start time in kernel ticks; `machine` names one boot of one machine and its process
    namespace.
    """

    model_config = ConfigDict(strict=True, extra="ignore")

    host: str = "an unknown machine"
    process: int = 0
    started: int | None = None
    machine: str | None = None
    since: str = "an unknown time"
    token: str = Field(default_factory=lambda: uuid4().hex)
    until: float | None = None  # the time at which the lease expires, in seconds since 1970; None for a lock

    @classmethod
    def here(cls) -> Writer:
        """Return a writer that describes this process."""
        return cls(
            host=socket.gethostname(), process=os.getpid(), started=_started(os.getpid()), machine=_machine(),
            since=_time(time.time()),
        )  # fmt: skip

    def is_gone(self) -> bool:
        """Whether the process ran on this machine and has ended. False if that cannot be known.

        A newer process may have the same id: the start time in /proc shows this. If /proc hides the processes of other
        users (hidepid), any process with this id counts as the writer.
        """
        if self.machine is None or self.machine != _machine():
            return False
        try:
            os.kill(self.process, 0)
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:  # The process lives and belongs to another user.
            pass
        started = _started(self.process)
        return started == ENDED or None not in (started, self.started) and started != self.started

    def has_lease(self) -> bool:
        """Whether the process has a lease that has not expired."""
        return self.until is not None and time.time() < self.until and not self.is_gone()


def live_writer(directory: Path) -> Writer | None:
    """Return the process that writes to a run or sweep, from the writer.json in this directory; None if none does.

    For a run in an object store, `directory` is its local copy, which may be out of date: see `find_writer`.
    """
    path = (directory.parent.parent if _is_trial(directory) else directory) / WRITER
    try:
        with path.open("rb") as file:
            writer = _parse(file.read())
            if writer and writer.until is not None:
                return writer if writer.has_lease() else None
            # This test takes a free lock for a moment. If this process itself is the writer, the lock is not free.
            return None if _try_lock(file, fcntl.LOCK_SH, 0) else writer or Writer()
    except OSError:
        return None


def find_writer(where: str | Path) -> Writer | None:
    """Return the process that writes to a run or sweep in a directory or at a URL, from its newest writer.json.

    Raises:
        StoreError: the object store cannot be read.
    """
    for place in _places(where):
        if mirror := mirror_of(place):
            for name in (WRITER, SWEEP):
                mirror.pull_file(name)
    return live_writer(copy_of(url_of(where)))


def require_free(where: str | Path) -> None:
    """Raise UserError if another process writes to the run or sweep in this directory or at this URL."""
    if _held.isdisjoint(_places(where)) and (writer := find_writer(where)):
        raise _in_use(_place(where), writer)


@contextmanager
def claimed(where: str | Path) -> Generator[None]:
    """Allow only this process to write to the run or sweep in a directory or at a URL, until the block ends.

    Creates a missing directory, and removes the directory at the end if it is empty. Nested use is allowed.

    Raises:
        UserError: another process writes there.
    """
    require_free(where)
    place = _place(where)
    directory, mirror = copy_of(place), mirror_of(place)
    if place in _held:
        yield
        return
    file = None if mirror else _lock(directory)
    _held.add(place)
    try:
        with _locked(directory, file) if file else _leased(place, mirror):
            yield
    finally:
        _held.discard(place)


@contextmanager
def _locked(directory: Path, file: IO[bytes]) -> Generator[None]:
    with file:
        try:
            yield
        finally:
            (directory / WRITER).unlink(missing_ok=True)
            with suppress(OSError):  # The directory is not empty.
                directory.rmdir()


SWEEP = "sweep.json"


def _places(where: str | Path) -> list[str]:
    """Return the directory itself and, if its path looks like a trial's, the sweep's directory."""
    own = url_of(where).rstrip("/")
    parts = own.split("/")
    return [own, "/".join(parts[:-2])] if parts[-2:-1] == ["trials"] and len(parts) > 2 else [own]


def _place(where: str | Path) -> str:
    """Return the directory or URL whose writer.json counts: for a trial, the sweep's. Trusts a URL's local copy."""
    own, *sweep = _places(where)
    return sweep[0] if _is_trial(copy_of(own)) else own


def _is_trial(directory: Path) -> bool:
    return directory.parent.name == "trials" and (directory.parent.parent / SWEEP).exists()


def _lock(directory: Path) -> IO[bytes] | None:
    """Open and lock writer.json until the file is closed; None if the file system has no locks.

    Raises:
        UserError: another process holds the lock.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = (directory / WRITER).open("a+b", buffering=0)
    try:
        locked = _try_lock(file, fcntl.LOCK_EX, LOCK_SECONDS)
    except OSError as error:
        file.close()
        if error.errno in NO_LOCKS:
            return None
        raise
    file.seek(0)
    content = file.read()
    if not locked:
        file.close()
        raise _in_use(str(directory), _parse(content) or Writer())
    if os.fstat(file.fileno()).st_nlink == 0:  # The previous writer has just deleted this file: open a new one.
        file.close()
        return _lock(directory)
    if content:
        time.sleep(LINGER_S)
    file.truncate(0)
    file.write(Writer.here().model_dump_json().encode())
    return file


def _try_lock(file: IO[bytes], kind: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
        time.sleep(0.02)


@contextmanager
def _leased(where: str, mirror: Mirror | None) -> Generator[None]:
    own = Writer.here()
    filesystem, root = (mirror.filesystem, mirror.root) if mirror else locate(where)
    path = join(root, WRITER)

    def read() -> Writer | None:
        try:
            return _parse(_read(filesystem, path))
        except FileNotFoundError:
            return None

    def write() -> None:
        _write(filesystem, path, own.model_copy(update={"until": time.time() + LEASE_S}).model_dump_json().encode())

    def renew(ended: threading.Event) -> None:
        while not ended.wait(RENEW_S):
            with suppress(OSError):  # Try again in RENEW_S.
                if (there := read()) is None or there.token != own.token:
                    _exit(where, there)
                write()

    if (there := retry(read, where)) and there.has_lease():
        raise _in_use(where, there)
    if there:
        time.sleep(LINGER_S)
    retry(write, where)
    time.sleep(SETTLE_S)
    if (there := retry(read, where)) is None or there.token != own.token:
        raise _in_use(where, there or Writer())
    try:
        with in_background(renew, "lease"):
            yield
    finally:
        with suppress(OSError):  # A lease that stays behind expires.
            filesystem.delete_file(path)


def _read(filesystem: fs.FileSystem, path: str) -> bytes:
    with filesystem.open_input_stream(path, compression=None) as stream:
        return stream.read()


def _write(filesystem: fs.FileSystem, path: str, content: bytes) -> None:
    from pyarrow import fs

    # Object stores replace a whole object at once; a local file needs `atomic_output`.
    local = isinstance(filesystem, fs.LocalFileSystem)
    with atomic_output(filesystem, path) if local else filesystem.open_output_stream(path, compression=None) as stream:
        stream.write(content)


def _exit(where: str, there: Writer | None) -> None:
    """Exit at once: another process has claimed the directory, and further writes would damage its run."""
    other = f"{_name(there)} has claimed it" if there else f"{join(where, WRITER)} was deleted"
    print(f"error: {where}: this process exits, because {other}", file=sys.stderr, flush=True)
    os._exit(1)


def _in_use(where: str, writer: Writer) -> UserError:
    text = f"{where} is in use by {_name(writer)}: wait until it ends, stop it, or choose another --out"
    if writer.until is not None:
        text += (
            f". If that process is gone, its claim expires at {_time(writer.until)}; to free {where} now, delete "
            f"{join(where, WRITER)}"
        )
    return UserError(text)


def _name(writer: Writer) -> str:
    return f"process {writer.process} on {writer.host}, since {writer.since}"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _parse(content: bytes) -> Writer | None:
    try:
        return Writer.model_validate_json(content)
    except ValidationError:
        return None


def _machine() -> str | None:
    """Return a name for this boot of this machine and its process namespace; None on systems other than Linux."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _started(process: int) -> int | None:
    """Return a process's start time in kernel ticks; ENDED for a zombie, None if /proc does not show the process."""
    try:
        state, *values = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return ENDED if state == "Z" else int(values[18])
