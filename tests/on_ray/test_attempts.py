"""Which ends of an attempt begin another one, and the last word when there are too many.

Rooms are found and taken in the tests' Ray; in place of each attempt's Ray Train run stands an end of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from ray.train import WorkerGroupError
from ray.util.placement_group import remove_placement_group

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import ScaleConfig
from minimind_ray.on_ray import trainer
from minimind_ray.on_ray.reservation import NoRoomError, Reservation
from minimind_ray.stages.run import Job
from minimind_ray.train.run import RunDirectory
from tests.faults import wait_for
from tests.jobs import make_job, start

pytestmark = pytest.mark.ray

LOST = WorkerGroupError("lost", {1: ray.exceptions.ActorDiedError()})


class Attempts:
    """What attempts come to, one after another: an error to raise, something to do, nodes of a notice, or none."""

    def __init__(self, run: RunDirectory, *ends: object) -> None:
        self.run, self.ends, self.workers = run, list(ends), []

    def __call__(self, job: Job, workers: int, start: int, reservation: Reservation) -> list[str]:
        self.workers.append(workers)
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        if callable(end):
            end(reservation)
        noticed = end if isinstance(end, list) else []
        self.run.update(state="stopped" if noticed else "finished")
        return noticed


@pytest.fixture
def play(tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Attempts]:
    def with_ends(*ends: object, **settings: object) -> Attempts:
        job = make_job(tmp_path, rows=60, **settings)
        attempts = Attempts(RunDirectory(start(job)), *ends)
        monkeypatch.setattr(trainer, "_attempt", attempts)
        try:
            trainer.train_on_ray(job)
        finally:
            attempts.restarts = attempts.run.info().get("restarts", [])
        return attempts

    return with_ends


def test_losses_in_a_row_are_counted_and_the_last_word_says_so(play: Callable[..., Attempts], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"worker 1's process.* after 2 restart\(s\).*scale.max_failures.*--resume"):
        play(LOST, LOST, LOST, scale__max_failures=2)
    info = RunDirectory(tmp_path / "run-pretrain").info()
    assert info["state"] == "failed" and len(info["restarts"]) == 2


def test_a_checkpoint_between_losses_begins_the_count_anew(play: Callable[..., Attempts], tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run-pretrain")

    def lost_after(step: int) -> Callable[[Reservation], None]:
        def attempt(reservation: Reservation) -> None:
            run.save_checkpoint(f"step-{step:08d}", lambda path: (path / "weights").write_text("1") and None)
            raise LOST

        return attempt

    attempts = play(*(lost_after(step) for step in range(1, 6)), None, scale__max_failures=1)
    assert len(attempts.workers) == 6 and [restart["step"] for restart in attempts.restarts] == [1, 2, 3, 4, 5]


def test_what_a_user_got_wrong_is_not_tried_again(play: Callable[..., Attempts], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the loss is nan"):
        play(WorkerGroupError("raised", {0: UserError("the loss is nan"), 1: RuntimeError("connection reset")}))
    assert "restarts" not in RunDirectory(tmp_path / "run-pretrain").info()


def test_notices_are_free_and_a_late_start_takes_fewer_workers(play: Callable[..., Attempts]) -> None:
    slow = NoRoomError("3 worker(s) could not be started in time")
    attempts = play(["node"], slow, ["another"], None, scale__workers="1:3", scale__max_failures=0)
    assert attempts.workers == [3, 3, 2, 3]
    assert [restart["why"].split(" ")[0] for restart in attempts.restarts] == ["notice", "3", "notice"]


def test_only_a_run_that_can_do_with_less_gives_up_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, float]] = []
    monkeypatch.setattr(
        trainer, "reserved", lambda scale, workers, cpus, stopped, seconds: asked.append((cpus, seconds))
    )
    job = make_job(tmp_path, rows=60, scale__workers="2:3", data__direct_steps=1)
    trainer._reserve(job, 2, 0)
    trainer._reserve(job, 3, 0)
    trainer._reserve(job, 2, job.plan.steps - 1)  # The workers read that step themselves.
    assert asked == [(1, math.inf), (1, trainer.START_SECONDS), (0, math.inf)]


def test_nothing_is_tried_again_once_ray_is_left(
    play: Callable[..., Attempts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def left(reservation: Reservation) -> None:
        remove_placement_group(reservation.group)  # As Ray does then.
        monkeypatch.setattr("ray.is_initialized", lambda: False)
        raise LOST

    with pytest.raises(UserError, match="a worker ended before the run did"):
        play(left)
    assert "restarts" not in RunDirectory(tmp_path / "run-pretrain").info()


def test_a_stop_while_workers_are_lost_is_a_stop(play: Callable[..., Attempts], tmp_path: Path) -> None:
    def stop_and_lose(reservation: Reservation) -> None:
        (tmp_path / "run-pretrain" / trainer.STOP_FILE).touch()
        raise LOST

    with pytest.raises(UserError, match="a worker ended before the run did"):
        play(stop_and_lose)


@pytest.mark.parametrize(
    ("rooms", "why", "files", "broken"),
    [
        ([2, 3], "the cluster has room for more workers", {".again"}, False),
        # The node of Ray Data's CPU was lost, and another program took the one that was free.
        ([2, 2, 2, 2], "the cluster no longer has room for 2 worker(s)", {".again", ".leave"}, True),
        # One node was slow to answer; then one was lost, and no step ended any more.
        ([1, 2, 1, 1, 1, 1], "the cluster no longer has room for 2 worker(s)", {".again", ".leave"}, False),
    ],
)
def test_room_is_looked_for_while_an_attempt_runs(
    rooms: list[int], why: str, files: set[str], broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, told = list(rooms), []
    monkeypatch.setattr(trainer, "workers_that_fit", lambda *a, **k: left.pop(0))
    monkeypatch.setattr(trainer, "request_resources", lambda bundles: None)
    monkeypatch.setattr(trainer, "LEAVE_SECONDS", 0.035)
    scale = ScaleConfig(workers="1:3", resize_seconds=0.01)
    with trainer._watch_capacity(
        scale, 2, set(), tmp_path / ".again", tmp_path / ".leave", told.append, lambda: broken
    ):
        wait_for(lambda: not left, 10)
    assert told == [why] and {path.name for path in tmp_path.iterdir()} == files


def test_an_attempt_that_had_to_leave_is_no_failure(
    play: Callable[..., Attempts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "LEAVE_SECONDS", 0.1)

    def lose_a_node_without_workers(reservation: Reservation) -> None:
        monkeypatch.setattr(trainer, "workers_that_fit", lambda *a, **k: 1)
        wait_for((tmp_path / "run-pretrain" / trainer.LEAVE_FILE).exists, 10)
        monkeypatch.setattr(trainer, "workers_that_fit", lambda *a, **k: 2)
        raise LOST

    settings = {"scale__workers": 2, "scale__max_failures": 0, "scale__resize_seconds": 0.01}
    attempts = play(lose_a_node_without_workers, None, **settings)
    assert [restart["why"] for restart in attempts.restarts] == ["the cluster no longer has room for 2 worker(s)"]
    assert not (tmp_path / "run-pretrain" / trainer.LEAVE_FILE).exists()


def test_waiting_for_nodes_can_be_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = iter([1, 1, 2, 1])
    monkeypatch.setattr(trainer, "workers_that_fit", lambda *a, **k: next(found))
    monkeypatch.setattr(trainer, "request_resources", lambda bundles: None)
    monkeypatch.setattr(trainer.time, "sleep", lambda seconds: None)
    scale = ScaleConfig(workers="2:4")
    assert trainer._wait_for_capacity(scale, set(), tmp_path / "stop") == 2
    assert capsys.readouterr().err == "the cluster has room for 1 of 2:4 workers; waiting for nodes\n"
    (tmp_path / "stop").touch()
    with pytest.raises(trainer.StoppedError, match="no room for the workers; --resume"):
        trainer._wait_for_capacity(scale, set(), tmp_path / "stop")
