"""Choose points while a sweep runs: neighbours for population based training (pbt), and the proposals of Optuna."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minimind_ray.config.errors import UserError
from minimind_ray.config.flags import movable_keys
from minimind_ray.config.schema import Config
from minimind_ray.data.storage import copy_of
from minimind_ray.stages.run import Job
from minimind_ray.stages.start import effect
from minimind_ray.sweep.axes import (
    Axis,
    Drawn,
    Grid,
    PlannedTrial,
    all_points,
    points_on,
    trial_at,
    trial_config,
    untried_point,
)

RESAMPLE, FACTORS = 0.25, (0.8, 1.2)
STARTUP = 10
REPEATS = 10
"""After this many proposals in a row of points that were already tried, an untried point is drawn at random."""
COMPARED = 1000
"""On axes with more points than this, `count_points` does not compare the points."""


class Explorer:
    """Moves a point to a neighbour (Jaderberg et al. 2017, "explore").

    On a drawn axis, multiplies the number by 0.8 or 1.2. On a grid, takes the next or the previous value. In one case
    of four, draws a new value instead.
    """

    def __init__(self, axes: Sequence[Axis], seed: int) -> None:
        if fixed := [axis.key for axis in axes if axis.key not in movable_keys()]:
            raise UserError(
                f"{fixed[0]} cannot be an axis with pbt, which changes its axes in the middle of a run; possible axes: "
                f"{', '.join(movable_keys())}"
            )
        if not axes:
            raise UserError("pbt needs an axis to move along, such as --lr 'log(1e-6,1e-4)'")
        self.axes = {axis.key: axis for axis in axes}
        self.keys = list(self.axes)
        self.rng = np.random.default_rng(seed)

    def __call__(self, point: dict[str, Any]) -> dict[str, Any]:
        """Return the point after one move along every axis."""
        return {key: self._move(self.axes[key], value) for key, value in point.items()}

    def _move(self, axis: Axis, value: Any) -> Any:
        if self.rng.random() < RESAMPLE:
            return axis.draw(self.rng)
        if isinstance(axis, Drawn):
            return axis.nearest(value * self.rng.choice(FACTORS))
        place = axis.values.index(value) + self.rng.choice([-1, 1])
        return axis.values[min(max(place, 0), len(axis.values) - 1)]


class OptunaPoints:
    """Points that Optuna proposes from the results so far (tree-structured Parzen estimator, Bergstra et al. 2011).

    `seeds` returns the number of seeds of a point, `count` is the number of all trials. A point's value is the mean
    over its seeds. `make` makes the run directory and job of a planned trial. `known` are
    the points of a resumed sweep; they come first. With several trials at once, the proposals depend on the order in
    which the trials end.

    If Optuna repeatedly proposes points that were tried, the next point is drawn from the untried points. A point also
    counts as tried if it differs from a tried point only in settings without effect, because its run would be the same.

    A point that cannot be run, because its config or data are refused, counts towards `points`: `refuse` is called with
    the reason, and the next point is proposed.
    """

    def __init__(
        self,
        base: Config,
        axes: Sequence[Axis],
        *,
        points: int,
        seeds: Callable[[dict[str, Any]], int],
        count: int,
        maximize: bool,
        make: Callable[[PlannedTrial], Job],
        refuse: Callable[[dict[str, Any], str], object],
        known: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        optuna = import_optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.base, self.axes, self.seeds = base, {axis.key: axis for axis in axes}, seeds
        self.make, self.refuse = make, refuse
        self.points, self.count = points, count
        self.distributions = {axis.key: _distribution(axis) for axis in axes}
        self.study = optuna.create_study(
            direction="maximize" if maximize else "minimize",
            sampler=optuna.samplers.TPESampler(
                seed=base.train.seed, n_startup_trials=min(STARTUP, max(2, points // 3)), constant_liar=True
            ),
        )
        for point in known:
            self.study.enqueue_trial({key: _inner(self.axes[key], value) for key, value in point.items()})
        self.proposals: dict[Path, Any] = {}
        self.values: dict[int, dict[Path, float | None]] = {}
        self.expected: dict[int, int] = {}
        self.tried: set[str] = set()
        self.rng = np.random.default_rng(base.train.seed)

    @property
    def asked(self) -> int:
        """The number of points proposed so far, including points that could not be run."""
        return len(self.values)

    def ask(self) -> list[Job] | None:
        """Return the jobs of the next point; None after the last point, or if every point on the axes was tried."""
        while len(self.values) < self.points and (proposed := self._propose()):
            proposal, point = proposed
            self.values[proposal.number] = {}
            self.expected[proposal.number] = self.seeds(point)
            seeds = range(self.base.train.seed, self.base.train.seed + self.seeds(point))
            try:
                jobs = [self.make(trial_at(self.base, point, seed)) for seed in seeds]
            except UserError as error:
                # Report the point as pruned, so that Optuna avoids it. Optuna learns nothing from a failed trial.
                self.study.tell(proposal, state=_state("PRUNED"))
                self.refuse(point, str(error))
                continue
            self.proposals |= {copy_of(job.config.out): proposal for job in jobs}
            return jobs
        return None

    def _propose(self) -> tuple[Any, dict[str, Any]] | None:
        """Return the next proposal and its untried point; None if every point on the axes was tried."""
        for _ in range(REPEATS):
            proposal = self.study.ask(self.distributions)
            point = {key: _outer(axis, proposal.params[key]) for key, axis in self.axes.items()}
            if not self._is_tried(point):
                break
            self.study.tell(proposal, state=_state("FAIL"))
        else:
            point = untried_point(list(self.axes.values()), self._is_tried, self.rng)
            if point is None:
                return None
            self.study.enqueue_trial({key: _inner(self.axes[key], value) for key, value in point.items()})
            proposal = self.study.ask(self.distributions)
        self.tried.add(run_key(self.base, point))
        return proposal, point

    def _is_tried(self, point: dict[str, Any]) -> bool:
        return run_key(self.base, point) in self.tried

    def tell(self, trial: Path, value: float | None) -> None:
        """Report a trial's metric. Once all seeds of its point have reported, Optuna gets their mean."""
        proposal = self.proposals[trial]
        values = self.values[proposal.number]
        values[trial] = value
        if len(values) == self.expected[proposal.number]:
            found = [v for v in values.values() if v is not None and math.isfinite(v)]
            if found:
                self.study.tell(proposal, sum(found) / len(found))
            else:
                self.study.tell(proposal, state=_state("FAIL"))


