"""What of the working directory a job is sent."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from minimind_ray.config.errors import UserError
from minimind_ray.data.package import package, rules

pytestmark = pytest.mark.unit

TOKEN = "a-token-of-this-machine-0123456789"
KEY = "-----BEGIN OPENSSH PRIVATE" + " KEY-----\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def fill(root: Path, *names: str, text: str = "text") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_secrets_stay_here(here: Path) -> None:
    secret = [".env", ".env.local", "prod.env", ".netrc", "id_rsa", "conf/ID_ED25519.pub", "tls.key", "auth_token",
              "hf-token.txt", "credentials.json", "my_credentials.json", "deploy/kubeconfig.yaml"]  # fmt: skip
    fill(here, *secret, ".aws/credentials", "conf/.ssh/config")
    sent = [".env.example", "tokenizer/tokenizer.json", "tokenizer/special_tokens_map.json", "data.jsonl", "tokens.py",
            "secrets.py", "environment.yaml", "keys.md"]  # fmt: skip
    fill(here, *sent)
    fill(here, "notes.txt", text=f"export RAY_AUTH_TOKEN={TOKEN}")
    fill(here, "deploy.sh", text=KEY)
    fill(here, "aws.sh", text="AKIA" + "ABCDEFGH12345678")
    (here / "linked").symlink_to(here / "deploy.sh")
    found = package(here)
    assert sorted(found.files) == sorted(sent)
    assert sorted(found.secrets) == sorted(
        [*secret, ".aws/", "conf/.ssh/", "notes.txt", "deploy.sh", "aws.sh", "linked"]
    )
    assert found.size == 4 * len(sent)


def test_secrets_by_shape_and_the_whole_directory(here: Path) -> None:
    fill(here, "run.sh", text="export WANDB_API_KEY=" + "0a" * 20)
    fill(here, "config.yaml", text="key: sk-" + "proj-0123456789abcdefgh")
    fill(here, "my.pem.bak", "passwords.txt", ".s3cfg", "a.txt")
    (here / ".gitignore").write_text("ignored.txt\r\n", encoding="utf-8-sig")
    fill(here, "ignored.txt")
    found = package(here)
    assert set(found.files) == {".gitignore", "a.txt"}
    assert sorted(found.secrets) == [".s3cfg", "config.yaml", "my.pem.bak", "passwords.txt", "run.sh"]
    with pytest.raises(UserError, match=r"--ship \. is the whole directory"):
        package(here, ["."])


def test_a_name_that_is_not_utf_8_is_said(here: Path, tmp_path: Path) -> None:
    (here / "na\udcffme.txt").write_text("text")
    with pytest.raises(UserError, match=r"na\?me.txt cannot be sent: its name is not UTF-8"):
        package(here).write(tmp_path / "sent.zip")


def test_what_is_named_is_sent_after_all(here: Path) -> None:
    fill(here, ".env", ".aws/credentials", ".aws/config", "runs/a/run.json", "ignored/a", "id_rsa")
    fill(here, ".gitignore", text="ignored\n")
    found = package(here, [".env", ".aws", "runs/a", "ignored/"])
    assert found.secrets == ["id_rsa"]
    assert set(found.files) == {
        ".env", ".aws/credentials", ".aws/config", "runs/a/run.json", "ignored/a", ".gitignore"
    }  # fmt: skip
    with pytest.raises(UserError, match="is outside of the working directory"):
        package(here, ["../other"])
    with pytest.raises(UserError, match="--ship none: there is no such file"):
        package(here, ["none"])


def test_what_is_ignored_or_of_no_use_stays(here: Path, tmp_path: Path) -> None:
    fill(here, "a.jsonl", "runs/x", "experiments/runs/x", ".venv/bin/python", "large/x", "log", "deep/log", "p.pyc")
    fill(here, ".rayignore", text="large/\n")
    fill(here, ".git/info/exclude", text="log\n")
    fill(here, "deep/.gitignore", text="!log\n")
    fill(tmp_path / "home", "git/ignore", text="*.pyc\n")
    (here / "circle").symlink_to(here)
    assert set(package(here).files) == {
        "a.jsonl", "experiments/runs/x", ".rayignore", "deep/.gitignore", "deep/log"
    }  # fmt: skip
    # In a folder of a repository its rules hold, too.
    assert set(package(here / "deep").files) == {".gitignore", "log"}


def test_links_that_lead_out_of_the_directory_stay(here: Path, tmp_path: Path) -> None:
    fill(tmp_path / "data", "b.jsonl")
    fill(here, "in/a.jsonl", ".env", ".aws/config")
    for name, target in {
        "out": tmp_path / "data", "out.jsonl": tmp_path / "data" / "b.jsonl", "up": "..", "gone": tmp_path / "none",
        "also": "in", "settings": ".env", "aws": ".aws/config",
    }.items():  # fmt: skip
        (here / name).symlink_to(target)
    (here / "in" / "out.jsonl").symlink_to("../../data/b.jsonl")
    found = package(here)
    assert set(found.files) == {"in/a.jsonl", "also/a.jsonl"}
    assert found.links == ["also/out.jsonl", "in/out.jsonl", "out/", "out.jsonl", "up/"]
    assert found.secrets == [".aws/", ".env", "aws", "settings"]
    # Through a link to the directory it is the same.
    (tmp_path / "alias").symlink_to(here)
    assert set(package(tmp_path / "alias").files) == set(found.files)
    found = package(here, ["out", "out.jsonl", "in"])
    assert set(found.files) == {"in/a.jsonl", "also/a.jsonl", "out/b.jsonl", "out.jsonl", "in/out.jsonl"}
    assert found.links == ["also/out.jsonl", "up/"]


def test_a_package_holds_the_files(here: Path, tmp_path: Path) -> None:
    fill(here, "a/b.txt")
    target = tmp_path / "x.zip"
    package(here).write(target)
    with zipfile.ZipFile(target) as archive:
        assert archive.namelist() == ["a/b.txt"] and archive.read("a/b.txt") == b"text"


PATTERNS = (
    "*.log", "!keep.log", "/top", "folder/", "a/b", "a/**/z", "**/deep/x", "all/**", "q?.txt", "n[0-9].txt",
    "m[!0-9].txt",
    "\\#hash", "\\!bang", "# a comment", "", "space\\ ", "trailing   ", "a**c", "*/middle", "bad[",
    "dir/*", "!dir/kept",
)  # fmt: skip
PATHS = (
    "x.log", "keep.log", "s/x.log", "s/keep.log", "top", "s/top", "folder/x", "s/folder/x", "t/folder", "a/b/c",
    "s/a/b", "a/z", "a/1/z", "a/1/2/z", "deep/x", "s/deep/x", "all/x", "all/s/x", "q1.txt", "q12.txt", "n1.txt",
    "nx.txt",
    "m1.txt", "mx.txt", "#hash", "!bang", "# a comment", "space ", "trailing", "abbc", "a-c", "middle", "s/middle",
    "s/s/middle", "bad[", "dir/gone", "dir/kept", "dir/s/x",
)  # fmt: skip


def test_patterns_mean_what_they_mean_to_git(here: Path) -> None:
    subprocess.run(["git", "init", "-q", str(here)], check=True)
    fill(here, *PATHS)
    fill(here, ".gitignore", text="\n".join(PATTERNS) + "\n")
    command = ["git", "-C", str(here), "ls-files", "-z", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split("\0")
    assert set(package(here).files) == set(listed) - {""}
    assert len(listed) < len(PATHS) and rules(PATTERNS, "/")
