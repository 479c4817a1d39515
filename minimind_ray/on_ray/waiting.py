"""A line on stderr for a run or a sweep that waits for room on the cluster."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager

from minimind_ray.config.paths import masked
from minimind_ray.config.schema import ScaleConfig

FIRST_S, AGAIN_S = 60.0, 300.0
SHOWN = 80
"""Characters of another program's command."""


def lacking(
    scale: ScaleConfig, have: Mapping[str, float], free: Mapping[str, float], others: Sequence[str]
) -> str | None:
    """What a trial waits for, in a sentence; None where the free CPUs and GPUs are enough for it."""
    need = {"CPU": scale.most * scale.cpus_per_worker + (scale.most > 1), "GPU": scale.most * scale.gpus_per_worker}
    if all(free.get(kind, 0) >= amount for kind, amount in need.items()):
        return None
    return waiting("a trial needs", need, have, free, others)


def waiting(
    who: str, need: Mapping[str, float], have: Mapping[str, float], free: Mapping[str, float], others: Sequence[str]
) -> str:
    """The sentence: `who` "needs" what, how much of it is free, and which `others` are on the cluster."""
    wanted = " and ".join(f"{amount:g} {kind}s" for kind, amount in need.items() if amount)
    left = " and ".join(f"{free.get(kind, 0):g} of {have.get(kind, 0):g} {kind}s" for kind in need if need[kind])
    holders = f"other programs on the cluster: {', '.join(others)}" if others else "no other program is on the cluster"
    return f"waiting for room: {who} {wanted}, and {left} are free; {holders}. Ctrl-C stops, a second one at once"


def starving(progress: Callable[[], object]) -> Callable[[], str | None]:
    """A function that says what Ray has no room for, in a sentence; None where `progress` has changed meanwhile."""
    last: object = None

    def why() -> str | None:
        import ray

        nonlocal last
        before, last = last, progress()
        need = pending()
        if last != before or not need:
            return None
        who = "workers and Ray Data's tasks need"
        return waiting(who, need, ray.cluster_resources(), ray.available_resources(), other_programs())

    return why


def pending() -> Mapping[str, float]:
    """CPUs and GPUs of the tasks, actors and placement groups, of all programs, for which the cluster has no room."""
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    demands = get_cluster_status(ray.get_runtime_context().gcs_address).resource_demands
    need = Counter[str]()
    for demand in (*demands.placement_group_demand, *demands.ray_task_actor_demand):
        for request in demand.bundles_by_count:
            need.update({kind: request.bundle.get(kind, 0) * request.count for kind in ("CPU", "GPU")})
    return +need


def other_programs() -> list[str]:
    """The other drivers on the cluster: process, machine and the beginning of the command."""
    import ray
    from ray._private.state import state

    own = ray.get_runtime_context().get_job_id()
    return [
        f"process {job['DriverPid']} on {job['DriverIPAddress']} ({masked(job['Entrypoint'])[:SHOWN]})"
        for job in state.job_table()
        if not job["IsDead"] and job["JobID"] != own
    ]


@contextmanager
def telling(why: Callable[[], str | None], first: float = FIRST_S, again: float = AGAIN_S) -> Generator[None]:
    """While inside, print what `why` says when it has said so for `first` seconds, and then every `again` seconds."""
    ended = threading.Event()

    def look() -> None:
        due = time.monotonic() + first
        while not ended.wait(min(5.0, first)):
            try:
                reason = why()
            except Exception:  # The head or the store does not answer, which the run itself reports.
                reason = None
            if reason is None:
                due = time.monotonic() + first
            elif time.monotonic() >= due:
                print(reason, file=sys.stderr)
                due = time.monotonic() + again

    thread = threading.Thread(target=look, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
