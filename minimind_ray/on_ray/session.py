"""Connect to Ray (the cluster at RAY_ADDRESS, or a Ray started on this machine), and query its CPUs and GPUs."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import ScaleConfig
from minimind_ray.data.files import one_line
from minimind_ray.on_ray import SETTINGS
from minimind_ray.on_ray.auth_token import ensure_token, keep_token_private
from minimind_ray.on_ray.folder import ray_folder
from minimind_ray.on_ray.head_watch import leave_head, watch_head
from minimind_ray.on_ray.versions import TESTED, private_parts
from minimind_ray.train import interrupts
from minimind_ray.train.interrupts import exit_at_once

Ending = Literal["by itself", "interrupted", "out of time"]
ANSWER_SECONDS = 2.0


@contextmanager
def ray_running(cpus: int | None = None) -> Generator[None]:
    """Keep Ray running while inside. Ray starts and ends here, unless it already runs in this process.

    So an outer block keeps one Ray for several runs; then the outer block's `cpus` count.

    Raises:
        UserError: as `start_ray`.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    start_ray(cpus)
    try:
        yield
    finally:
        stop_ray()


def start_ray(cpus: int | None = None) -> None:
    """Connect to the cluster that RAY_ADDRESS names, or start Ray here with `cpus` logical CPUs (default: all).

    Raises:
        UserError: there is no cluster at RAY_ADDRESS, or it has another token; or Ray cannot start here.
    """
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    keep_token_private()
    with _own_sessions():
        if address := os.environ.get("RAY_ADDRESS"):
            _join(address)
        else:
            ensure_token()
            _start_here(cpus)
    interrupts.reinstall()
    watch_head(ray.get_runtime_context().gcs_address)
    configure_data()


def _own_sessions() -> AbstractContextManager[None]:
    if not private_parts():
        return nullcontext()
    from minimind_ray.on_ray.private_ray import own_sessions

    return own_sessions()


def _join(address: str) -> None:
    import ray
    from ray.exceptions import AuthenticationError

    _require_cluster(address)
    environment = {name: os.environ[name] for name in (*SETTINGS, "MINIMIND_PUBLIC_ONLY") if name in os.environ}
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": environment})
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
        raise UserError(
            f"RAY_ADDRESS={address}: the cluster cannot be used ({one_line(error)}). Check that the cluster runs, and "
            "that this machine has the cluster's token (in RAY_AUTH_TOKEN or ~/.ray/auth_token)"
        ) from None


def _start_here(cpus: int | None) -> None:
    """Start Ray on this machine; try twice.

    Ray's processes have 15 seconds to start, which can be too short on a busy machine. The second time their files are
    in memory.
    """
    import ray

    folder = ray_folder()
    for last in (False, True):
        try:
            ray.init(
                address="local",  # Without this, Ray would connect to a Ray that already runs on this machine.
                num_cpus=cpus,
                _temp_dir=str(folder),
                # `_groups_of_dead_actors` needs the dashboard.
                include_dashboard=not private_parts(),
                log_to_driver=False,
                logging_level=logging.ERROR,
                # Use no runtime_env; it would make Ray start each worker twice. Processes of this machine inherit the
                # settings anyway.
            )
            return
        except Exception as error:  # Ray raises a plain Exception.
            if last or "timed out during startup" not in str(error):
                raise UserError(
                    f"Ray could not start on this machine: {one_line(error)}. Is the machine busy, or short of memory "
                    f"or disk? Ray's logs are in {folder}/session_latest/logs; RAY_TMPDIR chooses another folder"
                ) from error


def _require_cluster(address: str) -> None:
    """Check that the cluster answers, because Ray itself would retry for minutes. Raises UserError if it does not."""
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"RAY_ADDRESS={address} is a dashboard, but this command cannot be sent to a dashboard as a job: use "
            "--cluster FILE, or run it on the cluster"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():  # False for `auto`, the cluster that this machine is part of.
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            raise UserError(f"RAY_ADDRESS={address}: no cluster answers there: {error}") from None
    if not address.startswith("ray://") and private_parts():
        from minimind_ray.on_ray.private_ray import require_head

        require_head(address)


