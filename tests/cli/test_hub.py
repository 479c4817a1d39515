"""Commands that take a model of the hub where they take a directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minimind_ray.data.hub import pin
from minimind_ray.model.checkpoint import model_fingerprint
from tests.cli.conftest import Command, Models
from tests.hub import Hub
from tests.jobs import rows_of

pytestmark = pytest.mark.slow


def test_an_adapter_on_a_model_of_the_hub(
    command: Command, models: Models, rows: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commit = hub.put("me/model", models.base)
    arguments = [
        "train", "lora", "--no-ray", "--train", rows / "sft.jsonl", "--init-from", "me/model", "--pack-tokens", 256,
        "--batch-tokens", 512, "--max-seq-len", 64, "--max-steps", 3, "--wandb", "off", "--out", "adapter",
        "--set", f"data.cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    with monkeypatch.context() as stopping:
        stopping.setattr("minimind_ray.train.context.PlainContext.should_stop", lambda self: True)
        assert command(*arguments).code == 130
    assert f"init_from: hf://me/model@{commit}" in (tmp_path / "adapter" / "config.yaml").read_text()

    hub.put("me/model", models.other)  # The branch moves, and then the hub is gone.
    hub.stop()
    pin.cache_clear()
    resumed = command(*arguments, "--resume")
    assert resumed.code == 0, resumed.err
    written = next((tmp_path / "adapter").glob("checkpoints/step-00000003/adapter_config.json"))
    named = json.loads(written.read_text())
    assert (named["base_model_name_or_path"], named["revision"]) == ("me/model", commit)

    answered = command("generate", "adapter", "--prompt", "a", "--max-new-tokens", 3)
    assert answered.code == 0, answered.err
    merged = command("lora", "merge", "adapter", "merged")
    assert merged.code == 0, merged.err


def test_a_published_adapter_and_its_base(command: Command, models: Models, hub: Hub, tmp_path: Path) -> None:
    commit = hub.put("me/model", models.base)
    adapter = {file.name: file.read_bytes() for file in models.adapter.iterdir()}
    config = json.loads(adapter["adapter_config.json"]) | {"base_model_name_or_path": "me/model", "revision": commit}
    hub.put("me/adapter", {**adapter, "adapter_config.json": json.dumps(config).encode()})
    hub.put("me/model", models.other)
    asked = ("--prompt", "a", "--max-new-tokens", 8, "--temperature", 0)
    here = command("generate", models.base, "--adapter", models.adapter, *asked)
    there = command("generate", "hf://me/adapter", *asked)
    assert there.code == here.code == 0, there.err
    assert there.out.splitlines()[-1] == here.out.splitlines()[-1]
    unsuited = command("generate", "me/model", "--adapter", "me/adapter", *asked)
    assert unsuited.code == 1 and "not on this model" in unsuited.err


def test_a_model_of_the_hub_is_imported(command: Command, models: Models, hub: Hub, tmp_path: Path) -> None:
    hub.put("me/model", models.base)
    said = command("import", "hf://me/model", tmp_path / "own", "--tokenizer", "hf://me/model")
    assert said.code == 0, said.err
    assert model_fingerprint(tmp_path / "own") == model_fingerprint(models.base)
    refused = command("import", "me/model", tmp_path / "other", "--heads", 8)
    assert refused.code == 1 and "me/model is a directory with these settings in its config.json" in refused.err


def test_a_mistake_in_a_path_stays_local(
    command: Command, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    for name in ("runs/pretrian", "results/pretrian"):
        said = command("generate", name, "--prompt", "a")
        assert said.code == 1
        assert f"{name} is not a model: " in said.err
        assert said.err.endswith(f"; for a model of the hub, write hf://{name}\n")
    assert not hub.requests


RECIPE = """
name: small
data_dir: data
tokenizer: tokenizer
download: {data: hf://datasets/me/rows, tokenizer: hf://me/model}
settings: {batch: {tokens: 512}, train: {max_steps: 1}, eval: {samples: 0}}
stages:
  - name: pretrain
    settings: {model: {preset: tiny}, data: {train: rows/pretrain.jsonl, max_seq_len: 64, pack_tokens: 256}}
"""


def test_a_recipe_downloads_what_is_missing(
    command: Command, models: Models, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = "".join(json.dumps(row) + "\n" for row in rows_of("pretrain", 400)).encode()
    hub.put("me/rows", {"rows/pretrain.jsonl": content, "other.jsonl": b"x"}, kind="datasets")
    hub.put("me/model", models.base)
    Path("small.yaml").write_text(RECIPE)
    arguments = ["run", "small.yaml", "--no-ray", "--set", f"data.cache_dir={tmp_path / 'cache'}"]
    refused = command(*arguments)
    assert refused.code == 1
    assert "; add --download to fetch rows/pretrain.jsonl, tokenizer/ from the Hugging Face Hub" in refused.err
    assert not hub.requests

    hub.cut = True
    done = command(*arguments, "--download")
    assert done.code == 0, done.err
    assert done.out.startswith(f"downloading {len(content) / 1e3:.1f} kB from hf://datasets/me/rows to ")
    assert Path("data/rows/pretrain.jsonl").read_bytes() == content
    assert sorted(path.name for path in Path("tokenizer").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    hub.stop()
    again = command(*arguments, "--download")
    assert again.code == 0 and "skip: finished" in again.out


def test_a_data_set_that_lacks_a_file(
    command: Command, models: Models, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.put("me/rows", {"other.jsonl": b"x"}, kind="datasets")
    Path("small.yaml").write_text(RECIPE)
    said = command("run", "small.yaml", "--no-ray", "--download")
    assert said.code == 1 and said.err == "error: hf://datasets/me/rows has no file rows/pretrain.jsonl\n"
