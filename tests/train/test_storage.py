"""Runs in an object store, against an S3 server on loopback: as on a local disk, also when the store fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs
from typer.testing import CliRunner

from minimind_ray.cli.main import app
from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import ModelConfig
from minimind_ray.data import storage
from minimind_ray.data.files import locate
from minimind_ray.data.storage import copy_of
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.checkpoint import model_fingerprint, save_model
from minimind_ray.model.transformer import Transformer
from minimind_ray.stages.base import resolve_base
from minimind_ray.stages.recipe import set_aside
from minimind_ray.stages.run import Job, run_here
from minimind_ray.sweep.compare import compare
from minimind_ray.sweep.live import LiveReport
from minimind_ray.sweep.publish import facts, publish
from minimind_ray.sweep.trials import read_sweep
from minimind_ray.sweep.watch import WatchedReport
from minimind_ray.train.bundle import pack, unpack
from minimind_ray.train.context import PlainContext
from minimind_ray.train.run import RunDirectory, file_sha256, resolve_model
from tests.hub import Hub
from tests.jobs import make_config, make_job, make_tokenizer, start
from tests.store import Store, names
from tests.sweep.synthetic import make_sweep

pytestmark = pytest.mark.slow

URL = "s3://bucket/runs/x"


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    store = Store()
    yield store
    store.close()


def locate_impatiently(url: str) -> tuple[fs.FileSystem, str]:
    """As `locate`, but the store's client does not try again by itself, which takes it six seconds."""
    if not url.startswith("s3://"):
        return locate(url)
    once = fs.AwsStandardS3RetryStrategy(max_attempts=1)
    s3 = fs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"], retry_strategy=once)
    return s3, url.removeprefix("s3://")


