"""Each stage in a plain process, on what the stage before it left."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from minimind_ray.config.errors import UserError
from minimind_ray.config.load import to_yaml
from minimind_ray.config.schema import ModelConfig
from minimind_ray.data.plan import PackSource
from minimind_ray.data.store import PackStore
from minimind_ray.data.tokenizer import train_tokenizer
from minimind_ray.model.sampling import Sampling
from minimind_ray.objectives.preference import REFERENCE
from minimind_ray.stages import base as stages_base
from minimind_ray.stages import run as stages_run
from minimind_ray.stages import start as stages_start
from minimind_ray.stages.run import begun, run_here
from minimind_ray.stages.use import complete, open_trained
from minimind_ray.train import validation
from minimind_ray.train.context import PlainContext
from minimind_ray.train.evaluate import Evaluation
from minimind_ray.train.run import RunDirectory, read_jsonl, resolve_model, sound
from tests.jobs import make_config, make_job, rows_of, start

pytestmark = pytest.mark.slow


def train(job) -> list[dict]:
    run = start(job)
    run_here(job)
    assert RunDirectory(run).info()["state"] == "finished"
    return list(read_jsonl(run / "metrics.jsonl"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    train(make_job(directory, rows=200, eval__samples=1))
    return directory


def test_sft_learns_and_its_loss_is_on_answers_only(base: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, "sft", 200, init_from=str(base / "run-pretrain"), train__epochs=2)
    lines = train(job)
    assert lines[-1]["loss"] < lines[0]["loss"]
    store = PackStore(job.train)
    assert 0 < store.manifest.total("counted_tokens") < 0.7 * store.n_tokens


def test_a_run_that_is_not_compiled_does_not_import_the_compiler(base: Path, tmp_path: Path) -> None:
    """Torch does for a number of harmless calls; the import takes longer than all else that starts a process."""
    config = make_config(tmp_path, "lora", 60, init_from=str(base / "run-pretrain"), data__tokenizer=None)
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    run = (
        "import sys; from minimind_ray.cli.main import app; "
        f"app(['train', 'lora', '--config', {str(tmp_path / 'config.yaml')!r}, '--no-ray'], standalone_mode=False); "
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", run], check=True)
    assert RunDirectory(config.out).info()["state"] == "finished"


def test_a_run_goes_on_though_its_config_lacks_a_key_that_changes_nothing_learned(tmp_path: Path) -> None:
    config = make_job(tmp_path, rows=60).config
    run = RunDirectory(start(make_job(tmp_path, rows=60)))
    file = run.path / "config.yaml"
    file.write_text("".join(line for line in file.open() if "direct_steps" not in line))
    run.check(config, resume=True)
    other = config.model_copy(update={"optim": config.optim.model_copy(update={"lr": 0.5})})
    with pytest.raises(UserError, match="cannot be resumed with other settings: optim.lr 0.5 .the run has 0.003."):
        run.check(other, resume=True)


def test_lora_starts_as_the_base_and_leaves_it_alone(base: Path, tmp_path: Path) -> None:
    from_base = {"init_from": str(base / "run-pretrain"), "data__tokenizer": None}
    whole = train(make_job(tmp_path, "sft", 100, out=str(tmp_path / "whole"), **from_base))
    job = make_job(tmp_path, "lora", 100, lora__targets="all-linear", lora__rank=4, **from_base)
    before = resolve_model(base / "run-pretrain")
    weights = load_file(before / "model.safetensors")
    lines = train(job)
    # The first loss is measured before the first update: that of the base.
    assert lines[0]["loss"] == whole[0]["loss"]
    assert lines[-1]["loss"] < lines[0]["loss"]
    adapter = resolve_model(tmp_path / "run-lora")
    names = {"adapter_config.json", "adapter_model.safetensors", "README.md", "resume"}
    assert {p.name for p in adapter.iterdir()} == names
    kept = load_file(adapter / "resume" / "optimizer.safetensors")
    assert all("lora_" in name for name in kept)
    assert all(torch.equal(weights[k], v) for k, v in load_file(before / "model.safetensors").items())


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "v_proj"]])
def test_dora_trains_a_list_of_targets(base: Path, tmp_path: Path, targets: list[str]) -> None:
    from_base = {"init_from": str(base / "run-pretrain"), "data__tokenizer": None}
    lines = train(make_job(tmp_path, "lora", 100, lora__dora=True, lora__targets=targets, optim__lr=0.03, **from_base))
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_minimind_2_with_experts_learns_and_is_a_base_for_the_next_stage(tmp_path: Path) -> None:
    shape = {"qk_norm": False, "num_experts": 3, "num_experts_per_tok": 2, "n_shared_experts": 1,
             "intermediate_size": 64, "router_aux_loss_coef": 0.01}  # fmt: skip
    model = {f"model__{key}": value for key, value in shape.items()}
    lines = train(make_job(tmp_path, rows=200, **model))
    assert lines[-1]["loss"] < lines[0]["loss"] and 0 < lines[-1]["aux"] < 0.1
    out = {"out": str(tmp_path / "sft"), "init_from": str(tmp_path / "run-pretrain")}
    after = train(make_job(tmp_path, "sft", 60, schedule__warmup=100, **out))
    assert after[0]["loss"] < lines[0]["loss"]
    assert ["longer than the run" in line.get("warning", "") for line in after] == [True] + [False] * (len(after) - 1)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_dpo_starts_at_ln_2_and_prefers_the_chosen(base: Path, tmp_path: Path, adapters: bool) -> None:
    settings = {"init_from": str(base / "run-pretrain"), "dpo__lora": adapters, "dpo__beta": 0.5, "train__epochs": 3}
    lines = train(make_job(tmp_path, "dpo", 80, **settings))
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert lines[-1]["val/accuracy"] > 0.8 and lines[-1]["val/margin"] > 0
    for name in ("reward_chosen", "reward_rejected", "margin", "accuracy", "kl"):
        assert name in lines[-1] and f"val/{name}" in lines[-1]


def test_reference_is_computed_once_per_data_and_base(base: Path, tmp_path: Path, monkeypatch) -> None:
    calls = []

    def counting(reference):
        calls.append(reference.path)
        return stages_run.compute_here(reference)

    host = stages_run.Host(compute_column=counting)
    monkeypatch.setattr(stages_run, "Host", lambda: host)
    monkeypatch.setattr(stages_run.prepare_job, "__defaults__", (host, lambda line: None, None))
    base_model = str(base / "run-pretrain")
    make_job(tmp_path, "dpo", 40, init_from=base_model, dpo__beta=0.1)
    assert len(calls) == len(set(calls)) == 2  # train and val
    make_job(tmp_path, "dpo", 40, init_from=base_model, dpo__beta=0.3, optim__lr=1e-5)
    assert len(calls) == 2
    make_job(tmp_path, "dpo", 40, init_from=base_model, dpo__loss="simpo")
    assert len(calls) == 2
    train(make_job(tmp_path, "sft", 100, init_from=base_model))
    make_job(tmp_path, "dpo", 40, init_from=str(tmp_path / "run-sft"))
    assert len(calls) == 4
    turned = shutil.copytree(resolve_model(base_model), tmp_path / "turned")
    content = json.loads((turned / "config.json").read_text())
    (turned / "config.json").write_text(json.dumps({**content, "rope_theta": 10.0}))
    make_job(tmp_path, "dpo", 40, init_from=str(turned))
    assert len(calls) == 6


def test_a_base_is_found_and_hashed_once_for_a_job(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(module: Any, name: str) -> None:
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: [calls.append(name), function(*args, **kwargs)][1])

    counted(stages_base, "model_fingerprint")
    for module in (stages_base, stages_start):
        counted(module, "resolve_model")
    origin = str(base / "run-pretrain")
    train(make_job(tmp_path, "dpo", 40, init_from=origin, dpo__lora=True, data__tokenizer=None, train__max_steps=2))
    assert sorted(calls) == ["model_fingerprint", "resolve_model"]


def test_a_base_at_the_url_of_an_earlier_base_is_fetched_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of Ray lives on after a run; by then another model may lie at the same URL."""
    fetched: list[str] = []
    monkeypatch.setattr(stages_base, "_HERE", {})
    monkeypatch.setattr(stages_base, "resolve_model", lambda where: fetched.append(where) or tmp_path)
    shape = ModelConfig(preset="tiny").shape(100)
    for fingerprint in ("old", "old", "new"):
        assert stages_base.Base("s3://bucket/base", shape, fingerprint).local() == tmp_path
    assert fetched == ["s3://bucket/base"] * 2


