"""Checkpoints made to hurt, through every command that reads one: one sentence, nothing run, written or allocated."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minimind_ray.train.run import CHECKPOINT_SUMS, RunDirectory, file_sha256
from tests.cli.conftest import Command, Models, Outcome

pytestmark = pytest.mark.slow


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch was-run",)


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def pickles(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))


def pickle_by_another_name(model: Path) -> None:
    (model / "model.safetensors").write_bytes(pickle.dumps(Evil()))


def shard_elsewhere(model: Path) -> None:
    (model / "model.safetensors").rename(model.parent / "model-00001-of-00001.safetensors")
    names = load_file(model.parent / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(names, "../model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def link(model: Path, name: str) -> None:
    (model / name).rename(model.parent / "secret")
    (model / name).symlink_to(model.parent / "secret")


def tensor(model: Path, value: torch.Tensor) -> None:
    weights = load_file(model / "model.safetensors")
    save_file({**weights, "model.norm.weight": value}, model / "model.safetensors")


def header(model: Path) -> None:
    text = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


def pipe(model: Path) -> None:
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")


def far_id(model: Path) -> None:
    layout = json.loads((model / "tokenizer.json").read_text())
    token = next(iter(layout["model"]["vocab"]))
    layout["model"]["vocab"][token] = 2**32 - 1
    (model / "tokenizer.json").write_text(json.dumps(layout))


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickle": (pickles, "pickled weights can run code and are not read"),
    "pickle named safetensors": (pickle_by_another_name, "not a readable safetensors file"),
    "shard elsewhere": (shard_elsewhere, "is not the name of a safetensors file in the same directory"),
    "10^9 layers": (lambda m: change(m / "config.json", num_hidden_layers=10**9), "layers.2.input_layernorm.weight is"),
    "10^9 wide": (lambda m: change(m / "config.json", hidden_size=10**9), "not [382, 1000000000]"),
    "10^5000 heads": (lambda m: (m / "config.json").write_text('{"a": ' + "1" * 5000 + "}"), "more than 64 bits"),
    "nested": (lambda m: (m / "config.json").write_text('{"a":' * 10**6), "nested too deeply"),
    "shape": (lambda m: tensor(m, torch.ones(3)), "model.norm.weight is [3], not [64]"),
    "dtype": (lambda m: tensor(m, torch.ones(64, dtype=torch.int64)), "model.norm.weight is I64, not F32, F16, BF16"),
    "header": (header, "not a readable safetensors file"),
    "linked weights": (lambda m: link(m, "model.safetensors"), "links to a file outside of its directory"),
    "linked config": (lambda m: link(m, "config.json"), "links to a file outside of its directory"),
    "linked tokenizer": (lambda m: link(m, "tokenizer.json"), "links to a file outside of its directory"),
    "pipe": (pipe, "is not a regular file"),
    "far id": (far_id, "tokens, with ids up to 4294967295"),
}
COMMANDS: dict[str, list[str]] = {
    "generate": ["generate", "{bad}", "--prompt", "hi", "--max-new-tokens", "1"],
    "eval": ["eval", "{bad}", "{rows}", "--stage", "pretrain"],
    "train": ["train", "pretrain", "--no-ray", "--train", "{rows}", "--init-from", "{bad}", "--out", "{new}",
              "--wandb", "off"],
    "import": ["import", "{bad}", "{new}"],
    "merge": ["lora", "merge", "{adapter}", "{new}", "--base", "{bad}"],
    "verify": ["verify", "checkpoint", "{bad}"],
}  # fmt: skip


def one_sentence(outcome: Outcome) -> str:
    assert outcome.code == 1
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1 and len(outcome.err) < 2100
    return outcome.err


@pytest.fixture(autouse=True)
def _bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A gigabyte more than there is now, and a place of its own where code that ran would leave its mark."""
    monkeypatch.chdir(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (1 << 30), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("name", BAD)
def test_a_bad_model(name: str, command: Command, models: Models, rows: Path, tmp_path: Path) -> None:
    make, words = BAD[name]
    bad = tmp_path / "bad"
    shutil.copytree(models.base, bad)
    make(bad)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    places = {"bad": bad, "rows": rows / "pretrain.jsonl", "new": tmp_path / "new", "adapter": models.adapter}
    for what, args in COMMANDS.items():
        outcome = command(*(arg.format_map(places) for arg in args))
        if what == "verify":
            assert outcome.code == 1 and "Traceback" not in outcome.err
            said = outcome.out + outcome.err
        else:
            said = one_sentence(outcome)
        assert words in said, what
        assert not (tmp_path / "new").exists()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("name", "words"),
    [("adapter_model.safetensors", "links to a file outside"), ("adapter_config.json", "links to a file outside")],
)
def test_an_adapter_that_is_a_link(name: str, words: str, command: Command, models: Models, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(models.adapter, bad)
    link(bad, name)
    assert words in one_sentence(command("generate", bad, "--prompt", "hi"))
    assert words in one_sentence(command("lora", "merge", bad, tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_bad_pth(command: Command, models: Models, tmp_path: Path) -> None:
    torch.save({"model.norm.weight": Evil()}, tmp_path / "evil.pth")
    said = one_sentence(command("import", "evil.pth", "new", "--tokenizer", models.tokenizer))
    assert "such pickles can run code and are not read" in said
    assert "such pickles" in one_sentence(command("import", "evil.pth", "new", "--base", models.base))
    assert not (tmp_path / "new").exists()


def test_a_result_that_leads_out_of_its_run(command: Command, models: Models, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(models.base, tmp_path / "other")
    (run / "run.json").write_text('{"result": "../other"}')
    for args in (["generate", run, "--prompt", "hi"], ["verify", "checkpoint", run], ["import", run, "new"]):
        assert "its result '../other' is not a path inside the run directory" in one_sentence(command(*args))


def test_what_a_resume_reads(command: Command, models: Models, rows: Path, tmp_path: Path) -> None:
    """Sums do not help against one who writes them anew."""
    args = ["train", "pretrain", "--no-ray", "--train", rows / "pretrain.jsonl", "--tokenizer", models.tokenizer,
            "--preset", "tiny", "--max-steps", 1, "--wandb", "off", "--out", "run", "--batch-tokens", 512,
            "--pack-tokens", 512, "--set", "eval.samples=0", "--set", "eval.max_tokens=64"]  # fmt: skip
    assert command(*args).code == 0
    RunDirectory(tmp_path / "run").update(state="stopped")  # A finished run would not be read.
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    shutil.copytree(checkpoint, tmp_path / "good")
    optimizer = load_file(checkpoint / "resume" / "optimizer.safetensors")
    first = next(name for name in optimizer if name.startswith("exp_avg."))
    state = json.loads((checkpoint / "resume" / "state.json").read_text())

    def refused(words: str) -> None:
        files = [p for p in checkpoint.rglob("*") if p.is_file() and p.name != "sums.json"]
        sums = {str(p.relative_to(checkpoint)): file_sha256(p) for p in files if not p.is_symlink()}
        (checkpoint / CHECKPOINT_SUMS).write_text(json.dumps(sums))
        said = one_sentence(command(*args, "--resume"))
        assert words in said
        shutil.rmtree(checkpoint)
        shutil.copytree(tmp_path / "good", checkpoint)

    tensor(checkpoint, torch.ones(3))
    refused("model.norm.weight is [3], not [64]")
    (checkpoint / "resume" / "optimizer.safetensors").write_bytes(pickle.dumps(Evil()))
    refused("optimizer.safetensors: not a readable safetensors file")
    save_file({**optimizer, first: torch.ones(3)}, checkpoint / "resume" / "optimizer.safetensors")
    refused(f"does not fit the model: {first.removeprefix('exp_avg.')}")
    link(checkpoint / "resume", "optimizer.safetensors")
    refused("links to a file outside of its directory")
    for field, value in {"step": -1, "best": "../../../x", "tokens": 10**30, "best_value": []}.items():
        (checkpoint / "resume" / "state.json").write_text(json.dumps({**state, field: value}))
        refused("resume/state.json")
    assert command(*args, "--resume").code == 0


def test_a_report_is_not_written_through_a_link(command: Command, tmp_path: Path) -> None:
    from tests.sweep.synthetic import make_sweep

    sweep = make_sweep(tmp_path / "sweep", axes={"dpo.beta": [0.1]}, quality=lambda point: 0.5, examples=8)
    for name in ("report.html", "report.png"):
        (tmp_path / name).write_text("mine")
        (sweep / name).symlink_to(tmp_path / name)
    assert command("report", sweep).code == 0
    assert all((tmp_path / name).read_text() == "mine" for name in ("report.html", "report.png"))
