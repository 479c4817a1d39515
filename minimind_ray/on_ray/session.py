"""A Ray to run on: the cluster at RAY_ADDRESS, or one in this machine's processes."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Literal

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import ScaleConfig
from minimind_ray.on_ray import SETTINGS

Ending = Literal["by itself", "interrupted", "out of time"]


def start_ray(cpus: int | None = None, *, dashboard: bool = False) -> None:
    """Connect to the cluster that RAY_ADDRESS names, or start Ray here with `cpus` logical CPUs (default: all).

    Ray Train runs inside Ray Tune trials need the `dashboard` process to look after their placement groups.
    """
    import ray

    if ray.is_initialized():
        return
    local = "RAY_ADDRESS" not in os.environ
    logging.getLogger("ray").setLevel(logging.ERROR)
    ray.init(
        num_cpus=cpus if local else None,
        include_dashboard=dashboard if local else None,
        log_to_driver=False,
        logging_level=logging.ERROR,
        # Processes on this machine inherit the settings; a runtime environment would cost each worker a second start.
        runtime_env=None if local else {"env_vars": {name: os.environ[name] for name in SETTINGS}},
    )
    configure_data()


def configure_data() -> None:
    """Set up Ray Data in this process, which is to start a Ray Train run."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True


def stop_ray() -> None:
    """Leave the cluster; ends the one that `start_ray` started here."""
    import ray

    ray.shutdown()


def interruptible(work: Callable[[], object], stop: Callable[[], object], seconds: float = math.inf) -> Ending:
    """Do `work` in a thread, so that this one can turn Ctrl-C, or the end of `seconds`, into `stop`, a clean one.

    A second Ctrl-C interrupts at once. Raises what `work` raises.
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
                raise
            ending = "interrupted"
            stop()
    if failure:
        raise failure[0]
    return ending


def local_cpus(scale: ScaleConfig) -> int:
    """Logical CPUs for a Ray in this machine's processes: at least what a run needs, however few there are."""
    return max(os.cpu_count() or 1, math.ceil(scale.most * scale.cpus_per_worker) + 2)


def require_cpus(cpus: float, gpus: float, what: str) -> None:
    """Check before starting what would otherwise wait for ever.

    Raises:
        UserError: the cluster has fewer CPUs or GPUs than `what` needs, and no way to more.
    """
    import ray

    have = ray.cluster_resources()
    for resource, need in (("CPU", cpus), ("GPU", gpus)):
        if have.get(resource, 0) < need:
            raise UserError(
                f"{what} needs {need:g} {resource}s and the cluster has {have.get(resource, 0):g}; "
                "lower scale.workers or scale.cpus_per_worker, or add nodes"
            )


def room(scale: ScaleConfig, *, spare_cpus: int, without: Collection[str] = ()) -> int:
    """How many of `scale`'s workers fit on the cluster, leaving `spare_cpus` on one node and out some nodes, by id.

    Counts what nodes have, whoever uses it now.
    """
    import ray

    nodes = [dict(n["Resources"]) for n in ray.nodes() if n["Alive"] and n["NodeID"] not in without]
    if not nodes:
        return 0
    largest = max(nodes, key=lambda node: node.get("CPU", 0))
    largest["CPU"] = largest.get("CPU", 0) - spare_cpus
    need = worker_resources(scale)

    def fit(node: Mapping[str, float]) -> int:
        return max(0, int(min(node.get(kind, 0) / amount for kind, amount in need.items()) + 1e-6))

    return sum(fit(node) for node in nodes)


def worker_resources(scale: ScaleConfig) -> dict[str, float]:
    """What one worker takes, as Ray has it."""
    return {"CPU": scale.cpus_per_worker} | ({"GPU": scale.gpus_per_worker} if scale.gpus_per_worker else {})
