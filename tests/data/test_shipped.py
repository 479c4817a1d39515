"""What a job was sent with its working directory has a place by its content, in the storage."""

from __future__ import annotations

from pathlib import Path

import pytest

from minimind_ray.config.errors import UserError
from minimind_ray.config.load import load_config
from minimind_ray.data.records import discover
from minimind_ray.data.shipped import copy_to_storage, resolve_paths

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The storage that two jobs share."""
    (tmp_path / "storage").mkdir()
    monkeypatch.setenv("MINIMIND_STORAGE", str(tmp_path / "storage"))
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    return tmp_path / "storage"


def job(number: int, text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """In the working directory of a job, with two data files."""
    directory = tmp_path / "working_dir_files" / f"_ray_pkg_{number}"
    (directory / "data").mkdir(parents=True)
    (directory / "data" / "a.jsonl").write_text(text)
    (directory / "data" / "b.jsonl").write_text('{"text": "b"}\n')
    monkeypatch.chdir(directory)
    return directory


@pytest.mark.parametrize("name", ["data/a.jsonl", "data", "data/*.jsonl"])
def test_the_same_files_are_the_same_data_in_another_job(
    name: str, storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = []
    for number, text in enumerate(("one\n", "one\n", "other\n")):
        kept = copy_to_storage(str(job(number, text, monkeypatch, tmp_path) / name))
        assert Path(kept).is_relative_to(storage / "shipped")
        places.append(discover(kept))
    assert places[0] == places[1]  # In path, size and time.
    assert not {source.path for source in places[0]} & {source.path for source in places[2]}
    assert [Path(source.path).name for source in places[2]] == ["a.jsonl", "b.jsonl"][: len(places[0])]
    assert len(places[0]) == (1 if name.endswith("a.jsonl") else 2)
    assert Path(places[2][0].path).read_text() == "other\n"


def test_a_second_job_goes_on_with_the_same_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = {"data.train": ["data/a.jsonl", "data/b.jsonl"], "data.tokenizer": "tokenizer"}
    configs = []
    for number in (1, 2):
        (job(number, "one\n", monkeypatch, tmp_path) / "tokenizer").mkdir()
        Path("tokenizer/tokenizer.json").write_text("{}")
        configs.append(resolve_paths(load_config("pretrain", overrides=overrides)))
    assert configs[0] == configs[1]


def test_elsewhere_files_stay_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = str(job(1, "one\n", monkeypatch, tmp_path) / "data")
    assert copy_to_storage("s3://bucket/data/*.jsonl") == "s3://bucket/data/*.jsonl"
    assert copy_to_storage("/mnt/data") == "/mnt/data"
    monkeypatch.chdir(tmp_path)  # A job without a working directory of its own.
    assert copy_to_storage(here) == here
    monkeypatch.chdir(Path(here).parent)
    assert copy_to_storage(here) != here
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    assert copy_to_storage(here) == here


@pytest.mark.parametrize("key", ["data.train", "data.val", "data.tokenizer", "init_from", "out"])
def test_an_empty_path_is_none_of_a_config(key: str) -> None:
    with pytest.raises(UserError, match="a path is empty"):
        resolve_paths(load_config("pretrain", overrides={key: ""}))
