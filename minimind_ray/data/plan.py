"""Decide which packs each worker reads in each optimizer step.

A `Plan` says how many steps there are; a `StepSource` gives a worker its packs of each step. `StepPlan` is a pure
function of the prepared data, the seed and the config. The step number alone is therefore the position in the data: a
resumed run, a run with more workers and a run on another host read the same packs in the same step, and an epoch reads
each pack exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from minimind_ray.data.pack import Pack
from minimind_ray.data.store import PackStore, epoch_order


class Plan(Protocol):
    """How many steps and packs a run has, and which epoch a step belongs to."""

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
        """Packs in one pass over the data; None if unknown."""
        ...

    def epoch(self, step: int) -> int | None:
        """Return the epoch that `step` belongs to, from 0; None if unknown."""
        ...


class StepSource(Protocol):
    """Yields one worker's packs of each step."""

    @property
    def prefetch(self) -> bool:
        """Whether a step's packs can be made during the previous step. False if they depend on the weights."""
        ...

    def steps(self, start: int, /) -> Iterator[list[Pack]]:
        """Yield this worker's packs of each step from `start` on."""
        ...


@dataclass(frozen=True)
class PackSource:
    """A step source whose packs do not depend on the weights. See `StepSource` for `steps`."""

    steps: Callable[[int], Iterator[list[Pack]]]
    prefetch: bool = True


@dataclass(frozen=True)
class TrainingData:
    """The data that a host gives to a stage: the plan, this worker's source of packs, and the validation packs.

    `base` is the directory of the model that the run starts from.
    """

    plan: Plan
    source: StepSource
    val: PackStore | None
    base: Path | None = None


@dataclass(frozen=True)
class StepPlan:
    """Steps of `packs_per_step` packs each; the last step of an epoch may have fewer.

    `row_groups` are the numbers of packs in each row group of the prepared data.
    """

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
        """Optimizer steps of the run. If `max_steps` is given, it decides, and `epochs` has no effect."""
        return self.steps_per_epoch * self.epochs if self.max_steps is None else self.max_steps

    def epoch(self, step: int) -> int:
        """Return the epoch that `step` belongs to, from 0."""
        return step // self.steps_per_epoch

    def ids(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Return the ids of the packs that worker `rank` of `world_size` trains on in `step`, int64 [packs].

        May be empty in an epoch's last step.
        """
        epoch, at = divmod(step, self.steps_per_epoch)
        order = _order(self.row_groups, self.seed, epoch)
        return order[at * self.packs_per_step : (at + 1) * self.packs_per_step][rank::world_size]


@lru_cache(maxsize=2)
def _order(row_groups: tuple[int, ...], seed: int, epoch: int) -> np.ndarray:
    return epoch_order(row_groups, seed, epoch)


def read_steps(
    store: PackStore, plan: StepPlan, start: int, rank: int = 0, world_size: int = 1
) -> Iterator[list[Pack]]:
    """Yield this rank's packs of each step from `start` on, read from the prepared data without Ray Data."""
    for step in range(start, plan.steps):
        yield store.read(plan.ids(step, rank, world_size).tolist())
