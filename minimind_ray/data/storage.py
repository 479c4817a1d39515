"""Directories in object stores, by local copies, so that all else works with files as on a local disk.

    <cache>/work/s3/bucket/runs/x    the copy of the one process that writes there, which a thread sends up
    <cache>/read/s3/bucket/runs/x    what other processes have read of it

<cache> is MINIMIND_CACHE, or .cache/minimind-ray in the home directory. Objects cannot be renamed, so what must be
there whole or not at all is a folder with a MARK: a file that is sent after all others and deleted before them.
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
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar
from uuid import uuid4

from minimind_ray.config.errors import UserError
from minimind_ray.data.files import join, locate, one_line, require_bucket

if TYPE_CHECKING:
    from pyarrow import fs

MARK = "resume/sums.json"
WRITER = "writer.json"
DIRECT = ("config.yaml", "run.json", "trial.json", WRITER)
"""Written by several processes: always straight to the store, and never by a mirror's thread."""
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
    # As a package for fsspec answers: hf://gpt2 is no name of a repository.
    r"^(ValueError|NotImplementedError): ": "the store's package refuses it",
}
"""What stores say of requests that waiting does not help, and what it means."""

T = TypeVar("T")
Signature = tuple[int, int]


class StoreError(UserError):
    """An object store did not do what it was asked to."""


def is_url(where: str | Path) -> bool:
    """Whether this names something in an object store."""
    return "://" in str(where)


def copy_of(where: str | Path, kind: Literal["read", "work"] = "read") -> Path:
    """The local copy of a URL; a local path is its own."""
    scheme, separator, rest = str(where).partition("://")
    if not separator:
        return Path(where)
    if ".." in PurePosixPath(rest).parts:
        raise UserError(f"{where}: a URL with .. in it names no directory; write it without")
    return _cache() / kind / scheme / rest.strip("/")


def url_of(path: str | Path) -> str:
    """What a path is a copy of; any other path or URL as it is."""
    for kind in ("read", "work"):
        root = _cache() / kind
        if not is_url(path) and Path(path).is_relative_to(root) and Path(path) != root:
            scheme, *parts = Path(path).relative_to(root).parts
            return f"{scheme}://{'/'.join(parts)}"
    return str(path)


def _cache() -> Path:
    return Path(os.environ.get("MINIMIND_CACHE") or Path.home() / ".cache" / "minimind-ray").absolute()


def patience() -> float:
    """Seconds for which a store that fails is asked again: MINIMIND_STORE_PATIENCE, by default five minutes."""
    return float(os.environ.get("MINIMIND_STORE_PATIENCE", 300))


def patiently(work: Callable[[], T], what: str, note: str = "") -> T:
    """Do `work`, again and again with growing pauses while the store fails.

    Raises:
        FileNotFoundError: there is no such file.
        StoreError: it went on failing, or says that it always will; the sentence ends with `note`.
    """
    deadline, pause = time.monotonic() + patience(), 0.5
    while True:
        try:
            with _notice(what):
                return work()
        except FileNotFoundError:
            raise
        except OSError as error:
            if why := _refusal(error):
                raise StoreError(f"{what}: {why} ({one_line(error)}){note}") from None
            if time.monotonic() + pause > deadline:
                raise StoreError(f"{what}: the object store request failed: {one_line(error)}{note}") from None
            _say(
                "failing", f"{what}: the object store fails and is tried again for {patience():g} s: {one_line(error)}"
            )
        time.sleep(pause)
        pause = min(2 * pause, 30)


def _refusal(error: OSError) -> str | None:
    """Why a store will refuse a request however often it is made; None where it may work later."""
    if isinstance(error, PermissionError):
        return "the credentials do not allow it"
    return next((why for pattern, why in REFUSALS.items() if re.search(pattern, str(error))), None)


@contextmanager
def _notice(what: str) -> Generator[None]:
    """Say what is waited for, if it takes long."""
    timer = threading.Timer(NOTICE_S, _say, ("waiting", f"waiting for {what}"))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


_said: dict[str, float] = {}


def _say(kind: str, text: str) -> None:
    """A line on stderr, one of its kind a minute at most: many threads wait for the same store."""
    now = time.monotonic()
    if now >= _said.get(kind, -NOTICE_EVERY_S) + NOTICE_EVERY_S:
        _said[kind] = now
        print(text, file=sys.stderr, flush=True)


def require_writable(*places: str, probe: bool = True) -> None:
    """Check that files can be written to directories and URLs, in stores by writing a small one.

    Without `probe` nothing is written to a store: it is only asked what is there.

    Raises:
        UserError: they cannot; StoreError.
    """
    for where in dict.fromkeys(places):
        if not is_url(where) or where.startswith("file://"):
            _require_writable_folder(Path(where.removeprefix("file://")))
        elif probe:
            _require_writable_store(where)
        else:
            filesystem, root = locate(where)
            patiently(lambda filesystem=filesystem, root=root: filesystem.get_file_info(root), where)
            require_bucket(where)


