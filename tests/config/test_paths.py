"""What relative paths mean, here and in a job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from minimind_ray.config.errors import UserError
from minimind_ray.config.paths import input_path, output_path

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MINIMIND_STORAGE", raising=False)
    return tmp_path


def test_here_paths_are_of_the_working_directory(here: Path) -> None:
    assert output_path("runs/a") == input_path("runs/a") == f"{here}/runs/a"
    assert output_path("~/a") == input_path("~/a") == str(Path.home() / "a")
    assert output_path("s3://bucket/a") == input_path("s3://bucket/a") == "s3://bucket/a"


@pytest.mark.parametrize("storage", ["/mnt/shared", "/mnt/shared/", "s3://bucket/mine"])
def test_on_a_cluster_they_are_of_its_storage(here: Path, storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIMIND_STORAGE", storage)
    (here / "data").mkdir()
    (here / "data" / "mine.jsonl").touch()
    root = storage.rstrip("/")
    assert output_path(Path("runs/a")) == f"{root}/runs/a"
    assert output_path("data") == f"{root}/data"
    assert input_path("runs/base") == f"{root}/runs/base"
    assert input_path("data/theirs*.jsonl") == f"{root}/data/theirs*.jsonl"
    # What was sent along with the job comes first.
    assert input_path("data/mine.jsonl") == f"{here}/data/mine.jsonl"
    assert input_path("data/*.jsonl") == f"{here}/data/*.jsonl"
    assert input_path("/elsewhere/a") == output_path("/elsewhere/a") == "/elsewhere/a"


def test_a_job_without_storage_writes_nothing_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(UserError, match="MINIMIND_STORAGE"):
        output_path("runs/a")
    assert output_path("/mnt/a") == "/mnt/a"


@pytest.mark.parametrize("of", [input_path, output_path])
def test_an_empty_path_is_not_this_directory(of: Callable[[str], str]) -> None:
    with pytest.raises(UserError, match="a path is empty"):
        of("")
