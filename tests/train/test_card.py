"""The model card of the checkpoint that a run ends with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from minimind_ray.data import redact as redaction
from minimind_ray.model.checkpoint import model_fingerprint
from minimind_ray.stages.run import run_here
from minimind_ray.train.card import card, finish, locate
from minimind_ray.train.intervals import clustered_mean
from minimind_ray.train.run import RunDirectory, resolve_model, sound
from tests.jobs import make_job, start

TOKEN = "hf_" + "aB3" * 11 + "x"


def train(directory: Path, stage: str = "pretrain", **settings: Any) -> RunDirectory:
    job = make_job(directory, stage, 120, train__max_steps=2, track__wandb="off", **settings)
    start(job)
    run_here(job)
    return RunDirectory(job.config.out)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDirectory]:
    """A model and what was trained on it, in a folder whose name is nobody's business."""
    folder = tmp_path_factory.mktemp("cards") / "wintermute" / "unannounced"
    made = {"pretrain": train(folder, eval__samples=1, eval__prompts=["A fox"])}
    settings = {"eval__samples": 1, "data__tokenizer": None, "optim__clip": 0.5}
    made["sft"] = train(folder, "sft", init_from=str(made["pretrain"].path), **settings)
    made["lora"] = train(folder, "lora", init_from=str(made["sft"].path), data__tokenizer=None, lora__rank=4)
    made["dpo"] = train(folder, "dpo", init_from=str(made["sft"].path), data__tokenizer=None)
    return made


def read(run: RunDirectory) -> str:
    return (resolve_model(run.path) / "README.md").read_text(encoding="utf-8")


