"""What TensorBoard shows, read back by its own reader."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from minimind_ray.config.errors import UserError
from minimind_ray.config.load import load_config
from minimind_ray.config.schema import Config
from minimind_ray.stages.run import begin, run_here
from minimind_ray.sweep.compare import compare
from minimind_ray.sweep.publish import publish
from minimind_ray.sweep.trials import read_sweep
from minimind_ray.track.registry import check_trackers
from minimind_ray.track.tensorboard import TensorboardTracker
from minimind_ray.track.tracker import TrackedRun
from minimind_ray.train.run import RunDirectory
from tests.jobs import make_job
from tests.sweep.synthetic import make_sweep
from tests.track.runs import fail_after_three_lines, line

pytestmark = pytest.mark.unit


def config_of(out: Path, **settings: Any) -> Config:
    return load_config("sft", overrides={"out": str(out), "track.to": ["tensorboard"], "optim.lr": 1e-4, **settings})


def start(
    out: Path, lines: Sequence[dict[str, Any]] = (), samples: dict[int, list[str]] | None = None
) -> TensorboardTracker:
    tracker, texts = TensorboardTracker(), samples or {}
    earlier = [(each, texts.get(each["step"], [])) for each in lines]
    assert tracker.open(TrackedRun(config_of(out), {"commit": "c0ffee"}, lambda: earlier))
    return tracker


def shown(out: Path) -> EventAccumulator:
    """All event files of a run, as TensorBoard reads them, without leaving any step out."""
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    return events.Reload()


def curve(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(tag)]


def texts(events: EventAccumulator, tag: str) -> list[tuple[int, str]]:
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(tag)]


def test_a_run_has_curves_config_and_texts(tmp_path: Path) -> None:
    tracker = start(tmp_path)
    tracker.log(line(1, warning="a | b"))
    tracker.log(line(2, **{"val/loss": 1.5, "val/perplexity": 4.5}), ["春风\n# a fox", "x"])
    tracker.log(line(3, **{"val/loss": float("nan")}))
    tracker.finish("finished")
    events = shown(tmp_path)
    assert curve(events, "loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert curve(events, "tokens") == [(1, 100), (2, 200), (3, 300)]
    assert curve(events, "timing/mfu") == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert (curve(events, "best/loss"), curve(events, "best/step")) == ([(3, 1.5)], [(3, 2)])
    assert texts(events, "samples/1") == [(2, "    春风\n    # a fox\n")]
    assert texts(events, "warning") == [(1, "a | b")]
    assert "| state | finished |" in texts(events, "summary")[0][1]
    [(_, config)] = texts(events, "config")
    assert "| optim.lr | 0.0001 |" in config and "| commit | c0ffee |" in config and "| job_type | sft |" in config
    plugin = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = HParamsPluginData.FromString(plugin).session_start_info.hparams
    assert (hparams["optim.lr"].number_value, hparams["stage"].string_value) == (1e-4, "sft")


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    """After a stop, and after a kill that left steps after the checkpoint, and half a record."""
    lines = [line(step) for step in range(1, 13)]
    tracker = start(tmp_path)
    for each in lines[:4]:
        tracker.log(each)
    tracker.finish("stopped")
    running = shown(tmp_path)  # As in a TensorBoard that shows the run the whole time.
    before = {event.step: event.wall_time for event in running.Scalars("loss")}

    tracker = start(tmp_path, lines[:4])
    for each in lines[4:9]:
        tracker.log(each)
    *_, file = sorted((tmp_path / "tensorboard").iterdir())
    for read in (shown(tmp_path), running.Reload()):
        assert [event.step for event in read.Scalars("loss")] == list(range(1, 10))  # Killed here.
    os.truncate(file, file.stat().st_size - 5)

    tracker = start(tmp_path, lines[:6], {4: ["old"]})
    for each in lines[6:]:
        tracker.log(each)
    tracker.finish("finished")
    events = shown(tmp_path)
    for read in (events, running.Reload()):
        assert curve(read, "loss") == [(each["step"], each["loss"]) for each in lines]
        assert [event.step for event in read.Scalars("tokens")] == list(range(1, 13))
    assert texts(events, "samples/1") == [(4, "    old\n")]
    assert {event.step: event.wall_time for event in events.Scalars("loss") if event.step in before} == before


def test_a_damaged_file_is_written_anew(tmp_path: Path) -> None:
    start(tmp_path, [line(1), line(2)]).finish("stopped")
    [file] = (tmp_path / "tensorboard").iterdir()
    content = bytearray(file.read_bytes())
    content[60:62] = b"\xff\xff"
    file.write_bytes(content)
    start(tmp_path, [line(1), line(2)]).finish("finished")
    assert curve(shown(tmp_path), "loss") == [(1, 1.0), (2, 0.5)]


@pytest.mark.slow
def test_a_training_run_that_fails_and_goes_on_has_the_steps_of_metrics_jsonl(tmp_path: Path) -> None:
    settings = {"track.to": ["tensorboard"], "checkpoint.every": 2, "eval.every": 2, "eval.samples": 1}
    job = make_job(tmp_path, rows=150, **settings)
    run = begin(job, resume=False)
    fail_after_three_lines(job, run)
    begin(job, resume=True)
    run_here(job)
    events = shown(run.path)
    assert curve(events, "loss") == [(each["step"], each["loss"]) for each in run.metrics()]
    assert [step for step, _ in texts(events, "samples/1")] == [each["step"] for each in run.samples()]


def test_a_sweep_has_its_table_and_its_trials_have_the_facts_of_their_points(tmp_path: Path) -> None:
    path = make_sweep(tmp_path / "betas", axes={"dpo.beta": "0.1,0.2"}, seeds=1, steps=10, examples=40)
    content = json.loads((path / "sweep.json").read_text())
    content["config"]["track"]["to"] = ["tensorboard"]
    (path / "sweep.json").write_text(json.dumps(content))
    for file in path.glob("trials/*/config.yaml"):
        file.write_text(file.read_text().replace("- wandb", "- tensorboard"))
    for trial in read_sweep(path).trials:
        run = RunDirectory(trial.path)
        tracker = TensorboardTracker()
        run.update(tensorboard=tracker.open(TrackedRun(config_of(trial.path), run.info(), run.lines)))
        tracker.finish("finished")
    sweep = read_sweep(path)
    comparison = compare([sweep])
    for _ in range(2):
        publish(sweep, comparison)
    [(_, table)] = texts(shown(path), "points")
    assert table.count("\n") == 3 and all(str(row.verdict) in table for row in comparison.rows)
    for row in comparison.rows:
        events = shown(row.trials[0].path)
        assert row.metric and curve(events, "point/val/loss") == [(10, row.metric.value)]
        assert [event.step for event in events.Scalars("loss")] == list(range(1, 11))


def test_tensorboard_that_is_not_installed_is_the_users_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("minimind_ray.track.tracker.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tensorboard, which is not installed: pip install 'minimind-ray\[tensorboard"):
        check_trackers(config_of(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # The cluster's machines may have it.
    check_trackers(config_of(tmp_path))
    with pytest.raises(UserError, match="not installed"):
        start(tmp_path)


@pytest.mark.slow
def test_neither_torch_nor_tensorflow_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys; from minimind_ray.config.load import load_config;"
        "from minimind_ray.track.tensorboard import TensorboardTracker;"
        "from minimind_ray.track.tracker import TrackedRun;"
        f"TensorboardTracker().open(TrackedRun(load_config('sft', overrides={{'out': {str(tmp_path)!r}}}), {{}}));"
        "assert not {'torch', 'tensorflow', 'wandb'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
