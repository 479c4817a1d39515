"""Which packs each optimizer step reads, on which worker.

A pure function of the prepared data, the seed and the config, so the position in the data is one number, the step:
a resumed run, a run with another number of workers and a run on another host read the same packs in the same steps,
each pack of an epoch exactly once. A `StepSource` gives a worker its packs of each step, for a `Plan` of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from minimind_ray.data.pack import Pack
from minimind_ray.data.store import PackStore, epoch_order


class Plan(Protocol):
    """How many steps and packs there are, and which epoch (from 0) a step belongs to, where that is known."""

    @property
    def packs_per_step(self) -> int:
        """Packs of one optimizer step, over all workers."""
        ...

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        ...

    @property
    def packs_per_epoch(self) -> int | None:
        """Packs in one pass over the data."""
        ...

    def epoch(self, step: int) -> int | None:
        """The epoch of `step`."""
        ...


class StepSource(Protocol):
    """Where one worker's packs of each step come from."""

    @property
    def prefetch(self) -> bool:
        """Whether a step's packs can be made while the step before is trained; not where they depend on the weights."""
        ...

    def steps(self, start: int, /) -> Iterator[list[Pack]]:
        """This worker's packs of each step from `start` on."""
        ...


@dataclass(frozen=True)
class PackSource:
    """A step source whose packs do not depend on the weights. `steps` is as in `StepSource`."""

    steps: Callable[[int], Iterator[list[Pack]]]
    prefetch: bool = True


@dataclass(frozen=True)
class TrainingData:
    """What a host hands a stage: the plan, where this worker's packs come from, and the validation packs."""

    plan: Plan
    source: StepSource
    val: PackStore | None


@dataclass(frozen=True)
class StepPlan:
    """Steps over the packs of `row_groups`, `packs_per_step` at a time; an epoch's last step takes what is left."""

    row_groups: tuple[int, ...]
    packs_per_step: int
    epochs: int
    seed: int
    max_steps: int | None = None

    @property
    def packs_per_epoch(self) -> int:
        """Packs in one pass over the data."""
        return sum(self.row_groups)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        return -(-self.packs_per_epoch // self.packs_per_step)

    @property
    def steps(self) -> int:
        """Optimizer steps of the run. With max_steps alone deciding, epochs go on as long as it takes."""
        return self.steps_per_epoch * self.epochs if self.max_steps is None else self.max_steps

    def epoch(self, step: int) -> int:
        """The epoch that `step` belongs to, from 0."""
        return step // self.steps_per_epoch

    def ids(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Packs that `rank` of `world_size` workers trains on in `step`; may be empty in an epoch's last step."""
        epoch, at = divmod(step, self.steps_per_epoch)
        order = _order(self.row_groups, self.seed, epoch)
        return order[at * self.packs_per_step : (at + 1) * self.packs_per_step][rank::world_size]


@lru_cache(maxsize=2)
def _order(row_groups: tuple[int, ...], seed: int, epoch: int) -> np.ndarray:
    return epoch_order(row_groups, seed, epoch)


def read_steps(
    store: PackStore, plan: StepPlan, start: int, rank: int = 0, world_size: int = 1
) -> Iterator[list[Pack]]:
    """This rank's packs of each step from `start` on, read straight from the prepared data."""
    for step in range(start, plan.steps):
        yield store.read(plan.ids(step, rank, world_size).tolist())