def test_a_reference_is_named_by_the_precision_that_auto_comes_to(base: Path, tmp_path: Path) -> None:
    found: list[str] = []
    for dtype in (torch.float32, torch.bfloat16):
        host = stages_run.Host(dtype=lambda precision, gpus, dtype=dtype: dtype)
        config = make_config(
            tmp_path, "dpo", 40, init_from=str(base / "run-pretrain"), train__precision="auto", data__val_fraction=0.0
        )
        found.append(str(stages_run.prepare_job(config, host).train_columns[REFERENCE]))
    assert [path.rpartition("-")[2] for path in found] == ["float32.parquet", "bfloat16.parquet"]


@pytest.mark.parametrize("stage", ["sft", "lora", "dpo"])
def test_stages_that_need_a_base_say_so(tmp_path: Path, stage: str) -> None:
    for tokenizer in ({}, {"data__tokenizer": None}):
        with pytest.raises(UserError, match=f"init_from is not set: {stage}"):
            make_job(tmp_path, stage, 60, **tokenizer)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    for tokenizer in ({}, {"data__tokenizer": None}):
        with pytest.raises(UserError, match="init_from .*adapter is an adapter, not a whole model"):
            make_job(tmp_path, stage, 60, init_from=str(adapter), **tokenizer)


def test_the_tokenizer_is_checked_before_an_object_store_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, data__train="gs://bucket/a.jsonl", data__tokenizer=str(tmp_path / "t"))
    monkeypatch.setattr(stages_start, "require_files", lambda data: pytest.fail("asked"))
    with pytest.raises(UserError, match="/t"):
        stages_start.require_sources([config])


