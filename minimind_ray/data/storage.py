"""Mirror run and sweep directories of object stores in local copies, so that all other code works with local files.

    <cache>/work/s3/bucket/runs/x    the writing process's copy; a thread uploads its changes
    <cache>/read/s3/bucket/runs/x    the files that other processes have downloaded

<cache> is MINIMIND_CACHE, or .cache/minimind-ray in the home directory.

Object stores cannot rename a folder, so a checkpoint cannot appear all at once. A checkpoint folder therefore has a
MARK file, which is uploaded after all other files and deleted before them. A checkpoint without it is incomplete.

`files.py` opens single files by path or URL; this module mirrors whole directories on top of it.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar, get_args
from uuid import uuid4

from minimind_ray.config.errors import UserError
from minimind_ray.data.files import join, locate, one_line, require_bucket

if TYPE_CHECKING:
    from pyarrow import fs

MARK = "resume/sums.json"
CARD = "README.md"
WRITER = "writer.json"
DIRECT = ("config.yaml", "run.json", "trial.json", WRITER)
"""Files that several processes write. They go straight to the store; a mirror's thread never uploads them."""
TICK_S = 10.0
LOOK_S = 3.0
SMALL = 1 << 20
NOTICE_S, NOTICE_EVERY_S = 5.0, 60.0
REFUSALS = {
    r"NO_SUCH_BUCKET|bucket does not exist": "the bucket does not exist",
    # S3 answers a request without a body by the status alone, and an expired token by 400.
    r"Expired|status 400\)|InvalidToken|TokenRefresh|INVALID_CLIENT_TOKEN": (
        "the credentials have expired or are invalid"
    ),
    r"INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|status 401\)|UNAUTHENTICATED|UNRECOGNIZED_CLIENT": (
        "the credentials are not accepted"
    ),
    r"ACCESS_DENIED|status 403\)|PERMISSION_DENIED|Forbidden": "the credentials do not allow it",
    r"REQUEST_TIME_TOO_SKEWED": "the clock of this machine is wrong",
    # An fsspec package raises these errors for a bad name: hf://gpt2 is not a repository.
    r"^(ValueError|NotImplementedError): ": "the store's package refuses it",
}
"""Store errors that a retry cannot solve: a pattern of the error text, and the reason shown to the user."""

T = TypeVar("T")
Signature = tuple[int, int]
Copy = Literal["read", "work", "live"]
"""The local copies of a URL: "work" of a run's writer, "live" to follow a running sweep, and "read" of all others.

A pull deletes local files that the store lacks. So a program that follows a sweep needs its own local copy.
"""


class StoreError(UserError):
    """A request to an object store failed."""


def is_url(where: str | Path) -> bool:
    """Whether this is a URL and not a local path."""
    return "://" in str(where)


def copy_of(where: str | Path, kind: Copy = "read") -> Path:
    """Return the directory of a URL's local copy. Return a local path unchanged."""
    scheme, separator, rest = str(where).partition("://")
    if not separator:
        return Path(where)
    if ".." in PurePosixPath(rest).parts:
        raise UserError(f"{where}: a URL cannot contain ..; write the URL without it")
    return _cache() / kind / scheme / rest.strip("/")


def url_of(path: str | Path) -> str:
    """Return the URL that a local copy belongs to. Return any other path or URL unchanged."""
    for kind in get_args(Copy):
        root = _cache() / kind
        if not is_url(path) and Path(path).is_relative_to(root) and Path(path) != root:
            scheme, *parts = Path(path).relative_to(root).parts
            return f"{scheme}://{'/'.join(parts)}"
    return str(path)


def _cache() -> Path:
    return Path(os.environ.get("MINIMIND_CACHE") or Path.home() / ".cache" / "minimind-ray").absolute()


def patience() -> float:
    """Return how many seconds to retry a failing store request: MINIMIND_STORE_PATIENCE, by default five minutes."""
    return float(os.environ.get("MINIMIND_STORE_PATIENCE", 300))


