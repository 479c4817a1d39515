"""The set-up script on a Debian that lacks `venv` and is updating itself.

The Debian is this machine's, under an overlay that goes away with the test.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cluster.machines import ROOT

pytestmark = pytest.mark.cluster

# A process holds apt's lists for some seconds, as a fresh Ubuntu's own update does; then the script runs as root.
SCRIPT = """
set -e
mount -t tmpfs tmpfs "$DISK"
mkdir "$DISK"/{upper,work,root}
mount -t overlay overlay -o "lowerdir=/,upperdir=$DISK/upper,workdir=$DISK/work" "$DISK/root"
cd "$DISK/root"
mount --bind /dev dev
mount -t proc proc proc
rm -r "usr/lib/$PYTHON/ensurepip"
rm -rf etc/apt/sources.list etc/apt/sources.list.d/*
echo 'deb [trusted=yes] file:/packages ./' >etc/apt/sources.list
mkdir -p node packages
cp -r "$HERE/packages/." packages
cp -r "$HERE/node/." node
lock='import fcntl, sys, time
file = open("/var/lib/apt/lists/lock", "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(4)
print("free", file=sys.stderr)'
exec 3< <(exec chroot . "/usr/bin/$PYTHON" -c "$lock")
read -r held <&3
exec chroot . /usr/bin/env -i HOME=/node PATH=/usr/sbin:/usr/bin:/sbin:/bin PYTHON="/usr/bin/$PYTHON" PIP_NO_INDEX=1 \\
    RAY_AUTH_TOKEN=t bash /node/minimind-ray/cluster/setup.sh
"""


def debian_python() -> str:
    """The name of the distribution's Python; skips where there is none with `venv`, or no root."""
    names = [path.parent.name for path in Path("/usr/lib").glob("python3.*/ensurepip")]
    if not names or os.geteuid() or not all(map(shutil.which, ("apt-get", "dpkg-deb", "unshare", "chroot"))):
        pytest.skip("needs root, and a Debian with python3-venv")
    return names[0]


def make_package(packages: Path, python: str) -> None:
    """A repository with one package, the part of Python that Debian leaves out."""
    control = f"Package: {python}-venv\nVersion: 99\nArchitecture: all\nMaintainer: tests\nDescription: ensurepip\n"
    tree = packages.with_name("tree")
    shutil.copytree(f"/usr/lib/{python}/ensurepip", tree / "usr/lib" / python / "ensurepip")
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN/control").write_text(control)
    packages.mkdir()
    package = packages / "venv.deb"
    subprocess.run(["dpkg-deb", "--build", tree, package], check=True, capture_output=True)
    content = package.read_bytes()
    index = f"{control}Filename: ./venv.deb\nSize: {len(content)}\nSHA256: {hashlib.sha256(content).hexdigest()}\n"
    (packages / "Packages").write_text(index)


def test_setup_waits_for_the_systems_own_update_and_installs_venv(tmp_path: Path) -> None:
    python = debian_python()
    make_package(tmp_path / "packages", python)
    code = tmp_path / "node/minimind-ray"
    for folder in ("minimind_ray", "cluster", "experiments"):
        shutil.copytree(ROOT / folder, code / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, code)
    # Nothing can be downloaded: the script has done its part when pip in the new environment says so.
    (code / "cluster/requirements.txt").write_text("not-to-be-had==1\n")
    (tmp_path / "disk").mkdir()
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", SCRIPT],
        env={"PATH": os.environ["PATH"], "DISK": str(tmp_path / "disk"), "HERE": str(tmp_path), "PYTHON": python},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=180, check=False,
    )  # fmt: skip
    if "mount:" in done.stdout:
        pytest.skip(f"cannot mount here: {done.stdout[-300:]}")
    assert "free" in done.stdout, done.stdout
    assert "No matching distribution found for not-to-be-had==1" in done.stdout, done.stdout
