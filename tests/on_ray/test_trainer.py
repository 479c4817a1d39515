"""Real Ray Train workers: the same gradient however the batch is split, and runs that end, stop and fail well."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind_ray.config.errors import UserError
from minimind_ray.on_ray.versions import private_parts
from minimind_ray.train.run import RunDirectory, read_jsonl, resolve_model
from tests.faults import WORKER, logged, session_processes, wait_for
from tests.jobs import make_config, make_job, start

pytestmark = pytest.mark.ray


def one_step(job, out: str) -> None:
    """In a worker: one step on the first step's packs; keeps its gradient."""

    from minimind_ray.data.batch import batch_from_packs
    from minimind_ray.data.plan import read_steps
    from minimind_ray.data.store import PackStore
    from minimind_ray.objectives.causal_lm import CausalLM
    from minimind_ray.on_ray.trainer import RayTrainContext
    from minimind_ray.stages.start import initial_model, load_tokenizer
    from minimind_ray.train.optim import FlatGradients, build_adamw
    from minimind_ray.train.step import training_step

    context = RayTrainContext(job.config.out, notices=False)
    model = initial_model(job.config, load_tokenizer(job.config), context)
    gradients = FlatGradients(model)
    packs = next(read_steps(PackStore(job.train), job.plan, 0, context.rank, context.world_size))
    training_step(
        model, CausalLM(model.shape), packs, [batch_from_packs([pack]) for pack in packs],
        build_adamw(model, job.config.optim), gradients,
        step=0, lr=1.0, clip=0.0, device=context.device, dtype=torch.float32,
    )  # fmt: skip
    if context.rank == 0:
        torch.save(gradients.buffer, out)


@pytest.mark.long
def test_gradient_is_the_same_for_any_split(tmp_path: Path, ray_session: None) -> None:
    import ray.train
    from ray.train.torch import TorchTrainer

    # Six packs are one step; on 1 worker, on 3, and on 4, which get unequal shares.
    gradients = {}
    for workers in (1, 3, 4):
        job = make_job(tmp_path, batch__tokens=256 * 6, scale__workers=workers, out=str(tmp_path / f"run{workers}"))
        out = tmp_path / f"gradient{workers}.pt"
        TorchTrainer(
            partial(one_step, job, str(out)),
            scaling_config=ray.train.ScalingConfig(num_workers=workers),
            run_config=ray.train.RunConfig(name=f"w{workers}", storage_path=str(tmp_path / "ray")),
        ).fit()
        gradients[workers] = torch.load(out, weights_only=True)
    norm = gradients[1].norm()
    assert norm > 0
    for workers in (3, 4):
        assert (gradients[workers] - gradients[1]).norm() / norm < 1e-5


def finished(job) -> list[dict]:
    info = RunDirectory(job.config.out).info()
    assert info["state"] == "finished"
    assert (Path(job.config.out) / info["result"] / "model.safetensors").exists()
    return list(read_jsonl(Path(job.config.out) / "metrics.jsonl"))


def train_processes() -> set[int]:
    """Ids of the shared Ray's processes that are Ray Train workers or serve their data."""
    return {*session_processes(WORKER), *session_processes("ray::DatasetManager")}


def without_timing(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "timing"} for line in lines]