def retry(work: Callable[[], T], subject: str, note: str = "") -> T:
    """Call `work` and return its result. Repeat the call, with growing pauses, while it raises OSError.

    Raises:
        FileNotFoundError: the file does not exist.
        StoreError: the store still fails after `patience()` seconds, or refuses the request for good. The message
            begins with `subject` and ends with `note`.
    """
    deadline, pause = time.monotonic() + patience(), 0.5
    while True:
        try:
            with _notice(subject):
                return work()
        except FileNotFoundError:
            raise
        except OSError as error:
            if why := _refusal(error):
                raise StoreError(f"{subject}: {why} ({one_line(error)}){note}") from None
            if time.monotonic() + pause > deadline:
                raise StoreError(f"{subject}: the object store request failed: {one_line(error)}{note}") from None
            _say(
                "failing",
                f"{subject}: the object store fails and is tried again for {patience():g} s: {one_line(error)}",
            )
        time.sleep(pause)
        pause = min(2 * pause, 30)


def _refusal(error: OSError) -> str | None:
    """Return the reason if the store refuses the request for good; None if a retry may succeed."""
    if isinstance(error, PermissionError):
        return "the credentials do not allow it"
    return next((why for pattern, why in REFUSALS.items() if re.search(pattern, str(error))), None)


@contextmanager
def _notice(subject: str) -> Generator[None]:
    """Print the name of a request that takes longer than NOTICE_S."""
    timer = threading.Timer(NOTICE_S, _say, ("waiting", f"waiting for {subject}"))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


_said: dict[str, float] = {}


def _say(kind: str, text: str) -> None:
    """Print a line on stderr, at most one line of each kind a minute: many threads wait for the same store."""
    now = time.monotonic()
    if now >= _said.get(kind, -NOTICE_EVERY_S) + NOTICE_EVERY_S:
        _said[kind] = now
        print(text, file=sys.stderr, flush=True)


def require_writable(*places: str, probe: bool = True) -> None:
    """Check that files can be written to these directories and URLs.

    With `probe`, a small file is written to each store and deleted. Without it, stores are only read.

    Raises:
        UserError: a directory or bucket does not exist or cannot be written.
        StoreError: a store request failed.
    """
    for where in dict.fromkeys(places):
        if not is_url(where) or where.startswith("file://"):
            _require_writable_folder(Path(where.removeprefix("file://")))
        elif probe:
            _require_writable_store(where)
        else:
            filesystem, root = locate(where)
            retry(lambda filesystem=filesystem, root=root: filesystem.get_file_info(root), where)
            require_bucket(where)


def _require_writable_folder(folder: Path) -> None:
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not there.is_dir():
            raise UserError(f"{folder} cannot be a directory, because {there} is a file: choose another directory")
        TemporaryFile(dir=there).close()
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}: choose another directory") from None


def _require_writable_store(url: str) -> None:
    filesystem, root = locate(url)
    path, content = join(root, f".probe-{uuid4().hex[:8]}"), b"minimind-ray: may be deleted"

    def write() -> None:
        with filesystem.open_output_stream(path, compression=None) as stream:
            stream.write(content)

    def read() -> bytes:
        with filesystem.open_input_stream(path, compression=None) as stream:
            return stream.read()

    try:
        retry(write, url)
        if retry(read, url) != content:
            raise StoreError(f"{url}: the object store returns different bytes than were written")
        retry(lambda: filesystem.delete_file(path), url)
    except FileNotFoundError as error:
        raise StoreError(f"{url} cannot be used: {one_line(error)}") from None


def read_from(where: str, work: Callable[[], T]) -> T:
    """Call `work`, which reads from `where`: with `retry` for an object store, once for a local disk."""
    return retry(work, where) if is_url(where) else work()


