"""What `push` collects and uploads, on a loopback hub."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind_ray.cli.main import app
from minimind_ray.config.errors import UserError
from minimind_ray.model.checkpoint import model_fingerprint
from minimind_ray.stages.push import collect
from minimind_ray.stages.run import run_here
from minimind_ray.stages.use import open_trained
from minimind_ray.sweep.compare import compare
from minimind_ray.sweep.trials import read_sweep
from minimind_ray.train.run import RunDirectory, resolve_model
from tests.hub import Hub
from tests.jobs import make_job, start
from tests.sweep.synthetic import make_sweep

pytestmark = pytest.mark.slow

TOKEN = "hf_" + "aB3" * 11 + "x"
WHOLE = [
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]


def train(directory: Path, stage: str = "pretrain", **settings: Any) -> str:
    job = make_job(directory, stage, 120, train__max_steps=2, track__wandb="off", **settings)
    start(job)
    run_here(job)
    return job.config.out


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("push")
    base = train(folder)
    return {"pretrain": base, "lora": train(folder, "lora", init_from=base, data__tokenizer=None)}


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    """A token in the environment, and uploads by plain HTTP."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
    hub.token = TOKEN


def push(*arguments: str) -> None:
    app(["push", *arguments], standalone_mode=False)


def test_a_pushed_model_is_loaded_by_transformers_and_by_us(
    runs: dict[str, str], hub: Hub, token: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    push(runs["pretrain"], "--repo", "me/tiny", "--message", "First model")
    assert f"{hub.endpoint}/me/tiny/commit/" in capsys.readouterr().out
    repo = hub.repos["models/me/tiny"]
    files = repo.commits[repo.refs["main"]]
    assert sorted(files.keys() - {".gitattributes"}) == WHOLE and repo.messages == ["First model"]
    assert not repo.private and b"hf://me/tiny" in files["README.md"] and b"USER/NAME" not in files["README.md"]
    ours, own = open_trained("hf://me/tiny"), resolve_model(runs["pretrain"])
    assert model_fingerprint(ours.directory) == model_fingerprint(own)
    model, tokenizer = AutoModelForCausalLM.from_pretrained("me/tiny"), AutoTokenizer.from_pretrained("me/tiny")
    ids = tokenizer("river sees fox", return_tensors="pt").input_ids
    bounds = torch.tensor([0, ids.shape[1]], dtype=torch.int32)
    with torch.no_grad():
        logits = ours.model.project(ours.model(ids[0], bounds))
        torch.testing.assert_close(model(ids).logits[0], logits, rtol=1e-4, atol=1e-4)


def test_a_pushed_adapter_names_its_base_on_the_hub(
    runs: dict[str, str], hub: Hub, token: None, tmp_path: Path
) -> None:
    push(runs["pretrain"], "--repo", "me/tiny")
    push(runs["lora"], "--repo", "me/tiny-lora", "--base", "me/tiny")
    repo = hub.repos["models/me/tiny-lora"]
    files = repo.commits[repo.refs["main"]]
    assert sorted(files.keys() - {".gitattributes"}) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/tiny"
    assert b"\nbase_model: me/tiny\n" in files["README.md"]
    assert b"chat hf://me/tiny --adapter hf://me/tiny-lora" in files["README.md"]
    load = "from peft import AutoPeftModelForCausalLM as A; print(A.from_pretrained('me/tiny-lora').peft_config)"
    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    shown = subprocess.run([sys.executable, "-c", load], env=environment, check=True, capture_output=True, text=True)
    assert "base_model_name_or_path='me/tiny'" in shown.stdout
    assert open_trained("hf://me/tiny-lora").stage is None


def test_an_adapters_local_base_is_not_uploaded(runs: dict[str, str]) -> None:
    found = collect(runs["lora"], "me/lora")
    config = found.files["adapter_config.json"]
    assert isinstance(config, bytes) and json.loads(config)["base_model_name_or_path"] is None
    assert "push the base, and add --base" in found.notes[0]


def test_a_dry_run_shows_files_and_card_and_asks_nobody(
    runs: dict[str, str], hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    push(runs["pretrain"], "--repo", "me/tiny", "--dry-run")
    shown = capsys.readouterr().out
    assert all(f"  {name}  " in shown for name in WHOLE) and "resume" not in shown and "## How it was trained" in shown
    assert re.search(r"  config.json  \d\.\d kB\n", shown) and re.search(r"  model.safetensors  0\.\d MB\n", shown)
    assert not hub.requests


def test_a_private_repository_and_a_branch_are_made(runs: dict[str, str], hub: Hub, token: None) -> None:
    push(runs["pretrain"], "--repo", "me/secret", "--private", "--revision", "second")
    repo = hub.repos["models/me/secret"]
    assert repo.private and sorted(repo.commits[repo.refs["second"]].keys() - {".gitattributes"}) == WHOLE
    assert list(repo.commits[repo.refs["main"]]) == [".gitattributes"]
    push(runs["pretrain"], "--repo", "me/secret", "--private", "--revision", "second")
    push(runs["pretrain"], "--repo", "me/open")
    with pytest.raises(UserError, match="me/open exists and is public"):
        push(runs["pretrain"], "--repo", "me/open", "--private")


def test_without_a_token_nothing_is_asked(runs: dict[str, str], hub: Hub) -> None:
    with pytest.raises(UserError, match="no token for .*: set HF_TOKEN, or use hf auth login"):
        push(runs["pretrain"], "--repo", "me/tiny")
    assert not hub.requests


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "does not accept your token"),
        (403, "your token may not write there"),
        (404, "no user or organisation me"),
        (413, "refuses the upload"),
        (429, "allows no more requests"),
        (503, "status 503: try again later"),
    ],
)
def test_each_refusal_is_a_sentence(runs: dict[str, str], hub: Hub, token: None, status: int, message: str) -> None:
    hub.status = status
    with pytest.raises(UserError, match=message) as error:
        push(runs["pretrain"], "--repo", "me/tiny")
    assert TOKEN not in str(error.value) and "\n" not in str(error.value)