@pytest.fixture
def store(server: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    server.failing = False
    for name, value in {**server.environment, "MINIMIND_CACHE": str(tmp_path / "copies")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "TICK_S", 0.1)
    monkeypatch.setattr(storage, "locate", locate_impatiently)
    bucket = server.open()
    server.requests.clear()
    yield server
    server.failing, server.refusal = False, None
    bucket.delete_dir_contents("bucket")
    storage._mirror.cache_clear()


SETTINGS: dict[str, Any] = {"train__max_steps": 12, "eval__every": 2, "eval__samples": 1, "track__wandb": "off"}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on a local disk."""
    job = make_job(tmp_path_factory.mktemp("local"), rows=200, **SETTINGS)
    path = start(job)
    run_here(job)
    return path


def job_at(url: str, local: Path) -> Job:
    return make_job(local.parent, rows=200, out=url, **SETTINGS)


def check_same(local: Path, bucket: fs.FileSystem, folder: str = "bucket/runs/x") -> None:
    """The store's run has the files, results and metrics of the one on the local disk."""
    expected = {str(p.relative_to(local)) for p in local.rglob("*") if p.is_file()}
    assert names(bucket, folder) - {"writer.json"} == expected  # A killed process leaves its claim.
    run = RunDirectory(f"s3://{folder}")
    assert run.info()["state"] == "finished" and run.info()["result"] == RunDirectory(local).info()["result"]
    assert file_sha256(resolve_model(f"s3://{folder}") / "model.safetensors") == file_sha256(
        resolve_model(local) / "model.safetensors"
    )
    lines, others = ([{**line, "timing": 0} for line in r.metrics()] for r in (run, RunDirectory(local)))
    assert [{k: v for k, v in line.items() if k != "warning"} for line in lines] == others


def test_a_run_in_a_store_is_the_run_on_a_local_disk(store: Store, local: Path, tmp_path: Path) -> None:
    job = job_at(URL, local)
    start(job)
    run_here(job)
    check_same(local, store.open())
    assert not (tmp_path / "copies" / "work" / "s3" / "bucket" / "runs" / "x").exists()
    result = RunDirectory(URL).info()["result"]
    with pytest.raises(UserError, match=f"{URL} already holds a run"):
        start(job)
    command = CliRunner().invoke(app, ["verify", "checkpoint", URL])
    assert command.exit_code == 0 and command.output.startswith(f"{URL}/checkpoints/step-")
    fetched = {str(path.relative_to(tmp_path / "home")) for path in unpack(pack(URL), tmp_path / "home")}
    assert fetched == {"config.yaml", "run.json", "metrics.jsonl", "samples.jsonl", "validation.parquet"}
    command = CliRunner().invoke(app, ["runs", "s3://bucket"])
    assert command.exit_code == 0 and "finished" in command.output and "s3://bucket/run" in command.output
    command = CliRunner().invoke(app, ["generate", f"{URL}/{result}", "--prompt", "The", "--max-new-tokens", "4"])
    assert command.exit_code == 0, command.output
    adapter = make_job(
        local.parent, "lora", 40, init_from=URL, data__tokenizer=None, out="s3://bucket/runs/lora", **SETTINGS
    )
    start(adapter)
    run_here(adapter)
    text = (resolve_model("s3://bucket/runs/lora") / "adapter_config.json").read_text()
    assert f'"{URL}/{result}"' in text
    command = CliRunner().invoke(app, ["generate", "s3://bucket/runs/lora", "--prompt", "The", "--max-new-tokens", "4"])
    assert command.exit_code == 0, command.output


def test_a_checkpoint_in_a_store_is_there_whole_or_not_at_all(store: Store, tmp_path: Path) -> None:
    run = RunDirectory(URL, writes=True)
    run.open()

    def requests(method: str) -> list[str]:
        """Those for the run's files; the store's own for multi-part uploads have a query, and count once."""
        found = [r.removeprefix(f"{method} /bucket/runs/x/") for r in store.requests if r.startswith(f"{method} ")]
        store.requests.clear()
        return list(dict.fromkeys(found))

    requests("PUT")
    run.append("metrics.jsonl", {"step": 1})
    run.save_checkpoint("step-00000001", lambda path: (path / "model.safetensors").write_text("1") and None)
    assert run.mirror
    run.mirror.push()
    at = "checkpoints/step-00000001"
    assert requests("PUT") == ["metrics.jsonl", f"{at}/model.safetensors", f"{at}/resume/sums.json"]
    run.mirror.push()
    assert not requests("PUT")
    run.save_checkpoint("step-00000002", lambda path: (path / "model.safetensors").write_text("2") and None)
    run.prune(1, None)
    run.mirror.push()
    assert requests("DELETE")[:2] == [f"{at}/resume/sums.json", f"{at}/model.safetensors"]
    assert [path.name for path in RunDirectory(URL).checkpoints()] == ["step-00000002"]
    # Without its sums it is none for those who read.
    store.open().delete_file("bucket/runs/x/checkpoints/step-00000002/resume/sums.json")
    assert not RunDirectory(URL).checkpoints()


def test_a_killed_run_goes_on_from_the_store_alone(store: Store, local: Path, tmp_path: Path) -> None:
    job = job_at(URL, local)
    config = tmp_path / "config.yaml"
    start(job)
    config.write_bytes(RunDirectory(URL).file("config.yaml").read_bytes())
    code = "from minimind_ray.cli.main import run; run()"
    command = [sys.executable, "-c", code, "train", "pretrain", "--no-ray", "--config", str(config), "--resume"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    run = RunDirectory(URL)
    while not run.checkpoints():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert run.info()["state"] == "running"
    os.environ["MINIMIND_CACHE"] = str(tmp_path / "another machine")
    storage._mirror.cache_clear()
    start(job, resume=True)
    run_here(job)
    check_same(local, store.open())


def test_the_result_has_its_card_in_the_store(store: Store, local: Path) -> None:
    """And the checkpoint stays complete while the card is uploaded."""
    job = job_at(URL, local)
    start(job)
    run_here(job)
    result, bucket = RunDirectory(URL).info()["result"], store.open()
    cards = [name for name in names(bucket, "bucket/runs/x") if name.endswith("README.md")]
    assert cards == [f"{result}/README.md"]
    assert f"DELETE /bucket/runs/x/{result}/{storage.MARK}" not in store.requests


class Failing(PlainContext):
    """The store fails from one report to another."""

    def __init__(self, store: Store, first: int, last: int) -> None:
        super().__init__()
        self.store, self.first, self.last = store, first, last

    def report(self, metrics: dict[str, Any], checkpoint: str | None) -> bool:
        self.store.failing = self.first <= metrics["step"] < self.last
        if metrics["step"] == self.first:
            time.sleep(1)  # Long enough for a try.
        return True


def test_a_store_that_fails_for_a_while_is_caught_up_with(store: Store, local: Path) -> None:
    job = job_at(URL, local)
    start(job)
    context = Failing(store, 4, 10)
    job.run(context, job.data(context))
    check_same(local, store.open())
    warnings = [line["warning"] for line in RunDirectory(URL).metrics() if "warning" in line]
    assert warnings and "the object store fails and is tried again" in warnings[0] and "500" in warnings[0]


def test_a_store_that_stays_down_loses_nothing(
    store: Store, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIMIND_STORE_PATIENCE", "1")
    job = job_at(URL, local)
    start(job)
    context = Failing(store, 4, 100)
    copy = tmp_path / "copies" / "work" / "s3" / "bucket" / "runs" / "x"
    with pytest.raises(UserError, match=f"{URL}: the object store .*500.* missing files are in {copy} .*--resume"):
        job.run(context, job.data(context))
    store.failing = False
    bucket = store.open()
    before = {name.split("/")[1] for name in names(bucket, "bucket/runs/x") if name.endswith("sums.json")}
    assert "step-00000012" not in before
    start(job, resume=True)
    assert f"checkpoints/step-00000012/{storage.MARK}" in names(bucket, "bucket/runs/x")
    run_here(job)
    check_same(local, bucket)


def test_an_output_is_tried_before_anything_else(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.require_writable(URL)
    assert not names(store.open(), "bucket")
    with pytest.raises(UserError, match="^s3://none/x: the bucket does not exist"):
        storage.require_writable("s3://none/x")
    writes = ("PUT", "POST", "DELETE")
    for refusal, methods, why in (
        (("AccessDenied", "403 Forbidden"), writes, "the credentials do not allow it"),
        (("AccessDenied", "403 Forbidden"), ("DELETE",), "the credentials do not allow it"),
        (("ExpiredToken", "400 Bad Request"), (*writes, "GET", "HEAD"), "the credentials have expired"),
        (("ExpiredToken", "400 Bad Request"), ("HEAD",), "the credentials have expired"),
        (("InvalidAccessKeyId", "403 Forbidden"), writes, "the credentials are not accepted"),
    ):
        store.refusal, store.refuses = refusal, methods
        began = time.monotonic()
        with pytest.raises(UserError, match=f"^{URL}: {why}"):
            storage.require_writable(URL)
        assert time.monotonic() - began < 5


def test_a_store_that_is_down_is_named_while_it_is_waited_for(
    store: Store, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINIMIND_STORE_PATIENCE", "1")
    monkeypatch.setattr(storage, "NOTICE_S", 0.05)
    storage._said.clear()
    store.failing = True
    with pytest.raises(UserError, match=f"^{URL}: the object store request failed: .*500"):
        storage.require_writable(URL)
    assert f"{URL}: the object store fails and is tried again for 1 s: " in capfd.readouterr().err
    store.failing, store.silent = False, True
    timer = threading.Timer(0.5, setattr, (store, "silent", False))
    timer.start()
    storage.require_writable(URL)
    assert capfd.readouterr().err == f"waiting for {URL}\n"
    timer.join()


def test_a_run_on_this_machine_is_followed_while_the_store_fails(store: Store, local: Path) -> None:
    job = job_at(URL, local)
    start(job)
    began, seen = time.time(), list[str]()

    class Following(Failing):
        def report(self, metrics: dict[str, Any], checkpoint: str | None) -> bool:
            super().report(metrics, checkpoint)
            if self.store.failing:
                seen.extend(RunDirectory(URL).live_file("metrics.jsonl", began).read_text().splitlines())
            return True

    context = Following(store, 4, 10)
    job.run(context, job.data(context))
    assert any('"warning": ' in line for line in seen)
    check_same(local, store.open())
    assert len(RunDirectory(URL).live_file("metrics.jsonl", began).read_text().splitlines()) == 12


def test_pruned_checkpoints_leave_no_folders(store: Store) -> None:
    run = RunDirectory(URL, writes=True)
    run.open()
    assert run.mirror
    for number in (1, 2):
        run.save_checkpoint(f"step-0000000{number}", lambda path: (path / "weights").write_text("1") and None)
        run.prune(1, None)
        run.mirror.push()
    infos = store.open().get_file_info(fs.FileSelector("bucket/runs/x/checkpoints"))
    assert [info.base_name for info in infos] == ["step-00000002"]


def test_a_run_that_is_done_anew_is_set_aside(store: Store) -> None:
    for number in (1, 2):
        run = RunDirectory(URL)
        run.write("config.yaml", f"number: {number}\n")
        assert set_aside(run) == f"{URL}.before-{number}"
        assert not run.file("config.yaml").exists()
    assert names(store.open(), "bucket/runs") == {"x.before-1/config.yaml", "x.before-2/config.yaml"}
    assert "number: 1" in RunDirectory(f"{URL}.before-1").file("config.yaml").read_text()


def test_flags_are_seen_from_elsewhere(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LOOK_S", 0.05)
    sign = storage.flag(URL, ".stop")
    up = storage.watch_flag(storage.flag(URL, ".stop"))
    assert not sign.exists() and not up()
    sign.touch()
    assert sign.exists() and storage.flag(URL, ".stop").exists()
    deadline = time.monotonic() + 10
    while not up() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert up()
    sign.unlink()
    sign.unlink()
    assert not sign.exists()


def test_what_a_store_holds_cannot_lead_out_of_the_copy(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = storage.Mirror(URL, tmp_path / "x")
    monkeypatch.setattr(mirror, "filesystem", Evil())
    with pytest.raises(UserError, match=r"x/\.\./\.\./y leads out of it"):
        mirror.pull()
    with pytest.raises(UserError, match=r"cannot contain an empty part, \. or \.\."):
        resolve_model("s3://bucket/../../x")
    with pytest.raises(UserError, match="nobucket.*NO_SUCH_BUCKET"):
        start(make_job(tmp_path, out="s3://nobucket/x"))


class Evil:
    """Lists an object whose name climbs."""

    def get_file_info(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        return [fs.FileInfo("bucket/runs/x/../../y", fs.FileType.File, size=1)]


def test_the_comparison_of_a_sweep_in_the_store(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tracker's files lie in the store, and a second call continues the same tracked run."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    path = make_sweep(tmp_path / "s", axes={"dpo.beta": "0.1,0.2"}, steps=10, examples=40)
    bucket = store.open()
    fs.copy_files(str(path), "bucket/sweeps/s", destination_filesystem=bucket)
    for _ in range(2):
        sweep = read_sweep("s3://bucket/sweeps/s")
        publish(sweep, compare([sweep]))
    with bucket.open_input_stream("bucket/sweeps/s/sweep.json") as file:
        run = json.loads(file.read())["wandb"]["id"]
    assert {name.rpartition("/")[2] for name in names(bucket, "bucket/sweeps/s") if name.endswith(".wandb")} == {
        f"run-{run}.wandb"
    }


def test_the_report_of_a_running_sweep_reads_the_store_into_a_copy_of_its_own(store: Store, tmp_path: Path) -> None:
    """A pull deletes what the store lacks: a file that the sweep's process has written and not yet sent."""
    path = make_sweep(tmp_path / "s", axes={"dpo.beta": "0.1,0.2"}, seeds=1, steps=10, examples=40)
    bucket = store.open()
    fs.copy_files(str(path), "bucket/sweeps/live", destination_filesystem=bucket)
    plan_path = copy_of("s3://bucket/sweeps/live")
    unsent = plan_path / "trials" / "new" / "trial.json"
    unsent.parent.mkdir(parents=True)
    unsent.touch()
    LiveReport(plan_path).update()
    with bucket.open_input_stream("bucket/sweeps/live/report.html") as file:
        assert file.read() == (plan_path / "report.html").read_bytes()
    assert unsent.exists()
    report = WatchedReport("s3://bucket/sweeps/live")
    report.look()
    assert report.page == (plan_path / "report.html").read_text(encoding="utf-8")
    bucket.delete_file("bucket/sweeps/live/report.html")
    report.page = ""
    report.look()  # Writes the page anew.
    assert report.page and "report.html" in {name.rpartition("/")[2] for name in names(bucket, "bucket/sweeps/live")}
    sweep = read_sweep("s3://bucket/sweeps/live", "live")
    assert facts(sweep, compare([sweep]))["checkpoint"].startswith("s3://bucket/sweeps/live/trials/")


def test_workers_read_a_model_of_the_hub_from_the_store(
    store: Store, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer.load(make_tokenizer(tmp_path / "tokenizer"))
    save_model(Transformer(ModelConfig(preset="tiny").shape(tokenizer.vocab_size)), tokenizer, tmp_path / "model")
    commit = hub.put("me/model", tmp_path / "model")
    monkeypatch.setenv("MINIMIND_STORAGE", "s3://bucket/mine")
    config = make_config(tmp_path, "sft", rows=4, init_from="me/model")
    base = resolve_base(config)
    assert base and base.hub == config.init_from == f"hf://me/model@{commit}"
    assert base.where == f"s3://bucket/mine/hub/me/model/{commit}"

    hub.stop()
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "other-machine"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "other-cache"))
    monkeypatch.setattr("minimind_ray.stages.base._HERE", {})
    storage._mirror.cache_clear()
    assert model_fingerprint(base.local()) == base.fingerprint
    assert resolve_model(config.init_from or "").is_relative_to(tmp_path / "other-machine")