def test_all_missing_inputs_are_named(tmp_path: Path) -> None:
    missing = {"data__train": str(tmp_path / "rows.jsonl"), "data__tokenizer": str(tmp_path / "t")}
    configs = [make_config(tmp_path, **missing), make_config(tmp_path, **{**missing, "data__val": "/nowhere.jsonl"})]
    with pytest.raises(UserError) as error:
        stages_start.require_sources(configs)
    message = str(error.value)
    assert message.count(str(tmp_path / "t")) == 1 == message.count(str(tmp_path / "rows.jsonl")), message


def test_base_and_model_section_must_agree(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model.hidden_size is 128, but init_from"):
        make_job(tmp_path, "sft", 50, init_from=str(base / "run-pretrain"), model__hidden_size=128)


def test_a_preset_of_another_shape_than_the_base_is_refused(base: Path, tmp_path: Path) -> None:
    from_base = {"init_from": str(base / "run-pretrain")}
    with pytest.raises(UserError, match="model.preset minimind-3 has num_hidden_layers 8, but .* has 2; leave"):
        make_job(tmp_path, "sft", 50, model__preset="minimind-3", **from_base)
    # As given by the whole of a config that says nothing of it.
    make_job(tmp_path, "sft", 50, model__preset=ModelConfig().preset, **from_base)


@pytest.mark.parametrize("stage, adapters", [("lora", False), ("dpo", True)])
def test_an_adapter_is_trained_with_its_bases_tokenizer(base: Path, tmp_path: Path, stage: str, adapters: bool) -> None:
    train_tokenizer([row["text"][::-1] for row in rows_of("pretrain", 300)], vocab_size=400).save(tmp_path / "other")
    bare = shutil.copytree(resolve_model(base / "run-pretrain"), tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    # The same tokens and another chat template: for all weights, not for adapters.
    shutil.copytree(base / "tokenizer", tmp_path / "template")
    file = tmp_path / "template" / "tokenizer_config.json"
    content = json.loads(file.read_text())
    content["chat_template"] = "{# mine #}" + content["chat_template"]
    file.write_text(json.dumps(content))

    def job(base: Path, tokenizer: str, lora: bool) -> None:
        settings = {"data__tokenizer": str(tmp_path / tokenizer), "data__max_reject_fraction": 1.0}
        make_job(tmp_path, stage, 60, init_from=str(base), dpo__lora=lora, **settings)

    for lora in {adapters, False}:
        with pytest.raises(
            UserError, match="data.tokenizer .*other has other tokens than the tokenizer of init_from .*; leave"
        ):
            job(base / "run-pretrain", "other", lora)
    with pytest.raises(
        UserError, match="data.tokenizer .*template differs from the tokenizer of init_from .*; leave data"
    ):
        job(base / "run-pretrain", "template", adapters)
    job(bare, "other", adapters)
    if stage == "dpo":
        job(base / "run-pretrain", "template", False)


@pytest.mark.parametrize(
    "stage, settings, message",
    [
        ("dpo", {"lora__rank": 16}, "lora.rank is 16, but this run trains no adapter; leave it out, or set dpo.lora"),
        ("sft", {"lora__dropout": 0.5}, "lora.dropout is 0.5, but this run trains no adapter; leave it out, or train"),
        ("pretrain", {"lora__dora": True}, "lora.dora is True, but this run trains no adapter"),
        ("dpo", {"dpo__simpo_gamma": 3.0}, "dpo.simpo_gamma is 3, but dpo.loss sigmoid has no such margin"),
        ("sft", {"schedule__decay": 0.5}, "schedule.decay is 0.5, but schedule.name cosine has no such part; .* wsd"),
        (
            "sft",
            {"schedule__name": "constant", "schedule__final": 0.0},
            "schedule.final is 0, but schedule.name constant",
        ),
    ],
)
def test_a_setting_without_a_use_is_refused(
    base: Path, tmp_path: Path, stage: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_job(tmp_path, stage, 60, init_from=str(base / "run-pretrain"), **settings)
    if stage == "dpo":
        uses = {"dpo__lora": True, "dpo__loss": "simpo"}
        make_job(tmp_path, stage, 60, init_from=str(base / "run-pretrain"), **uses, **settings)
        # Other trials of a sweep may use it.
        config = make_config(tmp_path, stage, 60, init_from=str(base / "run-pretrain"), **settings)
        stages_run.prepare_job(config, validation=config.data)


def test_each_answer_has_its_own_room(base: Path, tmp_path: Path) -> None:
    short = shutil.copytree(resolve_model(base / "run-pretrain"), tmp_path / "short")
    content = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**content, "max_position_embeddings": 24}))
    trained, sampling = open_trained(short, precision="float32"), Sampling(temperature=0, max_new_tokens=16)
    trained = replace(trained, tokenizer=SimpleNamespace(stop_ids=()))  # Nothing ends an answer but its room.
    prompts = [[1, 60], [1, *[61] * 20], [1, 62, 63]]
    together = list(complete(trained, prompts, sampling, batch_size=3))
    assert [(len(ids), ended) for ids, ended in together] == [(16, False), (3, False), (16, False)]
    assert together == [answer for prompt in prompts for answer in complete(trained, [prompt], sampling, 1)]


