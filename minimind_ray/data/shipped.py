"""Copy data that came with a job's working directory into the cluster's storage.

Each job has its own working directory, and each node unpacks its own copy with its own file times. In the storage the
files lie under `shipped/HASH`, where HASH depends on their content. So all nodes see the same files, a second job with
the same files uses the same prepared data, and the path in the run's config stays valid after the job.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from minimind_ray.config.load import read_yaml
from minimind_ray.config.paths import STORAGE, in_job, input_path, output_path
from minimind_ray.config.schema import Config
from minimind_ray.data.files import atomic_output, join, locate
from minimind_ray.data.hub import model_location
from minimind_ray.data.storage import copy_of, mirror_of

UNPACKED = "working_dir_files"
"""The folder in which Ray unpacks working directories."""


def copy_to_storage(path: str) -> str:
    """Copy the files named by an absolute path or glob into the storage, and return the path of the copy.

    Returns `path` unchanged if it is a URL or outside of the working directory, or if this process is not part of a job
    with a working directory.

    Raises:
        UserError: the storage is a URL that cannot be used.
    """
    root, storage = Path.cwd(), os.environ.get(STORAGE)
    # A job without its own working directory may run in any folder. Do not copy data from there: it may be large.
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
        # Do not copy a file again: prepared data recognises its source by the file's time.
        if filesystem.get_file_info(join(folder, file)).size != (root / file).stat().st_size:
            with (root / file).open("rb") as source, atomic_output(filesystem, join(folder, file)) as copy:
                shutil.copyfileobj(source, copy)
    return join(target, name)


def resolve_paths(config: Config, *, again: bool = False) -> Config:
    """Return the config with absolute paths, because workers run in other directories, and with the hub's commits.

    With `again`, a run that is at `out` already keeps its commits (see `model_location`).

    Raises:
        UserError: a path is malformed, or a model of the hub cannot be found.
    """
    out = output_path(config.out.replace("{stage}", config.stage))
    before = _config_at(out) if again else {}

    def inputs(paths: str | list[str] | None) -> str | list[str] | None:
        if isinstance(paths, list):
            return [copy_to_storage(input_path(path)) for path in paths]
        return None if paths is None else copy_to_storage(input_path(paths))

    def model(path: str | None, earlier: str | None) -> str | None:
        return None if path is None else copy_to_storage(model_location(path, earlier))

    data = config.data.model_copy(
        update={
            "train": inputs(config.data.train),
            "val": inputs(config.data.val),
            "tokenizer": model(config.data.tokenizer, before.get("data", {}).get("tokenizer")),
            "cache_dir": output_path(config.data.cache_dir),
        }
    )
    init_from = model(config.init_from, before.get("init_from"))
    tasks = config.eval.model_copy(update={"task_path": inputs(config.eval.task_path)})
    return config.model_copy(update={"data": data, "eval": tasks, "out": out, "init_from": init_from})


def _config_at(out: str) -> dict[str, Any]:
    """Return the content of config.yaml of the run at `out`; empty if there is no run."""
    mirror = mirror_of(out)
    file = mirror.pull_file("config.yaml") if mirror else copy_of(out) / "config.yaml"
    return read_yaml(file) if file.exists() else {}


def _sum(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
