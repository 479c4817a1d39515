"""Examine this machine, or every node of a cluster: hardware, versions, storage, clock and connections."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from packaging.requirements import Requirement

from minimind_ray.config.errors import UserError
from minimind_ray.config.paths import masked
from minimind_ray.data.files import join, locate, one_line
from minimind_ray.on_ray.cluster.check import Finding

ALIKE = ("ray", "torch", "minimind-ray")
GB = 1e9
PROBE_SECONDS, COLLECTIVE_SECONDS = 60, 90


@dataclass(frozen=True)
class Node:
    """The properties of one node. Sizes are in bytes; `clock` is in seconds ahead of the machine that asks.

    `storage` has the error for each URL that could not be written and read. `gpus` are the names of the GPUs that torch
    finds, `driver_gpus` is the number that the NVIDIA driver finds, `ray_gpus` the number that Ray counts.
    """

    name: str
    python: str
    versions: Mapping[str, str]
    cpus: int
    gpus: tuple[str, ...]
    driver_gpus: int
    cuda: str
    nccl: str
    disk_free: int
    disk_size: int
    shm: int
    open_files: int
    storage: Mapping[str, str]
    role: str = "here"
    object_store: float = 0.0
    ray_gpus: float | None = None
    clock: float = 0.0


def probe(storage: Sequence[str] = ()) -> Node:
    """Return the properties of the machine that runs this function. `storage` are the URLs or folders to try."""
    import torch.cuda.nccl
    import torch.distributed

    disk = shutil.disk_usage("/tmp")
    shm = Path("/dev/shm")
    installed = {name: _version(name) for name in ALIKE}
    return Node(
        name=socket.gethostname(),
        python=platform.python_version(),
        versions=installed,
        cpus=os.cpu_count() or 1,
        gpus=tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())),
        driver_gpus=_driver_gpus(),
        cuda=torch.version.cuda or "",
        nccl=".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "",
        disk_free=disk.free,
        disk_size=disk.total,
        shm=shutil.disk_usage(shm).total if shm.is_dir() else 0,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        storage={url: fault for url in storage if (fault := _storage_fault(url))},
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _driver_gpus() -> int:
    if not shutil.which("nvidia-smi"):
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _storage_fault(url: str) -> str:
    """Write a small file into the storage, read it and delete it. Return the error as text; empty if there is none."""
    try:
        filesystem, path = locate(url)
        filesystem.create_dir(path, recursive=True)
        file = join(path, f".doctor-{uuid4().hex}")
        with filesystem.open_output_stream(file) as stream:
            stream.write(b"here")
        try:
            with filesystem.open_input_stream(file) as stream:
                return "" if stream.read() == b"here" else "a file that was written has other content when it is read"
        finally:
            filesystem.delete_file(file)
    except (OSError, UserError) as error:
        return one_line(error).removeprefix(f"{url}: ")


def examine_here(storage: Sequence[str]) -> list[Node]:
    """Examine this machine, without Ray."""
    return [probe(storage)]


def examine_cluster(storage: Sequence[str]) -> tuple[list[Node], list[Finding]]:
    """Examine every node of the cluster that this process is connected to, and the connections between the workers.

    Returns the nodes that answered, and findings about the others and about the connections. If a storage is a path, it
    must be a folder that all nodes share: each node looks for a file that this process writes there.
    """
    import ray

    marks = {url: _leave_mark(url) for url in storage if "://" not in url}
    nodes: list[Node] = []
    findings: list[Finding] = []
    try:
        alive = [node for node in ray.nodes() if node["Alive"]]
        for node, found in zip(alive, _probe_all(alive, storage, marks)):
            if isinstance(found, Exception):
                name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
                findings.append(
                    Finding(
                        f"{name} does not answer: {one_line(found)}",
                        "look at its log: `ray logs cluster raylet.out --node-ip ADDRESS`",
                    )
                )
            else:
                nodes.append(found)
        workers = [node for node in alive if not _is_head(node)]
        for backend, gpus in (("nccl", True), ("gloo", False)):
            alike = [node["NodeID"] for node in workers if ("GPU" in node["Resources"]) == gpus]
            if len(alike) > 1:
                findings += _collective(alike, backend)
    finally:
        for mark in marks.values():
            Path(mark).unlink(missing_ok=True)
    return nodes, findings


def _leave_mark(url: str) -> str:
    path = Path(url).expanduser().absolute()
    path.mkdir(parents=True, exist_ok=True)
    mark = path / f".doctor-{uuid4().hex}"
    mark.write_text("here")
    return str(mark)


def _is_head(node: Mapping[str, Mapping[str, float]]) -> bool:
    return "node:__internal_head__" in node["Resources"]


class _Examiner:
    """A short-lived Ray actor that examines its node."""

    def probe(self, storage: Sequence[str], marks: Mapping[str, str]) -> Node:
        found = probe(storage)
        unseen = {url: "the folder is not shared" for url, mark in marks.items() if not Path(mark).exists()}
        return replace(found, storage={**unseen, **found.storage})

    def clock(self) -> float:
        return time.time()


def _probe_all(
    alive: Sequence[Mapping[str, Any]], storage: Sequence[str], marks: Mapping[str, str]
) -> Iterator[Node | Exception]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    examiner: Any = ray.remote(num_cpus=0)(_Examiner)
    placed = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in alive]
    actors = [examiner.options(scheduling_strategy=place).remote() for place in placed]
    answers = [actor.probe.remote(storage, marks) for actor in actors]
    deadline = time.monotonic() + PROBE_SECONDS
    for node, actor, answer in zip(alive, actors, answers):
        try:
            found: Node = ray.get(answer, timeout=max(1, deadline - time.monotonic()))
            has = node["Resources"]
            yield replace(
                found,
                name=f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})",
                role=(node.get("Labels") or {}).get("minimind/role", "head" if _is_head(node) else "worker"),
                object_store=has.get("object_store_memory", 0),
                ray_gpus=has.get("GPU", 0),
                clock=_ahead(actor),
            )
        except Exception as error:
            yield error
        finally:
            ray.kill(actor)


def _ahead(actor: Any) -> float:
    """Return how many seconds the clock of the actor's node is ahead of this machine's clock.

    Of a few exchanges, the fastest counts. Returns 0 if its duration alone could explain the difference.
    """
    import ray

    best = (float("inf"), 0.0)
    for _ in range(5):
        before = time.time()
        there: float = ray.get(actor.clock.remote(), timeout=PROBE_SECONDS)
        after = time.time()
        best = min(best, (after - before, there - (before + after) / 2))
    return best[1] if abs(best[1]) > best[0] / 2 else 0.0


def _collective(node_ids: Sequence[str], backend: str) -> list[Finding]:
    """Test whether workers on these nodes can train together: one process on each node takes part in an all-reduce.

    The all-reduce hangs in the same cases in which training would hang.
    """
    import ray
    from ray.exceptions import GetTimeoutError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    rank: Any = ray.remote(num_cpus=0, num_gpus=int(backend == "nccl"), max_retries=0)(_add_up)
    meeting: Any = ray.remote(num_cpus=0)(_Meeting)
    store = meeting.remote()
    work = [
        rank.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            store, number, len(node_ids), backend
        )
        for number, node in enumerate(node_ids)
    ]
    try:
        totals = ray.get(work, timeout=COLLECTIVE_SECONDS)
        if all(total == len(node_ids) for total in totals):
            return []
        fault = f"adding 1 from each of {len(node_ids)} nodes gave {totals}"
    except GetTimeoutError:
        fault = f"no answer within {COLLECTIVE_SECONDS} seconds (GPUs in use by a run look the same)"
    except Exception as error:
        fault = one_line(error)
    finally:
        # Cancel only tasks that have not ended: Ray can abort this process if a task is cancelled as its result comes.
        for task in ray.wait(work, num_returns=len(work), timeout=0)[1]:
            ray.cancel(task, force=True)
        ray.kill(store)
    variable = f"{backend.upper()}_SOCKET_IFNAME"
    return [
        Finding(
            f"the workers cannot train together over {backend}: {fault}",
            f"open all ports between the nodes; with several network cards set {variable} where Ray is started",
        )
    ]


class _Meeting:
    """A Ray actor through which the process with rank 0 gives its address to the others."""

    def __init__(self) -> None:
        self.place = ""

    def set(self, place: str) -> None:
        self.place = place

    def get(self) -> str:
        return self.place


def _add_up(store: Any, rank: int, world: int, backend: str) -> float:
    from datetime import timedelta

    import ray
    import torch
    import torch.distributed as dist

    if rank == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        ray.get(store.set.remote(f"tcp://{ray.util.get_node_ip_address()}:{port}"))
    place: str = ""
    while not place:
        time.sleep(0.1)
        place = ray.get(store.get.remote())
    limit = timedelta(seconds=COLLECTIVE_SECONDS - 10)
    dist.init_process_group(backend, init_method=place, rank=rank, world_size=world, timeout=limit)
    try:
        one = torch.ones(1, device="cuda" if backend == "nccl" else "cpu")
        dist.all_reduce(one)
        return float(one)
    finally:
        dist.destroy_process_group()


def diagnose(nodes: Sequence[Node]) -> list[Finding]:
    """Return findings about the nodes, errors first."""
    findings = [*_wrong_versions(), *_unlike(nodes)]
    for node in nodes:
        findings += _of_node(node)
    return sorted(findings, key=lambda finding: finding.note)


def _wrong_versions() -> Iterator[Finding]:
    """Find packages of this environment whose version does not fit the requirements of minimind-ray."""
    for text in importlib.metadata.requires("minimind-ray") or ():
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        found = _version(wanted.name)
        if found == "none" or not wanted.specifier.contains(found, prereleases=True):
            there = "not installed" if found == "none" else found
            yield Finding(f"{wanted.name} is {there}, and {wanted.specifier} is needed", f"pip install '{wanted}'")


def _unlike(nodes: Sequence[Node]) -> Iterator[Finding]:
    kinds = {"Python": {node.name: node.python.rpartition(".")[0] for node in nodes}}
    # A build for CPUs and a build for CUDA of the same version can train together.
    kinds |= {name: {node.name: node.versions[name].partition("+")[0] for node in nodes} for name in ALIKE}
    for what, versions in kinds.items():
        if len(set(versions.values())) > 1:
            said = ", ".join(f"{version} on {name}" for name, version in versions.items())
            yield Finding(f"versions of {what} differ: {said}", "set up all nodes from one checkout: ray up FILE")


def _of_node(node: Node) -> Iterator[Finding]:
    for url, fault in node.storage.items():
        yield Finding(
            f"{node.name}: cannot use {masked(url)}: {fault}",
            "give the node's role access to the storage, or share the folder",
        )
    if node.driver_gpus > len(node.gpus):
        why = f"torch is for CUDA {node.cuda}" if node.cuda else "torch is a build for CPUs"
        yield Finding(
            f"{node.name}: the NVIDIA driver finds {node.driver_gpus} GPUs and torch finds {len(node.gpus)}; {why}",
            "update the NVIDIA driver, or install a build of torch that fits it",
        )
    if node.ray_gpus is not None and node.ray_gpus > len(node.gpus):
        yield Finding(
            f"{node.name}: Ray counts {node.ray_gpus:g} GPUs and torch finds {len(node.gpus)}",
            "correct the node's `resources` in the cluster file, or remove them",
        )
    full = 1 - node.disk_free / node.disk_size
    if full > 0.95:
        yield Finding(
            f"{node.name}: the disk is {full:.0%} full, and Ray stops at 95 %", "delete files, or use a larger disk"
        )
    elif node.disk_free < 10 * GB:
        yield Finding(f"{node.name}: {node.disk_free / GB:.1f} GB are left on the disk", "use a larger disk", note=True)
    if node.shm < node.object_store or node.shm < 0.25 * GB:
        yield Finding(
            f"{node.name}: /dev/shm has {node.shm / GB:.2f} GB, so Ray keeps objects on the disk",
            "make /dev/shm larger: docker run --shm-size, or a memory-backed emptyDir at /dev/shm",
            note=True,
        )
    if node.open_files < 4096:
        yield Finding(
            f"{node.name}: {node.open_files} open files are allowed", "ulimit -n 65536 before ray start", note=True
        )
    if abs(node.clock) > 1:
        yield Finding(
            f"{node.name}: its clock is {abs(node.clock):.1f} s {'ahead' if node.clock > 0 else 'behind'}; object "
            "stores refuse requests from a clock that is 15 minutes wrong",
            "turn on time synchronisation: timedatectl set-ntp true",
            note=abs(node.clock) < 60,
        )
