"""Bring the results of a run or a sweep from a cluster to this machine, through a job's log.

On the cluster `pack` turns all files but models into one line of text, which is printed to the log. Here `unpack` finds
that line in the log and writes the files. `unpack` does not trust the cluster: it limits the size and refuses any path
that `pack` would not send.
"""

from __future__ import annotations

import base64
import gzip
import io
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from pyarrow import fs

from minimind_ray.config.errors import UserError
from minimind_ray.config.trackers import tracker_folders
from minimind_ray.data.files import locate

MARK = "packed:"
EXCLUDED = ("checkpoints", "tokenizer", "rejects", *tracker_folders())
"""Files and folders that are not packed."""
MAX_FILE_BYTES = 32 << 20
MAX_BYTES, MAX_FILES = 1 << 30, 100_000
"""Limits for all files together, before compression."""


def pack(out: str) -> str:
    """Return the files below a directory or URL as one line: MARK, then a tar.gz archive in base64.

    Models, hidden files and folders, and files over 32 MiB are left out. A missing directory counts as empty.

    Raises:
        UserError: the files are more than `unpack` accepts.
    """
    filesystem, root = locate(out)
    found = filesystem.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    buffer, bounds = io.BytesIO(), _Bounds(out)
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for info in sorted((info for info in found if info.type == fs.FileType.File), key=lambda info: info.path):
            name = info.path.removeprefix(root).lstrip("/")
            if not _is_included(name) or info.size > MAX_FILE_BYTES:
                continue
            with filesystem.open_input_stream(info.path, compression=None) as content:
                data = content.read()  # Its length may differ from info.size: a log may have grown.
            bounds.add(len(data))
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return MARK + base64.b64encode(buffer.getvalue()).decode()


def unpack(log: str, target: Path) -> list[Path]:
    """Find the line of `pack` in a log and write its files below `target`. Return the paths; empty without such a line.

    Raises:
        UserError: the line is damaged, or has a file that `pack` never sends. Nothing is written in this case.
    """
    line = next((line for line in log.splitlines() if line.startswith(MARK)), None)
    if line is None:
        return []
    try:
        data = base64.b64decode(line.removeprefix(MARK), validate=True)
        with _open(data) as tar:
            names = _check(tar)
        with _open(data) as tar:
            tar.extractall(target, filter="data")
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error, tarfile.TarError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the results that the cluster sent are damaged ({error}); fetch them again") from None
    return sorted(target / name for name in names)


def _open(data: bytes) -> tarfile.TarFile:
    return tarfile.open(fileobj=_Bounded(data), mode="r|")


class _Bounded(io.RawIOBase):
    """The decompressed bytes of an archive, up to the size that an archive of `pack` can have."""

    def __init__(self, data: bytes) -> None:
        self.stream = gzip.GzipFile(fileobj=io.BytesIO(data))
        self.left = MAX_BYTES + MAX_FILES * 2 * tarfile.BLOCKSIZE

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes. Raises UserError if the archive is larger than the bound."""
        found = self.stream.read(self.left + 1 if size < 0 else min(size, self.left + 1))
        self.left -= len(found)
        if self.left < 0:
            raise UserError(f"the cluster sent more than {MAX_BYTES >> 30} GiB of results, which is refused")
        return found


def _check(tar: Iterable[tarfile.TarInfo]) -> list[str]:
    """Return the names of the files in an archive. Raises UserError if `pack` would not have sent one of them."""
    names, bounds = list[str](), _Bounds("the archive that the cluster sent")
    for member in tar:
        if not member.isreg() or not _is_included(member.name):
            raise UserError(f"the cluster sent {member.name!r} as a result, which is not a file of a run: refused")
        bounds.add(member.size)
        names.append(member.name)
    return names


def _is_included(name: str) -> bool:
    """Whether `pack` sends this path: relative, not hidden and not part of a model."""
    parts = name.split("/")
    return all(parts) and not any(part.startswith(".") or part in EXCLUDED for part in parts)


class _Bounds:
    """Counts files and their bytes."""

    def __init__(self, source: str) -> None:
        self.source, self.files, self.bytes = source, 0, 0

    def add(self, size: int) -> None:
        """Count a file of `size` bytes. Raises UserError if there are too many files, or too many bytes in total."""
        self.files, self.bytes = self.files + 1, self.bytes + size
        if self.files > MAX_FILES or self.bytes > MAX_BYTES:
            raise UserError(
                f"{self.source} has more than {MAX_FILES:,} files or {MAX_BYTES >> 30} GiB of results: copy them by "
                "other means"
            )
