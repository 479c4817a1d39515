"""Points found while a sweep runs, on functions whose best point is known."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minimind_ray.config.load import load_config
from minimind_ray.sweep.axes import parse_axis
from minimind_ray.sweep.searchers import Explorer, OptunaPoints

pytestmark = pytest.mark.unit


def test_neighbours_stay_on_their_axes() -> None:
    explore = Explorer([parse_axis("optim.lr", "log(1e-5,1e-3)"), parse_axis("dpo.beta", "0.05,0.1,0.3")], seed=0)
    point = {"optim.lr": 1e-4, "dpo.beta": 0.1}
    points = [explore(point) for _ in range(200)]
    assert {p["dpo.beta"] for p in points} == {0.05, 0.1, 0.3}
    factors = [p["optim.lr"] / 1e-4 for p in points]
    assert 0.6 < sum(math.isclose(f, 0.8) or math.isclose(f, 1.2) for f in factors) / 200 < 0.9
    for _ in range(200):
        point = explore(point)
        assert 1e-5 <= point["optim.lr"] <= 1e-3
    axes = list(explore.axes.values())
    assert Explorer(axes, 3)(point) == Explorer(axes, 3)(point)


class Made:
    """Trials that are only written down."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.trials: list[Any] = []

    def __call__(self, trial: Any) -> Any:
        self.trials.append(trial)
        return SimpleNamespace(config=trial.config.model_copy(update={"out": str(self.directory / trial.id)}))


def searched(
    tmp_path: Path, specs: dict[str, Any], value: Any, seed: int = 0, **options: Any
) -> tuple[list[Any], OptunaPoints]:
    made = Made(tmp_path)
    points = OptunaPoints(
        load_config("dpo", overrides={"train.seed": seed}), [parse_axis(k, v) for k, v in specs.items()],
        **{"points": 30, "seeds": 1, "maximize": False, "make": made, **options},
    )  # fmt: skip
    while jobs := points.ask():
        for job in jobs:
            points.tell(Path(job.config.out), value(job.config))
    return made.trials, points


def test_optuna_finds_the_best_point(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    specs = {"optim.lr": "log(1e-7,1e-3)", "lora.rank": "int(1,64)", "schedule.name": "cosine,linear"}

    def value(config: Any) -> float:
        distance = abs(math.log10(config.optim.lr / 1e-5)) + abs(config.lora.rank - 48) / 64
        return distance + (config.schedule.name == "cosine")

    first = last = 0.0
    for seed in range(4):
        trials, points = searched(tmp_path, specs, value, seed=seed)
        assert len(trials) == 30 == points.count
        values = [value(trial.config) for trial in trials]
        # The first ten are drawn, as random search does.
        first, last = first + sum(values[:10]), last + sum(values[20:])
    assert last < 0.7 * first
    for trial in trials:
        assert trial.point["optim.lr"] == float(f"{trial.point['optim.lr']:.4g}") == trial.config.optim.lr
        assert isinstance(trial.point["lora.rank"], int)
    again, _ = searched(tmp_path, specs, value, seed=3)
    assert [t.id for t in again] == [t.id for t in trials]


def test_optuna_hears_the_mean_over_seeds(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    trials, points = searched(
        tmp_path, {"optim.lr": "log(1e-7,1e-3)"},
        lambda config: None if config.train.seed == 2 else float(config.train.seed), points=3, seeds=3,
    )  # fmt: skip
    assert [t.seed for t in trials] == [0, 1, 2] * 3
    assert points.count == 9
    assert [t.value for t in points.study.trials] == [0.5] * 3


def test_optuna_repeats_no_point_and_ends_when_there_is_none(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    trials, points = searched(tmp_path, {"dpo.beta": "0.05,0.1,0.3"}, lambda config: config.dpo.beta, maximize=True)
    assert sorted(t.point["dpo.beta"] for t in trials) == [0.05, 0.1, 0.3]
    assert points.study.best_value == 0.3


def test_optuna_goes_on_where_it_was(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    specs = {"optim.lr": "log(1e-7,1e-3)", "lora.targets": ["square", ["q_proj", "v_proj"]]}
    trials, _ = searched(tmp_path, specs, lambda config: config.optim.lr, points=4)
    more, _ = searched(
        tmp_path, specs, lambda config: config.optim.lr, points=6, known=[trial.point for trial in trials]
    )
    assert [t.id for t in more[:4]] == [t.id for t in trials]
    assert len({t.id for t in more}) == 6
