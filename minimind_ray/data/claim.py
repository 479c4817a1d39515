"""One writer at a time for a run or a sweep, on a local disk and in an object store.

`writer.json` in the directory names the process that writes there, for as long as it does; a trial's is that of its
sweep. On a local disk the process holds a lock of the operating system on the file, which ends with the process,
however it ends. Object stores have no locks: there, and on file systems without locks, the file is a lease. The process
renews it every RENEW_S, and it ends LEASE_S after the last time, or at once where this machine knows that the process
is gone. A process that was killed leaves the file behind, and Ray's workers may write for a second longer: whoever
comes next waits LINGER_S.

A lease has limits. The clocks of the machines must agree to within a minute. Two processes that claim a directory
within the same second may both get it if one of them then needs more than SETTLE_S to write; the loser finds out when
it renews, and ends.
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
from minimind_ray.data.files import atomic_output, join, locate
from minimind_ray.data.storage import WRITER, Mirror, copy_of, mirror_of, patiently, url_of

if TYPE_CHECKING:
    from pyarrow import fs

LEASE_S, RENEW_S, SETTLE_S = 120.0, 30.0, 1.0
LINGER_S = 3.0
LOCK_SECONDS = 1.0
"""How long a lock is tried for: whoever looks at a run holds it for a moment."""
ENDED = -1
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_held = set[str]()


class Writer(BaseModel):
    """writer.json. `started` is in the kernel's ticks, `machine` a boot of a machine and a namespace of processes."""

    model_config = ConfigDict(strict=True, extra="ignore")

    host: str = "an unknown machine"
    process: int = 0
    started: int | None = None
    machine: str | None = None
    since: str = "an unknown time"
    token: str = Field(default_factory=lambda: uuid4().hex)
    until: float | None = None  # When a lease ends, in seconds since 1970; None: a lock.

    @classmethod
    def here(cls) -> Writer:
        """This process."""
        return cls(
            host=socket.gethostname(), process=os.getpid(), started=_started(os.getpid()), machine=_machine(),
            since=_time(time.time()),
        )  # fmt: skip

    def is_gone(self) -> bool:
        """Whether this machine knows that the process has ended.

        /proc shows whether a later process has its id. Mounted with hidepid, it shows no other users' processes; then
        whatever has the id counts as the writer.
        """
        if self.machine is None or self.machine != _machine():
            return False
        try:
            os.kill(self.process, 0)
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:  # It lives, and is another user's.
            pass
        started = _started(self.process)
        return started == ENDED or None not in (started, self.started) and started != self.started

    def has_lease(self) -> bool:
        """Whether it holds a lease that has not ended."""
        return self.until is not None and time.time() < self.until and not self.is_gone()


def live_writer(directory: Path) -> Writer | None:
    """The process that writes to a run or a sweep, from its directory or a local copy of it; None: no process does."""
    path = (directory.parent.parent if _is_trial(directory) else directory) / WRITER
    try:
        with path.open("rb") as file:
            writer = _parse(file.read())
            if writer and writer.until is not None:
                return writer if writer.has_lease() else None
            # Free for a moment: it looks the same to this process whether it holds the lock itself.
            return None if _try_lock(file, fcntl.LOCK_SH, 0) else writer or Writer()
    except OSError:
        return None


def find_writer(where: str | Path) -> Writer | None:
    """As `live_writer`, of a directory or a URL as it is now. Raises StoreError."""
    for place in _places(where):
        if mirror := mirror_of(place):
            for name in (WRITER, SWEEP):
                mirror.pull_file(name)
    return live_writer(copy_of(url_of(where)))


def require_free(where: str | Path) -> None:
    """Raises UserError where another process writes to the run or sweep in a directory or at a URL."""
    if _held.isdisjoint(_places(where)) and (writer := find_writer(where)):
        raise _in_use(_place(where), writer)


@contextmanager
def claimed(where: str | Path) -> Generator[None]:
    """While inside, this process alone writes to the run or sweep in a directory or at a URL.

    The directory is made if it is missing, and removed if it stays empty.

    Raises:
        UserError: another process does.
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
            with suppress(OSError):  # Something is in it.
                directory.rmdir()


SWEEP = "sweep.json"


def _places(where: str | Path) -> list[str]:
    """The directory itself, and the sweep whose trial it may be."""
    own = url_of(where).rstrip("/")
    parts = own.split("/")
    return [own, "/".join(parts[:-2])] if parts[-2:-1] == ["trials"] and len(parts) > 2 else [own]


def _place(where: str | Path) -> str:
    """The directory or URL whose writer.json counts, as far as the local copy of a URL is up to date."""
    own, *sweep = _places(where)
    return sweep[0] if _is_trial(copy_of(own)) else own


def _is_trial(directory: Path) -> bool:
    return directory.parent.name == "trials" and (directory.parent.parent / SWEEP).exists()


def _lock(directory: Path) -> IO[bytes] | None:
    """writer.json, locked until it is closed; None where the file system has no locks."""
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
    if os.fstat(file.fileno()).st_nlink == 0:  # The process before has just removed it.
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

    def renew() -> None:
        while not ended.wait(RENEW_S):
            with suppress(OSError):  # What fails now is tried again in RENEW_S.
                if (there := read()) is None or there.token != own.token:
                    _end(where, there)
                write()

    if (there := patiently(read, where)) and there.has_lease():
        raise _in_use(where, there)
    if there:
        time.sleep(LINGER_S)
    patiently(write, where)
    time.sleep(SETTLE_S)
    if (there := patiently(read, where)) is None or there.token != own.token:
        raise _in_use(where, there or Writer())
    ended = threading.Event()
    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(OSError):  # What is left of it ends by itself.
            filesystem.delete_file(path)


def _read(filesystem: fs.FileSystem, path: str) -> bytes:
    with filesystem.open_input_stream(path, compression=None) as stream:
        return stream.read()


def _write(filesystem: fs.FileSystem, path: str, content: bytes) -> None:
    from pyarrow import fs

    # Object stores replace a whole object at once.
    local = isinstance(filesystem, fs.LocalFileSystem)
    with atomic_output(filesystem, path) if local else filesystem.open_output_stream(path, compression=None) as stream:
        stream.write(content)


def _end(where: str, there: Writer | None) -> None:
    """End this process, which may write no longer; what it has not written by now would disturb the other's run."""
    other = f"{_name(there)} has claimed it" if there else f"{join(where, WRITER)} was deleted"
    print(f"error: {where}: this process ends, because {other}", file=sys.stderr, flush=True)
    os._exit(1)


def _in_use(where: str, writer: Writer) -> UserError:
    text = f"{where} is in use by {_name(writer)}: wait for its end, stop it, or choose another --out"
    if writer.until is not None:
        text += (
            f". If that process is gone, its claim ends by itself at {_time(writer.until)}, and at once if you delete "
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
    """Names this boot of this machine, and the namespace in which its process ids hold; None where Linux is not."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _started(process: int) -> int | None:
    """When a process was started; ENDED of one that only its parent still knows, None where /proc does not show it."""
    try:
        state, *values = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return ENDED if state == "Z" else int(values[18])
