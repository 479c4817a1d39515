"""Model directories: what is refused, and in which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import ModelShape
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.checkpoint import (
    load_model,
    load_shape,
    load_weights,
    model_fingerprint,
    save_model,
)
from minimind_ray.model.families import config_of
from minimind_ray.model.families.family import expected_tensors
from minimind_ray.model.transformer import Transformer
from tests.data.chat_families import write_family

pytestmark = pytest.mark.unit

BASE: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 4, "intermediate_size": 24, "max_position_embeddings": 64,
}  # fmt: skip
SHAPES = [
    ModelShape(**BASE),
    ModelShape(**BASE, qk_norm=False, tie_word_embeddings=False, dropout=0.1),
    ModelShape(**BASE, num_experts=3, moe_intermediate_size=8),
    ModelShape(**BASE, num_experts=3, moe_intermediate_size=24, qk_norm=False, n_shared_experts=2),
    ModelShape(**BASE, qk_norm=False, qkv_bias=True),
]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_model(Transformer(SHAPES[0]), None, tmp_path)
    return tmp_path


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "remove"}))


def shard(folder: Path) -> dict[str, str]:
    """Split model.safetensors in two with an index; the index's map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[:7], "model-00002-of-00002.safetensors": names[7:]}
    for file, members in files.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    weight_map = {name: file for file, members in files.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize("shape", SHAPES, ids=["qwen3", "llama", "moe", "granite", "qwen2"])
def test_round_trip(shape: ModelShape, tmp_path: Path) -> None:
    model = Transformer(shape)
    save_model(model, None, tmp_path)
    assert load_shape(tmp_path) == shape
    loaded = load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert dict(expected_tensors(shape)) == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert all(p.requires_grad and p.is_leaf for p in loaded.parameters())


def test_shards_and_16_bits_load_and_a_fingerprint_is_of_the_content(saved: Path) -> None:
    model, before = load_model(saved), model_fingerprint(saved)
    shard(saved)
    assert model_fingerprint(saved) == before
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), load_model(saved).parameters(), strict=True))

    with torch.no_grad():
        model.model.norm.weight[0] += 1
    save_model(model, None, saved)
    assert model_fingerprint(saved) != before
    save_file({k: v.bfloat16() for k, v in model.state_dict().items()}, saved / "model.safetensors")
    loaded = load_model(saved)
    assert all(torch.equal(a.bfloat16().float(), b) for a, b in zip(model.parameters(), loaded.parameters()))


@pytest.mark.parametrize("changes", [{"rope_theta": 10.0}, {"rms_norm_eps": 0.1}])
def test_a_fingerprint_is_of_what_tensors_do_not_show_too(changes: dict[str, Any], saved: Path) -> None:
    before = model_fingerprint(saved)
    change_config(saved, **changes)
    assert model_fingerprint(saved) != before


def test_load_weights_into_a_model_that_trains(saved: Path) -> None:
    model = Transformer(SHAPES[0])
    parameters = list(model.parameters())
    load_weights(model, saved)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))  # an optimizer still knows them
    assert all(torch.equal(a, b) for a, b in zip(parameters, load_model(saved).parameters(), strict=True))


def test_llama_of_old_without_head_dim_and_key_value_heads(tmp_path: Path) -> None:
    shape = ModelShape(**{**BASE, "num_key_value_heads": 4}, qk_norm=False, rope_theta=10000.0)
    save_model(Transformer(shape), None, tmp_path)
    change_config(tmp_path, head_dim="remove", num_key_value_heads="remove", rope_theta="remove", rope_scaling="remove")
    assert load_shape(tmp_path) == shape


def test_mistral_is_llama_where_its_window_covers_all_positions(tmp_path: Path) -> None:
    shape = SHAPES[1]
    save_model(Transformer(shape), None, tmp_path)
    for window in (None, shape.max_position_embeddings):
        change_config(tmp_path, model_type="mistral", sliding_window=window)
        assert load_shape(tmp_path) == shape
    change_config(tmp_path, sliding_window=shape.max_position_embeddings - 1)
    with pytest.raises(UserError, match=r"config.json: sliding_window is 63, less than max_position_embeddings 64"):
        load_shape(tmp_path)
    change_config(tmp_path, sliding_window="remove", max_position_embeddings=32768)
    with pytest.raises(UserError, match="sliding_window is 4096, less than"):  # as transformers takes it
        load_shape(tmp_path)


