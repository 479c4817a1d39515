"""What W&B gets, read back from what was written offline, and from what a server on loopback was sent."""

from __future__ import annotations

import asyncio
import getpass
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
import wandb
from typer.testing import CliRunner

from minimind_ray.cli.main import app
from minimind_ray.cli.tune import run_plan
from minimind_ray.config.errors import UserError
from minimind_ray.config.load import load_config
from minimind_ray.config.schema import Config
from minimind_ray.config.trackers import ALERTS
from minimind_ray.stages.run import begin, run_here
from minimind_ray.sweep.compare import compare
from minimind_ray.sweep.export import to_json
from minimind_ray.sweep.publish import SweepRun, publish
from minimind_ray.sweep.resume import reopen_sweep
from minimind_ray.sweep.trials import Sweep, read_sweep
from minimind_ray.track.registry import Trackers, check_trackers
from minimind_ray.track.tracker import TrackedRun
from minimind_ray.track.wandb import WandbTracker, within_limit
from minimind_ray.track.wandb_files import sync_command
from minimind_ray.train.run import RunDirectory
from tests.jobs import make_config, make_job
from tests.sweep.synthetic import make_sweep
from tests.track.endpoint import Endpoint
from tests.track.reading import history, log_records, parse_record, records, summary, values
from tests.track.runs import fail_after_three_lines, line

