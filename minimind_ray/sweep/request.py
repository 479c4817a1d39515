"""Combine a user's request for a sweep (a YAML file, settings, axes, search options) into a checked plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minimind_ray.config.cluster import read_cluster
from minimind_ray.config.errors import UserError
from minimind_ray.config.flags import config_flags
from minimind_ray.config.load import load_config
from minimind_ray.config.schema import ScaleConfig
from minimind_ray.config.search import SearchConfig, SweepFile, read_sweep_file, search_config
from minimind_ray.config.stages import STAGES, one_of
from minimind_ray.sweep.axes import Axis, Grid, parse_axis
from minimind_ray.sweep.plan import SweepPlan, plan_sweep


@dataclass(frozen=True)
class SweepRequest:
    """A request for a sweep. The other fields override `file`; an axis overrides the file's axis of the same key.

    `file` is the sweep's YAML file. `config` are YAML files with the stage's settings; `trees` are such settings as
    mappings, each under a name for error messages. `settings` are values by dotted config key. `search` has fields of
    `SearchConfig`, whose `price_per_hour` may also be a cluster file. `out` is the sweep's directory, sweeps/STAGE by
    default.
    """

    stage: str | None = None
    file: str | Path | None = None
    config: Sequence[str | Path] = ()
    trees: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    axes: Sequence[Axis] = ()
    search: Mapping[str, Any] = field(default_factory=dict)
    out: str | None = None
    gpus_per_trial: float | None = None

    def plan(self) -> SweepPlan:
        """Return the checked plan.

        Raises:
            UserError: the stage is missing or given twice, or a key is given twice; also as `plan_sweep`.
        """
        self._check_axes()
        file = read_sweep_file(self.file) if self.file else None
        if file and self.stage not in (None, file.stage):
            raise UserError(f"{self.file} is a sweep of {file.stage}, not of {self.stage}")
        stage = file.stage if file else self.stage
        if stage is None:
            raise UserError(f"no stage given: give {one_of(STAGES)}, or a --sweep file with a stage")
        trees = {**({str(self.file): file.settings} if file else {}), **self.trees}
        settings = dict(self.settings)
        base = load_config(stage, self.config, settings, trees)
        if self.gpus_per_trial is not None:
            settings["scale.gpus_per_worker"] = self.gpus_per_trial / base.scale.most
            base = load_config(stage, self.config, settings, trees)
        search = {**_search_of(file), **self.search}
        if price := self.search.get("price_per_hour"):
            search["price_per_hour"] = trial_price(str(price), base.scale)
        return plan_sweep(self.out or f"sweeps/{stage}", base, self._axes_with(file, settings), search_config(search))

    def _check_axes(self) -> None:
        keys = [axis.key for axis in self.axes]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise UserError(f"{twice[0]}: given as an axis twice; leave one out")
        if both := [key for key in keys if key in self.settings]:
            raise UserError(f"{both[0]}: given as a single value and as an axis; leave one out")

    def _axes_with(self, file: SweepFile | None, settings: Mapping[str, Any]) -> list[Axis]:
        axes = {key: parse_axis(key, spec) for key, spec in file.axes.items()} if file else {}
        axes |= {axis.key: axis for axis in self.axes}
        # A single value replaces the file's axis.
        return [axis for key, axis in axes.items() if key not in settings]


def settings_and_axes(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[Axis]]:
    """Split the values of flags (by their names in Python) into single values by dotted config key, and axes.

    A flag that a sweep can vary takes a list, or a text for `parse_axis`; a single value makes no axis. Ignores names
    that are not flags.
    """
    settings, axes = dict[str, Any](), list[Axis]()
    for name, found in config_flags().items():
        if name not in given or name == "out":
            continue
        axis = parse_axis(found.key, given[name]) if found.flag.vary else None
        if axis is None:
            settings[found.key] = found.value(given[name])
        elif isinstance(axis, Grid) and len(axis.values) == 1:
            settings[found.key] = axis.values[0]
        else:
            axes.append(axis)
    return settings, axes


def _search_of(file: SweepFile | None) -> dict[str, Any]:
    if file is None:
        return {}
    return {name: getattr(file, name) for name in SearchConfig.model_fields if name in file.model_fields_set}


def trial_price(text: str, scale: ScaleConfig) -> float:
    """Return the price of a trial in USD an hour. `text` is a number, or a cluster file with prices of its machines.

    Raises:
        UserError: `text` is neither, or no machine of the file has a price and is large enough for a worker.
    """
    try:
        return float(text)
    except ValueError:
        pass
    if not Path(text).is_file():
        raise UserError(f"--price-per-hour {text}: neither a number nor a cluster file")
    if (found := read_cluster(text).trial_price(scale)) is None:
        raise UserError(
            f"{text}: no node type with a price is large enough for a worker of {scale.cpus_per_worker:g} CPUs and "
            f"{scale.gpus_per_worker:g} GPUs; set metadata.price_per_hour"
        )
    return found[0]
