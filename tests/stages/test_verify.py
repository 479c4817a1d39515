"""Verdicts on checkpoints and on twins: sound ones pass, and every kind of damage is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from minimind_ray.cli.main import app
from minimind_ray.stages.run import run_here
from minimind_ray.stages.verify import check_checkpoint, compare_runs, prove_resume
from minimind_ray.train.run import CHECKPOINT_SUMS, RunDirectory, resolve_model
from tests.jobs import make_job, start


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    job = make_job(tmp_path_factory.mktemp("run"), rows=100, train__max_steps=4, checkpoint__every=2)
    run = start(job)
    run_here(job)
    return Path(run)


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def bad(run: Path) -> dict[str, str]:
    return {finding.check: finding.detail for finding in check_checkpoint(run) if not finding.ok}


@pytest.mark.unit
def test_a_sound_checkpoint_passes(trained: Path) -> None:
    assert bad(trained) == {}
    result = CliRunner().invoke(app, ["verify", "checkpoint", str(trained)])
    assert result.exit_code == 0 and result.output.count("ok ") == 5


@pytest.mark.unit
def test_damage_is_named(copy: Path) -> None:
    checkpoint = RunDirectory(copy).checkpoints()[-1]
    weights = checkpoint / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 64
    weights.write_bytes(content)
    assert bad(copy)["sums"] == "model.safetensors differs from the file that was saved"
    assert CliRunner().invoke(app, ["verify", "checkpoint", str(copy)]).exit_code == 1

    weights.write_bytes(content[: len(content) // 2])
    assert {"sums", "weights"} <= bad(copy).keys()

    (checkpoint / "resume" / "optimizer.safetensors").unlink()
    assert "optimizer.safetensors is missing" in bad(copy)["sums"]

    sums = checkpoint / CHECKPOINT_SUMS
    sums.write_text(json.dumps({"../../run.json": "0"}))
    assert bad(copy)["sums"] == "../../run.json is outside the checkpoint"
    sums.write_text("{")
    assert "not valid JSON" in bad(copy)["sums"]


@pytest.mark.unit
@pytest.mark.slow
def test_adapters_are_looked_at_with_their_magnitudes(trained: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, "lora", 60, init_from=str(trained), data__tokenizer=None, lora__dora=True,
                   train__max_steps=2)  # fmt: skip
    run = start(job)
    run_here(job)
    assert bad(run) == {}
    weights = RunDirectory(run).checkpoints()[-1] / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("lora_magnitude_vector"))
    tensors[name][0] = torch.nan
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, weights, metadata=metadata)
    assert bad(run)["weights"].endswith("magnitude is not finite")


@pytest.mark.unit
def test_what_a_resume_needs_is_looked_for(copy: Path) -> None:
    checkpoint = RunDirectory(copy).checkpoints()[-1]
    (checkpoint / "resume" / "state.json").unlink()
    assert bad(copy)["resume"].startswith("cannot be resumed")


@pytest.mark.unit
def test_a_pack_trained_on_twice_or_never_is_found(copy: Path) -> None:
    state_file = RunDirectory(copy).checkpoints()[-1] / "resume" / "state.json"
    state = json.loads(state_file.read_text())
    first, *others = state["ledger"]["epochs"]["0"].split()
    for text, found in (
        (f"{first}*2 {' '.join(others)}", "epoch 1: pack 0 was trained on 2 times"),
        (f"{first}-", "no ledger that can be read"),
        (" ".join(others), "epoch 1: 0 packs were trained on, not 9"),
    ):
        state["ledger"]["epochs"]["0"] = text
        state_file.write_text(json.dumps(state))
        assert found in bad(copy)["ledger"]
    del state["ledger"]
    state_file.write_text(json.dumps(state))
    assert "no ledger" in bad(copy)["ledger"]


@pytest.mark.unit
def test_twins_are_compared_in_weights_and_metrics(trained: Path, copy: Path) -> None:
    assert compare_runs(trained, copy)[1] == []
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    (copy / "metrics.jsonl").write_text("\n".join([json.dumps({**first, "loss": 0.0}), *lines[1:]]) + "\n")
    assert compare_runs(trained, copy)[1] == ["metrics: the first line that differs belongs to step 1"]
    (copy / "metrics.jsonl").write_text("\n".join(lines[1:]) + "\n")
    assert compare_runs(trained, copy)[1] == ["metrics: the runs logged different steps (4 and 3 lines)"]
    own = RunDirectory(copy).info()["cpu"]
    RunDirectory(copy, writes=True).update(cpu="7 threads, AVX512")
    assert compare_runs(trained, copy)[1][1:] == [f"CPU: {own}; and 7 threads, AVX512"]
    last = RunDirectory(copy).checkpoints()[-1]
    for name in ("resume/optimizer.safetensors", "model.safetensors"):  # that of the weights is told first
        (last / name).write_bytes((last / name).read_bytes() + b"\0")
        assert Path(name).name in compare_runs(trained, copy)[1][0]


@pytest.mark.unit
def test_the_first_tensor_that_differs_is_named(trained: Path, copy: Path) -> None:
    for directory in {resolve_model(copy), RunDirectory(copy).checkpoints()[-1]}:
        weights = directory / "model.safetensors"
        with safe_open(weights, "pt") as file:
            metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name][0, 0] += 0.5
        save_file(tensors, weights, metadata=metadata)
    (difference,) = compare_runs(trained, copy)[1]
    assert difference.endswith(f"1 of {len(tensors)} tensors differ; the first is {name}, by at most 5.0e-01")


@pytest.mark.slow
# Two threads wait for each other most of the time where something else runs beside them.
@pytest.mark.parametrize(
    ("stage", "kills", "threads"), [("pretrain", 1, "1"), pytest.param("lora", 2, "2", marks=pytest.mark.long)]
)
def test_a_killed_run_ends_as_its_twin(
    stage: str, kills: int, threads: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    few = ["eval.max_tokens=10000"]
    proof = prove_resume(stage, tmp_path, kills=kills, steps=16, settings=few)  # type: ignore[arg-type]
    assert proof.differences == []
    assert len(proof.kills) == kills and all(step < 16 for step in proof.kills)
