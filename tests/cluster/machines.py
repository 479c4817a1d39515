"""Machines made on this one: network namespaces on a bridge that nothing else is on.

Each has its own address, host name, processes, /root, /tmp, /run and /dev/shm; sees the rest of this machine's files;
and runs sshd, which takes one key. They share one folder, /mnt/minimind, except for the laptop, from which they are
used and on whose side the bridge is.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SHARED = "/mnt/minimind"
NETWORK = "10.77.0"

# As process 1 of its namespaces. Folders of this machine that a machine's own would hide are put back in their place.
BEGIN = """
set -e
mount -t tmpfs tmpfs /mnt
n=0
for folder in $KEEP; do n=$((n+1)); mkdir -p /mnt/.keep/$n; mount --bind $folder /mnt/.keep/$n; done
[ -z "$SHARE" ] || { mkdir -p /mnt/minimind; mount --bind $SHARE /mnt/minimind; }
mkdir /mnt/.disk
mount --bind $DISK /mnt/.disk
mount --bind /mnt/.disk/tmp /tmp
mount --bind /mnt/.disk/root /root
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
n=0
for folder in $KEEP; do n=$((n+1)); mkdir -p $folder; mount --bind /mnt/.keep/$n $folder; done
# The tests run from these: whatever is installed on a machine, it is not into them.
for folder in $SEALED; do mount --bind $folder $folder; mount -o remount,bind,ro $folder; done
# A network that knows its own names; others it has none to ask for, and waiting for an answer would take 20 s.
mount --bind /mnt/.disk/hosts /etc/hosts
mount --bind /mnt/.disk/resolv.conf /etc/resolv.conf
hostname $NAME
ip link set lo up
"""
HOST = """
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip address add $ADDRESS/24 dev eth0
ip link set eth0 up
ip route add default via $GATEWAY  # It leads nowhere; Ray looks at it for this machine's address.
mkdir -p /run/sshd
/usr/sbin/sshd -D -e -f /root/.sshd/config -E /root/.sshd/log &
"""
LAPTOP = """
ip link add bridge type bridge
ip address add $ADDRESS/24 dev bridge
ip link set bridge up
"""
WAIT = "\ntouch /root/.ready\nwhile :; do sleep 86400 & wait; done\n"

SSHD = """Port 22
HostKey /root/.sshd/key
AuthorizedKeysFile /root/.ssh/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
MaxStartups 100
Subsystem sftp internal-sftp
"""


def require_machines() -> None:
    """Skip where there cannot be any, and say why."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to make network namespaces")
    programs = ("unshare", "nsenter", "ip", "ssh", "ssh-keygen", "rsync", "/usr/sbin/sshd")
    if missing := [name for name in programs if shutil.which(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}: apt-get install openssh-server iproute2 rsync")
    probe = "mount -t tmpfs tmpfs /mnt && ip link add name b0 type bridge && ip link add a0 type veth peer name a1"
    made = subprocess.run(
        ["unshare", "--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--mount-proc", "sh", "-c", probe],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip(f"cannot make network namespaces here: {made.stderr.strip()}")


class Machine:
    """One machine; `disk` holds what is its own."""

    def __init__(self, name: str, number: int, disk: Path, setup: str, share: Path | None) -> None:
        self.name, self.address, self.disk = name, f"{NETWORK}.{number}", disk
        hidden = [p for p in map(Path, ("/root", "/tmp", "/run", "/mnt", "/dev/shm"))]
        needed = list(dict.fromkeys(map(str, (ROOT, sys.prefix, sys.base_prefix))))
        keep = [path for path in needed if any(Path(path).is_relative_to(p) for p in hidden)]
        (disk / "tmp").mkdir(parents=True)
        (disk / "root" / ".ssh").mkdir(parents=True, exist_ok=True)
        (disk / "hosts").write_text(f"127.0.0.1 localhost\n{self.address} {name}\n")
        (disk / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "KEEP": " ".join(keep),
            "SEALED": " ".join(needed), "SHARE": str(share or ""), "DISK": str(disk), "NAME": name,
            "ADDRESS": self.address, "GATEWAY": f"{NETWORK}.1",
        }  # fmt: skip
        # It ends with this process, however that ends, and everything in its namespaces with it.
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--pid", "--mount", "--uts", "--ipc", "--fork",
             "--kill-child", "--mount-proc", "bash", "-c", BEGIN + setup + WAIT],
            env=environment, stdin=subprocess.DEVNULL,
            stdout=(disk / "out").open("w"), stderr=subprocess.STDOUT,
        )  # fmt: skip

    @property
    def init(self) -> int:
        """The process id, as this machine counts, of its process 1."""
        return child_of(self.process)

    def ready(self) -> None:
        until(lambda: (self.disk / "root" / ".ready").exists(), f"{self.name}: see {self.disk}/out", self.process)

    def command(self, command: str) -> list[str]:
        """The command line, for this machine, that runs one in a shell there."""
        enter = ["nsenter", "--target", str(self.init), "--net", "--pid", "--mount", "--uts", "--ipc"]
        environment = {"HOME": "/root", "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        # A shell's background jobs ignore Ctrl-C, and so would all that they start.
        return [
            *enter,
            "env",
            "-i",
            "--default-signal=INT",
            *(f"{k}={v}" for k, v in environment.items()),
            "bash",
            "-c",
            command,
        ]

    def run(self, command: str, seconds: float = 120) -> str:
        """The output of a command there, which must succeed."""
        done = subprocess.run(
            self.command(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=seconds, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{self.name}: {command}: exit code {done.returncode}\n{done.stdout[-4000:]}"
        return done.stdout

    def cut(self) -> None:
        """The power goes: everything on it ends at once, and nothing is told to anyone."""
        os.kill(self.init, signal.SIGKILL)
        self.process.kill()
        self.process.wait()


class Machines:
    """A laptop and some hosts, as long as the block lasts."""

    def __init__(self, disks: Path, hosts: int) -> None:
        self.shared = disks / "shared"
        self.shared.mkdir()
        key = disks / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        self.laptop = Machine("laptop", 1, disks / "laptop", LAPTOP, None)
        shutil.copy(key, self.laptop.disk / "root" / ".ssh" / "minimind-ray")
        self.hosts: list[Machine] = []
        for number in range(10, 10 + hosts):
            root = disks / f"host{number}" / "root"
            (root / ".ssh").mkdir(parents=True)
            (root / ".sshd").mkdir()
            (root / ".ssh" / "authorized_keys").write_bytes(key.with_suffix(".pub").read_bytes())
            for folder in (root, root / ".ssh"):
                folder.chmod(0o700)
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", root / ".sshd" / "key"], check=True)
            (root / ".sshd" / "config").write_text(SSHD)
            self.hosts.append(Machine(f"host{number}", number, root.parent, HOST, self.shared))

    def __enter__(self) -> Machines:
        try:
            self.laptop.ready()
            for host in self.hosts:
                port = f"port{host.address.rsplit('.', 1)[1]}"
                subprocess.run(
                    ["nsenter", "--target", str(self.laptop.init), "--net", "ip", "link", "add", port, "type", "veth",
                     "peer", "name", "eth0", "netns", str(host.init)], check=True,
                )  # fmt: skip
                self.laptop.run(f"ip link set {port} master bridge up")
            for host in self.hosts:
                host.ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for machine in (*self.hosts, self.laptop):
            machine.process.kill()
            machine.process.wait()


def child_of(process: subprocess.Popen[Any]) -> int:
    """The process id of what `unshare` or `nsenter` runs."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until(lambda: bool(children.read_text().split()), "the process does not start")
    return int(children.read_text().split()[0])


def until(
    true: Callable[[], object], failing: str, process: subprocess.Popen[Any] | None = None, seconds: float = 30
) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end and (process is None or process.poll() is None), failing
        time.sleep(0.05)
