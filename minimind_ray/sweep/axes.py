"""Parse the axes of a sweep, and plan its trials: one trial for each point on the axes and each seed.

0.05,0.1,0.3      a grid: every value, in every combination with the other grids
log(1e-6,1e-4)    a drawn number, uniform in the logarithm
uniform(0,0.1)    a drawn number, uniform
int(1,64)         a drawn whole number, both bounds included
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel

from minimind_ray.config.errors import UserError
from minimind_ray.config.load import load_config, parse_value
from minimind_ray.config.reading import parse_yaml
from minimind_ray.config.schema import Config
from minimind_ray.data.shipped import resolve_paths
from minimind_ray.sweep.text import number_text, value_text

FORMS = "0.05,0.1 (a grid), log(1e-6,1e-4), uniform(0,0.1) or int(1,64)"
RESERVED = {
    "stage": "a sweep has one stage: start one sweep for each stage",
    "out": "every trial has its own directory under the sweep's",
    "train.seed": "repeat every point with --seeds instead",
    "scale": "every trial gets the same resources: --workers, --cpus-per-worker, --gpus-per-trial",
    "eval": "trials are compared on the same validation: set it for all trials",
    "data.val": "trials are compared on the same validation data",
    "data.val_fraction": "trials are compared on the same validation data",
    "data.cache_dir": "trials share prepared data",
    "data.direct_steps": "it does not change the trained model",
    "checkpoint": "it does not change the trained model",
    "generation": "it does not change the trained model",
    "track": "it does not change the trained model",
    "data.cache": "trials share prepared data",
}
"""Keys and whole sections that cannot be an axis, and the reason shown to the user."""


@dataclass(frozen=True)
class Grid:
    """An axis that tries each of its values."""

    key: str
    values: tuple[Any, ...]

    def to_json(self) -> list[Any]:
        """Return the list of values that stands for the axis in sweep.json."""
        return list(self.values)

    def draw(self, rng: np.random.Generator) -> Any:
        """Draw one of the values."""
        return self.values[rng.integers(len(self.values))]

    @property
    def choices(self) -> Sequence[Any]:
        """All values."""
        return self.values


@dataclass(frozen=True)
class Drawn:
    """A number drawn between two bounds."""

    key: str
    kind: Literal["log", "uniform", "int"]
    low: float
    high: float

    def to_json(self) -> str:
        """Return the text that stands for the axis in sweep.json. `parse_axis` reads it."""
        return f"{self.kind}({number_text(self.low)},{number_text(self.high)})"

    def draw(self, rng: np.random.Generator) -> float | int:
        """Draw a number."""
        if self.kind == "int":
            return int(rng.integers(int(self.low), int(self.high), endpoint=True))
        if self.kind == "log":
            return self.nearest(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))
        return self.nearest(rng.uniform(self.low, self.high))

    @property
    def choices(self) -> Sequence[int] | None:
        """All values; None if there are infinitely many."""
        return range(int(self.low), int(self.high) + 1) if self.kind == "int" else None

    def nearest(self, value: float) -> float | int:
        """Return `value`, moved into the bounds and rounded to 4 digits, so that tables show the exact value."""
        inside = min(max(float(f"{value:.4g}"), self.low), self.high)
        return round(inside) if self.kind == "int" else inside


Axis = Grid | Drawn


@dataclass(frozen=True)
class PlannedTrial:
    """A trial to start: its point on the axes, its seed, and the resulting config."""

    id: str
    point: dict[str, Any]
    seed: int
    config: Config


def parse_axis(key: str, spec: Any) -> Axis:
    """Parse the axis of a dotted config key. `spec` is a text (see the module's docstring), a list or a single value.

    Raises:
        UserError: the text has no known form, the bounds are wrong, or the key cannot be an axis.
    """
    if why := RESERVED.get(key) or RESERVED.get(key.split(".")[0]):
        raise UserError(f"{key} cannot be an axis: {why}")
    if not isinstance(spec, str):
        return _grid(key, spec if isinstance(spec, list) else [spec])
    if match := re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", spec):
        return _drawn(key, spec, match[1], match[2].split(","))
    try:
        # Parse as a YAML list, because a value may itself be a list: [q_proj, v_proj],all-linear
        values = parse_yaml(f"[{spec}]")
    except yaml.YAMLError:
        raise UserError(f"{key}={spec}: not an axis; expected {FORMS}") from None
    return _grid(key, values)


def parse_assignment(text: str) -> Axis:
    """Parse the text of an `--axis` flag, such as optim.weight_decay=0,0.1. Raises UserError."""
    key, separator, spec = text.partition("=")
    if not separator or not key.strip():
        raise UserError(f"--axis {text}: expected key=values, such as --axis optim.weight_decay=0,0.1")
    return parse_axis(key.strip(), spec)


def _grid(key: str, values: list[Any]) -> Grid:
    if not values or any(v is None or v == "" for v in values):
        raise UserError(f"{key}: an axis needs values; expected {FORMS}")
    if mapping := next((v for v in values if isinstance(v, dict)), None):
        raise UserError(f"{key}: {mapping} is a group of keys, not a value: make an axis of one of them")
    return Grid(key, tuple(values))


def _drawn(key: str, spec: str, kind: str, bounds: list[str]) -> Drawn:
    values = [parse_value(bound) for bound in bounds]
    if len(values) != 2 or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        raise UserError(f"{key}={spec}: expected two numbers, such as {kind}(1,2)")
    low, high = map(float, values)
    if kind == "log" or kind == "uniform" or kind == "int":
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise UserError(f"{key}={spec}: the first bound must be less than the second, and both finite")
        if kind == "log" and low <= 0:
            raise UserError(f"{key}={spec}: the bounds of log must be above 0; use uniform for a range with 0 in it")
        if kind == "int" and not (low.is_integer() and high.is_integer()):
            raise UserError(f"{key}={spec}: the bounds of int must be whole numbers")
        return Drawn(key, kind, low, high)
    raise UserError(f"{key}={spec}: {kind} is not a kind of axis; expected {FORMS}")


def plan_trials(
    base: Config, axes: Sequence[Axis], *, draws: int | None = None, seeds: int = 1, sweep_seed: int = 0
) -> list[PlannedTrial]:
    """Plan and check every trial of a sweep, in a fixed order: all points with the first seed, then with the next.

    `draws` points are drawn on the drawn axes, and each is combined with every combination of grid values. A draw
    depends only on `sweep_seed` and the axis's key, so another axis or more draws do not change earlier draws. The
    seeds are `base.train.seed` and the numbers after it.

    Raises:
        UserError: a key is unknown, the config refuses a value, a key or value is given twice, drawn axes come without
            `draws`, or `draws` without drawn axes.
    """
    keys = [axis.key for axis in axes]
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: at least 1 seed is needed")
    drawn = [axis for axis in axes if isinstance(axis, Drawn)]
    if drawn and (draws is None or draws < 1):
        raise UserError(f"{drawn[0].key}={drawn[0].to_json()} is a drawn axis: give the number of draws by --trials")
    if draws is not None and not drawn:
        raise UserError("--trials needs a drawn axis, such as --lr 'log(1e-6,1e-4)'; a grid sets its own number")
    check_axes(base, axes)
    grids = [[(axis.key, value) for value in axis.values] for axis in axes if isinstance(axis, Grid)]
    rows = draw_points(drawn, draws or 0, sweep_seed) if drawn else [{}]
    combinations = [{**dict(grid), **row} for grid in itertools.product(*grids) for row in rows]
    trials: dict[str, PlannedTrial] = {}
    for seed in range(base.train.seed, base.train.seed + seeds):
        for values in combinations:
            trial = trial_at(base, {key: values[key] for key in keys}, seed)
            if trial.id in trials:
                raise UserError(f"the axes give the trial {trial.id} twice: leave the repeated value out")
            trials[trial.id] = trial
    return list(trials.values())


def check_axes(base: Config, axes: Sequence[Axis]) -> None:
    """Check that each grid value and each bound of a drawn axis is valid with some values of the other axes.

    Raises:
        UserError: the config refuses a value, or a key or value is given twice.
    """
    keys = [axis.key for axis in axes]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise UserError(f"{', '.join(sorted(twice))}: given as an axis twice; leave one out")
    rng = np.random.default_rng(base.train.seed)
    for axis in axes:
        values = axis.values if isinstance(axis, Grid) else map(axis.nearest, (axis.low, axis.high))
        found = [repr(_possible_value(base, axes, axis.key, value, rng)) for value in values]
        if twice := {value for value in found if found.count(value) > 1}:
            raise UserError(f"{axis.key}: the axis has {', '.join(sorted(twice))} twice; leave one out")


def _possible_value(base: Config, axes: Sequence[Axis], key: str, value: Any, rng: np.random.Generator) -> Any:
    """Return the value after parsing by the config. Raises UserError if the config refuses ATTEMPTS points with it."""
    try:
        return setting(trial_config(base, {key: value}, base.train.seed), key)
    except UserError as error:
        for _ in range(ATTEMPTS):
            with suppress(UserError):
                point = {axis.key: axis.draw(rng) for axis in axes} | {key: value}
                return setting(trial_config(base, point, base.train.seed), key)
        raise error from None


ATTEMPTS = 20


def points_on(axes: Sequence[Axis]) -> float:
    """Return the number of points on the axes; infinity if an axis has infinitely many values."""
    return math.prod(math.inf if axis.choices is None else len(axis.choices) for axis in axes)


def all_points(axes: Sequence[Axis]) -> Iterator[dict[str, Any]]:
    """Every point on axes with finitely many points."""
    for values in itertools.product(*(axis.choices or () for axis in axes)):
        yield {axis.key: value for axis, value in zip(axes, values)}


def untried_point(
    axes: Sequence[Axis], tried: Callable[[dict[str, Any]], bool], rng: np.random.Generator
) -> dict[str, Any] | None:
    """Draw a point that was not `tried`; None if every point was tried."""
    drawn = ({axis.key: axis.draw(rng) for axis in axes} for _ in range(DRAWS))
    rest = all_points(axes) if math.isfinite(points_on(axes)) else ()
    return next((point for point in itertools.chain(drawn, rest) if not tried(point)), None)


DRAWS = 200


def trial_at(base: Config, values: Mapping[str, Any], seed: int) -> PlannedTrial:
    """Return the trial at a point. `values` are in the order of the axes. Raises as `trial_config`."""
    config = trial_config(base, values, seed)
    point = {key: setting(config, key) for key in values}
    return PlannedTrial(trial_id(point, seed), point, seed, resolve_paths(config))  # Trials run in other directories.


def draw_points(axes: Sequence[Drawn], count: int, sweep_seed: int) -> list[dict[str, Any]]:
    """Draw `count` different points, each coordinate independently (random search, Bergstra & Bengio 2012).

    Raises:
        UserError: the axes have fewer points.
    """
    streams = [_draws(axis, sweep_seed) for axis in axes]
    points: dict[tuple[Any, ...], None] = {}
    for values in itertools.islice(zip(*streams), 1000 * count):
        points[values] = None
        if len(points) == count:
            return [dict(zip((axis.key for axis in axes), values)) for values in points]
    raise UserError(f"--trials {count}: the axes have only {len(points)} different points; ask for fewer or use a grid")


def _draws(axis: Drawn, sweep_seed: int) -> Iterator[float | int]:
    digest = hashlib.blake2b(f"{sweep_seed}/{axis.key}".encode(), digest_size=8).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "big"))
    while True:
        yield axis.draw(rng)


def trial_config(base: Config, point: Mapping[str, Any], seed: int) -> Config:
    """Return the complete, checked config of a point.

    Raises:
        UserError: see `load_config` and `Config.packs_per_step`.
    """
    config = load_config(base.stage, overrides={**base.model_dump(), **point, "train.seed": seed})
    config.packs_per_step()
    return config


def setting(config: Config, key: str) -> Any:
    """Return the value of a dotted key, in a form that JSON can hold."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return a short name for each dotted key.

    The name is the key's last part (`schedule` for `schedule.name`), or the whole key if two keys had the same name.
    """
    short = {key: key.split(".")[-2 if key.endswith(".name") else -1] for key in keys}
    names = list(short.values())
    return {key: name if names.count(name) == 1 and name != "seed" else key for key, name in short.items()}


def trial_id(point: Mapping[str, Any], seed: int) -> str:
    """Return a file name that shows the point and the seed: beta=0.05,lr=1e-5,seed=0."""
    labels = short_names(list(point))
    name = ",".join(f"{labels[key]}={_file_safe(value_text(value), 40)}" for key, value in point.items())
    return _file_safe(f"{name},seed={seed}".lstrip(","), 200, also=",=")


def _file_safe(text: str, longest: int, also: str = "") -> str:
    safe = re.sub(f"[^A-Za-z0-9.+_{also}-]", "-", text)[:longest]
    # Different texts must not become the same name.
    return safe if safe == text else f"{safe}-{hashlib.blake2b(text.encode(), digest_size=3).hexdigest()}"
