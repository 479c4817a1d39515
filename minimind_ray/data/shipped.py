"""What a job on a cluster was sent with its working directory, kept in the storage.

That directory is another one in every job, and every node unpacks a copy of its own, with times of its own. Under
`shipped/HASH` in the storage a file's place follows from its content: all nodes see it, a second job with the same
files has the same data, and the run's config says where it is long after the job.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from minimind_ray.config.paths import STORAGE, in_job, input_path, output_path
from minimind_ray.config.schema import Config
from minimind_ray.data.files import atomic_output, join, locate

UNPACKED = "working_dir_files"
"""Ray's name for the folder that it unpacks working directories in."""


def keep_shipped(path: str) -> str:
    """An absolute path, glob or URL; what it names in a job's working directory is copied, and the copy's path given.

    Raises:
        UserError: the storage is a URL that cannot be used.
    """
    root, storage = Path.cwd(), os.environ.get(STORAGE)
    # A job that was sent without a working directory may be anywhere, and data beside it large and shared.
    sent = in_job() and UNPACKED in root.parts
    if not (storage and sent and Path(path).is_relative_to(root)) or ".." in Path(path).parts:
        return path
    name = str(Path(path).relative_to(root))
    found = [root / name] if (root / name).exists() else root.glob(name)
    files = sorted(file for place in found for file in (place.rglob("*") if place.is_dir() else [place]))
    sums = {str(file.relative_to(root)): _sum(file) for file in files if file.is_file()}
    target = join(storage, "shipped", hashlib.sha256(repr(sums).encode()).hexdigest()[:16])
    filesystem, folder = locate(target)
    for file in sums:
        # Those that are there keep their time, by which prepared data knows them.
        if filesystem.get_file_info(join(folder, file)).size != (root / file).stat().st_size:
            with (root / file).open("rb") as source, atomic_output(filesystem, join(folder, file)) as copy:
                shutil.copyfileobj(source, copy)
    return join(target, name)


def resolve_paths(config: Config) -> Config:
    """The same config with absolute paths, since workers run in other directories."""

    def inputs(paths: str | list[str] | None) -> str | list[str] | None:
        if isinstance(paths, list):
            return [keep_shipped(input_path(path)) for path in paths]
        return None if paths is None else keep_shipped(input_path(paths))

    data = config.data.model_copy(
        update={
            "train": inputs(config.data.train),
            "val": inputs(config.data.val),
            "tokenizer": inputs(config.data.tokenizer),
            "cache_dir": output_path(config.data.cache_dir),
        }
    )
    out = output_path(config.out.replace("{stage}", config.stage))
    return config.model_copy(update={"data": data, "out": out, "init_from": inputs(config.init_from)})


def _sum(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