def test_tied_matrix_stored_twice(saved: Path) -> None:
    before, tensors = load_model(saved), load_file(saved / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, saved / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), load_model(saved).parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model_type": "gpt2"},
            "model_type is 'gpt2'; known are qwen3, llama, qwen2, mistral, qwen3_moe, granitemoeshared",
        ),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_size": "remove"}, "hidden_size is missing"),
        ({"hidden_size": "big"}, "hidden_size: Input should be a valid integer"),
        ({"hidden_size": -1}, "hidden_size: Input should be greater than 0"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is supported"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn's factor is None"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0}}, "mscale"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', not an object"),
    ],
    ids=str,
)
def test_config_is_read_strictly(changes: dict[str, Any], words: str, saved: Path) -> None:
    change_config(saved, **changes)
    with pytest.raises(UserError) as error:
        load_model(saved)
    assert str(error.value).startswith(str(saved / "config.json")) and words in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"residual_multiplier": 0.22}, "residual_multiplier is 0.22; only 1.0 is supported"),
        ({"attention_multiplier": 0.25}, "attention_multiplier is 0.25; only 1 / sqrt(head_dim) is supported"),
        ({"attention_multiplier": "remove"}, "attention_multiplier is missing"),
        ({"shared_intermediate_size": 25}, "shared_intermediate_size 25 is not a multiple of intermediate_size 24"),
        ({"shared_intermediate_size": None}, "shared_intermediate_size None is not a multiple"),
        ({"num_local_experts": 10**9}, "router.layer.weight is [3, 16], not [1000000000, 16]"),
        ({"head_dim": 10**400}, "a whole number of more than 64 bits"),
        ({"head_dim": 2**63}, "attention_multiplier is"),
    ],
    ids=lambda value: f"{value:.40}" if isinstance(value, str) else str(value)[:40],
)
def test_multipliers_that_the_model_has_not_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    save_model(Transformer(SHAPES[3]), None, tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(UserError) as error:
        load_model(tmp_path)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"hidden_size": 10**9},
        {"vocab_size": 10**12},
        {"intermediate_size": 2**40},
        {"num_attention_heads": 10**9, "num_key_value_heads": 10**9},
    ],
    ids=str,
)
def test_absurd_sizes_are_refused_before_memory_is_taken(changes: dict[str, Any], saved: Path) -> None:
    change_config(saved, **changes)
    with pytest.raises(UserError, match="the weights do not fit config.json: model"):
        load_model(saved)


def test_absurd_number_of_experts(tmp_path: Path) -> None:
    save_model(Transformer(SHAPES[2]), None, tmp_path)
    change_config(tmp_path, num_experts=10**9)
    with pytest.raises(UserError, match=r"mlp\.gate\.weight is \[3, 16\], not \[1000000000, 16\]"):
        load_model(tmp_path)


def test_weights_that_do_not_fit_are_named(saved: Path) -> None:
    path = saved / "model.safetensors"
    tensors = load_file(path)

    def error_of(**changes: Any) -> str:
        changed = {**tensors, **{name.replace("__", "."): t for name, t in changes.items()}}
        save_file({k: v for k, v in changed.items() if v is not None}, path)
        with pytest.raises(UserError) as error:
            load_model(saved)
        return str(error.value)

    assert error_of(model__norm__weight=None).endswith("model.norm.weight is missing")
    assert error_of(model__norm__weight=torch.ones(3)).endswith("model.norm.weight is [3], not [16]")
    assert error_of(model__norm__weight=torch.ones(16).int()).endswith("model.norm.weight is I32, not F32, F16, BF16")
    assert error_of(a=torch.ones(1), b=torch.ones(1)).endswith(": a is unknown; b is unknown")
    many = error_of(**{name.replace(".", "__"): torch.ones(1, 1, 1) for name in tensors})
    assert many.count("[1, 1, 1]") == 3


def test_files_that_cannot_be_read(saved: Path) -> None:
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_model(saved)
    path.unlink()
    (saved / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(UserError, match="pickled weights can run code and are not read"):
        load_model(saved)
    (saved / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        load_model(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_model(saved)
    (saved / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not valid JSON"):
        load_model(saved)
    (saved / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        load_model(saved)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "sub/x.safetensors", "weights.bin", ""])
def test_an_index_names_files_of_its_own_directory_only(name: str, saved: Path) -> None:
    weight_map = shard(saved)
    weight_map["model.norm.weight"] = name
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="is not the name of a safetensors file in the same directory"):
        load_model(saved)


def test_a_shard_that_links_out_of_the_directory(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    shard(saved)
    link = saved / "model-00002-of-00002.safetensors"
    link.rename(target := tmp_path_factory.mktemp("elsewhere") / "x.safetensors")
    link.symlink_to(target)
    with pytest.raises(UserError, match="links to a file outside"):
        load_model(saved)


def test_a_snapshot_in_the_cache_of_hugging_face(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    before, root = load_model(saved), tmp_path_factory.mktemp("models--someone--model")
    snapshot, blobs = root / "snapshots" / "0123", root / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in ("config.json", "model.safetensors"):
        (saved / file).rename(blobs / file)
        (snapshot / file).symlink_to(Path("..") / ".." / "blobs" / file)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), load_model(snapshot).parameters(), strict=True))


def test_config_has_what_readers_of_all_ages_look_for() -> None:
    config = config_of(SHAPES[0])
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["model_type"] == "qwen3"
    assert {"rope_theta", "head_dim", "num_key_value_heads", "tie_word_embeddings", "torch_dtype"} <= config.keys()
    assert not any("expert" in key for key in config)


def test_transformers_is_told_all_tokens_that_end_an_answer(tmp_path: Path) -> None:
    for family, ends in (("chatml", 2), ("llama3", [4, 3])):
        tokenizer = Tokenizer.load(write_family(tmp_path / family, family, "bytes"))
        save_model(Transformer(SHAPES[0]), tokenizer, tmp_path / "model")
        for file in ("config.json", "generation_config.json"):
            assert json.loads((tmp_path / "model" / file).read_text())["eos_token_id"] == ends
