"""Runs that are trained together are the runs they would be alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minimind_ray.model.checkpoint import read_weights
from minimind_ray.model.fused_lora import FusedLinear
from minimind_ray.stages.fused import member, obstacle
from minimind_ray.stages.run import Job, begin, run_here
from minimind_ray.train.context import PlainContext
from minimind_ray.train.fused import Lockstep, Member, PlainFusedContext
from minimind_ray.train.loop import TrainingRun
from minimind_ray.train.run import RunDirectory, read_jsonl, resolve_model
from tests.jobs import make_job, start

pytestmark = pytest.mark.slow

SFT: list[dict[str, Any]] = [
    {"lora__rank": 1, "optim__lr": 1e-2},
    {"lora__rank": 4, "lora__alpha": 8.0, "optim__lr": 3e-3, "train__seed": 1, "schedule__name": "linear"},
    {"lora__rank": 16, "optim__lr": 3e-3, "train__seed": 2, "optim__clip": 0.0, "train__epochs": 2},
    {"lora__rank": 3, "lora__rslora": True, "optim__clip": 0.05, "batch__tokens": 512, "optim__beta1": 0.8,
     "optim__weight_decay": 0.1, "schedule__warmup": 2, "eval__every": 3},
]  # fmt: skip
DPO: list[dict[str, Any]] = [
    {"dpo__beta": 0.1, "lora__rank": 4, "optim__lr": 3e-3},
    {"dpo__beta": 0.5, "lora__rank": 8, "optim__lr": 1e-3, "train__seed": 1},
    {"dpo__beta": 0.05, "lora__rank": 2, "dpo__loss": "ipo", "batch__tokens": 512},
]


class Host(PlainFusedContext):
    """Stops the run early at step `ends_at`."""

    def __init__(self, weights: dict[str, torch.Tensor], ends_at: int = 10**9) -> None:
        super().__init__(weights)
        self.ends_at, self.step = ends_at, 0

    def post(self, metrics: dict[str, Any], checkpoint: str | None) -> None:
        self.step = metrics["step"]

    def verdict(self) -> bool:
        return self.step < self.ends_at


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fused")
    job = make_job(directory, rows=200, eval__samples=0, train__max_steps=5)
    start(job)
    run_here(job)
    return directory


def jobs_of(base: Path, stage: str, points: Sequence[dict[str, Any]], name: str) -> list[Job]:
    common = {"init_from": str(base / "run-pretrain"), "dpo__lora": stage == "dpo", "lora__targets": "all-linear",
              "data__val_fraction": 0.2, "eval__every": 4}  # fmt: skip
    return [
        make_job(base, stage, 120, out=str(base / f"{name}-{stage}-{i}"), **{**common, **point})
        for i, point in enumerate(points)
    ]


def train_together(jobs: Sequence[Job], hosts: Sequence[Host] | None = None, resume: bool = False) -> list[Member]:
    assert jobs[0].config.init_from
    weights = read_weights(resolve_model(jobs[0].config.init_from))
    lockstep = Lockstep(weights, torch.device("cpu"), torch.float32)
    for job, host in zip(jobs, hosts or [Host(weights) for _ in jobs], strict=True):
        start(job, resume=resume)
        host.weights = weights
        lockstep.add(member(job, host))
    ended: list[Member] = []
    while lockstep.members:
        ended += lockstep.turn()
    return ended


def lines(job: Job) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in line.items() if k != "timing"} for line in read_jsonl(Path(job.config.out) / "metrics.jsonl")
    ]


def assert_same(ours: Job, theirs: Job) -> None:
    """Losses to 1e-5, weights and optimizer to 1e-4, the same files."""
    one, other = Path(ours.config.out), Path(theirs.config.out)
    infos = [RunDirectory(x).info() for x in (one, other)]
    for key in ("state", "steps", "tokens", "result", "inputs"):  # A signal to pytest stops a run, and no test.
        assert infos[0][key] == infos[1][key]
    for a, b in zip(lines(ours), lines(theirs), strict=True):
        assert a.keys() == b.keys()
        for key, value in b.items():
            assert a[key] == pytest.approx(value, rel=1e-5, abs=1e-5), (key, b["step"])
    files = [{str(p.relative_to(x)) for p in x.rglob("*") if p.is_file()} for x in (one, other)]
    assert files[0] == files[1]
    for name in files[0]:
        if name.endswith(".safetensors"):
            a, b = load_file(one / name), load_file(other / name)
            assert a.keys() == b.keys()
            for key in a:
                torch.testing.assert_close(a[key], b[key], atol=1e-4, rtol=1e-4)


def test_a_projections_bias_is_added() -> None:
    frozen = torch.nn.Linear(6, 5)
    a_KRI, b_KRO = torch.randn(2, 3, 6), torch.randn(2, 3, 5)
    fused = FusedLinear(frozen, a_KRI, b_KRO, torch.tensor([0.5, 2.0]).view(-1, 1, 1))
    fused.present_J = torch.arange(2)
    x_SI = torch.randn(8, 6)
    expected = [frozen(x) + s * x @ a.T @ b for x, a, b, s in zip(x_SI.chunk(2), a_KRI, b_KRO, (0.5, 2.0))]
    torch.testing.assert_close(fused(x_SI), torch.cat(expected))


@pytest.mark.parametrize(("stage", "points"), [("lora", SFT), ("dpo", DPO)])
def test_each_run_is_as_alone(stage: str, points: list[dict[str, Any]], base: Path) -> None:
    alone, together = (jobs_of(base, stage, points, name) for name in ("alone", "together"))
    assert obstacle([job.config for job in together]) is None
    for job in alone:
        start(job)
        run_here(job)
    ended = train_together(together)
    assert len(ended) == len(points) and not any(member.error for member in ended)
    for ours, theirs in zip(together, alone, strict=True):
        assert_same(ours, theirs)


def test_a_run_that_ends_early_or_fails_leaves_the_others_as_they_are(base: Path) -> None:
    points = [{"optim__lr": 1e-2, "lora__rank": 2}, {"optim__lr": 1e30, "optim__clip": 0.0}, {"optim__lr": 1e-2}]
    common = {"train__epochs": 3, "eval__samples": 0}
    points = [{**point, **common, "train__seed": i} for i, point in enumerate(points)]
    alone, together = (jobs_of(base, "lora", points, name) for name in ("whole", "parts"))
    for job in (alone[0], alone[2]):
        start(job)
        run_here(job)
    steps = together[2].plan.steps
    hosts = [Host({}), Host({}), Host({}, ends_at=steps // 2)]
    ended = {hosts.index(member.context): member for member in train_together(together, hosts)}  # pyright: ignore
    assert ended[0].error is None and ended[2].error is None
    assert "the loss is" in str(ended[1].error)
    assert_same(together[0], alone[0])
    info = RunDirectory(together[2].config.out).info()
    assert info["state"] == "early-stopped"
    assert "(early-stopped)" in (Path(together[2].config.out) / info["result"] / "README.md").read_text()
    # It goes on as a run alone.
    begin(together[2], resume=True)
    run_here(together[2])
    assert_same(together[2], alone[2])


def test_a_run_that_was_stopped_alone_goes_on_with_others_that_are_under_way(base: Path) -> None:
    points = [{"optim__lr": 1e-2, "lora__rank": 2, "train__epochs": 3}, {"optim__lr": 3e-3, "lora__rank": 6}]
    alone, parted = (jobs_of(base, "lora", points, name) for name in ("unparted", "parted"))
    for job in alone:
        start(job)
        run_here(job)
    start(parted[0])
    stopping = Stopping(parted[0].plan.steps // 3)
    parted[0].run(stopping, parted[0].data(stopping))
    weights = read_weights(resolve_model(str(parted[0].config.init_from)))
    lockstep = Lockstep(weights, torch.device("cpu"), torch.float32)
    start(parted[1])
    lockstep.add(member(parted[1], PlainFusedContext(weights)))
    for _ in range(2):
        assert not lockstep.turn()
    begin(parted[0], resume=True)
    lockstep.add(member(parted[0], PlainFusedContext(weights)))
    while lockstep.members:
        lockstep.turn()
    for ours, theirs in zip(parted, alone, strict=True):
        assert_same(ours, theirs)


class Stopping(PlainContext):
    """Alone, and not worth going on with from a step on."""

    def __init__(self, ends_at: int) -> None:
        super().__init__()
        self.ends_at = ends_at

    def report(self, metrics: dict[str, Any], checkpoint: str | None) -> bool:
        return metrics["step"] < self.ends_at


def test_what_cannot_be_trained_together(base: Path) -> None:
    def configs(**changes: Any) -> list[Any]:
        return [job.config for job in jobs_of(base, "lora", [{}, changes], "refused")]

    assert obstacle(configs(lora__rank=2, optim__lr=1.0, data__pack_tokens=128, batch__tokens=128)) is None
    assert "lora.targets" in str(obstacle(configs(lora__targets="square")))
    assert "lora.dropout" in str(obstacle(configs(lora__dropout=0.1)))
    assert "train.precision" in str(obstacle(configs(train__precision="bfloat16")))
    assert "one worker" in str(obstacle(configs(scale__workers=2)))
    whole = jobs_of(base, "sft", [{"lora__targets": "square"}], "refused")
    assert "only adapters" in str(obstacle([job.config for job in whole]))


def test_an_error_of_the_shared_step_ends_every_run(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = jobs_of(base, "lora", [{}, {"train__seed": 1}], "broken")
    weights = read_weights(resolve_model(str(jobs[0].config.init_from)))
    lockstep = Lockstep(weights, torch.device("cpu"), torch.float32)
    closed: list[BaseException | None] = []
    monkeypatch.setattr(TrainingRun, "close", lambda run, error=None: closed.append(error))
    for job in jobs:
        start(job)
        lockstep.add(member(job, Host(weights)))
    error = RuntimeError("out of memory")

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr("minimind_ray.train.fused.FusedRuns.step", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        lockstep.turn()
    assert closed == [error, error]
