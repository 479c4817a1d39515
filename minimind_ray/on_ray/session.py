"""A Ray to run on: the cluster at RAY_ADDRESS, or one in this machine's processes."""

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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
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
from minimind_ray.on_ray.versions import private_parts
from minimind_ray.train import interrupts
from minimind_ray.train.interrupts import exit_at_once

Ending = Literal["by itself", "interrupted", "out of time"]
ANSWER_SECONDS = 2.0


def start_ray(cpus: int | None = None) -> None:
    """Connect to the cluster that RAY_ADDRESS names, or start Ray here with `cpus` logical CPUs (default: all).

    Raises:
        UserError: no cluster at RAY_ADDRESS, or one with another token; or Ray does not come up here.
    """
    import ray

    if ray.is_initialized():
        return
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
            f"RAY_ADDRESS={address}: the cluster cannot be used ({one_line(error)}); if one is there, is its token "
            "this machine's (RAY_AUTH_TOKEN, ~/.ray/auth_token)?"
        ) from None


def _start_here(cpus: int | None) -> None:
    """Ray's helpers have 15 seconds to come up, which can be too short for a busy machine; the second time their files
    have been read."""
    import ray

    folder = ray_folder()
    for last in (False, True):
        try:
            ray.init(
                address="local",  # Not one that runs on this machine for something else.
                num_cpus=cpus,
                _temp_dir=str(folder),
                # Without private parts it is asked what a killed trial held.
                include_dashboard=not private_parts(),
                log_to_driver=False,
                logging_level=logging.ERROR,
                # No runtime environment: it would cost each worker a second start, and processes of this machine
                # inherit the settings.
            )
            return
        except Exception as error:  # Ray raises this bare.
            if last or "timed out during startup" not in str(error):
                raise UserError(
                    f"Ray could not start on this machine: {one_line(error)}. Is the machine busy, or short of memory "
                    f"or disk? Ray's logs are in {folder}/session_latest/logs; RAY_TMPDIR chooses another folder"
                ) from error


def _require_cluster(address: str) -> None:
    """Ask for the cluster before Ray does, which repeats its questions for minutes. Raises UserError."""
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"RAY_ADDRESS={address} is a dashboard, and this command is not one that is sent there as a job: use "
            "--cluster FILE, or run it on the cluster"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():  # Not `auto`, which is a cluster that this machine is part of.
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            raise UserError(f"RAY_ADDRESS={address}: no cluster answers there: {error}") from None
    if not address.startswith("ray://") and private_parts():
        from minimind_ray.on_ray.private_ray import require_head

        require_head(address)


def configure_data() -> None:
    """Set up Ray Data in this process, which is to start a Ray Train run."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True


def stop_ray() -> None:
    """Leave the cluster; ends the one that `start_ray` started here."""
    import ray

    leave_head()
    ray.shutdown()


def interruptible(work: Callable[[], object], stop: Callable[[], object], seconds: float = math.inf) -> Ending:
    """Do `work` in a thread, so that this one can turn a signal, or the end of `seconds`, into `stop`, a clean one.

    The signals are those of train/interrupts.py. A second one interrupts at once. Raises what `work` raises.
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
    # Not `join`: when it is interrupted, Python 3.11 takes the thread for ended.
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
    """Logical CPUs for a Ray in this machine's processes: at least what a run needs, however few there are."""
    return max(os.cpu_count() or 1, math.ceil(scale.most * scale.cpus_per_worker) + 2)


def require_resources(scale: ScaleConfig) -> None:
    """Check that a run of this scale has the CPUs and GPUs it needs; otherwise it would wait for ever.

    Raises:
        UserError: it has not, or its workers would share a GPU that the config does not ask for.
    """
    # Ray Data hangs without a CPU of its own beside the workers'.
    require_cpus(scale.fewest * scale.cpus_per_worker + 1, scale.fewest * scale.gpus_per_worker, "this run")
    require_own_gpus(scale)


def require_cpus(cpus: float, gpus: float, what: str) -> None:
    """Check before starting what would otherwise wait for ever.

    Raises:
        UserError: the cluster has fewer CPUs or GPUs than `what` needs, and no way to more.
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
    """Raises UserError where workers that asked for no GPU would all find the first one of their machine."""
    import ray

    if scale.most > 1 and not scale.gpus_per_worker and ray.cluster_resources().get("GPU"):
        raise UserError(
            "scale.gpus_per_worker is 0, so that all workers of a machine would share its first GPU: set it to 1, or "
            "CUDA_VISIBLE_DEVICES to nothing where Ray starts, to train on CPUs"
        )


@dataclass(frozen=True)
class Machines:
    """What each node has, of which at most `most` run at once."""

    nodes: list[dict[str, float]]
    most: int

    def resources(self) -> dict[str, float]:
        """CPUs and GPUs of all, at the cluster's largest."""
        return {kind: sum(self._largest(node.get(kind, 0) for node in self.nodes)) for kind in ("CPU", "GPU")}

    def workers(self, scale: ScaleConfig, spare_cpus: int = 0) -> int:
        """How many of `scale`'s workers fit, with `spare_cpus` left, each on the node that has the most left."""
        need, nodes = worker_resources(scale), [dict(node) for node in self.nodes]
        for _ in range(spare_cpus if nodes else 0):
            largest = max(nodes, key=lambda node: node.get("CPU", 0))
            largest["CPU"] = largest.get("CPU", 0) - 1
        fit = (max(0, int(min(node.get(kind, 0) / n for kind, n in need.items()) + 1e-6)) for node in nodes)
        return int(sum(self._largest(fit)))

    def _largest(self, values: Iterable[float]) -> list[float]:
        return sorted(values, reverse=True)[: self.most]


