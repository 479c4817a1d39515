"""How the trials of a sweep share a cluster: arithmetic without Ray.

A trial takes the CPUs and GPUs of its workers. With several workers it takes one more CPU, for Ray Data's tasks. All
trials of a group together take the resources of one trial. A process that only waits for workers or for a group takes
no CPU, so it cannot block the processes that it waits for.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import ScaleConfig
from minimind_ray.on_ray.session import Machines


@dataclass(frozen=True)
class Layout:
    """The maximum number of trials `at_once`, and the number of `groups` that each train up to `size` trials together.

    With 0 groups, each trial has its own process.
    """

    at_once: int
    groups: int
    size: int

    @property
    def places(self) -> int:
        """The number of places. A place is the resources of a trial, or of a group of trials that share a process."""
        return self.groups or self.at_once


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
        have, spare = found.resources(), " and 1 more CPU" if scale.most > 1 else ""
        raise UserError(
            f"one trial needs {scale.most} worker(s) of {scale.cpus_per_worker:g} CPUs and {scale.gpus_per_worker:g} "
            f"GPUs{spare}, which the cluster's {have['CPU']:g} CPUs and {have['GPU']:g} GPUs on {found.most} node(s) "
            "cannot give; lower scale.workers, scale.cpus_per_worker or scale.gpus_per_worker, or add nodes"
        )
    return fit


def layout(fitting: int, count: int, *, fuse: int = 1, concurrent: int | None = None) -> Layout:
    """Distribute `count` trials over the cluster, where `fitting` trials or groups fit at the same time.

    With `fuse` above 1, up to `fuse` trials form a group. `concurrent` limits the number of trials at the same time.
    """
    at_once = min(fitting * fuse, concurrent or count, count)
    if fuse == 1:
        return Layout(at_once, 0, 1)
    size = -(-at_once // fitting)
    return Layout(at_once, -(-at_once // size), size)
