"""Models of the hub: which names they have, which commit they are, what is downloaded, and what users are told."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from minimind_ray.config.errors import UserError
from minimind_ray.config.load import load_config, to_yaml
from minimind_ray.data.hub import HubRef, cache_if_unreachable, fetch, hub_ref, model_location, pin
from minimind_ray.data.shipped import resolve_paths
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.train.run import resolve_model
from tests.hub import Files, Hub
from tests.jobs import make_tokenizer

pytestmark = pytest.mark.unit

CONFIG = json.dumps({
    "model_type": "qwen3", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
    "num_key_value_heads": 1, "head_dim": 16, "rope_theta": 1e6, "tie_word_embeddings": True, "hidden_act": "silu",
}).encode()  # fmt: skip
MODEL: Files = {
    "config.json": CONFIG, "model.safetensors": b"w" * 50_000, "pytorch_model.bin": b"pickle", "code.py": b"print()",
    "onnx/model.safetensors": b"other", "README.md": b"card",
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("me/model", "hf://me/model"), ("me/model@v1", "hf://me/model@v1"), ("hf://me/model", "hf://me/model"),
        ("hf://gpt2", "hf://gpt2"), ("hf://me/model@refs/pr/1", "hf://me/model@refs/pr/1"), ("gpt2", None),
        ("runs/sft", None), ("here/model", None), ("./me/model", None), ("me/model/x", None), ("/me/model", None),
        ("hf://datasets/me", None), ("hf://datasets/me/model", None), ("s3://me/model", None), ("me/../model", None),
    ],
)  # fmt: skip
def test_names_of_the_hub(text: str, name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    found = hub_ref(text)
    assert (found and str(found)) == name


def test_a_folder_of_the_storage_is_no_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIMIND_STORAGE", str(tmp_path / "storage"))
    assert hub_ref("mine/sft")
    (tmp_path / "storage" / "mine").mkdir(parents=True)
    assert hub_ref("mine/sft") is None


def test_only_files_that_cannot_run_code_are_downloaded(hub: Hub) -> None:
    commit = hub.put("me/model", MODEL)
    folder = resolve_model("me/model")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert folder.name == commit and (folder / "model.safetensors").read_bytes() == MODEL["model.safetensors"]
    hub.requests.clear()
    assert resolve_model(f"hf://me/model@{commit}") == folder
    assert not hub.requests  # A commit never changes.


def test_shards_are_downloaded_as_the_index_says(hub: Hub) -> None:
    index = json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}).encode()
    shards = {"m-1.safetensors": b"1", "m-2.safetensors": b"2", "consolidated.safetensors": b"3"}
    hub.put("me/model", {"config.json": CONFIG, "model.safetensors.index.json": index, **shards})
    names = {path.name for path in resolve_model("me/model").iterdir()}
    assert names == {"config.json", "model.safetensors.index.json", "m-1.safetensors", "m-2.safetensors"}


def test_a_download_that_was_cut_continues(hub: Hub) -> None:
    hub.put("me/model", MODEL)
    hub.cut = True
    assert (resolve_model("me/model") / "model.safetensors").read_bytes() == MODEL["model.safetensors"]
    assert len([line for line in hub.requests if line.startswith("GET") and "model.safetensors" in line]) == 2


def test_a_slow_hub_is_waited_for(hub: Hub) -> None:
    hub.put("me/model", MODEL)
    hub.slow = 0.1
    assert (resolve_model("me/model") / "model.safetensors").read_bytes() == MODEL["model.safetensors"]


def test_an_unknown_family_is_refused_before_its_weights(hub: Hub) -> None:
    hub.put("me/model", {**MODEL, "config.json": b'{"model_type": "mamba"}'})
    with pytest.raises(UserError, match=r"hf://me/model@\w{40}: config.json: model_type is 'mamba'; known are"):
        resolve_model("me/model")
    assert not any("safetensors" in line for line in hub.requests)


def test_pickled_weights_are_not_read(
    hub: Hub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    hub.put("me/model", {"config.json": CONFIG, "pytorch_model.bin": b"pickle"})
    with pytest.raises(UserError, match=r"has no model.safetensors: its weights are pickled, which can run code"):
        resolve_model("me/model")
    hub.put("me/data", {"README.md": b"nothing"})
    with pytest.raises(UserError, match=r"is not a model: the repository has no config.json"):
        resolve_model("me/data")
    assert not caplog.records  # The library's warning would name our patterns of files.


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub) -> None:
    first, other = (
        hub.put("me/model", MODEL),
        hub.put("me/model", {**MODEL, "generation_config.json": b"{}"}, branch="v2"),
    )
    assert str(pin(ref_of("me/model"))) == f"hf://me/model@{first}"
    assert str(pin(ref_of("me/model@v2"))) == f"hf://me/model@{other}"
    with pytest.raises(UserError, match="has no such branch, tag or commit"):
        pin(ref_of("me/model@v3"))


def ref_of(text: str) -> HubRef:
    found = hub_ref(text)
    assert found
    return found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"name": "me/modle"},
            "has no me/modle, or it is private: .*no directory me/modle here",
        ),
        ({"status": 429}, "allows no more requests for now"),
        ({"status": 503}, "does not answer the request .status 503.; try again later"),
        ({"status": 403}, "refuses your token"),
        ({"token": "secret"}, "has no me/model, or it is private: .*HF_TOKEN"),
        ({"stopped": True}, "cannot be reached, .*: check the network, or set HF_ENDPOINT to a mirror"),
        ({"offline": True}, "is not in the cache .*, and HF_HUB_OFFLINE is set"),
        ({"gated": True}, "is gated: accept its conditions at http.*/me/model, and give your token"),
    ],
)
def test_what_users_are_told(
    change: dict[str, object], message: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("me/model", MODEL)
    for name, value in change.items():
        if name == "stopped":
            hub.stop()
        elif name == "offline":
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        elif name == "gated":
            hub.repos["models/me/model"].gated = True
        elif name != "name":
            setattr(hub, name, value)
    with pytest.raises(UserError, match=message) as raised:
        resolve_model(str(change.get("name", "me/model")))
    assert "\n" not in str(raised.value)


def test_a_token_opens_a_private_model(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("me/model", MODEL)
    hub.token = "secret"
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert (resolve_model("me/model") / "model.safetensors").exists()


@pytest.mark.parametrize("offline", [False, True])
def test_without_the_hub_the_cache_is_used(
    offline: bool, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = hub.put("me/model", MODEL)
    folder = resolve_model("me/model")
    pin.cache_clear()
    hub.stop()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    capsys.readouterr()
    assert resolve_model("me/model") == folder
    said = capsys.readouterr().err
    assert not said if offline else f"using hf://me/model@{commit} from the cache" in said


def test_an_unreachable_hub_is_asked_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    with cache_if_unreachable():
        assert not constants.HF_HUB_OFFLINE
    hub.stop()
    with cache_if_unreachable():
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE


def test_a_run_keeps_its_commit(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = hub.put("me/model", MODEL)
    settings = {"init_from": "me/model", "data.tokenizer": "me/model", "out": str(tmp_path / "run")}
    config = resolve_paths(load_config("sft", overrides=settings))
    assert config.init_from == config.data.tokenizer == f"hf://me/model@{first}"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config))
    second = hub.put("me/model", {**MODEL, "generation_config.json": b"{}"})
    pin.cache_clear()
    assert resolve_paths(load_config("sft", overrides=settings), again=True) == config
    moved = {**settings, "init_from": "me/model@main", "data.tokenizer": "hf://me/model"}
    found = resolve_paths(load_config("sft", overrides=moved), again=True)
    assert (found.init_from, found.data.tokenizer) == (f"hf://me/model@{second}", config.data.tokenizer)
    assert resolve_paths(load_config("sft", overrides=settings)).init_from == f"hf://me/model@{second}"


def test_the_tokenizer_alone(hub: Hub, tmp_path: Path) -> None:
    own = Tokenizer.load(make_tokenizer(tmp_path / "tokenizer"))
    hub.put("me/model", MODEL | {path.name: path.read_bytes() for path in (tmp_path / "tokenizer").iterdir()})
    assert Tokenizer.load(model_location("me/model")).fingerprint == own.fingerprint
    assert not any("safetensors" in line for line in hub.requests)
    hub.put("me/other", MODEL)
    with pytest.raises(UserError, match=r"has no tokenizer.json"):
        Tokenizer.load(model_location("me/other"))


def test_on_a_cluster_only_the_first_process_asks(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.put("me/model", MODEL)
    monkeypatch.setenv("MINIMIND_STORAGE", str(tmp_path / "storage"))
    pinned = pin(ref_of("me/model"))
    folder = fetch(pinned)
    assert folder == tmp_path / "storage" / "hub" / "me" / "model" / commit
    assert (folder / "model.safetensors").read_bytes() == MODEL["model.safetensors"]
    hub.stop()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "other-machine"))
    assert fetch(pinned) == folder
