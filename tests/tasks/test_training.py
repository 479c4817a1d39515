"""Benchmarks during training: their values in metrics.jsonl, and tasks.parquet for the best checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import EvalConfig
from minimind_ray.config.search import SearchConfig
from minimind_ray.stages.benchmark import run_benchmark
from minimind_ray.sweep.plan import plan_sweep
from minimind_ray.tasks.items import FILE, metrics_of, read_items, scores_of
from minimind_ray.tasks.measure import require_task, suite_of
from minimind_ray.train.evaluate import drop_stale
from minimind_ray.train.run import VALIDATION, RunDirectory
from tests.jobs import make_config, make_job, start
from tests.train.test_loop import RESULT, drive, make_run, open_run

pytestmark = pytest.mark.slow

LOCAL = str(Path(__file__).parent / "local")
SETTINGS: dict[str, Any] = {
    "eval__tasks": ["my_letters", "my_texts"], "eval__task_path": LOCAL, "eval__task_limit": 5,
    "data__max_seq_len": 128,
}  # fmt: skip


def test_each_validation_runs_the_tasks_and_the_best_checkpoint_has_their_items(tmp_path: Path) -> None:
    run, directory = make_run(tmp_path, **SETTINGS)
    with run:
        reports = drive(run, [RESULT] * 4)
        assert run.next_step() is None
    lines = [line for line in directory.metrics() if "val/loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    assert all({"task/my_letters", "task/my_texts"} <= line.keys() for line in lines)
    assert reports[-1].metrics["task/my_texts"] == lines[-1]["task/my_texts"]
    table = read_items(directory.path / FILE)
    assert metrics_of(table) == {"my_letters": ["acc", "acc_norm"], "my_texts": ["bits_per_byte"]}
    scores = scores_of(table, "my_texts")
    assert len(scores.item_E) == 5
    assert scores.mean == pytest.approx(lines[-1]["task/my_texts"])
    config = run.config.eval
    again = run_benchmark(str(directory.path), suite_of(config), limit=5, precision="float32")
    assert again.values["my_texts"] == pytest.approx(lines[-1]["task/my_texts"], rel=1e-6)


def test_not_every_validation_has_to_run_the_tasks(tmp_path: Path) -> None:
    run, directory = make_run(tmp_path, **SETTINGS, eval__tasks_every=3)
    run.eval_every = run.checkpoint_every = 1
    with run:
        drive(run, [RESULT] * 4)
        assert run.next_step() is None
    assert [line["step"] for line in directory.metrics() if "task/my_texts" in line] == [3, 4]


def test_a_better_checkpoint_without_results_removes_those_of_the_earlier(tmp_path: Path) -> None:
    run, directory = make_run(tmp_path, **SETTINGS, eval__tasks_every=3)
    run.eval_every = run.checkpoint_every = 1
    found: list[bool] = []
    with run:
        for _ in range(4):
            drive(run, [RESULT])
            assert run.recorder
            run.recorder.settle()
            found.append((directory.path / FILE).exists())
    # All validations have the same loss, and of equal ones the last is the best.
    assert found == [False, False, True, True]
    run, directory = make_run(tmp_path / "other", **SETTINGS, eval__tasks_every=2)
    run.eval_every = run.checkpoint_every = 1
    with run:
        drive(run, [RESULT] * 3)
        assert run.recorder
        run.recorder.settle()
    assert not (directory.path / FILE).exists()
    assert (directory.path / VALIDATION).exists()


def test_results_of_another_checkpoint_are_dropped_together(tmp_path: Path) -> None:
    job = make_job(tmp_path, eval__every=2, train__max_steps=4, track__wandb="off", **SETTINGS)
    directory = RunDirectory(start(job))
    with open_run(job) as run:
        drive(run, [RESULT] * 2)
        assert run.recorder
        run.recorder.settle()
    files = [directory.path / VALIDATION, directory.path / FILE]
    assert all(file.exists() for file in files)
    loss = next(line["val/loss"] for line in directory.metrics() if "val/loss" in line)
    drop_stale(files[0], loss, files[1:])
    assert all(file.exists() for file in files)
    drop_stale(files[0], loss + 0.1, files[1:])
    assert not any(file.exists() for file in files)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval.tasks": ["nothing"]}, "there is no task nothing"),
        ({"eval.tasks": ["my_letters"], "eval.task_path": "/nowhere"}, "--task-path /nowhere is not a folder"),
        ({"eval.tasks": ["mm_demo"], "data.val_fraction": 0.0}, "eval.tasks run at validations"),
    ],
)  # fmt: skip
def test_a_run_says_at_once_what_is_wrong_with_its_tasks(
    tmp_path: Path, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minimind_ray.tasks import suite

    class Manager:
        all_tasks: tuple[str, ...] = ()

    monkeypatch.setattr(suite, "_manager", Manager)  # lm-eval's takes seconds.
    with pytest.raises(UserError, match=message):
        make_job(tmp_path, **{key.replace(".", "__"): value for key, value in settings.items()})


@pytest.mark.parametrize(
    ("metric", "mode", "config", "message"),
    [
        ("task/mm_demo", None, {}, "mm_demo is not in eval.tasks; add it: --set 'eval.tasks=\\[mm_demo\\]'"),
        ("task/mm_demo", None, {"tasks": ["mm_demo"], "tasks_every": 2}, "leave eval.tasks_every out"),
        ("task/mm_demo", "min", {"tasks": ["mm_demo"]}, "judged by acc, of which more is better"),
        ("task/my_texts", None, {"tasks": ["my_texts"], "task_path": LOCAL}, "of which less is better"),
    ],
)
def test_a_sweep_says_at_once_that_a_task_cannot_judge_it(
    tmp_path: Path, metric: str, mode: Any, config: dict[str, Any], message: str
) -> None:
    base = make_config(tmp_path)
    base = base.model_copy(update={"eval": EvalConfig(**config)})
    with pytest.raises(UserError, match=message):
        plan_sweep(tmp_path / "sweep", base, [], SearchConfig(metric=metric, mode=mode))


def test_tasks_that_can_judge_a_sweep() -> None:
    config = EvalConfig(tasks=["mm_demo", "mm_repetition", "my_texts"], task_path=LOCAL)
    for name in ("mm_demo", "mm_repetition"):
        metric, mode = SearchConfig(metric=f"task/{name}").judged_by("sft")
        require_task(config, metric, mode)
    require_task(config, "task/my_texts", "min")


def test_each_run_of_the_tasks_draws_the_same_examples(tmp_path: Path) -> None:
    """my_choice puts two random examples before a question."""
    job = make_job(tmp_path, eval__tasks=["my_choice"], eval__task_path=LOCAL, eval__task_limit=5, eval__every=2,
                   train__max_steps=2, track__wandb="off")  # fmt: skip
    start(job)
    with open_run(job) as run:
        drive(run, [RESULT] * 2)
        first, second = (run.validation.tasks() for _ in range(2))
    assert first == second
