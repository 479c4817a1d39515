"""What a relative path means: here, or in a Ray job on a cluster, where the working directory is a copy that goes away.

There MINIMIND_STORAGE names a folder that all nodes see, or a URL; the cluster file sets it.
"""

from __future__ import annotations

import os
from pathlib import Path

from minimind_ray.config.errors import UserError

STORAGE = "MINIMIND_STORAGE"


def output_path(path: str | Path) -> str:
    """Where a command's result belongs, absolute: relative paths lie in the storage, if there is one.

    Raises:
        UserError: a relative path in a Ray job of a cluster without storage.
    """
    path = _at_home(path)
    if _is_whole(path):
        return path
    if storage := os.environ.get(STORAGE):
        return f"{storage.rstrip('/')}/{path}"
    if in_job():
        raise UserError(
            f"{path} would lie in this job's copy of the working directory, which goes away: set {STORAGE} where the "
            "cluster file starts Ray, or give a path that all nodes share"
        )
    return str(Path(path).absolute())


def input_path(path: str | Path) -> str:
    """Where a relative path, which may be a glob, leads to, absolute: here if that is there, else the storage."""
    path = _at_home(path)
    if _is_whole(path):
        return path
    storage = os.environ.get(STORAGE)
    if storage and not Path(path).exists() and not any(Path().glob(path)):
        return f"{storage.rstrip('/')}/{path}"
    return str(Path(path).absolute())


def in_job() -> bool:
    """Whether this is a Ray job, whose working directory is a copy that goes away."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _at_home(path: str | Path) -> str:
    if path == "":
        raise UserError("a path is empty, as from a shell variable that is not set: name a file or directory")
    return path if isinstance(path, str) and "://" in path else str(Path(path).expanduser())


def _is_whole(path: str) -> bool:
    return "://" in path or Path(path).is_absolute()
