"""Points that are found while a sweep runs: neighbours, for population based training, and Optuna's proposals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import Config
from minimind_ray.data.storage import copy_of
from minimind_ray.stages.run import Job
from minimind_ray.stages.start import effect
from minimind_ray.sweep.axes import Axis, Drawn, Grid, PlannedTrial, trial_at, trial_config, untried_point

MOVABLE = (
    "optim.lr", "optim.weight_decay", "optim.clip", "optim.beta1", "optim.beta2",
    "dpo.beta", "dpo.label_smoothing", "dpo.simpo_gamma", "lora.dropout",
)  # fmt: skip
RESAMPLE, FACTORS = 0.25, (0.8, 1.2)
STARTUP = 10
REPEATS = 10
"""Proposals in a row of points that were tried, after which an untried one is drawn."""


class Explorer:
    """A neighbour of a point (Jaderberg et al. 2017, "explore").

    A drawn number is multiplied by 0.8 or 1.2, a value of a grid gives way to the next or the one before; in one case
    of four the value is drawn anew.
    """

    def __init__(self, axes: Sequence[Axis], seed: int) -> None:
        if fixed := [axis.key for axis in axes if axis.key not in MOVABLE]:
            raise UserError(
                f"{fixed[0]} cannot change in the middle of a run, as pbt does with its axes; it can with: "
                f"{', '.join(MOVABLE)}"
            )
        if not axes:
            raise UserError("pbt needs an axis to move along, such as --lr 'log(1e-6,1e-4)'")
        self.axes = {axis.key: axis for axis in axes}
        self.keys = list(self.axes)
        self.rng = np.random.default_rng(seed)

    def __call__(self, point: dict[str, Any]) -> dict[str, Any]:
        """One move along every axis."""
        return {key: self._move(self.axes[key], value) for key, value in point.items()}

    def _move(self, axis: Axis, value: Any) -> Any:
        if self.rng.random() < RESAMPLE:
            return axis.draw(self.rng)
        if isinstance(axis, Drawn):
            return axis.nearest(value * self.rng.choice(FACTORS))
        place = axis.values.index(value) + self.rng.choice([-1, 1])
        return axis.values[min(max(place, 0), len(axis.values) - 1)]


class OptunaPoints:
    """Points that Optuna proposes from what came out so far (tree-structured Parzen estimator, Bergstra et al. 2011).

    A point's value is the mean over its seeds. `make` gives a planned trial its run directory and job; `known` are
    the points of a sweep that goes on, which come first. With several trials at once the proposals depend on which
    ends first. When Optuna keeps proposing points that were tried, the next one is drawn from the others. A point that
    differs from one that was tried only in settings without a use makes the same run, so it counts as tried.

    A point that cannot be run, because its config or its data are refused, is one of the `points`: `refuse` is called
    with the reason, and the next point comes.
    """

    def __init__(
        self,
        base: Config,
        axes: Sequence[Axis],
        *,
        points: int,
        seeds: int,
        maximize: bool,
        make: Callable[[PlannedTrial], Job],
        refuse: Callable[[dict[str, Any], str], object],
        known: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        optuna = import_optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.base, self.axes, self.seeds = base, {axis.key: axis for axis in axes}, seeds
        self.make, self.refuse = make, refuse
        self.points, self.count = points, points * seeds
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
        self.tried: set[str] = set()
        self.rng = np.random.default_rng(base.train.seed)

    @property
    def asked(self) -> int:
        """Points that were proposed so far, with those that could not be run."""
        return len(self.values)

    def ask(self) -> list[Job] | None:
        """The trials of the next point; None after the last, or when the axes hold no other."""
        while len(self.values) < self.points and (proposed := self._propose()):
            proposal, point = proposed
            self.values[proposal.number] = {}
            seeds = range(self.base.train.seed, self.base.train.seed + self.seeds)
            try:
                jobs = [self.make(trial_at(self.base, point, seed)) for seed in seeds]
            except UserError as error:
                # As bad as can be: Optuna learns to keep away, which it does not from a trial that failed.
                self.study.tell(proposal, state=_state("PRUNED"))
                self.refuse(point, str(error))
                continue
            self.proposals |= {copy_of(job.config.out): proposal for job in jobs}
            return jobs
        return None

    def _propose(self) -> tuple[Any, dict[str, Any]] | None:
        """Optuna's next proposal and its point, one that was not tried; None where the axes hold no other."""
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
        self.tried.add(self._effect(point))
        return proposal, point

    def _is_tried(self, point: dict[str, Any]) -> bool:
        return self._effect(point) in self.tried

    def _effect(self, point: dict[str, Any]) -> str:
        """The same for points whose runs are equal; of a point that cannot be run it is all of the point."""
        try:
            return repr(effect(trial_config(self.base, point, self.base.train.seed), point))
        except UserError:
            return repr(point)

    def tell(self, trial: Path, value: float | None) -> None:
        """A trial's metric; when all seeds of its point are in, Optuna learns the mean."""
        proposal = self.proposals[trial]
        values = self.values[proposal.number]
        values[trial] = value
        if len(values) == self.seeds:
            found = [v for v in values.values() if v is not None and math.isfinite(v)]
            if found:
                self.study.tell(proposal, sum(found) / len(found))
            else:
                self.study.tell(proposal, state=_state("FAIL"))


def import_optuna() -> Any:
    """Optuna.

    Raises:
        UserError: it is not installed.
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
    """A config's value from Optuna's; a grid's values go by their places."""
    return axis.values[value] if isinstance(axis, Grid) else axis.nearest(value)


def _inner(axis: Axis, value: Any) -> Any:
    return axis.values.index(value) if isinstance(axis, Grid) else value
