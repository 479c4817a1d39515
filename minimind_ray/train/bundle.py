"""What is worth bringing home of a run or a sweep from elsewhere: all but models, as text that passes any log."""

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
from minimind_ray.data.files import locate

MARK = "packed:"
LEFT = ("checkpoints", "wandb", "tokenizer", "rejects")
LARGEST = 32 << 20
MOST_BYTES, MOST_FILES = 1 << 30, 100_000
"""Of all files together, before compression."""


def pack(out: str) -> str:
    """The files below a directory or URL as one line: MARK and a tar.gz in base64.

    Left out: models, hidden files and folders, and files over 32 MiB. A directory that is not there is an empty one.

    Raises:
        UserError: the files are more than `unpack` takes.
    """
    filesystem, root = locate(out)
    found = filesystem.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    buffer, bounds = io.BytesIO(), _Bounds(out)
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for info in sorted((info for info in found if info.type == fs.FileType.File), key=lambda info: info.path):
            name = info.path.removeprefix(root).lstrip("/")
            if not _worth_it(name) or info.size > LARGEST:
                continue
            with filesystem.open_input_stream(info.path, compression=None) as content:
                data = content.read()  # All there is now: a log may grow.
            bounds.add(len(data))
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return MARK + base64.b64encode(buffer.getvalue()).decode()


def unpack(log: str, target: Path) -> list[Path]:
    """The files that the line of `pack` in a log holds, written below `target`; none without that line.

    Raises:
        UserError: the line is damaged, or holds what `pack` never sends; nothing is written then.
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
        raise UserError(f"what the cluster sent of the results is damaged ({error}); fetch it again") from None
    return sorted(target / name for name in names)


def _open(data: bytes) -> tarfile.TarFile:
    return tarfile.open(fileobj=_Bounded(data), mode="r|")


class _Bounded(io.RawIOBase):
    """The decompressed bytes, as far as an archive of `pack` may have them."""

    def __init__(self, data: bytes) -> None:
        self.stream = gzip.GzipFile(fileobj=io.BytesIO(data))
        self.left = MOST_BYTES + MOST_FILES * 2 * tarfile.BLOCKSIZE

    def read(self, size: int = -1) -> bytes:
        """Raises UserError where there is more than the bound."""
        found = self.stream.read(self.left + 1 if size < 0 else min(size, self.left + 1))
        self.left -= len(found)
        if self.left < 0:
            raise UserError(f"the cluster sent more than {MOST_BYTES >> 30} GiB of results, which is refused")
        return found


def _check(tar: Iterable[tarfile.TarInfo]) -> list[str]:
    """The names of the files in an archive, all of which `pack` might have sent."""
    names, bounds = list[str](), _Bounds("what the cluster sent")
    for member in tar:
        if not member.isreg() or not _worth_it(member.name):
            raise UserError(f"the cluster sent {member.name!r} as a result, which is no file of a run: refused")
        bounds.add(member.size)
        names.append(member.name)
    return names


def _worth_it(name: str) -> bool:
    """Whether a path lies in the directory, and is neither hidden nor part of a model."""
    parts = name.split("/")
    return all(parts) and not any(part.startswith(".") or part in LEFT for part in parts)


class _Bounds:
    """Counts files and their bytes."""

    def __init__(self, what: str) -> None:
        self.what, self.files, self.bytes = what, 0, 0

    def add(self, size: int) -> None:
        """Count a file. Raises UserError where there are too many, or they are too large together."""
        self.files, self.bytes = self.files + 1, self.bytes + size
        if self.files > MOST_FILES or self.bytes > MOST_BYTES:
            raise UserError(
                f"{self.what} has more than {MOST_FILES:,} files or {MOST_BYTES >> 30} GiB of results: copy it by "
                "other means"
            )