def machines(without: Collection[str] = ()) -> Machines:
    """The nodes that can be reached, without some, by id; where Ray starts nodes on demand, those it may start.

    Ray itself does not tell. The head of a cluster made by `ray up` has its file in its home; on Kubernetes
    MINIMIND_NODE_TYPES of the head's pod repeats the groups of cluster/kuberay.yaml.
    """
    import ray

    if "RAY_ADDRESS" in os.environ:
        if told := os.environ.get("MINIMIND_NODE_TYPES"):
            nodes = [dict(kind) for kind in json.loads(told) for _ in range(kind["count"])]
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


def alone() -> bool:
    """Whether this machine is all of the cluster, and no others will be started for it, as far as can be known here."""
    import ray

    grows = bool(os.environ.get("MINIMIND_NODE_TYPES")) or _bootstrap_file().is_file()
    return not grows and sum(node["Alive"] for node in ray.nodes()) == 1


def _answers(node: dict[str, Any]) -> bool:
    """Whether a node can be reached: for some fifteen seconds Ray itself takes one that was lost for alive."""
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


def room(scale: ScaleConfig, *, spare_cpus: int, without: Collection[str] = ()) -> int:
    """How many of `scale`'s workers fit on the cluster, leaving `spare_cpus` on one node and out some nodes, by id.

    Counts what nodes have, whoever uses it now.
    """
    return machines(without).workers(scale, spare_cpus)


def worker_resources(scale: ScaleConfig) -> dict[str, float]:
    """What one worker takes, as Ray has it."""
    return {"CPU": scale.cpus_per_worker} | ({"GPU": scale.gpus_per_worker} if scale.gpus_per_worker else {})


def notices_may_come() -> bool:
    """Whether a notice may come that a node will be taken away: only a cluster's nodes get one."""
    return not alone() or "RAY_ADDRESS" in os.environ


def group_name() -> str:
    """A new name for a placement group, which names the driver and the actor (or "driver") that make it."""
    import ray

    context = ray.get_runtime_context()
    return f"minimind-ray {context.get_job_id()} {context.get_actor_id() or 'driver'} {secrets.token_hex(8)}"


def free_left_groups() -> None:
    """Remove the placement groups that actors of this driver made and left when they were killed.

    As trials with Ray Train workers do; nothing else frees what these groups hold.
    """
    from ray.util.placement_group import remove_placement_group

    if private_parts():
        from minimind_ray.on_ray.private_ray import groups_of_dead_actors as left
    else:
        left = _groups_of_dead_actors
    for group in left():
        remove_placement_group(group)


def _groups_of_dead_actors() -> Iterator[Any]:
    """By Ray's dashboard. Ray Train frees its own groups in the same way."""
    import ray
    from ray.util.state import get_actor

    address = ray.get_runtime_context().gcs_address  # Else it asks the Ray that this machine has started last.
    for group in _own_groups():
        maker = group["name"].split()[2]
        actor = None if maker == "driver" else get_actor(maker, address=address)
        if actor and actor.state == "DEAD":  # pyright: ignore[reportAttributeAccessIssue]
            yield ray.util.get_placement_group(group["name"])


def pending_resources() -> Mapping[str, float]:
    """The CPUs and GPUs for which this driver's placement groups wait, its actors' among them; empty if none waits."""
    need = Counter[str]()
    for group in _own_groups():
        if group["state"] != "CREATED":
            for bundle in group["bundles"].values():
                need.update({kind: bundle.get(kind, 0) for kind in ("CPU", "GPU")})
    return +need


def _own_groups() -> Iterator[dict[str, Any]]:
    """The placement groups of this driver and its actors that are not removed (see `group_name`)."""
    import ray
    from ray.util.placement_group import placement_group_table

    own = f"minimind-ray {ray.get_runtime_context().get_job_id()} "
    groups: Iterable[dict[str, Any]] = placement_group_table().values()
    yield from (group for group in groups if group["name"].startswith(own) and group["state"] != "REMOVED")
