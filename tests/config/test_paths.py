"""What relative paths mean, here and in a job."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from minimind_ray.config.errors import UserError
from minimind_ray.config.load import load_config
from minimind_ray.config.paths import check_location, input_path, masked, output_path
from minimind_ray.data.files import absolute

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


def test_the_home_of_an_unknown_user_is_said() -> None:
    for of in (input_path, output_path, absolute):
        with pytest.raises(UserError, match="~no-such-user/x: ~no-such-user has no home directory on this machine"):
            of("~no-such-user/x")


BAD_BUCKETS = ("ab", "No-Capitals", "under_score", "my bucket", "bücket", "-begins", "ends.", "two..dots", "x" * 64)


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("s3://", "names no bucket"),
        ("s3:///x", "names no bucket"),
        ("s3://bucket/a//b", "empty part"),
        ("s3://bucket/../x", "empty part, . or .."),
        ("s3:/bucket/x", "write s3://bucket/x"),
        ("gs:bucket/x", "write gs://bucket/x"),
        ("S3://bucket/x", "write the scheme in small letters"),
        ("http://example.org/x", "web address"),
        ("https://me:hidden@example.org/x", "web address"),
        ("ftp://example.org/x", "the address of a server (ftp://)"),
        ("sftp://me:hidden@example.org/x", "the address of a server (sftp://)"),
        ("s3a://bucket/x", "write s3://bucket/x"),
        ("-", "standard input and output are not supported"),
        *((f"s3://{name}/x", f"no bucket can be named {name}") for name in BAD_BUCKETS),
        ("file://runs/x", "write file:///PATH"),
        ("a b://x", "neither a path nor a URL"),
        ("s3://KEY:hidden@bucket/x", "holds credentials"),
        ("s3://KEY:hid/den@bucket/x", "holds credentials"),
        ("s3://hidden@bucket/x", "holds credentials"),
        ("s3://bucket/x?secret_key=hidden", "holds credentials"),
    ],
)
def test_what_is_no_place_is_refused_without_its_secrets(where: str, why: str) -> None:
    ways = [
        check_location, input_path, output_path, lambda text: load_config("sft", overrides={"out": text}),
        lambda text: load_config("sft", overrides={"data.train": ["a.jsonl", text]}),
    ]  # fmt: skip
    for way in ways:
        with pytest.raises(UserError, match=re.escape(why)) as error:
            way(where)
        assert "hid" not in str(error.value) and "\n" not in str(error.value)


def test_places_stay_as_they_are(here: Path) -> None:
    (here / "s3:").mkdir()
    for where in (
        "s3://bucket", "s3://bucket/x/", "s3://my.bucket-1/ä b", "gs://under_score/x",
        "hf://datasets/me/poems@main/*.jsonl", "abfs://box@account.dfs.core/x", "a:b",
        "file:///x", "s3:", "s3://bucket/**/[ab]?.jsonl", "runs/{stage}",
    ):  # fmt: skip
        assert check_location(where) == where == masked(where)


def test_a_file_url_is_its_path() -> None:
    assert output_path("file:///x/y") == input_path("file:///x/y") == "/x/y"


def test_storage_is_a_place_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIMIND_STORAGE", "s3://KEY:hidden@bucket")
    for of in (input_path, output_path):
        with pytest.raises(UserError, match="holds credentials"):
            of("runs/a")
