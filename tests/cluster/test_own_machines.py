"""`ray up` on machines of one's own, jobs from the laptop, a machine whose power goes: all for real."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cluster.machines import ROOT, Machine, Machines, child_of, require_machines, until
from tests.jobs import make_tokenizer, rows_of, write_jsonl

pytestmark = pytest.mark.cluster

PROJECT = "/root/project"
FILE = "cluster/local.yaml"
CPUS = 3
TINY = (
    "--max-seq-len 64 --pack-tokens 256 --batch-tokens 1024 --precision float32 "
    "--set data.val_fraction=0.1 --set eval.samples=1 --set eval.sample_tokens=8"
)


def prepare_laptop(machines: Machines) -> None:
    """A checkout, the cluster's token, and the cluster file with these machines in it: what docs/cluster.md says."""
    project = machines.laptop.disk / "root" / "project"
    project.mkdir()
    for name in ("minimind_ray", "cluster", "experiments"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    head, *workers = (host.address for host in machines.hosts)
    cluster = yaml.safe_load((project / FILE).read_text())
    cluster["provider"] |= {"head_ip": head, "worker_ips": workers}
    cluster["auth"]["ssh_user"] = "root"
    # Beside the first for the test's patience alone: a machine that is cut is noticed within 12 s rather than 65, and
    # a worker host that misses its head ends after 5 s rather than 60.
    settings = (
        "GLOO_SOCKET_IFNAME=eth0 RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S=15 RAY_health_check_period_ms=1000 "
        "RAY_health_check_timeout_ms=3000 RAY_health_check_failure_threshold=3 "
        "RAY_gcs_rpc_server_reconnect_timeout_s=5"
    )
    for kind in ("head", "worker"):
        commands = cluster[f"{kind}_start_ray_commands"]
        commands[-1] = f"export {settings}; {commands[-1]}"
    # Whatever this machine has, these have three CPUs.
    cluster["worker_start_ray_commands"][-1] += f" --num-cpus={CPUS}"
    (project / FILE).write_text(yaml.safe_dump(cluster))


def install(host: Machine, project: Path) -> None:
    """Leave cluster/setup.sh nothing to download: the environment is this one, and the code what was copied there."""
    environment = host.disk / "root" / "minimind-ray-venv"
    environment.mkdir()
    for entry in Path(sys.prefix).iterdir():
        (environment / entry.name).symlink_to(entry)
    (host.disk / "root" / ".bashrc").write_text(
        f"export PYTHON={sys.prefix}/bin/python PYTHONPATH=$HOME/minimind-ray\n"
    )
    script = (project / "cluster" / "setup.sh").read_text()
    [made_of] = re.findall(r"^made_of=.*?^} \| sha256sum\)\n", script, re.DOTALL | re.MULTILINE)
    version = ".".join(map(str, sys.version_info[:3]))
    told = subprocess.run(
        ["bash", "-c", f'root={project} version={version}\n{made_of}echo "$made_of"'],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (environment / ".made-of").write_text(told.stdout)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    require_machines()
    with Machines(tmp_path_factory.mktemp("machines"), hosts=3) as machines:
        prepare_laptop(machines)
        for host in machines.hosts:
            install(host, machines.laptop.disk / "root" / "project")
        yield machines


def on_laptop(machines: Machines, command: str) -> list[str]:
    settings = f"PATH={sys.prefix}/bin:$PATH PYTHONPATH={PROJECT} RAY_USAGE_STATS_ENABLED=0"
    return machines.laptop.command(f"cd {PROJECT} && export {settings} && {command}")


def laptop(machines: Machines, command: str, code: int = 0, seconds: float = 240) -> str:
    began = time.monotonic()
    done = subprocess.run(
        on_laptop(machines, command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=seconds, check=False,
    )  # fmt: skip
    print(f"{time.monotonic() - began:6.1f} s  {command}")
    assert done.returncode == code, f"{command}: exit code {done.returncode}\n{done.stdout[-6000:]}"
    return done.stdout


def saved(run: Path) -> int:
    """The last step of which there is a checkpoint; 0 without one."""
    return max((int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*")), default=0)


def restarts(run: Path) -> list[dict[str, object]]:
    return json.loads((run / "run.json").read_text()).get("restarts", [])


def test_a_sweep_on_machines_that_fail(machines: Machines) -> None:
    shared, home = machines.shared, machines.laptop.disk / "root" / "project"
    write_jsonl(shared / "data" / "pretrain.jsonl", rows_of("pretrain", 400))
    write_jsonl(shared / "data" / "dpo.jsonl", rows_of("dpo", 60))
    make_tokenizer(shared / "data" / "tokenizer")
    ours = f"minimind-ray --cluster {FILE}"
    base = shared / "runs" / "base"

    laptop(machines, "ray get-auth-token --generate")
    refused = laptop(machines, f"{ours} jobs", code=1)
    assert "ray up cluster/local.yaml" in refused
    laptop(machines, f"ray up {FILE} --no-config-cache -y")
    head = machines.hosts[0]
    until(lambda: f"/{2 * CPUS}.0 CPU" in head.run(". ~/.bashrc; ray status"), "the workers do not join", seconds=120)

    # A run over both worker hosts; its terminal goes, then the power of one of them; it goes on until told to stop.
    command = (
        f"{ours} train pretrain --train data/pretrain.jsonl --out runs/base {TINY} --tokenizer data/tokenizer "
        "--preset tiny --workers 1:2 --set scale.cpus_per_worker=1.6 --epochs 2000 --lr 1e-3 "
        "--set checkpoint.every=20"
    )
    began = time.monotonic()
    terminal = subprocess.Popen(
        on_laptop(machines, f"exec {command}"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    until(lambda: saved(base) or terminal.poll() is not None, "no checkpoint", seconds=240)
    print(f"{time.monotonic() - began:6.1f} s  to the first checkpoint")
    os.kill(child_of(terminal), signal.SIGINT)
    told = terminal.communicate(timeout=30)[0]
    print(told)
    assert terminal.returncode == 130
    [job] = re.findall(r"logs (train-[0-9a-f]{6});", told)
    training = [host for host in machines.hosts[1:] if "RayTrainWorker" in host.run("ps ax")]
    assert len(training) == 2, "the two workers are to be on both hosts"
    training[0].cut()
    began, before = time.monotonic(), saved(base)
    assert f"{job}  RUNNING" in laptop(machines, f"{ours} jobs")
    until(lambda: restarts(base) and saved(base) > before, "no checkpoint after the cut", seconds=240)
    print(f"{time.monotonic() - began:6.1f} s  from the cut to the next checkpoint")
    laptop(machines, f"{ours} stop {job}")
    followed = laptop(machines, f"{ours} logs {job}", code=130)
    print(followed)
    info = json.loads((home / "runs" / "base" / "run.json").read_text())
    print(info)
    assert info["state"] == "stopped"
    assert info["restarts"] == restarts(base)
    assert not list(home.rglob("*.safetensors"))

    # A sweep on what is left.
    out = laptop(
        machines,
        f"{ours} tune dpo --train data/dpo.jsonl --init-from runs/base {TINY} --beta 0.05,0.1 --epochs 1",
        seconds=300,
    )
    print(out)
    assert "report: sweeps/dpo/report.html" in out
    assert "0.05" in laptop(machines, "minimind-ray compare sweeps/dpo")

    # As people know it from Ray: a tunnel, and a job through it.
    way = subprocess.Popen(
        on_laptop(machines, f"exec ray dashboard {FILE}"), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        job = "ray job submit --address http://127.0.0.1:8265 --working-dir . -- minimind-ray data inspect"
        laptop(machines, "until (: >/dev/tcp/127.0.0.1/8265) 2>/dev/null; do sleep 0.2; done", seconds=30)
        assert "60 rows of format preference = 60 kept" in laptop(
            machines, f"export RAY_AUTH_MODE=token; {job} data/dpo.jsonl --tokenizer data/tokenizer"
        )
    finally:
        os.kill(child_of(way), signal.SIGKILL)
        way.wait()

    laptop(machines, f"ray down {FILE} -y")
    for host in (head, training[1]):  # Ray stops the head; its workers end when they miss it.
        until(lambda host=host: "raylet/raylet" not in host.run("ps ax"), f"Ray goes on running on {host.name}")
