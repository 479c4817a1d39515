"""Open local files and objects of object stores in the same way, by path or URL.

`locate` turns a path or URL into a pyarrow file system and a path in it.

`storage.py` builds on this module to mirror whole directories of a store.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from minimind_ray.config.errors import UserError
from minimind_ray.config.paths import STORES, check_location, expanded, masked

if TYPE_CHECKING:  # Functions import pyarrow themselves: it takes 0.1 s, and most commands do not need it.
    import pyarrow as pa
    from pyarrow import fs

GS_RETRY_S = 10


def locate(url: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of a path or URL (`s3://`, `gs://`, `hf://`, or another of fsspec), and the path in it.

    Credentials and endpoints come from the environment (AWS_ENDPOINT_URL, HF_TOKEN, …).

    Raises:
        UserError: the URL is malformed (see `check_location`), its scheme cannot be used, or its object store cannot be
            reached.
    """
    import pyarrow as pa
    from pyarrow import fs

    scheme, separator, rest = absolute(check_location(url)).partition("://")
    if not separator:
        return fs.LocalFileSystem(), scheme
    if scheme == "file":
        return fs.LocalFileSystem(), rest
    if scheme == "hf":
        from huggingface_hub import HfFileSystem

        return _filesystem(HfFileSystem()), rest
    if scheme in ("s3", "gs"):
        # Google's client retries each request for 15 minutes by default and reacts to no signal meanwhile.
        options = f"?retry_limit_seconds={GS_RETRY_S}" if scheme == "gs" else ""
        try:  # Pass only the bucket: the path may contain characters that a URI cannot, such as a glob's wildcards.
            return fs.FileSystem.from_uri(f"{scheme}://{rest.split('/')[0]}{options}")[0], rest
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{url}: the object store cannot be used: {one_line(error)}") from None
    import fsspec
    from fsspec.registry import known_implementations

    # Among the schemes that fsspec knows, use only object stores: other schemes need more than a URL (ftp://) or do not
    # store files (memory://).
    why = "it is not the scheme of an object store"
    if scheme in STORES or scheme not in known_implementations:
        try:
            return _filesystem(fsspec.filesystem(scheme)), rest
        except Exception as error:  # Each package raises its own exceptions.
            why = one_line(error)
    raise UserError(
        f"{url}: {scheme}:// cannot be used ({why}); use a local path, s3://, gs:// or hf://, or the scheme of another "
        "object store whose package for fsspec is installed, such as abfs:// with adlfs"
    )


def _filesystem(filesystem: Any) -> fs.FileSystem:
    from pyarrow import fs

    return fs.PyFileSystem(fs.FSSpecHandler(_WithOSErrors(filesystem)))


class _WithOSErrors:
    """Wraps an fsspec file system, or one of its files, so that every error is an OSError, as in pyarrow.

    fsspec packages let through the exceptions of their clients (RuntimeError, azure's, httpx's).
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __reduce__(self) -> tuple[type[_WithOSErrors], tuple[Any]]:
        return _WithOSErrors, (self._inner,)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                result = value(*args, **kwargs)
            except OSError:
                raise
            except Exception as error:
                raise OSError(f"{type(error).__name__}: {error}") from error
            return _WithOSErrors(result) if name == "open" else result

        return call

    # fsspec's own versions answer False on any error, so a file would count as deleted while the store fails.

    def isfile(self, path: str) -> bool:
        return self._type(path) == "file"

    def isdir(self, path: str) -> bool:
        return self._type(path) == "directory"

    def exists(self, path: str) -> bool:
        return self._type(path) is not None

    def _type(self, path: str) -> str | None:
        try:
            return self.info(path)["type"]
        except FileNotFoundError:
            return None


def absolute(url: str) -> str:
    """Return the path as an absolute path, because workers run in other directories. Return a URL unchanged."""
    return url if "://" in url else str(expanded(url).absolute())


def join(base: str, *parts: str) -> str:
    """Return `base/part/…`, for paths and for URLs."""
    return "/".join([base.rstrip("/"), *parts])


@contextmanager
def atomic_output(filesystem: fs.FileSystem, path: str) -> Generator[pa.NativeFile]:
    """Open a stream that writes `path`. The file appears only when the block ends without an exception."""
    from pyarrow import fs

    temporary = f"{path}.{uuid4().hex}{TEMPORARY}"
    filesystem.create_dir(path.rpartition("/")[0], recursive=True)
    try:
        with filesystem.open_output_stream(temporary) as stream:
            yield stream
        filesystem.move(temporary, path)
    except BaseException:
        if filesystem.get_file_info(temporary).type != fs.FileType.NotFound:
            filesystem.delete_file(temporary)
        raise


TEMPORARY = ".tmp"


@contextmanager
def writing_to(path: Path) -> Generator[None]:
    """Add the file's name to an OSError from inside the block: Python's error for a full disk lacks it."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line, cut to 300 characters, without credentials."""
    return masked(" ".join(str(error).split()))[:300]


def exists(url: str) -> bool:
    """Whether a path or URL names an existing file or folder."""
    from pyarrow import fs

    filesystem, path = locate(url)
    return filesystem.get_file_info(path).type != fs.FileType.NotFound


def require_bucket(url: str) -> None:
    """Check that the bucket of a URL in S3 or Google's store exists. Pass if the credentials do not allow the check.

    Raises:
        UserError: the bucket does not exist.
    """
    from pyarrow import fs

    filesystem, path = locate(url)
    if filesystem.type_name not in ("s3", "gcs"):
        return
    bucket = path.partition("/")[0]
    with suppress(OSError):  # The credentials may still allow access to the files in the bucket.
        if filesystem.get_file_info(bucket).type == fs.FileType.NotFound:
            raise UserError(f"{url}: the bucket {bucket} does not exist")


def remove(url: str) -> None:
    """Delete a folder and its content. Ignores errors."""
    filesystem, path = locate(url)
    with suppress(OSError):
        filesystem.delete_dir(path)
