"""Points found while a sweep runs, on functions whose best point is known."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minimind_ray.config.errors import UserError
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
        load_config("dpo", overrides={"train.seed": seed, "dpo.lora": True}),
        [parse_axis(k, v) for k, v in specs.items()],
        **{
            "points": 30, "seeds": lambda point: 1, "count": 30, "maximize": False, "make": made, "refuse": None,
            **options,
        },
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
        assert len(trials) == 30
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
        lambda config: None if config.train.seed == 2 else float(config.train.seed), points=3,
        seeds=lambda point: 3,
    )  # fmt: skip
    assert [t.seed for t in trials] == [0, 1, 2] * 3
    assert [t.value for t in points.study.trials] == [0.5] * 3


def test_a_known_point_may_have_more_seeds(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    trials, points = searched(
        tmp_path, {"optim.lr": "log(1e-7,1e-3)"}, lambda config: float(config.train.seed), points=2,
        known=[{"optim.lr": 1e-5}], seeds=lambda point: 3 if point == {"optim.lr": 1e-5} else 1,
    )  # fmt: skip
    assert [t.seed for t in trials] == [0, 1, 2, 0]
    assert [t.value for t in points.study.trials] == [1.0, 0.0]


GRIDS = [
    ({"dpo.beta": "0.05,0.1,0.3"}, 3),
    ({"optim.lr": "1e-5,1e-4,1e-3", "dpo.beta": "0.05,0.1,0.3,1"}, 12),
    ({"lora.rank": "int(1,5)", "lora.dora": "true,false"}, 10),
    # Without LoRA its rank changes nothing; under cosine the decay does not.
    ({"dpo.lora": "true,false", "lora.rank": "2,4,8"}, 4),
    ({"schedule.name": "cosine,wsd", "schedule.decay": "0.1,0.2,0.3"}, 4),
]


@pytest.mark.parametrize(("specs", "size"), GRIDS)
@pytest.mark.parametrize("seed", range(3))
def test_optuna_tries_each_point_of_a_grid_once(tmp_path: Path, specs: dict[str, str], size: int, seed: int) -> None:
    pytest.importorskip("optuna")
    for asked in (size - 1, size, size + 3):
        trials, points = searched(tmp_path, specs, lambda config: config.dpo.beta, seed=seed, points=asked)
        assert len({trial.id for trial in trials}) == len(trials) == points.asked == min(asked, size)


def test_a_point_that_cannot_be_run_is_one_of_the_points(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    refused: list[tuple[Any, str]] = []
    specs = {"data.max_seq_len": "int(128,512)", "data.pack_tokens": [256, 512]}
    trials, points = searched(
        tmp_path, specs, lambda config: -config.data.max_seq_len, points=12,
        refuse=lambda point, error: refused.append((point, error)),
    )  # fmt: skip
    assert refused and trials and len(trials) + len(refused) == points.asked == 12
    for point, error in refused:
        assert error.startswith(f"data.pack_tokens is 256, less than data.max_seq_len {point['data.max_seq_len']}")

    def make(trial: Any) -> Any:
        raise UserError("no row is left")

    refused.clear()
    searched(tmp_path, {"optim.lr": "log(1e-5,1e-3)"}, None, points=4, make=make, refuse=lambda *it: refused.append(it))
    assert [error for _, error in refused] == ["no row is left"] * 4


def test_optuna_goes_on_where_it_was(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    specs = {"optim.lr": "log(1e-7,1e-3)", "lora.targets": ["square", ["q_proj", "v_proj"]]}
    trials, _ = searched(tmp_path, specs, lambda config: config.optim.lr, points=4)
    more, _ = searched(
        tmp_path, specs, lambda config: config.optim.lr, points=6, known=[trial.point for trial in trials]
    )
    assert [t.id for t in more[:4]] == [t.id for t in trials]
    assert len({t.id for t in more}) == 6
