"""A run on a cluster that has no worker yet: Ray's real autoscaler, with processes in place of machines."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs import make_tokenizer, rows_of, write_jsonl

pytestmark = [pytest.mark.cluster, pytest.mark.long]

SCRIPT = Path(__file__).with_name("autoscaling.py")
APART = ["unshare", "--pid", "--mount", "--net", "--ipc", "--fork", "--kill-child", "bash", "-ec"]
PREPARE = 'mount -t proc proc /proc; mount -t tmpfs tmpfs /tmp; ip link set lo up; exec "$@"'


@pytest.fixture
def place() -> Iterator[Path]:
    """Outside /tmp, which is another one in there."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        yield Path(directory)


def test_workers_come_when_a_run_asks_for_them(place: Path) -> None:
    """Data is prepared and two workers train on the CPU node; nothing lands on the head, and no GPU node starts."""
    if os.geteuid() or subprocess.run([*APART, PREPARE, "-", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs root, namespaces and ip: its Ray has to be apart from others on this machine")
    rows = write_jsonl(place / "rows.jsonl", rows_of("pretrain", 60))
    token = place / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("t" * 32)
    settings = ["data.max_seq_len=64", "data.pack_tokens=64", "batch.tokens=256", "schedule.warmup=1", "eval.samples=0"]
    settings.append("data.val_fraction=0.2")
    command = [
        sys.executable, "-c", "from minimind_ray.cli.main import run; run()", "train", "pretrain", "--train", rows,
        "--tokenizer", make_tokenizer(place / "tokenizer"), "--out", place / "run", "--preset", "tiny",
        "--workers", 2, "--max-steps", 2, *(word for setting in settings for word in ("--set", setting)),
    ]  # fmt: skip
    env = {
        **os.environ, "HOME": str(place), "RAY_AUTH_MODE": "token",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    done = subprocess.run(
        [*APART, PREPARE, "-", sys.executable, str(SCRIPT), *map(str, command)],
        env=env, cwd=SCRIPT.parents[2], capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "finished after 2 steps" in done.stdout
    assert "nodes: [0, 4.0]" in done.stdout
    assert "GPUs: 0" in done.stdout