class Mirror:
    """The directory `url` in an object store and its local copy `path`. Transfers files between the two."""

    def __init__(self, url: str, path: Path) -> None:
        self.url, self.path = url, path
        self.filesystem, self.root = locate(url)
        self.root = self.root.rstrip("/")
        self._sent: dict[str, Signature] = {}
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._whole = self._ended = False
        self._warning: str | None = None

    def files(self, under: str = "") -> dict[str, fs.FileInfo]:
        """Return the store's files in the directory, or in its folder `under`, by path relative to the directory.

        Raises:
            UserError: the bucket does not exist.
            StoreError: see `retry`; or a file's name leads out of the directory.
        """
        from pyarrow import fs

        selector = fs.FileSelector(join(self.root, under).rstrip("/"), recursive=True, allow_not_found=True)
        found: dict[str, fs.FileInfo] = {}
        for info in retry(lambda: self.filesystem.get_file_info(selector), self.url):
            name = info.path.removeprefix(f"{self.root}/")
            if info.type != fs.FileType.File:
                continue
            if not {"", ".", ".."}.isdisjoint(name.split("/")):
                raise StoreError(f"{self.url}: the name of object {info.path} leads out of it; nothing was read")
            found[name] = info
        if not found:
            require_bucket(self.url)
        return found

    def pull(self, under: str = "", wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Download the `wanted` files of folder `under`, and delete local files that the store lacks.

        `wanted` takes a file's name. Raises as `files`.
        """
        there = {name: info for name, info in self.files(under).items() if wanted(name)}
        for name in _files(self.path / under, self.path):
            # Another process of this machine may be downloading to a hidden file right now.
            if name not in there and wanted(name) and not _hidden(name):
                (self.path / name).unlink(missing_ok=True)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(self._pull, there, there.values()))

    def pull_file(self, name: str) -> Path:
        """Download one file, or delete the local file if the store has none. Returns the local path."""
        self._pull(name, None)
        return self.path / name

    def tail(self, name: str, size: int) -> bytes:
        """Return the last `size` bytes of a file in the store. Does not retry: raises OSError if the request fails."""
        with self.filesystem.open_input_file(join(self.root, name)) as file:
            file.seek(max(0, file.size() - size))
            return file.read()

    def _pull(self, name: str, info: fs.FileInfo | None) -> None:
        target = self.path / name
        modified = info and info.mtime_ns
        if info and modified and info.size >= SMALL and target.exists():
            stat = target.stat()
            if (stat.st_size, stat.st_mtime_ns) == (info.size, modified):
                return
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid4().hex}")

        def download() -> None:
            source = self.filesystem.open_input_stream(join(self.root, name), compression=None)
            with source, temporary.open("wb") as f:
                shutil.copyfileobj(source, f, 1 << 22)

        try:
            retry(download, join(self.url, name))
            if modified:
                os.utime(temporary, ns=(modified, modified))
            temporary.replace(target)
        except FileNotFoundError:
            target.unlink(missing_ok=True)
        finally:
            temporary.unlink(missing_ok=True)

    def put(self, *names: str) -> None:
        """Upload these files now, one after another. Raises StoreError."""
        for name in names:
            retry(lambda name=name: self._upload(name), join(self.url, name))

    def _upload(self, name: str) -> None:
        from pyarrow import fs

        with (self.path / name).open("rb") as f:
            path = join(self.root, name)
            if isinstance(self.filesystem, fs.LocalFileSystem):  # file://
                self.filesystem.create_dir(path.rpartition("/")[0], recursive=True)
            target = self.filesystem.open_output_stream(path, compression=None)
            with target:
                shutil.copyfileobj(f, target, 1 << 22)

    def delete(self, names: Iterable[str]) -> None:
        """Delete these files in the store, marks first. Raises StoreError."""
        for name in sorted(names, key=lambda name: not name.endswith(MARK)):
            with suppress(FileNotFoundError):
                retry(lambda name=name: self.filesystem.delete_file(join(self.root, name)), self.url)

    def move(self, url: str) -> None:
        """Move the directory to another URL in the same store. Raises StoreError."""
        target = locate(url)[1]
        names = sorted(self.files(), key=lambda name: name.endswith(MARK))
        for name in names:
            source, copy = join(self.root, name), join(target, name)
            retry(lambda source=source, copy=copy: self.filesystem.copy_file(source, copy), url)
        self.delete(names)

    def open(self) -> None:
        """Prepare to write: download all files, so that the copy equals the store."""
        with self._lock:
            self.pull(wanted=lambda name: not _hidden(name))
            self._sent = self._signatures()

    def push(self, *, whole: bool = True) -> None:
        """Upload changed files and delete removed ones, so that the store equals the copy. Raises OSError.

        Without `whole`, skip files that have grown by less than 1/16 since their last upload.
        """
        with self._lock:
            while not self._push(whole):
                pass

    def _push(self, whole: bool) -> bool:
        """Upload once. Returns False if a file (of an old checkpoint) was deleted meanwhile: then call it again."""
        here = self._signatures()
        changed = {name for name, signature in here.items() if self._sent.get(name) != signature}
        if not whole:  # Otherwise the growing log of a long run would be uploaded again and again.
            changed -= {n for n in changed if n in self._sent and here[n][0] < self._sent[n][0] * 17 / 16}
        gone = self._sent.keys() - here.keys()
        marks = {mark for name in changed if (mark := _mark(name)) in self._sent}
        for name in [*sorted(marks), *sorted(gone, key=lambda name: not name.endswith(MARK))]:
            with suppress(FileNotFoundError):
                self.filesystem.delete_file(join(self.root, name))
            self._sent.pop(name, None)
        for folder in {name.rpartition(f"/{MARK}")[0] for name in gone if name.endswith(MARK)}:
            with suppress(FileNotFoundError):  # S3 represents a folder without files by an empty object.
                self.filesystem.delete_dir(join(self.root, folder))
        changed |= marks & here.keys()
        # Upload a checkpoint after the logs of its steps, and its mark last.
        for name in sorted(changed, key=lambda name: (name.startswith("checkpoints/"), name.endswith(MARK), name)):
            try:
                self._upload(name)
                self._sent[name] = here[name]
                if _mark(name):  # Checkpoint files never change. With the store's time, `pull` finds them up to date.
                    modified = self.filesystem.get_file_info(join(self.root, name)).mtime_ns
                    if modified:
                        os.utime(self.path / name, ns=(modified, modified))
                        self._sent[name] = (here[name][0], modified)
            except FileNotFoundError:
                if (self.path / name).exists():
                    raise
                return False
        return True

    def _signatures(self) -> dict[str, Signature]:
        found: dict[str, Signature] = {}
        for name in _files(self.path, self.path):
            if not _hidden(name) and name not in DIRECT:
                with suppress(FileNotFoundError):
                    stat = (self.path / name).stat()
                    found[name] = (stat.st_size, stat.st_mtime_ns)
        return found

    @contextmanager
    def syncing(self) -> Generator[None]:
        """Upload changed files in a thread until the block ends, then upload all files and delete the local copy.

        A store that fails for a while delays the thread.

        Raises:
            StoreError: the final upload failed. The local copy stays.
        """
        self.open()
        self._ended, self._warning = False, None
        self._wake.clear()
        thread = threading.Thread(target=self._keep_up, name="mirror", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            with suppress(OSError):
                self.push()
            raise
        else:
            self.push_with_retry()
        finally:
            self._ended = True
            self._wake.set()
            thread.join()
        shutil.rmtree(self.path, ignore_errors=True)

    def _keep_up(self) -> None:
        pause, failing = TICK_S, False
        while True:
            self._wake.wait(pause)
            whole, self._whole = self._whole, False
            self._wake.clear()
            if self._ended:
                return
            try:
                self.push(whole=whole)
            except Exception as error:  # No error may end the thread.
                self._whole = whole or self._whole
                if not failing:
                    self._warning = f"{self.url}: the object store fails and is tried again: {one_line(error)}"
                failing, pause = True, min(2 * pause, 60)
            else:
                if failing:
                    self._warning = f"{self.url}: the object store works again and has all files"
                failing, pause = False, TICK_S

    def resend(self) -> None:
        """Upload all files, whether or not they were uploaded before. Raises StoreError."""
        self._sent = {name: (0, 0) for name in self.files() if not _hidden(name) and name not in DIRECT}
        self.push_with_retry()

    def changed(self) -> None:
        """Wake the thread, so that it uploads a new checkpoint completely now."""
        self._whole = True
        self._wake.set()

    def pop_warning(self) -> str | None:
        """Return the thread's newest message about the store; None if no message came since the last call."""
        warning, self._warning = self._warning, None
        return warning

    def push_with_retry(self) -> None:
        """Upload all files now. Raises StoreError."""
        note = (
            f". The missing files are in {self.path} on {socket.gethostname()}; when the store works again, run the "
            "same command with --resume there to upload them and continue"
        )
        retry(self.push, self.url, note)


@lru_cache(maxsize=1024)
def _mirror(url: str, path: Path) -> Mirror:
    return Mirror(url, path)


def mirror_of(where: str | Path, kind: Copy = "read") -> Mirror | None:
    """Return the mirror of a URL, or of the URL whose local copy this path is; None for any other local path.

    All calls in a process return the same object for the same URL.
    """
    url = url_of(where).rstrip("/")
    return _mirror(url, copy_of(url, kind)) if is_url(url) else None


def _files(folder: Path, base: Path) -> list[str]:
    return [str(Path(at, name).relative_to(base)) for at, _, names in os.walk(folder) for name in names]


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _mark(name: str) -> str | None:
    """Return the name of the mark of the checkpoint that a file belongs to; None for a file that needs no mark.

    A checkpoint is complete without its model card, which is written only when the run ends.
    """
    parts = name.split("/")
    if parts[0] != "checkpoints" or len(parts) < 3 or parts[2] == CARD:
        return None
    return join(parts[0], parts[1], MARK)


class Flag(Protocol):
    """A small file that is a signal between processes, such as "stop". A local flag is a `Path`."""

    def touch(self) -> None:
        """Set the flag."""
        ...

    def unlink(self, missing_ok: bool = False) -> None:
        """Clear the flag."""
        ...

    def exists(self) -> bool:
        """Whether the flag is set."""
        ...


class StoreFlag:
    """A flag in an object store. All methods wait for the store and raise StoreError if its requests fail."""

    def __init__(self, mirror: Mirror, name: str) -> None:
        self.mirror, self.name = mirror, name

    def touch(self) -> None:
        """Set the flag."""
        self.mirror.path.mkdir(parents=True, exist_ok=True)
        (self.mirror.path / self.name).touch()
        self.mirror.put(self.name)

    def unlink(self, missing_ok: bool = False) -> None:
        """Clear the flag, if it is set."""
        self.mirror.delete([self.name])

    def exists(self) -> bool:
        """Whether the flag is set."""
        return self.mirror.pull_file(self.name).exists()


def flag(where: str | Path, name: str) -> Flag:
    """Return the flag of this name in a directory or at a URL."""
    mirror = mirror_of(where)
    return StoreFlag(mirror, name) if mirror else Path(where) / name


def watch_flag(flag: Flag) -> Callable[[], bool]:
    """Return a cheap check whether the flag is set, to be called in every step.

    For a flag in a store, a thread looks every LOOK_S seconds, and the check returns its last answer.
    """
    if not isinstance(flag, StoreFlag):
        return flag.exists
    up = threading.Event()

    def look() -> None:
        while not up.wait(LOOK_S):
            with suppress(StoreError):
                if flag.exists():
                    up.set()

    threading.Thread(target=look, name="flag", daemon=True).start()
    return up.is_set