def test_a_mirror_without_xet_storage_is_a_sentence(
    runs: dict[str, str], hub: Hub, token: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: True)
    with pytest.raises(UserError, match="has no Xet storage: set HF_HUB_DISABLE_XET=1"):
        push(runs["pretrain"], "--repo", "me/tiny")


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ("PUT /large", 403, "your token may not write there"),
        ("POST /me/tiny.git", 503, "status 503: try again later"),
        ("/preupload/", 403, "your token may not write there"),
        ("/commit/", 409, "somebody else is changing the repository"),
        ("/validate-yaml", 400, "refuses the header of README.md"),
    ],
)
def test_a_refusal_in_the_middle_is_a_sentence(
    runs: dict[str, str], hub: Hub, token: None, request_: str, status: int, message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # Between the library's own attempts.
    hub.refused = {request_: status}
    with pytest.raises(UserError, match=message):
        push(runs["pretrain"], "--repo", "me/tiny")


def test_without_a_network_a_push_says_so(runs: dict[str, str], hub: Hub, token: None) -> None:
    hub.stop()
    with pytest.raises(UserError, match="cannot be reached"):
        push(runs["pretrain"], "--repo", "me/tiny")


@pytest.mark.parametrize("name", ["tiny", "me/tiny/x", "/home/me", "hf://me/tiny", "me/ti ny", "-/x"])
def test_a_repository_has_an_owner_and_a_name(runs: dict[str, str], name: str) -> None:
    with pytest.raises(UserError, match="write OWNER/NAME"):
        collect(runs["pretrain"], name)


def test_the_users_own_card_is_kept_unless_it_holds_a_token(runs: dict[str, str], tmp_path: Path) -> None:
    for file in resolve_model(runs["pretrain"]).iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nMine, USER/NAME.\n")
    (tmp_path / "trainer_state.json").write_text("{}")
    found = collect(str(tmp_path), "me/tiny")
    assert found.card == "---\nlicense: mit\n---\nMine, me/tiny.\n" and "trainer_state.json" not in found.files
    (tmp_path / "README.md").write_text(f"token: {TOKEN}")
    with pytest.raises(UserError, match="README.md holds what looks like a token"):
        collect(str(tmp_path), "me/tiny")


def test_an_unfinished_run_says_which_checkpoint_it_gives(runs: dict[str, str], tmp_path: Path) -> None:
    import shutil

    run = RunDirectory(shutil.copytree(runs["pretrain"], tmp_path / "run"))
    run.update(state="stopped", steps=1, planned_steps=9)
    for card in run.path.glob("checkpoints/*/README.md"):
        card.unlink()
    found = collect(str(run.path), "me/tiny")
    assert found.notes == [f"the run is stopped at step 1 of 9; its checkpoint {found.directory.name} is pushed"]
    assert "1 steps of 9 (stopped)" in found.card


def test_the_winner_of_a_sweep_is_pushed(
    runs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    sweep = make_sweep(tmp_path / "sweep", seeds=1)
    best = compare([read_sweep(sweep)]).winner
    assert best
    shutil.rmtree(best.path / "checkpoints", ignore_errors=True)
    shutil.copytree(resolve_model(runs["pretrain"]), best.path / "checkpoints" / "step-00000060")
    push(str(sweep), "--repo", "me/best", "--dry-run")
    shown = capsys.readouterr().out
    assert f"the sweep's winner by val/loss is {best.id} (finished)" in shown and str(best.path) in shown
