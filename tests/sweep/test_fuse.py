"""Which sweeps train their trials together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minimind_ray.cli.tune import plan_of
from minimind_ray.config.errors import UserError
from minimind_ray.config.search import SearchConfig, search_config
from minimind_ray.stages.run import run_here
from minimind_ray.sweep.axes import parse_axis
from minimind_ray.sweep.fuse import fusing_decision
from minimind_ray.sweep.plan import SweepPlan, plan_sweep
from tests.jobs import make_config, make_job, start

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fuse")
    job = make_job(directory, rows=60, eval__samples=0, train__max_steps=1)
    start(job)
    run_here(job)
    return directory


def planned(
    base: Path, axes: dict[str, Any], search: dict[str, Any] | None = None, stage: str = "lora", **settings: Any
) -> SweepPlan:
    config = make_config(base, stage, 20, init_from=str(base / "run-pretrain"), **settings)
    return plan_sweep(
        base / "sweep", config, [parse_axis(k, v) for k, v in axes.items()], SearchConfig(**(search or {}))
    )


def test_a_number_is_taken_or_refused(base: Path) -> None:
    axes = {"lora.rank": "2,4", "optim.lr": "1e-3,1e-2"}
    assert fusing_decision(planned(base, axes, {"fuse": 3})) == (3, "fuse is 3")
    assert fusing_decision(planned(base, axes, {"fuse": "off"}))[0] == 1
    with pytest.raises(UserError, match=r"fuse is 3, but .* lora.targets is not the same in all trials"):
        fusing_decision(planned(base, {"lora.targets": ["square", "all-linear"]}, {"fuse": 3}))
    for values in ("true,false", "false,true"):
        with pytest.raises(UserError, match=r"fuse is 2, but .* only adapters can share a base"):
            fusing_decision(planned(base, {"dpo.lora": values}, {"fuse": 2}, "dpo"))
    with pytest.raises(UserError, match="pbt changes settings"):
        fusing_decision(planned(base, {"optim.lr": "1e-3,1e-2"}, {"fuse": 3, "scheduler": "pbt"}))
    for wrong in (0, "4", False, "on"):
        with pytest.raises(UserError, match="fuse"):
            search_config({"fuse": wrong})
    for text, number in (("4", 4), ("off", "off")):
        assert plan_of({"stage": "pretrain", "fuse": text}).search.fuse == number


def test_auto_says_why(base: Path) -> None:
    axes = {"lora.rank": "2,4", "optim.lr": "1e-3,1e-2"}
    assert fusing_decision(planned(base, axes, lora__dropout=0.1)) == (
        1, "lora.dropout and lora.dora do not work for many adapters at once",
    )  # fmt: skip
    on_gpu = planned(base, axes, scale__gpus_per_worker=1.0)
    assert fusing_decision(on_gpu) == (4, "one trial's steps leave the GPU waiting")
    large = planned(base, axes, scale__gpus_per_worker=1.0, data__pack_tokens=32768, batch__tokens=32768)
    assert fusing_decision(large) == (1, "one trial's steps keep the GPU busy")


def test_points_that_are_not_known_yet(base: Path) -> None:
    pytest.importorskip("optuna", reason="optuna is not installed")
    search = {"searcher": "optuna", "trials": 4, "fuse": 2}
    assert fusing_decision(planned(base, {"lora.rank": "int(2,8)"}, search)) == (2, "fuse is 2")
    on_gpu = planned(base, {"lora.rank": "int(2,8)"}, {**search, "fuse": "auto"}, scale__gpus_per_worker=1.0)
    assert fusing_decision(on_gpu) == (4, "one trial's steps leave the GPU waiting")
    plan = planned(base, {"lora.dropout": "uniform(0.0,0.2)"}, search)
    # Nor when it goes on, and some points are known.
    for known in ((), planned(base, {"lora.rank": "2,4"}).trials):
        with pytest.raises(UserError, match="the points of lora.dropout are found while the sweep runs"):
            fusing_decision(replace(plan, trials=tuple(known)))