@pytest.mark.public
def test_a_run_learns_and_equals_the_plain_process(tmp_path: Path, ray_session: None) -> None:
    from ray.util.placement_group import placement_group_table

    from minimind_ray.on_ray.trainer import train_on_ray
    from minimind_ray.stages.run import run_here

    settings = {"train__epochs": 3, "eval__every": 10}
    job = make_job(tmp_path, scale__workers=2, out=str(tmp_path / "ray"), **settings)
    start(job)
    before = train_processes()  # A plain TorchTrainer of another test ends its processes later.
    train_on_ray(job)
    lines = finished(job)
    assert [line["step"] for line in lines] == list(range(1, job.plan.steps + 1))
    values = [line["val/bits_per_byte"] for line in lines if "val/bits_per_byte" in line]
    assert len(values) >= 3 and values == sorted(values, reverse=True)
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]

    plain = make_job(tmp_path, out=str(tmp_path / "plain"), **settings)
    start(plain)
    run_here(plain)
    for ours, theirs in zip(finished(plain), lines, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
    # Workers, Ray Data's processes and what they held are gone.
    assert not [group for group in placement_group_table().values() if group["state"] == "CREATED"]
    wait_for(lambda: not train_processes() - before, 20)


@pytest.mark.public
def test_a_stop_and_a_killed_worker_give_the_same_end_as_none(tmp_path: Path, ray_session: None) -> None:
    from minimind_ray.on_ray.trainer import STOP_FILE, train_on_ray
    from minimind_ray.train.run import file_sha256

    settings = {"scale__workers": 2, "train__epochs": 3, "model__dropout": 0.1, "eval__every": 7}
    whole = make_job(tmp_path, out=str(tmp_path / "whole"), **settings)
    start(whole)
    train_on_ray(whole)

    parted = make_job(tmp_path, out=str(tmp_path / "parted"), **settings)
    run = start(parted)

    def after(step: int, do: Callable[[], object]) -> None:
        wait_for(lambda: logged(run) >= step)
        do()

    stopper = threading.Thread(target=after, args=(3, (run / STOP_FILE).touch))
    stopper.start()
    train_on_ray(parted)
    stopper.join()
    info = RunDirectory(run).info()
    assert info["state"] == "stopped" and 3 <= info["steps"] < parted.plan.steps

    start(parted, resume=True)
    kill = lambda: os.kill(session_processes(WORKER)[0], signal.SIGKILL)  # noqa: E731
    killer = threading.Thread(target=after, args=(info["steps"] + 1, kill))
    killer.start()
    train_on_ray(parted)
    killer.join()
    assert len(RunDirectory(run).info()["restarts"]) == 1
    expected, got = finished(whole), finished(parted)
    assert without_timing(got) == without_timing(expected)
    last = RunDirectory(tmp_path / "whole").checkpoints()[-1].name
    sums = [file_sha256(tmp_path / name / "checkpoints" / last / "model.safetensors") for name in ("whole", "parted")]
    assert sums[0] == sums[1]


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_documents(
    tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minimind_ray.on_ray import trainer
    from minimind_ray.on_ray.trainer import train_on_ray

    # A run this short is read by its workers alone.
    monkeypatch.setattr(trainer, "step_dataset", None)
    job = make_job(tmp_path, scale__workers=2, data__direct_steps=64, optim__lr=1e30, optim__clip=0.0, eval__every=1)
    assert job.plan.steps <= 64
    run = start(job)
    with pytest.raises(UserError, match=r"step \d+: the loss is .*nonfinite.*optim.lr"):
        train_on_ray(job)
    documents = [json.loads(line) for f in run.glob("nonfinite-rank*.jsonl") for line in f.open()]
    assert documents and all(d["text"] for d in documents)
    assert RunDirectory(run).checkpoints()


def test_too_many_workers_are_refused_before_anything_starts(tmp_path: Path, ray_session: None) -> None:
    from minimind_ray.on_ray.trainer import train_on_ray

    job = make_job(tmp_path, batch__tokens=256 * 64, scale__workers=64)
    start(job)
    with pytest.raises(UserError, match=r"needs 65 CPUs and this machine has 8"):
        train_on_ray(job)


def test_a_stream_gives_workers_what_the_plain_process_reads(tmp_path: Path, ray_session: None) -> None:
    from minimind_ray.on_ray.trainer import train_on_ray
    from minimind_ray.stages.run import run_here

    settings = {"data__cache": False, "train__max_steps": 20, "eval__every": 10, "rows": 300}
    plain = make_job(tmp_path, out=str(tmp_path / "plain"), **settings)
    start(plain)
    run_here(plain)
    job = make_job(tmp_path, scale__workers=2, out=str(tmp_path / "ray"), **settings)
    start(job)
    train_on_ray(job)
    for ours, theirs in zip(finished(job), finished(plain), strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)


def test_dpo_with_adapters_on_experts_over_two_workers(
    tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference log-probabilities by Ray Data, a mixture of experts, adapters, two workers: as one plain process."""
    from minimind_ray.objectives.preference import REFERENCE
    from minimind_ray.on_ray import columns
    from minimind_ray.on_ray.trainer import RAY_HOST, train_on_ray
    from minimind_ray.stages.run import prepare_job, run_here

    base = make_job(tmp_path, rows=120, model__num_experts=4)
    start(base)
    run_here(base)
    settings = {"init_from": base.config.out, "dpo__lora": True, "lora__targets": "all-linear", "train__epochs": 2}
    plain = make_job(tmp_path, "dpo", 60, out=str(tmp_path / "plain"), **settings)
    start(plain)
    run_here(plain)
    config = make_config(tmp_path, "dpo", 60, out=str(tmp_path / "ray"), scale__workers=2, **settings)
    for file in Path(plain.train).glob("reference-*"):
        file.unlink()
    monkeypatch.setattr(columns, "SMALL_FLOPS", 0)
    job = prepare_job(config, RAY_HOST)
    assert Path(job.train_columns[REFERENCE]).exists()
    start(job)
    train_on_ray(job)
    lines = list(read_jsonl(tmp_path / "ray" / "metrics.jsonl"))
    expected = list(read_jsonl(tmp_path / "plain" / "metrics.jsonl"))
    assert lines[0]["loss"] - lines[0]["aux"] == pytest.approx(math.log(2), abs=1e-5)
    for ours, theirs in zip(lines, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert RunDirectory(job.config.out).info()["state"] == "finished"
    assert (resolve_model(tmp_path / "ray") / "adapter_model.safetensors").exists()


@pytest.mark.skipif(not private_parts(), reason="with private parts of Ray only: otherwise Ray Train itself frees them")
def test_workers_that_fail_just_after_their_start_are_gone(
    tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback
    from ray.util.placement_group import placement_group_table

    from minimind_ray.on_ray.private_train import Trainer
    from minimind_ray.on_ray.trainer import train_on_ray

    class Fails(WorkerGroupCallback):
        def after_worker_group_start(self, worker_group: Any) -> None:
            raise RuntimeError("no network between the workers")

    def callbacks(trainer: Trainer) -> list[Any]:
        return [*own(trainer), Fails()]

    own = Trainer._create_default_callbacks
    monkeypatch.setattr(Trainer, "_create_default_callbacks", callbacks)
    before = {name for name, group in placement_group_table().items() if group["state"] == "CREATED"}
    job = make_job(tmp_path, scale__workers=2, scale__max_failures=1)
    start(job)
    with pytest.raises(UserError, match=r"no network between the workers.*after 1 restart"):
        train_on_ray(job)
    after = {name for name, group in placement_group_table().items() if group["state"] == "CREATED"}
    assert after <= before


@pytest.mark.parametrize("held", [7, pytest.param(6, marks=pytest.mark.long)])
def test_a_run_that_waits_for_workers_or_for_ray_datas_cpu_says_so(
    tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], held: int
) -> None:
    import ray

    from minimind_ray.on_ray import trainer, waiting

    holder = ray.remote(threading.Event).options(num_cpus=held).remote()
    ray.get(holder.is_set.remote())
    said: list[str] = []

    def why_and_release(why: Callable[[], str | None]) -> str | None:
        reason = why()
        if reason and not said:
            said.append(reason)
        elif said:
            ray.kill(holder)
        return reason

    monkeypatch.setattr(
        trainer, "print_wait_reason", lambda why: waiting.print_wait_reason(partial(why_and_release, why), first=1.0)
    )
    job = make_job(tmp_path, scale__workers=2, data__direct_steps=1, train__max_steps=4)
    start(job)
    trainer.train_on_ray(job)
    assert RunDirectory(job.config.out).info()["state"] == "finished"
    free, others = 8 - held, "; no other program is on the cluster" if private_parts() else ""
    assert said == [
        f"waiting for room: workers and Ray Data's tasks need 3 CPUs, and {free} of 8 CPUs are free{others}. "
        "Ctrl-C stops, a second one at once"
    ]
    assert f"{said[0]}\n" in capsys.readouterr().err


@pytest.mark.public
def test_what_a_killed_trial_held_is_free_again(ray_session: None) -> None:
    import ray
    from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

    from minimind_ray.on_ray.session import free_left_groups, group_name

    @ray.remote(num_cpus=0)
    class Trial:
        def start(self) -> str:
            self.group = placement_group([{"CPU": 1}], name=group_name())
            assert self.group.wait(10)
            return self.group.id.hex()

    def held() -> set[str]:
        return {name for name, group in placement_group_table().items() if group["state"] == "CREATED"}

    ours = placement_group([{"CPU": 1}], name=group_name())
    assert ours.wait(10)
    killed, living = Trial.remote(), Trial.remote()
    left, used = ray.get([killed.start.remote(), living.start.remote()])
    ray.kill(killed)

    def freed(name: str) -> bool:
        free_left_groups()
        return name not in held()

    wait_for(lambda: freed(left), 20)
    assert {used, ours.id.hex()} <= held()
    remove_placement_group(ours)
    ray.kill(living)
    wait_for(lambda: freed(used), 20)