KEY = "0" * 40


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No key, no settings of this machine's user, no proxy, and afterwards no run left open."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "nobody"))
    yield
    wandb.teardown()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Endpoint]]:
    """Makes this process talk to a new server with a key."""
    servers: list[Endpoint] = []

    def start(status: int = 200) -> Endpoint:
        wandb.teardown()  # What it was told of the server before.
        servers.append(Endpoint(status))
        monkeypatch.setenv("WANDB_BASE_URL", servers[-1].url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        return servers[-1]

    yield start
    wandb.teardown()
    for server in servers:
        server.close()


def config_of(out: Path, mode: str = "offline", **track: Any) -> Config:
    keys = {f"track.{key}": value for key, value in {"wandb": mode, **track}.items()}
    return load_config("sft", overrides={"out": str(out), "optim.lr": 1e-4, **keys})


def start(
    out: Path,
    mode: str = "offline",
    info: dict[str, Any] | None = None,
    lines: Sequence[dict[str, Any]] = (),
    samples: dict[int, list[str]] | None = None,
    **track: Any,
) -> WandbTracker:
    """A tracker of a run in `out`, begun or, with an identity in `info`, continued after `lines`."""
    out.mkdir(exist_ok=True)
    tracker, texts = WandbTracker(), samples or {}
    run = TrackedRun(config_of(out, mode, **track), info or {}, lambda: [(x, texts.get(x["step"], [])) for x in lines])
    assert tracker.open(run)
    return tracker


@pytest.mark.slow
@pytest.mark.unit
def test_an_offline_run_holds_config_metrics_samples_and_summary(tmp_path: Path) -> None:
    out = tmp_path / "a run"
    info = {
        "commit": "c0ffee",
        "versions": {"torch": "2.13"},
        "inputs": {"data.train": "/packs/1234", "data.val": None},
    }
    tracker = start(out, info=info, group="a sweep", tags=["x"], project="p")
    tracker.log(line(1))
    tracker.log(line(2, **{"val/loss": 1.5, "val/perplexity": 4.5}), ["春风", "a fox"])
    tracker.log(line(3, **{"val/loss": 1.7, "val/perplexity": 5.5}))
    tracker.finish("finished")

    [run] = [r.run for r in records(out) if r.HasField("run")]
    assert (run.project, run.run_group, run.job_type, run.display_name, list(run.tags)) == (
        "p", "a sweep", "sft", "a run", ["x"],
    )  # fmt: skip
    config = values(run.config.update)
    assert config["optim_lr"] == 1e-4
    assert config["versions_torch"] == "2.13"
    assert config["inputs_data_train"] == "/packs/1234"
    assert not [key for key, value in config.items() if "." in key or (isinstance(value, dict) and key != "_wandb")]

    rows = history(out)
    assert [row["_step"] for row in rows] == [1, 2, 3]
    assert [row["tokens"] for row in rows] == [100, 200, 300]
    assert rows[0]["timing/mfu"] == 0.5
    [table] = out.glob("wandb/*/files/media/table/*.json")
    assert json.loads(table.read_text()) == {
        "columns": ["step", "sample", "text"],
        "data": [[2, 1, "春风"], [2, 2, "a fox"]],
    }
    assert rows[1]["samples.path"] == f"media/table/{table.name}"

    axes = {r.metric.glob_name or r.metric.name: r.metric.step_metric for r in records(out) if r.HasField("metric")}
    assert axes == {"step": "", "tokens": "", "*": "tokens"}
    last = summary(out)
    assert (last["loss"], last["val/loss"], last["state"]) == (1 / 3, 1.7, "finished")
    assert (last["best/loss"], last["best/perplexity"], last["best/step"], last["best/tokens"]) == (1.5, 4.5, 2, 200)


@pytest.mark.slow
@pytest.mark.unit
def test_the_comparison_of_a_sweep_is_a_run_of_its_group(tmp_path: Path) -> None:
    sweep = read_sweep(make_sweep(tmp_path / "betas", failed=3, steps=10, examples=40))
    comparison = compare([sweep])
    for _ in range(2):  # As after `tune --resume`: the same W&B run, with one new part to send.
        publish(sweep, comparison)
    [run] = [r.run for r in records(sweep.path) if r.HasField("run")]
    assert run.run_id == json.loads((sweep.path / "sweep.json").read_text())["wandb"]["id"]
    assert (run.run_group, run.job_type, run.display_name) == ("betas", "sweep", "betas")
    [table] = sweep.path.glob("wandb/*/files/media/table/points_*.json")
    content = json.loads(table.read_text())
    rows = [dict(zip(content["columns"], row)) for row in content["data"]]
    assert [row["verdict"] for row in rows] == [row.verdict for row in comparison.rows]
    assert [row["val/loss low"] for row in rows] == [row.metric and row.metric.low for row in comparison.rows]
    last = summary(sweep.path)
    assert (last["winner"], last["state"]) == (to_json(comparison)["winner"], "finished")


@pytest.mark.slow
def test_tables_pages_and_alerts_over_the_wire(online: Callable[..., Endpoint], tmp_path: Path) -> None:
    server, page = online(), tmp_path / "report"
    page.write_text("<html><body>春风</body></html>", encoding="utf-8")
    tracker = start(tmp_path / "run", "online")
    tracker.log(line(1))
    tracker.log_table("importance", [{"key": "optim.lr", "share": 0.9}, {"key": "dpo.beta", "share": math.nan}])
    tracker.log_page("report", page)
    tracker.alert("the run failed", "CUDA is out of memory")
    tracker.finish("finished")
    [run] = server.runs.values()
    assert [row["_step"] for row in run.rows] == [1, 2, 3]
    assert {"columns": ["key", "share"], "data": [["optim.lr", 0.9], ["dpo.beta", None]]} in [
        json.loads(text) for text in server.uploads.values() if text.startswith('{"columns"')
    ]
    assert page.read_text(encoding="utf-8") in server.uploads.values()
    assert [(alert["title"], alert["text"]) for alert in server.alerts] == [("the run failed", "CUDA is out of memory")]


@pytest.mark.slow
def test_a_comparison_online_and_after_a_resume(online: Callable[..., Endpoint], tmp_path: Path) -> None:
    server = online()
    sweep = read_sweep(make_sweep(tmp_path / "betas", axes={"dpo.beta": "0.1,0.2"}, steps=10, examples=40))
    sweep.info.config["track"]["alerts"] = ["sweep-finished"]
    for ending in ("interrupted", "by itself"):
        publish(sweep, compare([sweep]), ending=ending)
    [run] = server.runs.values()
    assert [alert["title"] for alert in server.alerts] == [ALERTS["sweep-finished"]]
    assert [row["_step"] for row in run.rows] == list(range(4))
    assert run.summary["state"] == "finished"
    tables = [json.loads(text) for name, text in server.uploads.items() if "table/points" in name]
    assert [row[tables[0]["columns"].index("verdict")] for row in tables[0]["data"]].count("best") == 1


@pytest.mark.slow
def test_one_sync_sends_the_last_state_of_a_sweep_that_was_updated_offline(
    online: Callable[..., Endpoint], tmp_path: Path
) -> None:
    server, sweep = online(), read_sweep(make_sweep(tmp_path / "betas", axes={"dpo.beta": "0.1,0.2"}, steps=10))
    sweep.info.config["track"]["wandb"] = "offline"
    page = sweep.path / "report.html"
    run = SweepRun(sweep, sweep.path, 10.0)
    for number in range(3):
        page.write_text(f"<p>{number}</p>")
        run.send(sweep, compare([sweep], margin=number))
    run.finish("stopped")
    assert len(list(sweep.path.glob("wandb/*"))) == len(list(sweep.path.glob("wandb/**/*.html"))) == 1
    page.write_text("<p>end</p>")
    comparison = compare([sweep], margin=10.0)
    publish(sweep, comparison)  # The sweep has ended.
    sync(sweep.path)
    [sent] = server.runs.values()
    assert (sent.summary["equal_within"], sent.summary["state"]) == (10.0, "finished")
    assert sent.summary["report"]["_type"] == "html-file"
    assert sent.summary["trials/tokens"] == sum(trial.tokens for trial in sweep.trials)
    uploads = {re.sub(r"_\d+_\w+", "", name.rpartition("/")[2]): text for name, text in server.uploads.items()}
    shown = {"points.table.json", "answers.table.json", "report.html"}
    assert len([name for name in server.uploads if "media" in name]) == 3 and shown <= set(uploads)
    table = json.loads(uploads["points.table.json"])
    assert [row[table["columns"].index("verdict")] for row in table["data"]] == [row.verdict for row in comparison.rows]
    assert uploads["report.html"] == "<p>end</p>"
    assert sync_command(sweep.path) is None


@pytest.mark.slow
def test_a_running_sweep_is_a_running_run(online: Callable[..., Endpoint], tmp_path: Path) -> None:
    server, sweep = online(), read_sweep(make_sweep(tmp_path / "betas", axes={"dpo.beta": "0.1,0.2"}, steps=10))
    run = SweepRun(sweep, sweep.path, 10.0)
    for _ in range(2):
        run.send(sweep, compare([sweep]))
    [sent] = server.runs.values()
    assert sent.exit_code is None
    run.finish("stopped")
    assert (sent.exit_code, sent.summary["state"]) == (0, "stopped")
    publish(sweep, compare([sweep]))
    assert len(server.runs) == 1 and sent.summary["state"] == "finished"
    assert [row["_step"] for row in sent.rows] == list(range(6))
    assert ["points" in str(row) for row in sent.rows] == [True, False] * 3


@pytest.mark.slow
def test_a_sweep_gets_one_saved_view(
    online: Callable[..., Endpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = online()
    sweep = read_sweep(make_sweep(tmp_path / "it's=β", steps=10))
    comparison = compare([sweep])
    assert publish(sweep, comparison, ending="interrupted") == {}  # Its user waits.
    for _ in range(2):  # The second time as after a resume.
        [(title, url)] = publish(sweep, comparison, ending="by itself").items()
        assert title == "W&B" and url.startswith(f"{server.url}/{server.entity}/minimind-ray?nw=")
        assert json.loads((sweep.path / "sweep.json").read_text())["wandb"]["view"] == url
    [view] = server.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == (server.entity, "minimind-ray", "it's-β")
    content = json.loads(view["spec"])["section"]
    [shown] = content["runSets"]
    [of_group] = shown["filters"]["filters"]
    assert (of_group["key"]["name"], of_group["value"]) == ("group", "it's=β")
    panels = [panel for section in content["panelBankConfig"]["sections"] for panel in section["panels"]]
    found = {panel["viewType"]: panel["config"] for panel in panels}
    assert [(column["accessor"], column.get("log")) for column in found["Parallel Coordinates Plot"]["columns"]] == [
        ("config:dpo_beta.value", True), ("config:optim_lr.value", True), ("summary:best/loss", None),
    ]  # fmt: skip
    assert found["Parameter Importance"]["targetKey"] == "best/loss"
    scatters = [panel["config"] for panel in panels if panel["viewType"] == "Scatter Plot"]
    assert [(each["xAxis"], each["yAxis"]) for each in scatters] == [
        ("config:dpo_beta.value", "summary:best/loss"), ("config:optim_lr.value", "summary:best/loss"),
    ]  # fmt: skip
    curves = [panel["config"] for panel in panels if panel["viewType"] == "Run History Line Plot"]
    assert [(each["xAxis"], each["metrics"]) for each in curves] == [("tokens", ["val/loss"]), ("tokens", ["loss"])]
    assert {"Run Comparer", "Weave", "Media Browser"} <= set(found)
    assert not [path for path, *_ in server.requests if "otel" in path]

    def refused(*given: Any) -> str:
        raise PermissionError("no views\nfor you")

    monkeypatch.setattr("minimind_ray.track.wandb_views.save_view", refused)
    capsys.readouterr()
    other = read_sweep(make_sweep(tmp_path / "other", axes={"dpo.beta": "0.1,0.2"}, steps=10, examples=40))
    assert publish(other, compare([other]), ending="by itself") == {}
    assert capsys.readouterr().err == "W&B: the view of the sweep was not saved: no views for you\n"
    monkeypatch.setattr("minimind_ray.track.wandb.find_spec", lambda name: None)  # Without the extra.
    assert publish(other, compare([other]), ending="by itself") == {}
    assert capsys.readouterr().err == ""
    assert [run.summary["state"] for run in server.runs.values()] == ["finished", "finished"]


def tracked_sweep(directory: Path) -> Sweep:
    """A sweep of two points whose trials have been tracked offline."""
    path = make_sweep(directory, axes={"dpo.beta": "0.1,0.2"}, seeds=1, steps=10, examples=40)
    for trial in read_sweep(path).trials:
        run = RunDirectory(trial.path)
        tracker = WandbTracker()
        identity = tracker.open(TrackedRun(config_of(trial.path), run.info(), run.lines))
        tracker.finish("finished")
        run.update(wandb=identity)
    return read_sweep(path)


@pytest.mark.slow
@pytest.mark.parametrize("sent_before", [False, True])
def test_a_trials_run_gets_the_facts_of_its_point(
    sent_before: bool, online: Callable[..., Endpoint], tmp_path: Path
) -> None:
    """Offline, also if the trials were sent before the sweep had ended; a resumed sweep replaces the facts."""
    server, sweep = online(), tracked_sweep(tmp_path / "betas")
    if sent_before:
        sync(sweep.path)
    sweep.info.config["track"]["wandb"] = "offline"
    for trial in sweep.trials:
        config = (trial.path / "config.yaml").read_text().replace("wandb: auto", "wandb: offline")
        (trial.path / "config.yaml").write_text(config)
    comparison = compare([sweep])
    publish(sweep, compare([sweep], margin=10.0))
    publish(sweep, comparison)
    sync(sweep.path)
    for row in comparison.rows:
        [trial] = row.trials
        assert row.metric
        run = server.runs[json.loads((trial.path / "run.json").read_text())["wandb"]["id"]]
        shown = {name: run.summary[f"point/{name}"] for name in ("verdict", "val/loss_low", "val/loss_high", "seeds")}
        assert shown == {
            "verdict": row.verdict, "val/loss_low": row.metric.low, "val/loss_high": row.metric.high, "seeds": 1,
        }  # fmt: skip
        assert run.summary["point/val/loss"] == pytest.approx(run.summary["best/loss"])
        assert (run.summary["val/loss"], run.summary["state"]) == (trial.metrics[-1]["val/loss"], "finished")
        assert [line["_step"] for line in run.rows] == list(range(11))
    assert len(server.runs) == 3


@pytest.mark.slow
def test_online_a_trials_summary_grows_and_no_line_is_sent_twice(
    online: Callable[..., Endpoint], tmp_path: Path
) -> None:
    sweep, server = tracked_sweep(tmp_path / "betas"), online()
    for _ in range(2):
        publish(sweep, compare([sweep]))
    ids = [json.loads((trial.path / "run.json").read_text())["wandb"]["id"] for trial in sweep.trials]
    for run in (server.runs[id] for id in ids):
        assert [line["_step"] for line in run.rows] == list(range(11))
        assert run.summary["point/verdict"] and run.summary["best/loss"] and run.summary["val/loss"]
    assert len(server.runs) == 3 and sync_command(sweep.path) is None


@pytest.mark.slow
@pytest.mark.unit
def test_sending_the_facts_of_trials_is_bounded_in_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tracked_sweep(tmp_path / "betas")
    publish(sweep, compare([sweep]), seconds=0.0)
    said = capsys.readouterr().err
    assert "not to the runs of 2 trial(s)" in said and f"tune --resume {sweep.path} sends it to all" in said
    assert summary(sweep.path)["state"] == "finished"
    assert "point/verdict" not in summary(sweep.trials[0].path)


@pytest.mark.slow
def test_a_comparison_that_cannot_be_sent_is_said_and_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_sweep(tmp_path / "betas", axes={"dpo.beta": "0.1,0.2"}, steps=10, examples=40)
    content = json.loads((path / "sweep.json").read_text())
    content["config"]["track"]["wandb"] = "online"
    (path / "sweep.json").write_text(json.dumps(content))
    sweep = read_sweep(path)
    publish(sweep, compare([sweep]))
    assert "the comparison was not sent: track.wandb is online, but there is no key" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.unit
def test_records_are_what_wandb_itself_reads(tmp_path: Path) -> None:
    tracker = start(tmp_path)
    long = "x" * 70_000  # More than two blocks.
    for step in range(1, 200):
        tracker.log(line(step, note=long if step == 50 else "short"))
    tracker.finish("finished")
    [file] = tmp_path.glob("wandb/*run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", str(file), "--json"]
    read = [
        json.loads(x)
        for x in subprocess.run(command, capture_output=True, check=True, text=True, cwd=tmp_path).stdout.splitlines()
    ]
    assert [r["history"]["item"]["note"] for r in read if r["type"] == "history"] == [
        r["note"] for r in history(tmp_path)
    ]
    assert [r["num"] for r in read] == [r.num for r in records(tmp_path)]


@pytest.mark.slow
@pytest.mark.unit
def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    """Also when the steps after the checkpoint had been logged already, or W&B died before it wrote the last ones."""
    lines = [line(step) for step in range(1, 13)]
    tracker = start(tmp_path)
    info = {"wandb": tracker.identity}
    for each in lines[:6]:
        tracker.log(each)
    tracker.finish("stopped")

    # Back to the checkpoint after step 4, though W&B was given 6. The run is killed: the file loses its end.
    tracker = start(tmp_path, info=info, lines=lines[:4])
    for each in lines[4:9]:
        tracker.log(each)
    tracker.finish("stopped")
    [file] = tmp_path.glob("wandb/*run-*/*.wandb")
    ends = {parse_record(data).history.step.num: end for data, end in log_records(file.read_bytes())}
    os.truncate(file, ends[8] - 3)
    assert [row["step"] for row in history(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]

    # On from the checkpoint after step 9: what W&B lost comes from metrics.jsonl.
    tracker = start(tmp_path, info=info, lines=lines[:9], samples={4: ["old"], 9: ["lost"]})
    for each in lines[9:]:
        tracker.log(each)
    tracker.finish("finished")
    assert [row["step"] for row in history(tmp_path)] == list(range(1, 13))
    tables = [json.loads(file.read_text())["data"] for file in tmp_path.glob("wandb/*/files/media/table/*.json")]
    assert sorted(tables) == [[[4, 1, "old"]], [[9, 1, "lost"]]]
    assert {r.run.run_id for r in records(tmp_path) if r.HasField("run")} == {info["wandb"]["id"]}


@pytest.mark.unit
@pytest.mark.slow
def test_two_runs_are_two_also_in_one_directory_after_another(tmp_path: Path) -> None:
    first, second = [], []
    for ids in (first, second):
        tracker = start(tmp_path)
        ids.append(tracker.identity["id"])
        tracker.finish("finished")
    assert first != second


@pytest.mark.slow
def test_a_process_takes_no_part_in_its_parents_w_and_b(tmp_path: Path) -> None:
    wandb.teardown()
    left_open = start(tmp_path).identity
    assert os.environ["WANDB_SERVICE"]  # W&B tells child processes by it; there the run is in use.
    child = f"""
from pathlib import Path
from tests.track.test_wandb import start
start(Path({str(tmp_path)!r}), info={{"wandb": {left_open!r}}}).finish("finished")
"""
    subprocess.run([sys.executable, "-c", child], check=True, timeout=60)
    assert summary(tmp_path)["state"] == "finished"


@pytest.mark.slow
@pytest.mark.unit
def test_an_exception_while_it_opens_marks_the_run_failed(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[dict[str, Any], list[str]]]:
        yield line(1), []
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        WandbTracker().open(TrackedRun(config_of(tmp_path), {}, broken))
    assert summary(tmp_path)["state"] == "failed"


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_lineage_is_logged_by_reference(mode: str, online: Callable[..., Endpoint], tmp_path: Path) -> None:
    """Online the data and the base are inputs of the run; offline only the config names them."""
    server = online()
    data, model = tmp_path / ("a" * 40), tmp_path / "base" / "checkpoints" / "step-00000002"
    for folder in (data, model / "resume"):
        folder.mkdir(parents=True)
    (data / "manifest.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "base" / "run.json").write_text(json.dumps({"wandb": {"id": "theirs"}}))
    out = tmp_path / "run"
    out.mkdir()
    info = {"inputs": {"data.train": str(data), "data.val": None, "init_from": "fingerprint"}}
    tracker = WandbTracker()
    assert tracker.open(TrackedRun(config_of(out, mode, artifacts=True), info, base=model))
    result = out / "checkpoints" / "step-00000001"
    (result / "resume").mkdir(parents=True)
    (result / "model.safetensors").write_bytes(b"other weights")
    (out / "run.json").write_text(json.dumps({"wandb": tracker.identity}))
    tracker.finish("finished", result)

    inputs = {"data-aaaaaaaaaaaaaaaa": data / "manifest.json", "model-theirs": model / "model.safetensors"}
    files = {f"model-{tracker.identity['id']}": result / "model.safetensors"}
    if mode == "online":
        config = server.runs[str(tracker.identity["id"])].config
        assert server.used == list(inputs)
        files |= inputs
        contents = {name: json.loads(server.uploads[f"{name}/manifest"])["contents"] for name in files}
        refs = {name: [entry["ref"] for entry in entries.values()] for name, entries in contents.items()}
        assert {a["artifactCollectionName"] for a in server.artifacts} == files.keys()
    else:
        [config] = [values(r.run.config.update) for r in records(out) if r.HasField("run")]
        artifacts = {r.artifact.name: r.artifact for r in records(out) if r.HasField("artifact")}
        refs = {name: [content.ref for content in a.manifest.contents] for name, a in artifacts.items()}
    assert refs == {name: [file.as_uri()] for name, file in files.items()}
    assert (config["inputs_data_train"], config["inputs_init_from"]) == (str(data), "fingerprint")


@pytest.mark.unit
@pytest.mark.parametrize(
    ("mode", "variable", "kind"),
    [("off", None, None), ("auto", None, "offline"), ("auto", "WANDB_MODE=disabled", None),
     ("auto", "WANDB_MODE=offline", "offline"), ("offline", "WANDB_MODE=disabled", "offline"),
     ("auto", "WANDB_DISABLED=True", None), ("auto", "WANDB_DISABLED=false", "offline"),
     ("offline", "WANDB_DISABLED=true", "offline")],
)  # fmt: skip
def test_modes_without_a_key(
    mode: str, variable: str | None, kind: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable:
        monkeypatch.setenv(*variable.split("="))
    identity = WandbTracker().open(TrackedRun(config_of(tmp_path, mode), {}))
    assert (identity and identity["mode"]) == kind


@pytest.mark.unit
@pytest.mark.parametrize(
    "variable",
    ["WANDB_MODE=true", "WANDB_MODE=Offline", "WANDB_BASE_URL=my.server", "WANDB_CONSOLE=x", "WANDB_INIT_TIMEOUT=soon",
     "WANDB_SILENT=maybe", "WANDB_PROJECT=a/b", "WANDB_FORK_FROM=x?_step=3", "WANDB_DISABLED=maybe",
     "WANDB_API_KEY= of mine"],
)  # fmt: skip
def test_a_refused_variable_is_named_before_a_run_is_made(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    wandb.teardown()
    name, value = variable.split("=", 1)
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"track.wandb is online, but W&B refuses the environment variable {name}: "):
        check_trackers(config_of(tmp_path, "online"))
    for mode in ("off", "offline", "auto"):
        monkeypatch.setenv(name, value)
        monkeypatch.delenv("WANDB_MODE", raising=name == "WANDB_MODE")
        monkeypatch.setenv(name, value)
        check_trackers(config_of(tmp_path, mode))
        said = capfd.readouterr().err
        assert (name in said and said.count("\n") == 1 and "logging offline" in said) == (mode != "off")
        assert "of mine" not in said
    tracker = start(tmp_path)
    tracker.finish("finished")
    assert summary(tmp_path)["state"] == "finished" and not capfd.readouterr().err


@pytest.mark.unit
def test_a_failure_of_w_and_b_is_said_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the service is gone")

    trackers = Trackers(TrackedRun(config_of(tmp_path), {}))
    with monkeypatch.context() as broken:
        broken.setattr(wandb.Run, "log", fail)
        for step in (1, 2):
            trackers.log(line(step), [])
    trackers.finish("finished")
    assert capfd.readouterr().err == ("W&B cannot be used: the service is gone; the run continues without it\n")
    monkeypatch.setattr(wandb, "init", fail)
    assert not Trackers(TrackedRun(config_of(tmp_path / "next"), {}, lambda: [(line(1), [])])).identities
    assert "the service is gone" in capfd.readouterr().err
    with pytest.raises(UserError, match="track.wandb is online, but"):
        Trackers(TrackedRun(config_of(tmp_path / "next", "online"), {}))


@pytest.mark.unit
def test_names_too_long_for_w_and_b_stay_distinct() -> None:
    assert within_limit("x" * 128) == "x" * 128
    first, second = (within_limit("x" * 200 + end) for end in "ab")
    assert first != second and len(first) == len(second) == 128


@pytest.mark.unit
@pytest.mark.parametrize(
    ("key", "reason"), [(None, "there is no key: run `wandb login`"), ("short", "API key must have 40+ characters")]
)
def test_online_without_a_usable_key_is_the_users_error(
    key: str | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    with pytest.raises(UserError, match="track.wandb is online, but") as error:
        start(tmp_path, "online")
    assert reason in str(error.value)
    with pytest.raises(UserError, match="track.wandb is online, but") as before:
        check_trackers(config_of(tmp_path, "online"))
    assert str(before.value) == str(error.value)
    check_trackers(config_of(tmp_path, "auto"))
    assert capfd.readouterr() == ("", "")
    if key:  # With auto it is said, and the run goes on offline.
        assert start(tmp_path, "auto").run.offline
        assert "logging offline" in capfd.readouterr().err


@pytest.mark.unit
def test_without_a_key_no_run_is_made(tmp_path: Path) -> None:
    wandb.teardown()  # It remembers the key that a test before this one gave it.
    make_config(tmp_path)
    out = tmp_path / "out"
    arguments = ["train", "pretrain", "--train", str(tmp_path / "pretrain.jsonl"), "--tokenizer"]
    arguments += [str(tmp_path / "tokenizer"), "--wandb", "online", "--no-ray", "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UserError) and "there is no key" in str(result.exception)
    assert not out.exists()
    recipe = tmp_path / "recipe.yaml"
    stages = [{"name": "pretrain", "settings": {"data": {"train": "pretrain.jsonl"}}}]
    settings = {"track": {"wandb": "online"}}
    recipe.write_text(
        json.dumps({"name": "r", "tokenizer": str(tmp_path / "tokenizer"), "settings": settings, "stages": stages})
    )
    result = CliRunner().invoke(app, ["run", str(recipe), "--data-dir", str(tmp_path), "--no-ray", "--out", str(out)])
    assert isinstance(result.exception, UserError) and "there is no key" in str(result.exception)
    assert not out.exists()


@pytest.mark.unit
def test_what_the_environment_says_of_w_and_b(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "")
    with pytest.raises(UserError, match="there is no key"):
        check_trackers(config_of(tmp_path, "online"))
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
    # A cluster's machines may have one.
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check_trackers(config_of(tmp_path, "online"))


@pytest.mark.unit
def test_the_sync_command_names_what_waits(tmp_path: Path) -> None:
    def pending(run: str, kind: str = "offline-run") -> Path:
        file = tmp_path / run / "wandb" / f"{kind}-20260101_000000-id" / "run-id.wandb"
        file.parent.mkdir(parents=True)
        file.touch()
        return file

    assert sync_command(tmp_path) is None
    pending("online", "run")
    assert sync_command(tmp_path) is None
    first = pending("my sweep/trials/1")
    one = f"wandb sync '{tmp_path}/my sweep/trials/1/wandb'"
    assert sync_command(tmp_path / "my sweep" / "trials" / "1") == one
    assert sync_command(tmp_path) == one
    pending("my sweep/trials/2")
    assert sync_command(tmp_path / "my sweep") == f"wandb sync '{tmp_path}/my sweep/trials'/*/wandb"
    comparison = pending("my sweep")
    both = f"wandb sync '{tmp_path}/my sweep'/wandb '{tmp_path}/my sweep'/*/*/wandb"
    assert sync_command(tmp_path / "my sweep") == both
    comparison.unlink()
    pending("pretrain")
    assert sync_command(tmp_path) == f"wandb sync {tmp_path}/*/wandb {tmp_path}/*/*/*/wandb"
    first.with_suffix(".wandb.synced").touch()
    assert sync_command(first.parents[1]) is None


@pytest.mark.slow
def test_a_training_run_that_fails_and_goes_on_is_one_run_with_the_steps_of_metrics_jsonl(tmp_path: Path) -> None:
    settings = {"track.wandb": "offline", "track.artifacts": True, "checkpoint.every": 2}
    settings |= {"eval.every": 2, "eval.samples": 1}
    job = make_job(tmp_path, rows=150, **settings)
    run = begin(job, resume=False)
    fail_after_three_lines(job, run)
    assert summary(run.path)["state"] == "failed"
    begin(job, resume=True)
    run_here(job)

    expected = [(line["step"], line["tokens"], line["loss"], line["timing"]["mfu"]) for line in run.metrics()]
    start, *rows = history(run.path)
    assert start["step"] == 0  # It has the answers of the model before the first step.
    got = [(row["step"], row["tokens"], row["loss"], row["timing/mfu"]) for row in rows]
    assert got[:2] + got[3:] == expected[:2] + expected[3:]
    assert got[2][:3] == expected[2][:3]  # Logged before the failure, so with that attempt's timing.
    tables = [json.loads(path.read_text())["data"] for path in run.path.glob("wandb/*/files/media/table/*.json")]
    assert sorted(tables) == [[[s["step"], 1, s["samples"][0]]] for s in run.samples()]
    ended = summary(run.path)
    best = min((line for line in run.metrics() if "val/loss" in line), key=lambda line: line["val/loss"])
    assert (ended["state"], ended["best/loss"], ended["best/step"]) == ("finished", best["val/loss"], best["step"])
    artifacts = [r.artifact for r in records(run.path) if r.HasField("artifact")]
    [model] = [artifact for artifact in artifacts if artifact.type == "model"]
    assert model.name == f"model-{run.info()['wandb']['id']}"


@pytest.mark.slow
def test_online_and_resumed_over_the_wire(online: Callable[..., Endpoint], tmp_path: Path) -> None:
    server = online()
    tracker = start(tmp_path, "online", group="g")
    info = {"wandb": tracker.identity}
    assert info["wandb"]["url"].startswith(f"{server.url}/someone/minimind-ray/runs/")
    for step in range(1, 7):
        tracker.log(line(step), ["春风"] if step == 3 else [])
    tracker.finish("stopped")
    tracker = start(tmp_path, "online", info, [line(s) for s in range(1, 5)], group="g")
    for step in range(5, 9):
        tracker.log(line(step))
    tracker.finish("finished")

    [(name, run)] = server.runs.items()
    assert name == info["wandb"]["id"]
    assert [row["_step"] for row in run.rows] == list(range(1, 9))
    assert (run.exit_code, run.summary["state"], run.summary["step"]) == (0, "finished", 8)
    assert run.config["optim_lr"] == 1e-4
    assert {(u["groupName"], u["jobType"]) for u in run.upserts if u["groupName"]} == {("g", "sft")}
    assert "春风" in "".join(server.uploads.values())

    # Nothing but the run: no telemetry, and nothing that tells the machine or its user.
    assert {path.split("/")[1] for path, _, _ in server.requests} == {"graphql", "files", "upload"}
    sent = "".join(f"{headers}{body}" for _, headers, body in server.requests)
    for private in (socket.gethostname(), getpass.getuser(), sys.executable, Path(__file__).name):
        assert not re.search(rf"(?<![\w/+=]){re.escape(private)}(?![\w/+=])", sent)
    assert not {u["host"] or u["program"] or u["repo"] or u["commit"] for u in run.upserts} - {None}


@pytest.mark.slow
def test_stop_in_the_web_page_asks_for_a_stop(
    online: Callable[..., Endpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # W&B looks every 15 s.
    monkeypatch.setattr("wandb.sdk.lib.run_stopping._SLEEP", lambda seconds: asyncio.sleep(0.05))
    online().stopped = True
    tracker = start(tmp_path, "online")
    deadline = time.monotonic() + 20
    while not tracker.stop_requested and time.monotonic() < deadline:
        time.sleep(0.01)
    assert tracker.stop_requested
    tracker.finish("stopped")


@pytest.mark.slow
def test_a_killed_and_resumed_offline_run_is_sent_whole_by_the_sync_command(
    online: Callable[..., Endpoint], tmp_path: Path
) -> None:
    tracker = start(tmp_path)
    info = {"wandb": tracker.identity}
    for step in range(1, 7):
        tracker.log(line(step), ["春风"] if step == 3 else [])
    tracker.finish("running")
    [file] = tmp_path.glob("wandb/*/*.wandb")
    os.truncate(file, file.stat().st_size - 5)
    tracker = start(tmp_path, info=info, lines=[line(s) for s in range(1, 5)], samples={3: ["春风"]})
    for step in range(5, 9):
        tracker.log(line(step))
    tracker.alert("a sweep has finished", "6 finished")
    tracker.finish("finished")

    server = online()
    sync(tmp_path)
    assert [alert["text"] for alert in server.alerts] == ["6 finished"]
    [(name, run)] = server.runs.items()
    assert name == info["wandb"]["id"]
    assert [row["_step"] for row in run.rows] == list(range(1, 9))
    assert (run.exit_code, run.summary["state"]) == (0, "finished")
    assert "春风" in "".join(server.uploads.values())
    assert sync_command(tmp_path) is None


@pytest.mark.slow
def test_a_part_sent_between_two_starts_is_not_sent_again(
    online: Callable[..., Endpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first start was killed, so the file that is sent lacks its end; the second is sent before a third."""
    server = online()
    monkeypatch.setenv("WANDB_MODE", "offline")
    info: dict[str, Any] = {}
    for first, killed_at, last in ((1, 4, 6), (5, 8, 8), (9, 12, 12)):
        tracker = start(tmp_path, info=info, lines=[line(s) for s in range(1, first)])
        info = {"wandb": tracker.identity}
        for step in range(first, last + 1):
            tracker.log(line(step))
        tracker.finish("running")
        if killed_at < last:
            file = max(tmp_path.glob("wandb/*/*.wandb"))
            ends = {parse_record(data).history.step.num: end for data, end in log_records(file.read_bytes())}
            os.truncate(file, ends[killed_at] + 3)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        sync(tmp_path)
        monkeypatch.setenv("WANDB_MODE", "offline")
    [run] = server.runs.values()
    assert [row["_step"] for row in run.rows] == list(range(1, 13))
    assert sync_command(tmp_path) is None


@pytest.mark.slow
def test_what_waited_offline_is_sent_by_a_resume_that_is_online(
    online: Callable[..., Endpoint], tmp_path: Path
) -> None:
    tracker = start(tmp_path)
    info = {"wandb": tracker.identity}
    for step in range(1, 5):
        tracker.log(line(step))
    tracker.finish("stopped")
    server = online()
    tracker = start(tmp_path, "online", info, [line(step) for step in range(1, 5)])
    tracker.log(line(5))
    tracker.finish("finished")
    [run] = server.runs.values()
    assert [row["_step"] for row in run.rows] == [1, 2, 3, 4, 5]
    assert sync_command(tmp_path) is None


def sync(directory: Path) -> None:
    """Run the command that a user is given."""
    command = sync_command(directory)
    assert command
    command = command.replace("wandb", f"{sys.executable} -m wandb", 1)
    subprocess.run(command, shell=True, check=True, timeout=60, cwd=directory)


@pytest.mark.slow
def test_a_server_that_refuses_the_key_is_the_users_error(
    online: Callable[..., Endpoint], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    online(status=401)
    with pytest.raises(UserError, match=r"track\.wandb is online, but W&B cannot be used: .*401"):
        start(tmp_path, "online")
    tracker = start(tmp_path, "auto")
    assert tracker.run.offline
    assert "401" in capfd.readouterr().err


@pytest.mark.slow
def test_no_server_is_an_error_within_bounds(
    online: Callable[..., Endpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minimind_ray.track.wandb.CONNECT_SECONDS", 1)
    online().close()
    with pytest.raises(UserError, match="connection refused"):
        start(tmp_path, "online")


@pytest.mark.slow
def test_a_server_lost_in_mid_run_costs_a_bounded_wait_at_the_end(
    online: Callable[..., Endpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("minimind_ray.track.wandb.FINISH_SECONDS", 1)
    server = online()
    tracker = start(tmp_path, "online")
    tracker.log(line(1))
    server.close()
    tracker.log(line(2))
    tracker.finish("finished")
    said = capfd.readouterr().err
    command = said[said.index("wandb sync") :].strip()
    server = online()
    subprocess.run(
        command.replace("wandb", f"{sys.executable} -m wandb", 1), shell=True, check=True, timeout=60, cwd=tmp_path
    )
    [run] = server.runs.values()
    assert [row["_step"] for row in run.rows] == [1, 2]


@pytest.mark.slow
@pytest.mark.unit
def test_an_interrupted_sweep_sends_what_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tracked_sweep(tmp_path / "betas")
    for trial in sweep.trials:
        facts = json.loads((trial.path / "trial.json").read_text())
        (trial.path / "trial.json").write_text(json.dumps({**facts, "number": trial.seed}))
    content = json.loads((sweep.path / "sweep.json").read_text())
    (sweep.path / "sweep.json").write_text(json.dumps({**content, "search": {"seeds": 1}}))
    monkeypatch.setattr("minimind_ray.sweep.run.sweep_on_ray", lambda *_, **__: "interrupted")
    with pytest.raises(typer.Exit) as ending:
        run_plan(reopen_sweep(sweep.path), resume=True)
    assert ending.value.exit_code == 130
    said = capsys.readouterr().out
    assert said.index("interrupted; continue with") < said.index("send it to W&B: wandb sync")
    assert summary(sweep.path)["winner"] == to_json(compare([sweep]))["winner"]
    assert [summary(trial.path)["point/seeds"] for trial in sweep.trials] == [1, 1]
    # Sent again, after a resume, the run of the sweep is the same.
    run_id = json.loads((sweep.path / "sweep.json").read_text())["wandb"]["id"]
    monkeypatch.setattr("minimind_ray.sweep.run.sweep_on_ray", lambda *_, **__: "by itself")
    run_plan(reopen_sweep(sweep.path), resume=True)
    assert {r.run.run_id for r in records(sweep.path) if r.HasField("run")} == {run_id}
