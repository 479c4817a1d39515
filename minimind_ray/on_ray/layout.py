"""How the trials of a sweep share a cluster: arithmetic without Ray.

A trial takes the CPUs and GPUs of its workers. With several workers it takes one CPU more for Ray Data's tasks. Trials
that are trained together in a group take what one trial takes. Processes that only wait for workers or for a group
take no CPU, so they cannot keep one from whom they wait for.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import ScaleConfig
from minimind_ray.on_ray.session import Machines


@dataclass(frozen=True)
class Layout:
    """Trials at once, and the groups of `size` trials that train them (0 groups: each trial has its own process)."""

    at_once: int
    groups: int
    size: int


def trials_that_fit(found: Machines, scale: ScaleConfig) -> int:
    """Return how many trials, or groups of trials, fit on the machines at the same time.

    Raises:
        UserError: not even one trial fits.
    """
    if scale.most == 1:
        fit = found.workers(scale)
    else:
        fit = next(n for n in count() if found.workers(scale, spare_cpus=n + 1) < (n + 1) * scale.most)
    if not fit:
        have, spare = found.resources(), " and 1 CPU beside" if scale.most > 1 else ""
        raise UserError(
            f"one trial needs {scale.most} worker(s) of {scale.cpus_per_worker:g} CPUs and {scale.gpus_per_worker:g} "
            f"GPUs{spare}, which the cluster's {have['CPU']:g} CPUs and {have['GPU']:g} GPUs on {found.most} node(s) "
            "cannot give; lower scale.workers, scale.cpus_per_worker or scale.gpus_per_worker, or add nodes"
        )
    return fit


def layout(places: int, count: int, *, fuse: int = 1, concurrent: int | None = None) -> Layout:
    """Distribute `count` trials over `places` concurrent trials or groups of up to `fuse` trials each.

    `concurrent` limits the number of trials at the same time.
    """
    at_once = min(places * fuse, concurrent or count, count)
    if fuse == 1:
        return Layout(at_once, 0, 1)
    size = -(-at_once // places)
    return Layout(at_once, -(-at_once // size), size)