def count_points(base: Config, axes: Sequence[Axis], most: int) -> int:
    """The number of points on the axes with different runs, counted up to `most`.

    On axes with more than COMPARED points it counts all of them: a comparison would take seconds.
    """
    if (size := points_on(axes)) > COMPARED:
        return int(min(most, size))
    found = set[str]()
    for point in all_points(axes):
        if len(found) == most:
            break
        found.add(run_key(base, point))
    return len(found)


def run_key(base: Config, point: Mapping[str, Any]) -> str:
    """Return a key that is equal for points with equal runs. For a point that cannot be run, it is the whole point."""
    try:
        return repr(effect(trial_config(base, point, base.train.seed), point))
    except UserError:
        return repr(point)


def import_optuna() -> Any:
    """Import the package optuna and return it.

    Raises:
        UserError: optuna is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise UserError("searcher optuna is not installed: pip install 'minimind-ray[optuna]'") from None
    return optuna


def _state(name: str) -> Any:
    return import_optuna().trial.TrialState[name]


def _distribution(axis: Axis) -> Any:
    d = import_optuna().distributions
    if isinstance(axis, Grid):
        return d.CategoricalDistribution(range(len(axis.values)))
    if axis.kind == "int":
        return d.IntDistribution(int(axis.low), int(axis.high))
    return d.FloatDistribution(axis.low, axis.high, log=axis.kind == "log")


def _outer(axis: Axis, value: Any) -> Any:
    """Return the config's value for Optuna's value. For a grid, Optuna's value is the index."""
    return axis.values[value] if isinstance(axis, Grid) else axis.nearest(value)


def _inner(axis: Axis, value: Any) -> Any:
    return axis.values.index(value) if isinstance(axis, Grid) else value
