"""A head that is gone ends the run with a sentence; nothing here starts Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

PROGRAM = """
import socket, sys, time
from minimind_ray.on_ray import head_watch
head_watch.PAUSE = 0.05
with socket.create_server(("127.0.0.1", 0)) as head:
    head_watch.watch_head("127.0.0.1:%d" % head.getsockname()[1], patience=0.2)
    time.sleep(0.5)
    print("alive", flush=True)
    if sys.argv[1] == "leave":
        head_watch.leave_head()
time.sleep(1 if sys.argv[1] == "leave" else 30)
"""


@pytest.mark.parametrize(("then", "code"), [("wait", 1), ("leave", 0)])
def test_a_head_that_is_gone_ends_the_process_and_says_how_to_go_on(then: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, then], cwd=Path(__file__).parents[2], capture_output=True, text=True,
        timeout=20, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (code, "alive\n")
    assert ("--resume" in done.stderr) == (code == 1) and "Traceback" not in done.stderr
