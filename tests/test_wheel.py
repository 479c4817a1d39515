"""The wheel is complete: installed without a checkout, the commands find recipes, sweeps and cluster files in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SETUPTOOLS = 77  # as in pyproject.toml
FOLDERS = ("minimind_ray", "experiments", "cluster")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "cluster.yaml", "README.md", "LICENSE")


def build(source: Path, target: Path) -> Path:
    """A wheel of the source."""
    if not find_spec("pip") or not find_spec("setuptools"):
        pytest.skip("needs pip and setuptools here, since nothing is downloaded")
    if int(metadata.version("setuptools").split(".")[0]) < SETUPTOOLS:
        pytest.skip(f"needs setuptools {SETUPTOOLS} or newer here: {metadata.version('setuptools')} is too old")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(target)]
    done = subprocess.run([*pip, "wheel", *options, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = target.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source)
    return build(source, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`minimind-ray` in a fresh environment, which has the wheel, and sees the packages of the running one."""
    home = tmp_path_factory.mktemp("fresh")
    venv.create(home)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    (site / "base.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", str(home / "bin/python"), "--disable-pip-version-check"]
    # The running environment has the package, too, as an editable install.
    options = ["--no-deps", "--no-index", "--ignore-installed"]
    subprocess.run([*pip, "install", *options, str(wheel)], check=True, capture_output=True)
    return home / "bin/minimind-ray"


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RAY_ADDRESS")}


Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def call(program: Path, tmp_path: Path) -> Call:
    """The installed command, run in another folder."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(program), *arguments], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
        )

    return run


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_has_each_file_of_the_package_and_one_copy_of_each_shipped_file(wheel: Path) -> None:
    top = [*ROOT.glob("experiments/**/*.yaml"), *(path for path in ROOT.glob("cluster/*") if path.is_file())]
    expected = {f"minimind_ray/shipped/{path.relative_to(ROOT)}" for path in top}
    expected |= {f"minimind_ray/shipped/{name}" for name in FILES if name != "MANIFEST.in"}
    own = (path for path in ROOT.glob("minimind_ray/**/*") if path.is_file() and "__pycache__" not in path.parts)
    assert names(wheel) == expected | {str(path.relative_to(ROOT)) for path in own}


def test_recipes_configs_and_sweeps_are_found_by_name(call: Call, program: Path) -> None:
    assert "zero" in call("recipes").stdout
    assert str(program.parents[1]) in call("recipes").stdout.splitlines()[-1]
    for arguments, note in {
        ("run", "zero"): "recipe: zero, shipped with minimind-ray 0.1.0",
        ("tune", "--sweep", "dpo"): "sweep: dpo, shipped with minimind-ray 0.1.0",
        ("train", "sft", "--config", "sft"): "config: sft, shipped with minimind-ray 0.1.0",
    }.items():
        done = call(*arguments)
        assert done.returncode == 1 and done.stdout.splitlines()[0] == note, done
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert call("--version").stdout.startswith("minimind-ray 0.1.0\n")


def test_nodes_of_a_cluster_build_the_same_software(call: Call, wheel: Path, tmp_path: Path) -> None:
    """`ray up` copies the files of the installation; cluster/setup.sh installs them."""
    assert call("init", "--cloud", "aws", "mine").returncode == 0
    mounts = yaml.safe_load((tmp_path / "mine/cluster.yaml").read_text())["file_mounts"]
    node = tmp_path / "node"
    for remote, local in mounts.items():
        target = node / remote.removeprefix("~/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if Path(local).is_dir():
            shutil.copytree(local, target, ignore=shutil.ignore_patterns("__pycache__"))
        elif remote != "~/.ray/auth_token":
            shutil.copy(local, target)
    again = build(node / "minimind-ray", tmp_path / "dist")
    assert names(again) == names(wheel) - {"minimind_ray/shipped/cluster.yaml"}


def test_the_demo_starts(program: Path, tmp_path: Path) -> None:
    demo = subprocess.Popen(
        [str(program), "demo", "--no-ray"], cwd=tmp_path, env={**environment(), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert demo.stdout
        said: list[str] = []
        for line in demo.stdout:
            said.append(line)
            if "start: not started yet" in line:
                break
        assert any("quickstart: pretrain" in line for line in said) and demo.poll() is None, said
        assert (tmp_path / "demo/runs/tokenizer/tokenizer.json").exists()
    finally:
        demo.kill()
        demo.communicate()
