"""Check paths and URLs, and resolve relative paths on this machine and in a Ray job on a cluster.

A job's working directory is a temporary copy. Its results belong in the storage: MINIMIND_STORAGE names a folder that
all nodes share, or a URL. The cluster file sets this variable.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from minimind_ray.config.errors import UserError

STORAGE = "MINIMIND_STORAGE"
STORES = ("s3", "gs", "gcs", "hf", "abfs", "abfss", "az", "adl", "oci", "oss", "r2", "tos", "wasb", "wasbs")
"""Schemes of object stores. A path such as s3:/bucket is a wrongly written URL."""
SERVERS = ("http", "https", "ftp", "ftps", "sftp", "ssh", "scp", "smb", "nfs", "rsync", "webdav")
ALIASES = {"s3a": "s3", "s3n": "s3", "gcs": "gs"}
_S3_BUCKET = re.compile(r"(?!.*\.\.)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_SECRETS = (
    (re.compile(r"(?<=://)[^/@\s]*:[^@\s]*(?=@)|(?<=s3://)[^/@\s]+(?=@)|(?<=gs://)[^/@\s]+(?=@)"), "***"),
    (
        re.compile(r"([?&](?:\w*(?:key|secret|token|password|signature)|sig|x-amz-\w+|x-amz-[\w-]+)=)[^&\s'\"]+", re.I),
        r"\1***",
    ),
)


def check_location(where: str) -> str:
    """Check the form of a path or URL, and return it unchanged. Does not check whether it exists.

    Raises:
        UserError: a URL has no bucket, a bucket name that S3 does not allow, an empty part, credentials, or only one
            slash; or `where` is the address of a server, or -.
    """
    shown = masked(where)
    if where == "-":
        raise UserError(
            "- is not a path: standard input and output are not supported; give a file or directory, or ./- if that is "
            "its name"
        )
    scheme, separator, rest = where.partition("://")
    if not separator:
        start, colon, end = where.partition(":")
        if colon and start.lower() in STORES and not Path(where).exists():
            raise UserError(f"{shown} is neither a path nor a URL: write {start.lower()}://{masked(end).lstrip('/')}")
        return where
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme):
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
            raise UserError(f"{shown} is neither a path nor a URL: write it without ://, or as s3://BUCKET/PATH")
        raise UserError(f"{shown}: write the scheme in small letters, {scheme.lower()}://")
    if scheme in SERVERS:
        kind = "a web address" if scheme in ("http", "https") else f"the address of a server ({scheme}://)"
        raise UserError(
            f"{shown} is {kind}, where nothing can be read or written: download the file, or use a path or the URL of "
            "an object store, such as s3://BUCKET/PATH, gs:// or hf://"
        )
    if scheme in ALIASES:
        raise UserError(f"{shown}: write {ALIASES[scheme]}://{masked(rest)}")
    if scheme == "file":
        if not rest.startswith("/"):
            raise UserError(f"{shown} is not an absolute path: write file:///PATH, or PATH without file://")
        return where
    first, *parts = rest.rstrip("/").split("/")
    if shown != where or ("@" in first and scheme in ("s3", "gs")):
        raise UserError(
            f"{shown} holds credentials: leave them out of the URL, and give them in the environment, such as "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if not first:
        raise UserError(f"{shown} names no bucket: write {scheme}://BUCKET/PATH")
    if scheme == "s3" and not _S3_BUCKET.fullmatch(first):
        raise UserError(
            f"{shown}: no bucket can be named {first}: the name of a bucket has 3 to 63 small letters, digits, dots "
            "and hyphens, and begins and ends with a letter or digit"
        )
    if not {"", ".", ".."}.isdisjoint(parts):
        raise UserError(f"{shown}: a URL cannot contain an empty part, . or ..: write it without them")
    return where


def masked(text: str) -> str:
    """Return the text with *** in place of credentials in its URLs."""
    for pattern, mask in _SECRETS:
        text = pattern.sub(mask, text)
    return text


def output_path(path: str | Path) -> str:
    """Return the absolute path for a command's result. A relative path lies in the storage if there is a storage.

    Raises:
        UserError: the path is relative in a Ray job, and the cluster has no storage; or see `check_location`.
    """
    path = _at_home(path)
    if _is_whole(path):
        return path
    if storage := os.environ.get(STORAGE):
        return check_location(f"{storage.rstrip('/')}/{path}")
    if in_job():
        raise UserError(
            f"{path} would lie in this job's temporary copy of the working directory: set {STORAGE} where the cluster "
            "file starts Ray, or give a path that all nodes share"
        )
    return str(Path(path).absolute())


def input_path(path: str | Path) -> str:
    """Return the absolute path of an input, which may be a glob.

    A relative path that does not exist in the working directory lies in the storage.

    Raises:
        UserError: see `check_location`.
    """
    path = _at_home(path)
    if _is_whole(path):
        return path
    storage = os.environ.get(STORAGE)
    if storage and not Path(path).exists() and not any(Path().glob(path)):
        return check_location(f"{storage.rstrip('/')}/{path}")
    return str(Path(path).absolute())


def in_job() -> bool:
    """Whether this process runs in a Ray job, where the working directory is a temporary copy."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _at_home(path: str | Path) -> str:
    if path == "":
        raise UserError("a path is empty, perhaps from a shell variable that is not set: give a file or directory")
    check_location(str(path))
    # Remove file://, so that a directory has only one name: a lock of its path must also hold for its URL.
    path = str(path).removeprefix("file://") if isinstance(path, str) else path
    return path if isinstance(path, str) and "://" in path else str(expanded(path))


def expanded(path: str | Path) -> Path:
    """Return the path with the home directory in place of ~ or ~USER at its beginning.

    Raises:
        UserError: the user does not exist.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{path}: {Path(path).parts[0]} has no home directory on this machine: write the whole path"
        ) from None


def _is_whole(path: str) -> bool:
    return "://" in path or Path(path).is_absolute()