def _require_writable_folder(folder: Path) -> None:
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not there.is_dir():
            raise UserError(f"{folder} cannot be a directory, because {there} is a file: name another place")
        TemporaryFile(dir=there).close()
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}: name another place") from None


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
        patiently(write, url)
        if patiently(read, url) != content:
            raise StoreError(f"{url}: the object store returns other bytes than were written")
        patiently(lambda: filesystem.delete_file(path), url)
    except FileNotFoundError as error:
        raise StoreError(f"{url} cannot be used: {one_line(error)}") from None


def read_from(where: str, work: Callable[[], T]) -> T:
    """Do `work`, which reads from a directory or URL: `patiently` from an object store, once from a local disk."""
    return patiently(work, where) if is_url(where) else work()


class Mirror:
    """A directory in a store, `url`, and its local copy, `path`."""

    def __init__(self, url: str, path: Path) -> None:
        self.url, self.path = url, path
        self.filesystem, self.root = locate(url)
        self.root = self.root.rstrip("/")
        self._sent: dict[str, Signature] = {}
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._whole = self._ended = False
        self._news: str | None = None

    def files(self, under: str = "") -> dict[str, fs.FileInfo]:
        """The store's files in the directory, or in its folder `under`, by their names from the directory on.

        Raises:
            UserError: there is no such bucket.
            StoreError: see `patiently`; or a name leads out of the directory.
        """
        from pyarrow import fs

        selector = fs.FileSelector(join(self.root, under).rstrip("/"), recursive=True, allow_not_found=True)
        found: dict[str, fs.FileInfo] = {}
        for info in patiently(lambda: self.filesystem.get_file_info(selector), self.url):
            name = info.path.removeprefix(f"{self.root}/")
            if info.type != fs.FileType.File:
                continue
            if not {"", ".", ".."}.isdisjoint(name.split("/")):
                raise StoreError(f"{self.url}: the object {info.path} leads out of it, and nothing of it is read")
            found[name] = info
        if not found:
            require_bucket(self.url)
        return found

    def pull(self, under: str = "", wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Make the copy like the store, in the folder `under`, as far as files are `wanted` by their names."""
        there = {name: info for name, info in self.files(under).items() if wanted(name)}
        for name in _files(self.path / under, self.path):
            # Hidden ones may be what another process of this machine pulls just now.
            if name not in there and wanted(name) and not _hidden(name):
                (self.path / name).unlink(missing_ok=True)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(self._pull, there, there.values()))

    def pull_file(self, name: str) -> Path:
        """Make one file of the copy like the store's, which may have none; its path in the copy."""
        self._pull(name, None)
        return self.path / name

    def tail(self, name: str, size: int) -> bytes:
        """The last `size` bytes of one of the store's files. Asks once, and raises OSError where the store fails."""
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
            patiently(download, join(self.url, name))
            if modified:
                os.utime(temporary, ns=(modified, modified))
            temporary.replace(target)
        except FileNotFoundError:
            target.unlink(missing_ok=True)
        finally:
            temporary.unlink(missing_ok=True)

    def put(self, *names: str) -> None:
        """Send files of the copy, now and one after another. Raises StoreError."""
        for name in names:
            patiently(lambda name=name: self._upload(name), join(self.url, name))

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
        """Delete files in the store, marks first."""
        for name in sorted(names, key=lambda name: not name.endswith(MARK)):
            with suppress(FileNotFoundError):
                patiently(lambda name=name: self.filesystem.delete_file(join(self.root, name)), self.url)

    def move(self, url: str) -> None:
        """Give the directory another URL in the same store."""
        target = locate(url)[1]
        names = sorted(self.files(), key=lambda name: name.endswith(MARK))
        for name in names:
            source, copy = join(self.root, name), join(target, name)
            patiently(lambda source=source, copy=copy: self.filesystem.copy_file(source, copy), url)
        self.delete(names)

    def open(self) -> None:
        """Begin to write: make the copy like the store."""
        with self._lock:
            self.pull(wanted=lambda name: not _hidden(name))
            self._sent = self._signatures()

    def push(self, *, whole: bool = True) -> None:
        """Make the store like the copy; without `whole`, files that have grown by little wait for another time.

        Raises OSError.
        """
        with self._lock:
            while not self._push(whole):
                pass

    def _push(self, whole: bool) -> bool:
        """False where a file went away meanwhile, as those of old checkpoints do: there is more to do."""
        here = self._signatures()
        changed = {name for name, signature in here.items() if self._sent.get(name) != signature}
        if not whole:  # Else a log of a long run would be sent again and again.
            changed -= {n for n in changed if n in self._sent and here[n][0] < self._sent[n][0] * 17 / 16}
        gone = self._sent.keys() - here.keys()
        marks = {mark for name in changed if (mark := _mark(name)) in self._sent}
        for name in [*sorted(marks), *sorted(gone, key=lambda name: not name.endswith(MARK))]:
            with suppress(FileNotFoundError):
                self.filesystem.delete_file(join(self.root, name))
            self._sent.pop(name, None)
        for folder in {name.rpartition(f"/{MARK}")[0] for name in gone if name.endswith(MARK)}:
            with suppress(FileNotFoundError):  # S3 leaves an empty object for a folder without files.
                self.filesystem.delete_dir(join(self.root, folder))
        changed |= marks & here.keys()
        # A checkpoint after the lines of its steps, its mark at its end.
        for name in sorted(changed, key=lambda name: (name.startswith("checkpoints/"), name.endswith(MARK), name)):
            try:
                self._upload(name)
                self._sent[name] = here[name]
                if _mark(name):  # Never changed again; with the store's time it is known as the same when pulled.
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
    def kept_up(self) -> Generator[None]:
        """While inside, a thread sends what changes; a store that fails for a while delays it. All is sent at the end.

        Raises:
            StoreError: the store did not take all of it in the end, which is kept in the copy.
        """
        self.open()
        self._ended, self._news = False, None
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
            self.push_patiently()
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
            except Exception as error:  # Whatever it is, the thread goes on.
                self._whole = whole or self._whole
                if not failing:
                    self._news = f"{self.url}: the object store fails and is tried again: {one_line(error)}"
                failing, pause = True, min(2 * pause, 60)
            else:
                if failing:
                    self._news = f"{self.url}: the object store works again, and has all there is"
                failing, pause = False, TICK_S

    def resend(self) -> None:
        """Make the store like the copy, whatever was sent before. Raises StoreError."""
        self._sent = {name: (0, 0) for name in self.files() if not _hidden(name) and name not in DIRECT}
        self.push_patiently()

    def changed(self) -> None:
        """There is something that should be sent soon, and whole: a checkpoint."""
        self._whole = True
        self._wake.set()

    def news(self) -> str | None:
        """What there is to tell since the last call."""
        news, self._news = self._news, None
        return news

    def push_patiently(self) -> None:
        """Send all there is, now. Raises StoreError."""
        note = (
            f". What it lacks is kept in {self.path} on {socket.gethostname()}; when it works again, the same command "
            "with --resume there sends it and goes on"
        )
        patiently(self.push, self.url, note)


@lru_cache(maxsize=1024)
def _mirror(url: str, path: Path) -> Mirror:
    return Mirror(url, path)


def mirror_of(where: str | Path, kind: Literal["read", "work"] = "read") -> Mirror | None:
    """The mirror of a URL, or of what is the copy of one, the same in all of a process; None for a local path."""
    url = url_of(where).rstrip("/")
    return _mirror(url, copy_of(url, kind)) if is_url(url) else None


def _files(folder: Path, base: Path) -> list[str]:
    return [str(Path(at, name).relative_to(base)) for at, _, names in os.walk(folder) for name in names]


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _mark(name: str) -> str | None:
    """The mark of the checkpoint that a file belongs to."""
    parts = name.split("/")
    return join(parts[0], parts[1], MARK) if parts[0] == "checkpoints" and len(parts) > 2 else None


class Flag(Protocol):
    """A small file by which one process tells another of something, as far as `Path` has the methods for it."""

    def touch(self) -> None:
        """Put it up."""
        ...

    def unlink(self, missing_ok: bool = False) -> None:
        """Take it down."""
        ...

    def exists(self) -> bool:
        """Whether it is up."""
        ...


class StoreFlag:
    """A flag in an object store. All methods wait for the store, and raise StoreError where it fails."""

    def __init__(self, mirror: Mirror, name: str) -> None:
        self.mirror, self.name = mirror, name

    def touch(self) -> None:
        """Put it up."""
        self.mirror.path.mkdir(parents=True, exist_ok=True)
        (self.mirror.path / self.name).touch()
        self.mirror.put(self.name)

    def unlink(self, missing_ok: bool = False) -> None:
        """Take it down, if it is up."""
        self.mirror.delete([self.name])

    def exists(self) -> bool:
        """Whether it is up."""
        return self.mirror.pull_file(self.name).exists()


def flag(where: str | Path, name: str) -> Flag:
    """The flag of that name in a directory or at a URL."""
    mirror = mirror_of(where)
    return StoreFlag(mirror, name) if mirror else Path(where) / name


def watched(flag: Flag) -> Callable[[], bool]:
    """Whether the flag is up, for those who ask in every step: of one in a store, as a thread saw it last."""
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
