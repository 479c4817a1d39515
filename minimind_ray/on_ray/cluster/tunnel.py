"""The way to a cluster's head: one ssh connection of Ray's own, with the cluster file's settings.

`python -m minimind_ray.on_ray.cluster.tunnel FILE PORT` opens it, as the child process of `tunnel`: PORT on this
machine's loopback leads to the dashboard on the head's loopback, which no other machine can reach.
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
# Then nothing more happens: the connection stays for as long as this process does.
TELL_TOKEN = 'echo "token:$(cat ${RAY_AUTH_TOKEN_PATH:-~/.ray/auth_token}):"; while sleep 3600; do :; done'


@contextmanager
def tunnel(cluster: Path) -> Generator[tuple[str, str]]:
    """While inside, the dashboard's address on loopback, and the cluster's token, which is kept in memory alone.

    Raises:
        UserError: not a file of `ray up`, no head is running, or it cannot be reached.
    """
    if read_cluster(cluster).provider == "kuberay":
        raise UserError(
            f"{cluster}: Kubernetes has its own way in: kubectl port-forward to the head's service, and "
            "RAY_ADDRESS=http://localhost:8265 in place of --cluster"
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
        start_new_session=True,  # Ctrl-C is for the command that uses the tunnel.
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
    """Of all that Ray and ssh say as the way there fails, the line that says why."""
    found = (line for pattern in REASONS for line in reversed(said) if re.search(pattern, line))
    return next(found, "ssh said nothing")


REASONS = (r"^ssh: ", r"Permission denied|Connection (closed|reset|timed out)", r"^[\w.]+(Error|Exception): .", r"\S")


def _main(cluster: str, port: int) -> None:
    # The other end of standard input closes when the parent ends, however it does; ssh ends with this group.
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