@pytest.mark.parametrize("keep, result, validated", [(2, "step-00000003", 5.5), (9, "step-00000001", None)])
def test_after_a_damaged_best_the_result_is_one_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int, result: str, validated: float | None
) -> None:
    losses = iter([5.0, 6.0, 4.0, 5.5, 5.6, 5.7])  # of steps 1, 2, 3, and again 3, 4, 5

    def evaluate(*args: Any, **kwargs: Any) -> Evaluation:
        loss = next(losses)
        examples = {"example": np.zeros(1), "loss": np.array([loss]), "count": np.ones(1)}
        return Evaluation({"loss": loss}, examples)

    monkeypatch.setattr(validation, "evaluate", evaluate)
    settings = {"checkpoint__every": 1, "eval__every": 1, "checkpoint__keep": keep, "eval__samples": 0}
    job = make_job(tmp_path, rows=400, train__max_steps=5, **settings)
    run, context = RunDirectory(start(job)), PlainContext()
    context.should_stop = lambda: len(list(run.metrics())) == 2
    job.run(context, job.data(context))
    (resolve_model(run.path) / "model.safetensors").write_bytes(b"")
    start(job, resume=True)
    run_here(job)
    assert run.info()["result"] == f"checkpoints/{result}" and sound(run.path / "checkpoints" / result)
    file = run.path / "validation.parquet"
    assert (pq.read_table(file)["loss"].to_pylist() if file.exists() else [None]) == [validated]


