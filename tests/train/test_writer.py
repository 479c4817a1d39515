"""Checkpoints written while training goes on, on disks that have room and on one that has none."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind_ray.config.errors import UserError
from minimind_ray.stages.run import Job, run_here
from minimind_ray.train.context import PlainContext
from minimind_ray.train.run import UNFINISHED, VALIDATION, RunDirectory, file_sha256, sound, write_atomically
from minimind_ray.train.writer import CheckpointWriter, HostCopy, Write
from tests.faults import fill, small_disk
from tests.jobs import make_job, start

pytestmark = pytest.mark.slow


def test_a_copy_stays_as_it_was_and_is_made_in_the_same_place_again() -> None:
    copy, weight = HostCopy(), torch.ones(3, dtype=torch.bfloat16)
    first = copy({"weight": weight})["weight"]
    weight += 1
    assert first.tolist() == [1, 1, 1] and first.dtype == torch.float32
    assert copy({"weight": weight})["weight"] is first and first.tolist() == [2, 2, 2]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    run, may_write = RunDirectory(tmp_path), threading.Event()
    writer = CheckpointWriter(run, keep=1, best=(None, 9.0))

    def write(directory: Path) -> None:
        may_write.wait(10)
        (directory / "weights").write_text("1")

    writer.save("step-00000001", write, ("step-00000001", 1.0), {})
    assert writer.pop_warning() is None and not run.checkpoints()
    may_write.set()
    assert writer.settle() == ("step-00000001", 1.0)
    assert sound(run.checkpoints()[0])
    fails = {VALIDATION: lambda path: (path / "no").write_text("")}
    writer.save("step-00000002", write, ("step-00000001", 1.0), fails)
    assert writer.settle() == ("step-00000001", 1.0)
    assert "step-00000002 could not be written" in str(writer.pop_warning()) and writer.pop_warning() is None
    results = {VALIDATION: lambda path: path.touch() or None, "tasks.parquet": None}
    (tmp_path / "tasks.parquet").touch()
    writer.save("step-00000003", write, ("step-00000003", 0.5), results)
    writer.close()
    # One is kept, and the best is that one.
    assert [path.name for path in run.checkpoints()] == ["step-00000003"]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "validation.parquet"}


def test_a_full_disk_is_told_truly_before_the_first_checkpoint_and_after_it(tmp_path: Path) -> None:
    writer = CheckpointWriter(RunDirectory(tmp_path), keep=3, best=(None, 9.0))

    def full(directory: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def save(step: int, write: Write) -> str:
        writer.save(f"step-{step:08d}", write, (None, 9.0), {})
        writer.settle()
        return str(writer.pop_warning())

    assert "No space left on device; the run has no earlier checkpoint, and training continues" in save(1, full)
    with pytest.raises(UserError, match=r"disk space there.*--resume.*no checkpoint, so training starts at the first"):
        writer.close()
    writer = CheckpointWriter(RunDirectory(tmp_path), keep=3, best=(None, 9.0))
    save(2, lambda directory: None)
    assert "No space left on device; earlier checkpoints are kept" in save(3, full)
    with pytest.raises(UserError, match=r"disk space there.*--resume.*continues from checkpoint step-00000002"):
        writer.close()


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        with (disk / "filler").open("wb", buffering=0) as f, pytest.raises(OSError, match="No space left"):
            while True:
                f.write(bytes(4096))
        with pytest.raises(OSError, match=r"No space left on device: '.*disk/config.yaml'"):
            write_atomically(disk / "config.yaml", "stage: sft\n" * 1000)
        assert [path.name for path in disk.iterdir()] == ["filler"]


def test_two_that_write_the_same_checkpoint_are_not_in_each_others_way(tmp_path: Path) -> None:
    given_up, ours = (CheckpointWriter(RunDirectory(tmp_path), keep=1, best=(None, 9.0)) for _ in range(2))
    begun, may_write = threading.Event(), threading.Event()

    def slowly(directory: Path) -> None:
        (directory / "weights").write_text("1")
        begun.set()
        may_write.wait(10)

    given_up.save("step-00000003", slowly, (None, 9.0), {})
    begun.wait(10)
    ours.save("step-00000003", lambda path: (path / "weights").write_text("1") and None, (None, 9.0), {})
    ours.settle()
    may_write.set()
    given_up.settle()
    assert ours.pop_warning() is None and given_up.pop_warning() is None
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_what_a_killed_process_had_begun_to_write_goes_when_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / f"{UNFINISHED}step-00000001-0").mkdir(parents=True)
    (tmp_path / f"{UNFINISHED}validation-0.parquet").touch()
    RunDirectory(tmp_path).forget_after(0)
    assert [path.name for path in tmp_path.rglob("*")] == ["checkpoints"]


def test_what_is_no_fault_of_the_disk_is_raised(tmp_path: Path) -> None:
    writer = CheckpointWriter(RunDirectory(tmp_path), keep=1, best=(None, 9.0))

    def write(directory: Path) -> None:
        raise KeyError("a mistake")

    writer.save("step-00000001", write, (None, 9.0), {})
    with pytest.raises(KeyError, match="a mistake"):
        writer.close()
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as disk:
        yield disk


class FullAfter(PlainContext):
    """Fills the disk when the run reports a step, and makes room again at another."""

    def __init__(self, disk: Path, full: int, room: int | None) -> None:
        super().__init__()
        self.disk, self.full, self.room = disk, full, room

    def report(self, metrics: dict[str, Any], checkpoint: str | None) -> bool:
        run = RunDirectory(self.disk / "run")
        if metrics["step"] == self.full:
            while len(run.checkpoints()) < 2:  # The step's own checkpoint is on its way.
                pass
            self.filler = fill(self.disk)
        elif metrics["step"] == self.room:
            self.filler.unlink()
        return True


def job_on(disk: Path, data: Path) -> Job:
    settings = {"train__max_steps": 12, "eval__every": 2, "out": str(disk / "run"), "track__wandb": "off"}
    return make_job(data, rows=200, checkpoint__keep=10, **settings)


def sums(run: Path) -> dict[str, str]:
    return {f"{p.parent.name}/{p.name}": file_sha256(p) for p in sorted(run.glob("checkpoints/*/*.safetensors"))}


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(tmp_path: Path, disk: Path) -> None:
    undisturbed = job_on(tmp_path, tmp_path)
    start(undisturbed)
    run_here(undisturbed)
    job = job_on(disk, tmp_path)
    run = RunDirectory(start(job))
    context = FullAfter(disk, full=4, room=8)
    job.run(context, job.data(context))
    assert run.info()["state"] == "finished"
    lines = list(run.metrics())
    assert [line["step"] for line in lines] == list(range(1, 13))
    warnings = [line["warning"] for line in lines if "warning" in line]
    assert warnings and all("could not be written" in w and "No space left" in w for w in warnings)
    expected = sums(tmp_path / "run")
    got = sums(run.path)
    missing = {name.split("/")[0] for name in expected.keys() - got.keys()}
    assert missing and missing <= {"step-00000006", "step-00000008"}
    assert got == {name: value for name, value in expected.items() if name in got}
    assert all(sound(path) for path in run.checkpoints())
    assert not [path for path in run.path.rglob(f"{UNFINISHED}*")]
    assert run.info()["result"] == RunDirectory(tmp_path / "run").info()["result"]
    assert (run.path / "validation.parquet").read_bytes() == (tmp_path / "run/validation.parquet").read_bytes()


def test_a_disk_that_stays_full_ends_the_run_with_a_word_and_a_resume_ends_it_well(tmp_path: Path, disk: Path) -> None:
    job = job_on(disk, tmp_path)
    run = RunDirectory(start(job))
    context = FullAfter(disk, full=4, room=None)
    with pytest.raises(UserError, match=r"the last checkpoint, step-00000012 .*No space left.*disk space.*--resume"):
        job.run(context, job.data(context))
    assert [path.name for path in run.checkpoints()] == ["step-00000002", "step-00000004"]
    assert all(sound(path) for path in run.checkpoints())
    context.filler.unlink()
    start(job, resume=True)
    run_here(job)
    undisturbed = job_on(tmp_path, tmp_path)
    start(undisturbed)
    run_here(undisturbed)
    assert sums(run.path) == sums(tmp_path / "run")
    assert [line["step"] for line in run.metrics()] == list(range(1, 13))
