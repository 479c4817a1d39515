"""Print a line on stderr while a run or a sweep waits for free resources on the cluster."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from minimind_ray.config.paths import masked
from minimind_ray.config.schema import ScaleConfig
from minimind_ray.data.background import in_background
from minimind_ray.on_ray.session import pending_resources
from minimind_ray.on_ray.versions import private_parts

FIRST_S, AGAIN_S = 60.0, 300.0
SHOWN = 80
"""Show so many characters of another program's command."""


def trial_needs(scale: ScaleConfig) -> dict[str, float]:
    """Return the CPUs and GPUs of a trial: its workers', and one CPU for Ray Data if there are several workers."""
    return {"CPU": scale.most * scale.cpus_per_worker + (scale.most > 1), "GPU": scale.most * scale.gpus_per_worker}


def wait_reason(who: str, need: Mapping[str, float]) -> str | None:
    """Return a sentence that says what `who` needs and waits for; None if enough CPUs and GPUs are free."""
    import ray

    free = ray.available_resources()
    if all(free.get(kind, 0) >= amount for kind, amount in need.items()):
        return None
    return format_wait_reason(who, need, ray.cluster_resources(), free, other_programs())


def rows_of(dataset: Any, who: str, need: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """Yield the dataset's rows. Print `wait_reason` while no row comes and the cluster has too few free resources."""
    came = looked = 0

    def why() -> str | None:
        nonlocal looked
        before, looked = looked, came
        return wait_reason(who, need) if looked == before else None

    with print_wait_reason(why):
        for row in dataset.iter_rows():
            came += 1
            yield row


def format_wait_reason(
    who: str,
    need: Mapping[str, float],
    have: Mapping[str, float],
    free: Mapping[str, float],
    others: Sequence[str] | None,
) -> str:
    """Return a sentence: what `who` needs, how much of it is free, and which `others` use the cluster, if known."""
    wanted = " and ".join(f"{amount:g} {kind}s" for kind, amount in need.items() if amount)
    left = " and ".join(f"{free.get(kind, 0):g} of {have.get(kind, 0):g} {kind}s" for kind in need if need[kind])
    holders = "; no other program is on the cluster" if others == [] else ""
    if others:
        holders = f"; other programs on the cluster: {', '.join(others)}"
    return f"waiting for room: {who} {wanted}, and {left} are free{holders}. Ctrl-C stops, a second one at once"


def workers_wait_reason() -> str | None:
    """Return a sentence that says what this driver's Ray Train runs wait for; None if all have their workers."""
    import ray

    if not (need := pending_resources()):
        return None
    who = "workers and Ray Data's tasks need"
    return format_wait_reason(who, need, ray.cluster_resources(), ray.available_resources(), other_programs())


def other_programs() -> list[str] | None:
    """Return the other drivers on the cluster: process, machine and the start of the command; None if unknown."""
    if not private_parts():
        return None
    from minimind_ray.on_ray.private_ray import other_jobs

    return [
        f"process {job.driver_pid} on {job.driver_address.ip_address} ({masked(job.entrypoint)[:SHOWN]})"
        for job in other_jobs()
    ]


@contextmanager
def print_wait_reason(why: Callable[[], str | None], first: float = FIRST_S, again: float = AGAIN_S) -> Generator[None]:
    """Inside, call `why` every few seconds, and print its sentence if it has returned one for `first` seconds.

    After that, print the sentence every `again` seconds, until `why` returns None.
    """

    def look(ended: threading.Event) -> None:
        due = time.monotonic() + first
        while not ended.wait(min(5.0, first)):
            try:
                reason = why()
            except Exception:  # The head or the store does not answer; the run itself reports this.
                reason = None
            if reason is None:
                due = time.monotonic() + first
            elif time.monotonic() >= due:
                print(reason, file=sys.stderr)
                due = time.monotonic() + again

    with in_background(look, "waiting"):
        yield