def configure_data() -> None:
    """Set up Ray Data in this process, before it starts a Ray Train run."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True


def stop_ray() -> None:
    """Leave the cluster, or stop the Ray that `start_ray` started on this machine."""
    import ray

    leave_head()
    ray.shutdown()


def interruptible(work: Callable[[], object], stop: Callable[[], object], seconds: float = math.inf) -> Ending:
    """Do `work` in a thread. On a signal, or after `seconds`, call `stop`, which should end the work cleanly.

    The signals are listed in train/interrupts.py. A second signal interrupts at once. An exception of `work` is raised
    here.
    """
    ended, failure = threading.Event(), list[BaseException]()

    def target() -> None:
        try:
            work()
        except BaseException as error:
            failure.append(error)
        finally:
            ended.set()

    threading.Thread(target=target, daemon=True).start()
    deadline = time.monotonic() + seconds
    ending: Ending = "by itself"
    # Do not use `join`: if it is interrupted, Python 3.11 believes that the thread has ended.
    while not ended.is_set():
        try:
            ended.wait(0.2)
            if ending == "by itself" and time.monotonic() > deadline:
                ending = "out of time"
                stop()
        except KeyboardInterrupt:
            if ending == "interrupted":
                exit_at_once()
                raise
            ending = "interrupted"
            stop()
    if failure:
        raise failure[0]
    return ending


def local_cpus(scale: ScaleConfig) -> int:
    """Return the number of logical CPUs for a Ray on this machine: at least as many as a run needs."""
    return max(os.cpu_count() or 1, math.ceil(scale.most * scale.cpus_per_worker) + 2)


def require_resources(scale: ScaleConfig) -> None:
    """Check that a run of this scale has the CPUs and GPUs it needs; otherwise it would wait for ever.

    Raises:
        UserError: there are too few, or the run's workers would share a GPU that the config does not ask for.
    """
    # Ray Data hangs if the workers take every CPU.
    require_cpus(scale.fewest * scale.cpus_per_worker + 1, scale.fewest * scale.gpus_per_worker, "this run")
    require_own_gpus(scale)


def require_cpus(cpus: float, gpus: float, what: str) -> None:
    """Check that the cluster has the CPUs and GPUs for `what`, which would otherwise wait for ever.

    Raises:
        UserError: the cluster has too few, and cannot get more.
    """
    have, where = machines().resources(), "the cluster" if "RAY_ADDRESS" in os.environ else "this machine"
    if gpus and not have["GPU"]:
        raise UserError(
            f"scale.gpus_per_worker asks for a GPU for {what}, and {where} has none; set it to 0 to use CPUs alone, "
            "or use a cluster with GPUs"
        )
    for resource, need in (("CPU", cpus), ("GPU", gpus)):
        if have[resource] < need:
            raise UserError(
                f"{what} needs {need:g} {resource}s and {where} has {have[resource]:g}; "
                f"lower scale.workers or scale.{resource.lower()}s_per_worker, or add nodes"
            )


def require_own_gpus(scale: ScaleConfig) -> None:
    """Raise UserError if workers that asked for no GPU would all use the first GPU of their machine."""
    import ray

    if scale.most > 1 and not scale.gpus_per_worker and ray.cluster_resources().get("GPU"):
        raise UserError(
            "scale.gpus_per_worker is 0, so all workers of a machine would share its first GPU: set it to 1; or, to "
            "train on CPUs, start Ray with an empty CUDA_VISIBLE_DEVICES"
        )


@dataclass(frozen=True)
class Machines:
    """The resources of each possible node. At most `most` nodes run at the same time."""

    nodes: list[dict[str, float]]
    most: int

    def resources(self) -> dict[str, float]:
        """Return the CPUs and GPUs of all nodes together, when the cluster is at its largest."""
        return {kind: sum(self._largest(node.get(kind, 0) for node in self.nodes)) for kind in ("CPU", "GPU")}

    def workers(self, scale: ScaleConfig, spare_cpus: int = 0) -> int:
        """Return how many of `scale`'s workers fit, if `spare_cpus` stay free, each on the node with most free CPUs."""
        need, nodes = worker_resources(scale), [dict(node) for node in self.nodes]
        for _ in range(spare_cpus if nodes else 0):
            largest = max(nodes, key=lambda node: node.get("CPU", 0))
            largest["CPU"] = largest.get("CPU", 0) - 1
        fit = (max(0, int(min(node.get(kind, 0) / n for kind, n in need.items()) + 1e-6)) for node in nodes)
        return int(sum(self._largest(fit)))

    def _largest(self, values: Iterable[float]) -> list[float]:
        return sorted(values, reverse=True)[: self.most]


def machines(without: Collection[str] = ()) -> Machines:
    """Return the nodes that can be reached, except those with the ids `without`.

    If Ray starts nodes on demand, return the nodes that it may start. Ray has no function that lists these nodes. On a
    cluster made by `ray up`, a file in the head's home directory lists them. On Kubernetes, the variable
    MINIMIND_NODE_TYPES of the head's pod repeats the groups of cluster/kuberay.yaml.
    """
    import ray

    if "RAY_ADDRESS" in os.environ:
        if node_types := os.environ.get("MINIMIND_NODE_TYPES"):
            nodes = [dict(kind) for kind in json.loads(node_types) for _ in range(kind["count"])]
            return Machines(nodes, len(nodes))
        file = _bootstrap_file()
        if file.is_file() and (config := json.loads(file.read_text()))["provider"]["type"] != "local":
            types = [node for name, node in config["available_node_types"].items() if name != config["head_node_type"]]
            nodes = [dict(node["resources"]) for node in types for _ in range(node["max_workers"])]
            return Machines(nodes, config["max_workers"])
    alive = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in without]
    with ThreadPoolExecutor(64) as pool:
        nodes = [dict(node["Resources"]) for node, up in zip(alive, pool.map(_answers, alive)) if up]
    return Machines(nodes, len(nodes))


