"""Reserve all CPUs and GPUs of a Ray Train run at once, with the CPUs of Ray Data's tasks.

Ray Data's tasks run inside the run's own placement group. So a run with workers has everything it needs, and a waiting
run holds nothing. Any number of runs and sweeps can share a cluster without a deadlock.

Without private parts of Ray (see versions.py), Ray Train makes the workers' placement group itself. Then the run
first waits for a group with all its resources. It replaces this group by a group with only Ray Data's CPUs, and Ray
Train reserves the workers' resources again. Another program may take them in between. So Ray Train waits only
START_SECONDS; after that the run frees everything and waits again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import ray
import ray.train
from ray.data import DataContext, ExecutionOptions, ExecutionResources
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import ScaleConfig
from minimind_ray.on_ray.session import group_name, worker_resources
from minimind_ray.on_ray.versions import private_parts

LOOK_SECONDS = 0.1
START_SECONDS = 60.0
"""Time for workers to start on resources that were free a moment ago."""
SWAP_SECONDS = 5.0
"""Time for Ray to remove the first group and to make the group of Ray Data's CPUs."""


class StoppedError(UserError):
    """The run was asked to stop before it had workers, so it cannot finish a step."""


class NoRoomError(Exception):
    """The cluster had no free resources in time."""


NO_ROOM = "stopped while there was no room for the workers; --resume waits for room again"


@dataclass(frozen=True)
class Reservation:
    """A placement group with a bundle for each worker, followed by `data_cpus` bundles of 1 CPU for Ray Data.

    If Ray Train makes the workers' placement group itself, the workers' bundles are missing here.
    """

    group: PlacementGroup
    data_cpus: int

    def broken(self) -> bool:
        """Whether a node of the group is lost. Then the group waits for new resources, which others may hold."""
        return _state(self.group) == "RESCHEDULING"

    def data_config(self) -> ray.train.DataConfig:
        """Return a config that limits Ray Data to its CPUs; with more tasks, tasks would wait for each other."""
        limits = ExecutionResources(cpu=self.data_cpus)
        return ray.train.DataConfig(
            execution_options=ExecutionOptions(preserve_order=True, resource_limits=limits, verbose_progress=False)
        )

    def dataset(self, make: Callable[[], ray.data.Dataset]) -> ray.data.Dataset:
        """Return the dataset of `make`, with all its tasks in the placement group."""
        context = deepcopy(DataContext.get_current())
        # Tasks may use any bundle of the group; only Ray Data's bundles have free CPUs. Set the attributes through
        # `vars`, because assigning them prints a deprecation warning of Ray.
        strategy = PlacementGroupSchedulingStrategy(self.group)
        vars(context).update(scheduling_strategy=strategy, scheduling_strategy_large_args=strategy)
        with DataContext.current(context):
            return make()


@contextmanager
def reserved(
    scale: ScaleConfig, workers: int, data_cpus: int, stopped: Callable[[], bool], seconds: float
) -> Generator[Reservation]:
    """Inside, reserve the CPUs and GPUs of `workers` workers, and `data_cpus` CPUs for Ray Data's tasks.

    Raises:
        StoppedError: `stopped` returned true while the reservation waited.
        NoRoomError: the resources were not free within `seconds`.
    """
    data_bundles = [{"CPU": 1.0}] * data_cpus
    with _made([worker_resources(scale)] * workers + data_bundles) as group:
        _wait(group, workers, stopped, seconds)
        if private_parts():
            yield Reservation(group, data_cpus)
            return
    if not data_cpus:
        yield Reservation(group, 0)
        return
    with _made(data_bundles) as group:
        _wait(group, workers, stopped, SWAP_SECONDS)
        yield Reservation(group, data_cpus)


@contextmanager
def _made(bundles: list[dict[str, float]]) -> Generator[PlacementGroup]:
    """Give a placement group, and remove it at the end. Its resources may not be reserved yet."""
    group = placement_group(bundles, name=group_name())
    try:
        yield group
    finally:
        if ray.is_initialized():
            remove_placement_group(group)


def _wait(group: PlacementGroup, workers: int, stopped: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    # Do not use `group.wait`: each call that times out leaks memory in Ray's head, some megabytes per second.
    while _state(group) != "CREATED":
        if stopped():
            raise StoppedError(NO_ROOM)
        if time.monotonic() > deadline:
            raise NoRoomError(f"{workers} worker(s) could not be started in time")
        time.sleep(LOOK_SECONDS)


def _state(group: PlacementGroup) -> str:
    return placement_group_table(group)["state"]
