"""`minimind-ray init`: what it writes, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from minimind_ray.cli.init import CLUSTER_FILES, MOUNTED, cluster_file
from minimind_ray.config.shipped import PACKAGE, experiments, find, shipped
from tests.cli.conftest import Command

pytestmark = pytest.mark.unit


def test_a_folder_to_start_from(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new/README.md").write_text("mine")
    monkeypatch.chdir(tmp_path)
    said = command("init", "new", "--cloud", "aws")
    assert said.code == 0
    assert (tmp_path / "new/README.md").read_text() == "mine"
    assert "kept   new/README.md (it differs from ours)\n" in said.out
    assert "wrote  new/experiments/sweeps/dpo.yaml\n" in said.out and "cd new && minimind-ray demo" in said.out
    files = {str(path.relative_to(tmp_path / "new")) for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert files == {
        ".gitignore", "README.md", "cluster.yaml", "cluster/aws-account.cfn",
        *(str(each.path.relative_to(shipped(""))) for each in experiments()),
    }  # fmt: skip
    again = command("init", "new", "--cloud", "aws").out
    assert "wrote" not in again and again.count("kept") == len(files)
    monkeypatch.chdir(tmp_path / "new")
    assert find("recipe", "zero").note == "recipe: ./experiments/zero.yaml"


def test_the_readme_is_short_and_its_commands_are_commands(command: Command, tmp_path: Path) -> None:
    assert command("init", tmp_path / "here").code == 0
    text = (tmp_path / "here/README.md").read_text()
    assert len(text.splitlines()) <= 10 and text.startswith("# here\n")
    for line in text.splitlines():
        if line.startswith("    minimind-ray"):
            assert command(line.split()[1], "--help").code == 0, line


@pytest.mark.parametrize("cloud", list(CLUSTER_FILES))
def test_nodes_get_the_software_of_this_installation(cloud: str) -> None:
    text = cluster_file(cloud)
    assert "checkout" not in text and "'.[" not in text
    assert cloud == "aws" or CLUSTER_FILES[cloud] not in text
    tree = yaml.safe_load(text)
    if cloud == "kubernetes":
        return
    mounts = {remote.removeprefix("~/minimind-ray/"): local for remote, local in tree["file_mounts"].items()}
    del mounts["~/.ray/auth_token"]
    assert mounts == {"minimind_ray": str(PACKAGE), **{name: str(shipped(name)) for name in MOUNTED}}
    assert all(Path(local).exists() for local in mounts.values())


def test_kubernetes_gets_the_command_that_builds_the_image(command: Command, tmp_path: Path) -> None:
    said = command("init", tmp_path, "--cloud", "kubernetes")
    assert f"docker build -f {shipped('cluster/Dockerfile')} --build-context code={PACKAGE} " in said.out
    assert "kubectl apply -f cluster.yaml" in (tmp_path / "README.md").read_text()
