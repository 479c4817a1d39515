"""`minimind-ray doctor` on this machine, and on a cluster of several nodes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Command


@pytest.mark.slow
def test_the_command_here(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("MINIMIND_STORAGE", str(tmp_path))
    assert f"storage {tmp_path}: written and read on 1 of 1 node(s)" in " ".join(command("doctor").out.split())
    (tmp_path / "file").write_text("")
    outcome = command("doctor", "--storage", tmp_path / "file" / "below")
    assert outcome.code == 1
    assert "cannot use" in outcome.out


@pytest.mark.cluster
def test_the_command_on_a_cluster(
    three_nodes: str,
    command: Command,
    tmp_path: Path,
) -> None:
    """Every node answers, its storage is the one that is seen here, and the two workers train together."""
    outcome = command("doctor", "--storage", tmp_path)
    assert "written and read on 3 of 3 node(s)" in outcome.out
    assert outcome.out.count(" head ") == 1
    assert outcome.out.count(" cpu ") == 2
    assert "does not answer" not in outcome.out
    assert "cannot train together" not in outcome.out
    assert not list(tmp_path.iterdir())

    # Another token is refused in one sentence. A process of its own: Ray reads the token once.
    other = subprocess.run(
        [sys.executable, "-m", "minimind_ray", "doctor"],
        env=os.environ | {"RAY_ADDRESS": three_nodes, "RAY_AUTH_TOKEN": "t" * 64},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (other.returncode, other.stdout) == (1, "")
    assert other.stderr.startswith(f"error: RAY_ADDRESS={three_nodes}: the cluster does not take this machine's token")
    assert other.stderr.count("\n") == 1