def test_resume_is_exact_and_passes_over_a_damaged_checkpoint(tmp_path: Path, capsys) -> None:
    settings = {"rows": 150, "model__dropout": 0.1, "checkpoint__every": 1, "checkpoint__keep": 9, "eval__every": 2}
    whole = make_job(tmp_path, out=str(tmp_path / "whole"), **settings)
    expected = train(whole)

    parted = make_job(tmp_path, out=str(tmp_path / "parted"), **settings)
    run = start(parted)
    context = PlainContext()
    context.should_stop = lambda: len(list(read_jsonl(run / "metrics.jsonl"))) == 2
    parted.run(context, parted.data(context))
    assert RunDirectory(run).info()["state"] == "stopped"
    assert len(RunDirectory(run).checkpoints()) == 3
    # A stop validates nothing that a run without one does not.
    assert [{**line, "timing": 0} for line in read_jsonl(run / "metrics.jsonl")] == [
        {**line, "timing": 0} for line in expected[:3]
    ]
    with pytest.raises(UserError, match="already holds a run"):
        start(parted)
    with pytest.raises(UserError, match="optim.lr"):
        start(make_job(tmp_path, out=str(run), optim__lr=0.5, **settings), resume=True)
    weights = RunDirectory(run).checkpoints()[-1] / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    start(parted, resume=True)
    run_here(parted)
    said = capsys.readouterr().err
    assert "step-00000003 is damaged" in said and "last digits" not in said
    got = list(read_jsonl(run / "metrics.jsonl"))
    assert [{**line, "timing": 0} for line in got] == [{**line, "timing": 0} for line in expected]
    for name in ("model.safetensors", "resume/optimizer.safetensors"):
        files = [resolve_model(tmp_path / run) / name for run in ("whole", "parted")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert all(sound(c) for c in RunDirectory(run).checkpoints())


def test_a_resume_with_other_threads_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, rows=60, train__max_steps=2)
    run, context = start(job), PlainContext()
    context.should_stop = lambda: True
    job.run(context, job.data(context))
    before = RunDirectory(run).info()["cpu"]
    assert before.startswith(f"{torch.get_num_threads()} thread")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    start(job, resume=True)
    run_here(job)
    said = capsys.readouterr().err
    assert f"until now the run computed with {before}; from now on it computes with 77 threads, " in said
    assert RunDirectory(run).info()["cpu"].startswith("77 threads, ")


