"""Connect to a cluster's head through ssh. Ray itself opens the connection, with the cluster file's settings.

The head's dashboard listens only on the head's loopback address, so other machines cannot reach it directly. `tunnel`
starts the child process `python -m minimind_ray.on_ray.cluster.tunnel FILE PORT`. The child opens the connection and
forwards PORT on this machine's loopback address to the dashboard.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from minimind_ray.config.cluster import read_cluster
from minimind_ray.config.errors import UserError

DASHBOARD_PORT = 8265
# A shell command for the head: print the token, then sleep, so that the connection stays open.
TELL_TOKEN = 'echo "token:$(cat ${RAY_AUTH_TOKEN_PATH:-~/.ray/auth_token}):"; while sleep 3600; do :; done'


@contextmanager
def tunnel(cluster: Path) -> Generator[tuple[str, str]]:
    """Inside, give the dashboard's address on this machine and the cluster's token. The token is held only in memory.

    Raises:
        UserError: `cluster` is not a file for `ray up`, no head is running, or the head cannot be reached.
    """
    if read_cluster(cluster).provider == "kuberay":
        raise UserError(
            f"{cluster}: --cluster does not work with Kubernetes: run kubectl port-forward to the head's service, and "
            "set RAY_ADDRESS=http://localhost:8265 in place of --cluster"
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", __name__, str(cluster), str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C must reach only the command that uses the tunnel.
    )
    assert process.stdin and process.stdout
    try:
        said: list[str] = []
        for line in process.stdout:
            if found := re.search(r"token:([^\s:]*):", line):
                break
            said.append(line.strip())
        else:
            raise UserError(
                f"{cluster}: the cluster's head cannot be reached ({reason(said)}); start it with: ray up {cluster}"
            )
        yield f"http://127.0.0.1:{port}", found[1]
    finally:
        process.stdin.close()
        process.wait()


def reason(said: Sequence[str]) -> str:
    """Return the line that explains a failed connection, from the output of Ray and ssh."""
    found = (line for pattern in REASONS for line in reversed(said) if re.search(pattern, line))
    return next(found, "ssh said nothing")


REASONS = (r"^ssh: ", r"Permission denied|Connection (closed|reset|timed out)", r"^[\w.]+(Error|Exception): .", r"\S")


def _main(cluster: str, port: int) -> None:
    # Standard input closes when the parent ends for any reason. Then end this process group, which includes ssh.
    parent = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def end_with_parent() -> None:
        os.read(parent, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=end_with_parent, daemon=True).start()
    from ray.autoscaler.sdk import run_on_cluster

    run_on_cluster(cluster, cmd=TELL_TOKEN, port_forward=[(port, DASHBOARD_PORT)])


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
