"""The set-up script of the nodes, in a clean home with a fresh virtual environment."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
Setup = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A node's home as `file_mounts` leave it."""
    code = tmp_path / "minimind-ray"
    for folder in ("minimind_ray", "cluster", "experiments"):
        shutil.copytree(ROOT / folder, code / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, code)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("t" * 32)
    (tmp_path / ".bashrc").write_text('[ -z "$PS1" ] && return\n')
    return tmp_path


@pytest.fixture
def setup(home: Path) -> Setup:
    def call(**env: str) -> subprocess.CompletedProcess[str]:
        clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RAY_AUTH_TOKEN")}
        return subprocess.run(
            ["bash", "minimind-ray/cluster/setup.sh"],
            cwd=home, env={**clean, "HOME": str(home), "PYTHON": sys.executable, **env},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    return call


def test_a_node_is_set_up_once(home: Path, setup: Setup) -> None:
    """Here with the packages of this environment, so that nothing is downloaded."""
    lines = (ROOT / "cluster/requirements.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and line[0] != "#"]
    if other := [pin.name for pin in pins if not pin.specifier.contains(importlib.metadata.version(pin.name))]:
        pytest.skip(f"other versions are installed here: {', '.join(other)}")
    venv = home / "minimind-ray-venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    site = sysconfig.get_path("purelib", vars={"base": str(venv), "platbase": str(venv)})
    Path(site, "base.pth").write_text(sysconfig.get_path("purelib"))

    done = setup(PIP_NO_INDEX="1")
    assert done.returncode == 0, done.stderr
    assert (home / ".ray/auth_token").stat().st_mode & 0o777 == 0o600
    assert (venv / "bin/minimind-ray").exists()
    # A shell of `ray exec` is not interactive, and Ubuntu's .bashrc leaves at once in such a one.
    ask = """. ~/.bashrc; which minimind-ray; echo $RAY_AUTH_MODE
python -c 'import minimind_ray; print(*minimind_ray.__path__)'"""
    told = subprocess.run(
        ["bash", "-c", ask],
        env={"HOME": str(home), "PATH": os.environ["PATH"]},
        cwd=home,
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split() == [str(venv / "bin/minimind-ray"), "token", f"{site}/minimind_ray"]

    bashrc, installed = (home / ".bashrc").read_text(), (venv / ".made-of").stat().st_mtime_ns
    assert setup(PIP_NO_INDEX="1").returncode == 0
    assert (home / ".bashrc").read_text() == bashrc
    assert (venv / ".made-of").stat().st_mtime_ns == installed

    # The cluster files' own commands, as `ray up` has them run; not those that download.
    shell = {"HOME": str(home), "PATH": os.environ["PATH"], "PYTHON": sys.executable}
    for name in ("cluster.yaml", "cluster/gcp.yaml", "cluster/azure.yaml", "cluster/local.yaml"):
        commands = yaml.safe_load((ROOT / name).read_text())["setup_commands"]
        for command in (c for c in commands if "pip install" not in c):
            subprocess.run(["bash", "-c", command], env=shell, cwd=home, capture_output=True, check=True)
        told = subprocess.run(["bash", "-c", ". ~/.bashrc; env"], env=shell, capture_output=True, text=True, check=True)
        (storage,) = re.findall(r"MINIMIND_STORAGE=\S+", " ".join(commands))
        assert f"{storage}\n" in told.stdout
        assert ("AZURE_STORAGE_ACCOUNT_NAME=myaccount" in told.stdout) == (name == "cluster/azure.yaml")
    assert (venv / ".made-of").stat().st_mtime_ns == installed

    (home / "minimind-ray/minimind_ray/new.py").write_text("NEW = 1\n")
    assert setup(PIP_NO_INDEX="1").returncode == 0
    assert Path(site, "minimind_ray/new.py").exists()


def test_a_node_without_the_token_is_refused(home: Path, setup: Setup) -> None:
    (home / ".ray/auth_token").unlink()
    done = setup()
    assert done.returncode == 1
    assert "ray get-auth-token --generate" in done.stderr
    assert not (home / "minimind-ray-venv").exists()


def test_an_old_python_is_refused(home: Path, setup: Setup) -> None:
    old = home / "python3.10"
    old.write_text('#!/bin/sh\ncase "$2" in *exit*) exit 1;; esac\necho 3.10.12\n')
    old.chmod(0o755)
    done = setup(PYTHON=str(old))
    assert done.returncode == 1
    assert "is 3.10.12 and 3.11 or newer is needed" in done.stderr