def test_a_cache_may_move_and_damaged_checkpoints_go(tmp_path: Path) -> None:
    settings = {"rows": 150, "checkpoint__every": 1, "checkpoint__keep": 1, "data__val_fraction": 0.0}
    job = make_job(tmp_path, **settings)
    run = start(job)
    context = PlainContext()
    context.should_stop = lambda: len(list(read_jsonl(run / "metrics.jsonl"))) == 1
    job.run(context, job.data(context))
    (sound_one,) = RunDirectory(run).checkpoints()
    damaged = sound_one.with_name("step-00000009")
    shutil.copytree(sound_one, damaged)
    (damaged / "model.safetensors").write_bytes(b"")
    shutil.move(tmp_path / "cache", tmp_path / "elsewhere")
    moved = make_job(tmp_path, data__cache_dir=str(tmp_path / "elsewhere"), **settings)
    start(moved, resume=True)
    context.should_stop = lambda: True
    moved.run(context, moved.data(context))
    assert [path.name for path in RunDirectory(run).checkpoints()] == ["step-00000003"]
    assert sound(RunDirectory(run).checkpoints()[0])


def test_data_that_end_before_the_run_are_no_success(tmp_path: Path) -> None:
    job = make_job(tmp_path, rows=150)
    run = start(job)
    context = PlainContext()
    data = job.data(context)
    with pytest.raises(UserError, match=rf"the data ended after step 2 of {job.plan.steps}"):
        job.run(context, replace(data, source=PackSource(lambda step: islice(data.source.steps(step), 2))))
    assert RunDirectory(run).info()["state"] != "finished"


def test_run_directory_explains_itself(base: Path) -> None:
    run = RunDirectory(base / "run-pretrain")
    info = run.info()
    assert info["versions"]["torch"] == torch.__version__.split("+")[0] or "+" in torch.__version__
    assert Path(info["inputs"]["data.train"]).is_dir()
    assert json.loads((run.path / "samples.jsonl").read_text().splitlines()[0])["samples"]
    assert len(run.checkpoints()) <= 3


def test_a_stream_trains_without_keeping_packs_and_resumes(tmp_path: Path) -> None:
    settings = {"rows": 300, "data__cache": False, "train__max_steps": 12, "data__val_fraction": 0.05}
    with pytest.raises(UserError, match="train.max_steps is not set"):
        make_job(tmp_path, **settings | {"train__max_steps": None})
    job = make_job(tmp_path, out=str(tmp_path / "whole"), **settings)
    lines = train(job)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["val/loss"] < lines[0]["val/loss"] and lines[-1]["loss"] < lines[0]["loss"]
    # The validation set is kept; of the training packs nothing is.
    assert len(list((tmp_path / "cache" / "datasets").iterdir())) == 1

    parted = make_job(tmp_path, out=str(tmp_path / "parted"), **settings)
    run = start(parted)
    context = PlainContext()
    context.should_stop = lambda: len(list(read_jsonl(run / "metrics.jsonl"))) == 6
    parted.run(context, parted.data(context))
    start(parted, resume=True)
    run_here(parted)
    assert [{**x, "timing": 0} for x in read_jsonl(run / "metrics.jsonl")] == [{**x, "timing": 0} for x in lines]


def test_a_stream_reads_every_row_once_per_epoch(tmp_path: Path) -> None:
    job = make_job(tmp_path, rows=200, data__cache=False, train__max_steps=1, data__val_fraction=0.0)
    cached = make_job(tmp_path, rows=200, data__val_fraction=0.0)
    stream = job.train
    tables = [t for index in stream.order(0) for t in stream.unit_tables(index)]
    store = PackStore(cached.train)
    assert sum(len(t["tokens"][0]) for t in tables) == store.n_tokens
    shares = [[p.id for p in next(job.steps(rank, 3, 0))] for rank in range(3)]
    assert sorted(i for share in shares for i in share) == list(range(job.plan.packs_per_step))


def test_a_signal_before_the_first_step_leaves_a_stopped_run(tmp_path: Path) -> None:
    job = make_job(tmp_path, rows=60, train__max_steps=2)
    run = RunDirectory(job.config.out)
    with pytest.raises(KeyboardInterrupt), begun(job, resume=False):
        assert run.state() == "running"
        raise KeyboardInterrupt
    assert run.state() == "stopped"
    with begun(job, resume=True):
        run_here(job)
    assert run.state() == "finished"
