"""Stores that fsspec has packages for: whatever they raise is an OSError here, and does no harm."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import fs

from minimind_ray.config.errors import UserError
from minimind_ray.data import storage
from minimind_ray.data.files import locate
from minimind_ray.data.records import discover
from minimind_ray.data.storage import StoreError, require_writable

pytestmark = pytest.mark.unit


FAILURE = RuntimeError("Failed to upload block")  # as adlfs has it, which is no OSError


class Flaky(MemoryFileSystem):
    """Raises `down`, if that is set, whatever it is asked."""

    protocol = "flaky"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    down: Exception | None = None

    @classmethod
    def _strip_protocol(cls, path: str) -> Any:
        return MemoryFileSystem._strip_protocol(path.replace("flaky://", "memory://"))

    def info(self, path: str, **kwargs: Any) -> Any:
        self.fail()
        return super().info(path, **kwargs)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        self.fail()
        return super()._open(path, mode, **kwargs)

    @classmethod
    def fail(cls) -> None:
        if cls.down:
            raise cls.down


@pytest.fixture(autouse=True)
def flaky(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "copies"))
    monkeypatch.setattr(storage, "TICK_S", 0.02)
    yield
    Flaky.down = None
    Flaky.store.clear()
    storage._mirror.cache_clear()


def test_what_a_store_raises_is_an_oserror() -> None:
    filesystem, path = locate("flaky://b/x")
    filesystem = pickle.loads(pickle.dumps(filesystem))
    with filesystem.open_output_stream(path) as stream:
        stream.write(b"content")
    with filesystem.open_input_file(path) as file:
        assert (file.read(3), file.read()) == (b"con", b"tent")
    with pytest.raises(FileNotFoundError):
        filesystem.open_input_stream("b/none")
    Flaky.down = FAILURE
    for use in (filesystem.open_input_stream, filesystem.open_output_stream, filesystem.get_file_info):
        with pytest.raises(OSError, match="RuntimeError: Failed to upload block") as error:
            use(path)
        assert not isinstance(error.value, FileNotFoundError)
    with pytest.raises(UserError, match="flaky://b/x: cannot be read: RuntimeError: Failed"):
        discover("flaky://b/x")
    Flaky.down = ConnectionError("reset")
    with pytest.raises(ConnectionError):  # Else nothing would be there any more.
        filesystem.get_file_info(fs.FileSelector("b", allow_not_found=True))
    with pytest.raises(ConnectionError):
        filesystem.delete_file(path)


@pytest.mark.parametrize("url", ["memory://b/x", "zip://b/x", "nothing://b/x"])
def test_a_scheme_of_no_store_is_said_in_a_sentence(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=f"{url}: .* cannot be used .*; use a local path, s3://, gs:// or hf://"):
        locate(url)
    assert capfd.readouterr() == ("", "")


def test_a_mirror_goes_on_when_the_store_works_again() -> None:
    mirror = storage.mirror_of("flaky://b/run", "work")
    assert mirror

    def news() -> str:
        for _ in range(500):
            if told := mirror.pop_warning():
                return told
            time.sleep(0.01)
        raise AssertionError("no news")

    with mirror.syncing():
        mirror.path.mkdir(parents=True, exist_ok=True)
        Flaky.down = FAILURE
        (mirror.path / "metrics.jsonl").write_text("1\n")
        assert "the object store fails and is tried again: RuntimeError: Failed" in news()
        Flaky.down = None
        assert "works again" in news()
        assert "/b/run/metrics.jsonl" in Flaky.store


def test_a_local_url_is_made_as_it_is_written(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/new/run"
    mirror = storage.mirror_of(url, "work")
    assert mirror
    with mirror.syncing():
        (mirror.path / "checkpoints").mkdir(parents=True)
        (mirror.path / "checkpoints" / "a").write_text("a")
    assert (tmp_path / "new" / "run" / "checkpoints" / "a").read_text() == "a"


def test_what_a_package_refuses_is_not_asked_again() -> None:
    Flaky.down = ValueError("Repository id must be 'namespace/name', got 'x'")
    with pytest.raises(StoreError, match="flaky://x: the store's package refuses it .*Repository id must be"):
        require_writable("flaky://x", probe=False)


def test_googles_client_does_not_keep_signals_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Recorder:
        @staticmethod
        def from_uri(uri: str) -> tuple[None, None]:
            asked.append(uri)
            return None, None

    monkeypatch.setattr(fs, "FileSystem", Recorder)
    assert locate("gs://bucket/a*") == (None, "bucket/a*")
    assert asked == ["gs://bucket?retry_limit_seconds=10"]