def header(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_card_tells_a_models_lineage(runs: dict[str, RunDirectory]) -> None:
    text = read(runs["sft"])
    assert re.findall(r"^### (.*)$", text, re.MULTILINE) == ["1. pretrain", "2. sft"]
    assert "- start: new weights" in text and "- start: the model of the stage before (weights " in text
    assert "- length: 2 steps, " in text
    assert "training data: `pretrain.jsonl`" in text and "training data: `sft.jsonl`" in text
    assert "    - `model.preset`: tiny" in text and "    - `optim.clip`: 0.5" in text
    assert "| family | qwen3 |" in text and "| vocabulary | " in text
    assert 'AutoModelForCausalLM.from_pretrained("USER/NAME")' in text and "minimind-ray chat hf://USER/NAME" in text


def test_the_header_is_the_hubs(runs: dict[str, RunDirectory]) -> None:
    assert header(read(runs["sft"])) == {
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["minimind", "minimind-ray", "sft", "qwen3"],
    }  # fmt: skip
    lora = header(read(runs["lora"]))
    assert lora["library_name"] == "peft" and lora["tags"] == ["minimind", "minimind-ray", "lora", "qwen3"]
    assert "license" not in lora and "# license: apache-2.0" in read(runs["lora"])


def test_an_adapters_card_describes_adapter_and_base(runs: dict[str, RunDirectory]) -> None:
    text = read(runs["lora"])
    assert text.startswith("---\n") and "\n# A LoRA adapter for a qwen3 model\n" in text
    assert "rank 4 and alpha 4 and adapts " in text and "| the base | |" in text
    assert "PeftModel.from_pretrained" in text and "--adapter hf://USER/NAME" in text


def test_the_validation_is_the_checkpoints_own(runs: dict[str, RunDirectory]) -> None:
    run = runs["sft"]
    best = next(line for line in run.metrics() if f"step-{line['step']:08d}" == resolve_model(run.path).name)
    found = re.search(r"^\| perplexity \| (\S+) \| (\S+) to (\S+) \|$", read(run), re.MULTILINE)
    assert found
    value, low, high = map(float, found.groups())
    assert low < value < high and value == pytest.approx(best["val/perplexity"], rel=1e-3)
    assert re.search(r"^\| accuracy \| \S+% \| \S+% to \S+% \|$", read(runs["dpo"]), re.MULTILINE)


def test_a_few_examples_have_no_interval(runs: dict[str, RunDirectory], tmp_path: Path) -> None:
    run = copy_of(runs["sft"], tmp_path)
    (run.path / "validation.parquet").unlink()
    text = card(locate(str(run.path)))
    assert "too few validation examples for intervals" in text and " to " not in text.split("## Validation")[1][:200]


def test_samples_are_those_of_the_checkpoint(runs: dict[str, RunDirectory]) -> None:
    (*_, line) = runs["pretrain"].samples()
    assert line["step"] == 2 and line["samples"][0].startswith("A fox")
    shown = line["samples"][0].strip().splitlines()[0]
    assert "## What it writes" in read(runs["pretrain"]) and shown in read(runs["pretrain"])


def test_a_card_does_not_quote_the_validation_data(runs: dict[str, RunDirectory]) -> None:
    (*_, line) = runs["sft"].samples()
    assert line["prompts"][0].startswith("What about the ")
    assert "## What it writes" not in read(runs["sft"]) and line["prompts"][0] not in read(runs["sft"])


def test_a_card_changes_neither_the_model_nor_itself(runs: dict[str, RunDirectory]) -> None:
    run = runs["sft"]
    checkpoint, before = resolve_model(run.path), read(run)
    assert card(locate(str(run.path))) == before == card(locate(str(checkpoint)))
    fingerprint = model_fingerprint(checkpoint)
    (checkpoint / "README.md").unlink()
    assert model_fingerprint(checkpoint) == fingerprint and sound(checkpoint)
    run.write(str((checkpoint / "README.md").relative_to(run.path)), before)


def test_a_run_is_finished_though_its_card_cannot_be_made(
    runs: dict[str, RunDirectory], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(runs["sft"], tmp_path)
    result = run.info()["result"]
    (run.path / result / "README.md").unlink()
    (run.path / "metrics.jsonl").write_text('{"step": 2, "val/loss": "a text"}\n')
    finish(run, state="finished", steps=7, tokens=9, result=result)
    assert run.info()["steps"] == 7 and not (run.path / result / "README.md").exists()
    assert f"{run.where}: the model card could not be made: " in capsys.readouterr().err


def test_a_directory_that_no_run_made_has_a_card_too(runs: dict[str, RunDirectory], tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((resolve_model(runs["sft"].path) / name).read_bytes())
    text = card(locate(str(tmp_path)))
    assert "the directory is not part of a run" in text and "| family | qwen3 |" in text


def test_what_came_from_the_hub_is_named(
    runs: dict[str, RunDirectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run = copy_of(runs["lora"], tmp_path)
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    config["init_from"] = "hf://me/base@" + "0a" * 20
    config["data"]["train"] = ["hf://datasets/you/rows/train.jsonl", "/home/wintermute/more.jsonl"]
    (run.path / "config.yaml").write_text(yaml.safe_dump(config))
    text = card(locate(str(run.path)))
    assert header(text)["base_model"] == "me/base" and header(text)["base_model_relation"] == "adapter"
    assert header(text)["datasets"] == ["you/rows"] and "base_model:adapter:me/base" in header(text)["tags"]
    assert f"the model `me/base` of the hub at commit {'0a' * 20}" in text
    assert "minimind-ray chat hf://me/base --adapter hf://USER/NAME" in text


def test_secrets_and_places_never_enter_a_card(
    runs: dict[str, RunDirectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "wintermute")
    monkeypatch.setattr("socket.gethostname", lambda: "straylight-7")
    monkeypatch.setenv("WANDB_API_KEY", "key-of-this-machine-1234")
    redaction.machine.cache_clear()
    run = copy_of(runs["sft"], tmp_path / f"run-{TOKEN}")
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    config["track"] |= {"name": f"run {TOKEN}", "entity": "wintermute", "tags": ["straylight-7"]}
    config["data"] |= {"train": f"/home/wintermute/{TOKEN}/rows.jsonl", "fields": {"text": "/home/wintermute"}}
    config["data"]["val"] = "s3://private-bucket/val.jsonl"
    config["eval"]["prompts"] = ["key-of-this-machine-1234"]
    config["lora"]["targets"] = ["/home/wintermute/q_proj", TOKEN]
    config["init_from"] = str(runs["pretrain"].path)
    (run.path / "config.yaml").write_text(yaml.safe_dump(config))
    texts = [
        f"key-of-this-machine-1234 {TOKEN}\n/home/wintermute/x on straylight-7 ``` s3://private-bucket/a?sig=abcdef"
    ]
    (run.path / "samples.jsonl").write_text(json.dumps({"step": 1, "samples": texts}) + "\n")
    info = json.loads((run.path / "run.json").read_text())
    info |= {"command": [f"--hub-token={TOKEN}"], "versions": {"torch": "/home/wintermute/torch"}}
    info["inputs"]["data.train"] = "/home/wintermute/cache/0123456789abcdef"
    (run.path / "run.json").write_text(json.dumps(info))
    text = card(locate(str(run.path)))
    redaction.machine.cache_clear()
    assert "## What it writes" in text and "1. pretrain" in text
    for secret in (
        TOKEN,
        "key-of-this-machine",
        "wintermute",
        "straylight",
        "private-bucket",
        "unannounced",
        "/home",
        "/tmp",
    ):
        assert secret not in text, secret


def test_a_sample_cannot_end_its_own_block(runs: dict[str, RunDirectory], tmp_path: Path) -> None:
    run = copy_of(runs["sft"], tmp_path)
    sample = "```\n# A heading\n\x1b[31m"
    (run.path / "samples.jsonl").write_text(json.dumps({"step": 1, "samples": [sample]}) + "\n")
    text = card(locate(str(run.path)))
    assert "````text\n```\n# A heading\n[31m\n````" in text


def copy_of(run: RunDirectory, folder: Path) -> RunDirectory:
    """A copy of a run, of which a test may change the files."""
    import shutil

    return RunDirectory(shutil.copytree(run.path, folder / "run"))


def test_an_interval_of_a_mean_counts_clusters() -> None:
    """Two examples with the same loss in each cluster say no more than one: the variance is that of 4 clusters."""
    loss = np.array([1.0, 2.0, 3.0, 6.0])
    once = clustered_mean(loss, np.ones(4), np.arange(4))
    twice = clustered_mean(np.repeat(loss, 2), np.ones(8), np.repeat(np.arange(4), 2))
    # Mean 3, deviations -2, -1, 0, 3: sqrt(14 · 4/3) / 4 = 1.0801, times t(3) = 3.1824.
    assert once == pytest.approx((3 - 3.4374, 3 + 3.4374), rel=1e-4)
    assert twice == pytest.approx(once)
