"""Which ends of an attempt begin another one, and the last word when there are too many. No attempt runs here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from minimind_ray.config.errors import UserError
from minimind_ray.on_ray import trainer
from minimind_ray.stages.run import Job
from minimind_ray.train.run import RunDirectory
from tests.jobs import make_job, start

pytestmark = pytest.mark.unit

LOST = WorkerGroupError("lost", {1: ray.exceptions.ActorDiedError()})


class Attempts:
    """What attempts come to, one after another: an error to raise, a name of a file to make, or None for a good end."""

    def __init__(self, run: RunDirectory, *ends: object) -> None:
        self.run, self.ends, self.workers = run, list(ends), []

    def __call__(self, job: Job, workers: int) -> None:
        self.workers.append(workers)
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        if callable(end):
            end()


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Attempts]:
    def with_ends(*ends: object, room: int = 8, **settings: object) -> Attempts:
        job = make_job(tmp_path, rows=60, **settings)
        attempts = Attempts(RunDirectory(start(job)), *ends)
        for name in ("require_cpus", "request_resources"):
            monkeypatch.setattr(trainer, name, lambda *a, **k: None)
        monkeypatch.setattr(trainer, "room", lambda *a, **k: room)
        monkeypatch.setattr(trainer, "_attempt", attempts)
        monkeypatch.setattr(trainer, "_steps_done", lambda run: run.info().get("steps", 0))
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

    def lost_after(steps: int) -> Callable[[], None]:
        def attempt() -> None:
            run.update(steps=steps)
            raise LOST

        return attempt

    attempts = play(*(lost_after(step) for step in range(1, 6)), None, scale__max_failures=1)
    assert len(attempts.workers) == 6 and [restart["step"] for restart in attempts.restarts] == [1, 2, 3, 4, 5]


def test_what_a_user_got_wrong_is_not_tried_again(play: Callable[..., Attempts], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the loss is nan"):
        play(WorkerGroupError("raised", {0: UserError("the loss is nan"), 1: RuntimeError("connection reset")}))
    assert "restarts" not in RunDirectory(tmp_path / "run-pretrain").info()


def test_notices_are_free_and_a_late_start_takes_fewer_workers(play: Callable[..., Attempts], tmp_path: Path) -> None:
    again = tmp_path / "run-pretrain" / trainer.AGAIN_FILE
    slow = ControllerError(type("WorkerGroupStartupTimeoutError", (Exception,), {})("30 s"))
    notice = lambda: again.write_text(json.dumps(["node"]))  # noqa: E731
    attempts = play(notice, slow, notice, None, scale__workers="1:3", scale__max_failures=0)
    assert attempts.workers == [3, 3, 2, 3]
    assert [restart["why"].split(" ")[0] for restart in attempts.restarts] == ["notice", "3", "notice"]


def test_a_stop_while_workers_are_lost_is_a_stop(play: Callable[..., Attempts], tmp_path: Path) -> None:
    def stop_and_lose() -> None:
        (tmp_path / "run-pretrain" / trainer.STOP_FILE).touch()
        raise LOST

    with pytest.raises(UserError, match="a worker ended before the run did"):
        play(stop_and_lose)
