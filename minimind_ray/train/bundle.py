"""What is worth bringing home of a run or a sweep from elsewhere: all but models, as text that passes any log."""

from __future__ import annotations

import base64
import io
import tarfile
from pathlib import Path
from typing import IO

import fsspec

MARK = "packed:"
LEFT = ("checkpoints", "wandb", "tokenizer", "rejects")
LARGEST = 32 << 20


def pack(out: str) -> str:
    """The files below a directory or URL as one line: MARK and a tar.gz in base64.

    Left out: models, hidden folders, and files over 32 MiB. A directory that is not there is an empty one.
    """
    files, root = fsspec.url_to_fs(out)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for path in sorted(files.find(root)):
            name = path.removeprefix(root).lstrip("/")
            parts = Path(name).parts
            if any(part.startswith(".") or part in LEFT for part in parts) or files.size(path) > LARGEST:
                continue
            member = tarfile.TarInfo(name)
            member.size = files.size(path)
            with files.open(path) as content:
                tar.addfile(member, content)
    return MARK + base64.b64encode(buffer.getvalue()).decode()


def unpack(log: str, target: Path) -> list[Path]:
    """The files that the line of `pack` in a log holds, written below `target`; none without that line."""
    for line in log.splitlines():
        if line.startswith(MARK):
            data: IO[bytes] = io.BytesIO(base64.b64decode(line.removeprefix(MARK)))
            with tarfile.open(fileobj=data) as tar:
                tar.extractall(target, filter="data")
                return sorted(target / member.name for member in tar.getmembers())
    return []