def _bootstrap_file() -> Path:
    return Path.home() / "ray_bootstrap_config.yaml"


def is_single_node() -> bool:
    """Whether this machine is the whole cluster, and no other nodes will be started, as far as can be known here."""
    import ray

    grows = bool(os.environ.get("MINIMIND_NODE_TYPES")) or _bootstrap_file().is_file()
    return not grows and sum(node["Alive"] for node in ray.nodes()) == 1


def _answers(node: dict[str, Any]) -> bool:
    """Whether a node can be reached. Ray itself reports a lost node as alive for some fifteen seconds."""
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


def workers_that_fit(scale: ScaleConfig, *, spare_cpus: int, without: Collection[str] = ()) -> int:
    """Return how many of `scale`'s workers fit on the cluster, if `spare_cpus` stay free (see `Machines.workers`).

    Nodes with the ids `without` are not counted. Resources count even if other programs use them now.
    """
    return machines(without).workers(scale, spare_cpus)


def worker_resources(scale: ScaleConfig) -> dict[str, float]:
    """Return the resources of one worker by Ray's names."""
    return {"CPU": scale.cpus_per_worker} | ({"GPU": scale.gpus_per_worker} if scale.gpus_per_worker else {})


def notices_may_come() -> bool:
    """Whether preemption notices are possible (only on a cluster)."""
    return not is_single_node() or "RAY_ADDRESS" in os.environ


def group_name() -> str:
    """Return a new name for a placement group. It contains the ids of the driver and the actor that make the group."""
    import ray

    context = ray.get_runtime_context()
    return f"minimind-ray {context.get_job_id()} {context.get_actor_id() or 'driver'} {secrets.token_hex(8)}"


def free_left_groups() -> None:
    """Remove the placement groups of this driver's actors that were killed, such as trials with Ray Train workers.

    Nothing else frees the resources of these groups.
    """
    from ray.util.placement_group import remove_placement_group

    if private_parts():
        from minimind_ray.on_ray.private_ray import groups_of_dead_actors as left
    else:
        left = _groups_of_dead_actors
    for group in left():
        remove_placement_group(group)


def _groups_of_dead_actors() -> Iterator[Any]:
    """Yield the placement groups of killed actors, found through Ray's dashboard. (Ray Train uses the same way.)"""
    import ray

    for group in _own_groups():
        maker = group["name"].split()[2]
        if maker != "driver" and _is_dead(maker):
            with suppress(ValueError):  # Another trial has just removed the group.
                yield ray.util.get_placement_group(group["name"])


def _is_dead(actor: str) -> bool:
    """Ask Ray's dashboard whether an actor is dead. Raises UserError if the dashboard does not answer."""
    import ray
    from ray.util.state import get_actor
    from ray.util.state.exception import RayStateApiException

    address = ray.get_runtime_context().gcs_address  # By default `get_actor` asks the Ray that was started here last.
    try:
        found: Any = get_actor(actor, address=address)
    except (ConnectionError, RayStateApiException) as error:
        raise UserError(
            f"Ray's dashboard does not answer ({one_line(error)}). It is needed to free what killed trials reserved: "
            f"start the head with --include-dashboard=true, or use ray=={TESTED[-1]}"
        ) from error
    return bool(found) and found.state == "DEAD"


def pending_resources() -> Mapping[str, float]:
    """Return the CPUs and GPUs that placement groups of this driver and its actors wait for; empty if none waits."""
    need = Counter[str]()
    for group in _own_groups():
        if group["state"] != "CREATED":
            for bundle in group["bundles"].values():
                need.update({kind: bundle.get(kind, 0) for kind in ("CPU", "GPU")})
    return +need


def _own_groups() -> Iterator[dict[str, Any]]:
    """Yield the existing placement groups of this driver and its actors (see `group_name`)."""
    import ray
    from ray.util.placement_group import placement_group_table

    own = f"minimind-ray {ray.get_runtime_context().get_job_id()} "
    groups: Iterable[dict[str, Any]] = placement_group_table().values()
    yield from (group for group in groups if group["name"].startswith(own) and group["state"] != "REMOVED")
