from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import LoraConfig, ModelConfig, RopeScaling
from minimind_ray.data.tokenizer import Tokenizer, train_tokenizer
from minimind_ray.model.checkpoint import load_model, load_shape, model_fingerprint, read_weights, save_model
from minimind_ray.model.lora import adapters, add_lora, load_adapter, save_adapter
from minimind_ray.model.minimind_pth import (
    export_lora_pth,
    export_pth,
    import_lora_pth,
    import_pth,
    read_pth,
    settings_not_in_file,
)
from minimind_ray.model.transformer import Transformer

pytestmark = [pytest.mark.unit, pytest.mark.slow]

TOKENS = torch.tensor([1, 5, 3, 200, 17, 2, 9])
MINIMIND_3 = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
MINIMIND_2 = {**MINIMIND_3, "num_key_value_heads": 2, "qk_norm": False, "rms_norm_eps": 1e-5}
MOE_2 = {"intermediate_size": 80, "num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.01}
SHAPES: dict[str, dict[str, Any]] = {
    "3": {**MINIMIND_3, "intermediate_size": 192},
    "3-moe": {**MINIMIND_3, "intermediate_size": 192, "moe_intermediate_size": 80, "num_experts": 3},
    "3-untied": {**MINIMIND_3, "intermediate_size": 192, "tie_word_embeddings": False},
    "2": {**MINIMIND_2, "intermediate_size": 192},
    "2-moe": {**MINIMIND_2, **MOE_2, "n_shared_experts": 1},
    "2-moe-2-shared": {**MINIMIND_2, **MOE_2, "n_shared_experts": 2, "tie_word_embeddings": False},
    "2-moe-none-shared": {**MINIMIND_2, **MOE_2},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["a small text", "another"], vocab_size=320).save(directory)
    return directory


def make_model(fields: dict[str, Any]) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(preset="tiny", **fields).shape(400))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)  # norms are not all 1
    return model.eval()


def make_directory(fields: dict[str, Any], tokenizer: Path, directory: Path) -> Path:
    save_model(make_model(fields), Tokenizer.load(tokenizer), directory)
    return directory


def logits(model: Transformer) -> Tensor:
    with torch.no_grad():
        return model.project(model(TOKENS, torch.tensor([0, len(TOKENS)], dtype=torch.int32)))


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_a_round_trip_is_exact(name: str, tokenizer: Path, tmp_path: Path) -> None:
    directory = make_directory(SHAPES[name], tokenizer, tmp_path / "model")
    export_pth(directory, tmp_path / "whole.pth", "float32")
    shape = import_pth(tmp_path / "whole.pth", tokenizer, tmp_path / "again")
    before, after = read_weights(directory), read_weights(tmp_path / "again")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert shape == load_shape(tmp_path / "again")
    kept = {"intermediate_size"} if "moe" in name else set[str]()  # nothing of a MoE model has that size
    assert shape.model_dump(exclude=kept) == load_shape(directory).model_dump(exclude=kept)
    assert Tokenizer.load(tmp_path / "again").fingerprint == Tokenizer.load(tokenizer).fingerprint

    export_pth(tmp_path / "again", tmp_path / "a.pth")
    import_pth(tmp_path / "a.pth", tokenizer, tmp_path / "halved")
    export_pth(tmp_path / "halved", tmp_path / "b.pth", "half")
    a, b = read_pth(tmp_path / "a.pth"), read_pth(tmp_path / "b.pth")
    assert list(a) == list(b)
    assert all(v.dtype == torch.float16 and torch.equal(v, b[k]) for k, v in a.items())


def rotated(x_NHK: Tensor, theta: float) -> Tensor:
    half = x_NHK.shape[-1] // 2
    angles_NK = torch.arange(len(x_NHK))[:, None] * theta ** (-torch.arange(half) / half).repeat(2)
    x1, x2 = x_NHK.split(half, -1)
    return x_NHK * angles_NK.cos()[:, None] + torch.cat([-x2, x1], -1) * angles_NK.sin()[:, None]


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def expert_mixture(x_NC: Tensor, w: dict[str, Tensor], per_token: int, normalised: bool) -> Tensor:
    """Token by token, expert by expert."""
    rows: list[Tensor] = []
    for x_C in x_NC:
        scores, chosen = (w["gate.weight"] @ x_C).softmax(-1).topk(per_token)
        if normalised:
            scores = scores / scores.sum()
        row = torch.zeros_like(x_C)
        for score, expert in zip(scores, chosen.tolist()):
            gate, up, down = (w[f"experts.{expert}.{kind}_proj.weight"] for kind in ("gate", "up", "down"))
            row = row + score * (down @ (nn.functional.silu(gate @ x_C) * (up @ x_C)))
        rows.append(row)
    return torch.stack(rows)


def reference_logits(
    tensors: dict[str, Tensor], per_token: int, normalised: bool, theta: float = 1e6, eps: float = 1e-6
) -> Tensor:
    """MiniMind-3's mixture of experts as its formulas read: logits of TOKENS from the tensors of a .pth file."""

    def section(start: str) -> dict[str, Tensor]:
        return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}

    x_NC = tensors["model.embed_tokens.weight"][TOKENS]
    ahead_NN = torch.full((len(TOKENS), len(TOKENS)), -torch.inf).triu(1)
    for layer in range(2):
        w = section(f"model.layers.{layer}.")
        size = len(w["self_attn.q_norm.weight"])
        y_NC = normed(x_NC, w["input_layernorm.weight"], eps)
        q, k, v = ((y_NC @ w[f"self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, size)) for n in "qkv")
        q = rotated(normed(q, w["self_attn.q_norm.weight"], eps), theta)
        k = rotated(normed(k, w["self_attn.k_norm.weight"], eps), theta)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        weights_HNN = (torch.einsum("nhk,mhk->hnm", q, k) / size**0.5 + ahead_NN).softmax(-1)
        x_NC = x_NC + torch.einsum("hnm,mhk->nhk", weights_HNN, v).flatten(1) @ w["self_attn.o_proj.weight"].T
        y_NC = normed(x_NC, w["post_attention_layernorm.weight"], eps)
        x_NC = x_NC + expert_mixture(y_NC, section(f"model.layers.{layer}.mlp."), per_token, normalised)
    return normed(x_NC, tensors["model.norm.weight"], eps) @ tensors["lm_head.weight"].T


@pytest.fixture(scope="module")
def experts_file(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("experts")
    export_pth(make_directory(SHAPES["3-moe"], tokenizer, root / "model"), root / "a.pth", "float32")
    return root / "a.pth"


@pytest.mark.parametrize("per_token", [1, 2])
@pytest.mark.parametrize("normalised", [True, False])
def test_weights_of_experts_are_as_the_settings_say(
    per_token: int, normalised: bool, experts_file: Path, tokenizer: Path, tmp_path: Path
) -> None:
    settings = {"num_experts_per_tok": per_token, "norm_topk_prob": normalised}
    import_pth(experts_file, tokenizer, tmp_path / "model", settings)
    with torch.no_grad():
        expected = reference_logits(read_pth(experts_file), per_token, normalised)
        other = reference_logits(read_pth(experts_file), per_token, not normalised)
    torch.testing.assert_close(logits(load_model(tmp_path / "model").eval()), expected, rtol=1e-4, atol=1e-4)
    assert (other - expected).abs().max() > 0.1
    told = export_pth(tmp_path / "model", tmp_path / "b.pth")
    assert told.get("norm_topk_prob", True) == normalised and told.get("num_experts_per_tok", 1) == per_token


def test_rope_and_norm_are_as_the_settings_say(experts_file: Path, tokenizer: Path, tmp_path: Path) -> None:
    import_pth(experts_file, tokenizer, tmp_path / "model", {"rope_theta": 100.0, "rms_norm_eps": 0.1})
    with torch.no_grad():
        expected = reference_logits(read_pth(experts_file), 1, True, theta=100.0, eps=0.1)
    torch.testing.assert_close(logits(load_model(tmp_path / "model").eval()), expected, rtol=1e-4, atol=1e-4)


def test_settings_that_tensors_do_not_show(experts_file: Path, tokenizer: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "rope_theta": 1e4, "inference_rope_scaling": True, "max_position_embeddings": 4096, "rms_norm_eps": 1e-3,
        "dropout": 0.1, "num_experts_per_tok": 3, "norm_topk_prob": False, "router_aux_loss_coef": 0.02,
    }  # fmt: skip
    assert settings.keys() == settings_not_in_file(qk_norm=True, experts=True).keys()
    shape = import_pth(experts_file, tokenizer, tmp_path / "model", settings)
    assert load_shape(tmp_path / "model") == shape
    assert settings.items() <= export_pth(tmp_path / "model", tmp_path / "b.pth").items()
    short = import_pth(
        experts_file, tokenizer, tmp_path / "short", {"inference_rope_scaling": True, "max_position_embeddings": 2048}
    )
    assert short.rope_scaling is None  # MiniMind scales positions only above 2048.


@pytest.mark.parametrize("dtype", ["half", "float32"])
def test_a_lora_round_trip_is_exact(dtype: Any, tokenizer: Path, tmp_path: Path) -> None:
    base = make_directory(SHAPES["3"], tokenizer, tmp_path / "base")
    model = load_model(base)
    add_lora(model, LoraConfig(rank=5), seed=0)
    for layer in adapters(model).values():
        layer.lora_B.data.normal_()
    save_adapter(model, tmp_path / "adapter", base, model_fingerprint(base))
    export_lora_pth(tmp_path / "adapter", base, tmp_path / "a.pth", dtype)
    import_lora_pth(tmp_path / "a.pth", base, tmp_path / "again")
    export_lora_pth(tmp_path / "again", base, tmp_path / "b.pth", dtype)
    a, b = read_pth(tmp_path / "a.pth"), read_pth(tmp_path / "b.pth")
    assert set(a) == {
        f"model.layers.{i}.self_attn.{p}_proj.lora.{m}.weight" for i in (0, 1) for p in "qo" for m in "AB"
    }
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    if dtype == "float32":
        again = load_model(base)
        load_adapter(again, tmp_path / "again", model_fingerprint(base))
        assert torch.equal(logits(again), logits(model))


def test_an_adapters_scale_is_folded_in(tokenizer: Path, tmp_path: Path) -> None:
    base = make_directory(SHAPES["3"], tokenizer, tmp_path / "base")
    model = load_model(base)
    add_lora(model, LoraConfig(rank=5, alpha=12), seed=0)
    for layer in adapters(model).values():
        layer.lora_B.data.normal_()
    save_adapter(model, tmp_path / "adapter", base, model_fingerprint(base))
    export_lora_pth(tmp_path / "adapter", base, tmp_path / "a.pth", "float32")
    import_lora_pth(tmp_path / "a.pth", base, tmp_path / "again")
    again = load_model(base)
    load_adapter(again, tmp_path / "again", model_fingerprint(base))
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(targets="all-linear"), "MiniMind adapts every layer's o_proj, q_proj and nothing else"),
        (LoraConfig(targets="q_proj"), "MiniMind adapts every layer's o_proj, q_proj and nothing else"),
        (LoraConfig(dora=True), "MiniMind has no DoRA"),
    ],
)
def test_adapters_that_minimind_cannot_hold(config: LoraConfig, message: str, tokenizer: Path, tmp_path: Path) -> None:
    base = make_directory(SHAPES["3"], tokenizer, tmp_path / "base")
    model = load_model(base)
    add_lora(model, config, seed=0)
    save_adapter(model, tmp_path / "adapter", base, model_fingerprint(base))
    with pytest.raises(UserError, match=message):
        export_lora_pth(tmp_path / "adapter", base, tmp_path / "a.pth")
    assert not (tmp_path / "a.pth").exists()


def test_heads_of_minimind_2_are_8_unless_given(tokenizer: Path, tmp_path: Path) -> None:
    fields = {**SHAPES["2"], "num_attention_heads": 4}
    directory = make_directory(fields, tokenizer, tmp_path / "model")
    export_pth(directory, tmp_path / "a.pth", "float32")
    assert import_pth(tmp_path / "a.pth", tokenizer, tmp_path / "8").num_attention_heads == 8
    assert import_pth(tmp_path / "a.pth", tokenizer, tmp_path / "4", {"num_attention_heads": 4}) == load_shape(
        directory
    )
    with pytest.raises(UserError, match=r"q_proj.weight is \[64, 64\], not \[60, 64\]|heads 5 is not a multiple"):
        import_pth(tmp_path / "a.pth", tokenizer, tmp_path / "5", {"num_attention_heads": 5})


def test_wrong_files_get_one_sentence(tokenizer: Path, tmp_path: Path) -> None:
    directory = make_directory(SHAPES["3"], tokenizer, tmp_path / "model")
    export_pth(directory, tmp_path / "good.pth")
    good = torch.load(tmp_path / "good.pth", weights_only=True)
    path = tmp_path / "bad.pth"

    def refused(content: Any, message: str) -> None:
        if not isinstance(content, bytes):
            torch.save(content, path)
        else:
            path.write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            import_pth(path, tokenizer, tmp_path / "out")
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    norm, q_proj = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"
    refused({k: v for k, v in good.items() if k != norm}, "does not fit: model.norm.weight is missing$")
    refused({**good, q_proj: torch.zeros(64, 32)}, r"does not fit: model.layers.1.*q_proj.weight is \[64, 32\], not")
    refused({**good, "model.extra": torch.zeros(1)}, "does not fit: model.extra is unknown$")
    refused({**good, "model.layers.123456789.x": torch.zeros(1)}, "model.layers.123456789.x is unknown$")
    refused(
        {k: v for k, v in good.items() if ".layers.1." not in k or k == q_proj},
        "is missing; .* is missing; .* is missing$",
    )
    refused(
        {"transformer.wte.weight": torch.zeros(3, 3)},
        "not a MiniMind model: model.embed_tokens.weight is missing; the file ",
    )
    refused({**good, "model.embed_tokens.weight": torch.zeros(0, 64)}, r"has shape \[0, 64\], not 2 dimensions")
    refused(
        {"model": good, "optimizer": {"state": {}}}, "entry 'model' is not a tensor but a dict; this is a resume file"
    )
    refused({**good, norm: torch.zeros(64, dtype=torch.int8)}, "model.norm.weight is not a dense tensor of floating")
    refused({**good, norm: torch.zeros(1).expand(2**40)}, "model.norm.weight is not a dense tensor of floating")
    refused({**good, "model.layers.0.mlp.shared_experts.0.up_proj.weight": torch.zeros(1)}, "0.up_proj.* is unknown$")
    refused({f"{q_proj[:-7]}.lora.A.weight": torch.zeros(1)}, "a LoRA file, not a model")
    refused([1, 2], "holds a list, not a dict of tensors")
    refused(b"", "not a file that torch.save wrote")
    refused(b"not a zip file", "not a file that torch.save wrote")
    refused((tmp_path / "good.pth").read_bytes()[:-5000], "not a file that torch.save wrote")
    with pytest.raises(UserError, match="none.pth: cannot be read: No such file"):
        import_pth(tmp_path / "none.pth", tokenizer, tmp_path / "out")


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch was-run",)


def test_pickled_code_does_not_run(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model.norm.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="such pickles can run code and are not read"):
        import_pth(tmp_path / "evil.pth", tokenizer, tmp_path / "out")
    assert not (tmp_path / "was-run").exists()


def test_a_file_that_unpacks_to_more_than_it_is_is_not_opened(tokenizer: Path, tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(10**6)}, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.namelist():
            packed.writestr(entry, plain.read(entry))
    with pytest.raises(UserError, match=r"bomb.pth: a packed archive, not a file that torch.save wrote"):
        import_pth(tmp_path / "bomb.pth", tokenizer, tmp_path / "out")


def test_what_half_cannot_hold_is_not_written(tokenizer: Path, tmp_path: Path) -> None:
    model = make_model(SHAPES["3"])
    with torch.no_grad():
        model.model.norm.weight[0] = 1e6
    save_model(model, Tokenizer.load(tokenizer), tmp_path / "model")
    with pytest.raises(UserError, match="model.norm.weight has values that half cannot hold; export as float32"):
        export_pth(tmp_path / "model", tmp_path / "a.pth")
    assert not (tmp_path / "a.pth").exists()
    export_pth(tmp_path / "model", tmp_path / "a.pth", "float32")


def test_a_model_with_biases_has_no_form_in_minimind(tokenizer: Path, tmp_path: Path) -> None:
    save_model(make_model({**SHAPES["2"], "qkv_bias": True}), Tokenizer.load(tokenizer), tmp_path / "model")
    with pytest.raises(UserError, match="MiniMind's attention has no biases"):
        export_pth(tmp_path / "model", tmp_path / "a.pth")


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    model = Transformer(ModelConfig(preset="tiny", **SHAPES["3"]).shape(100))
    save_model(model, None, tmp_path / "model")
    export_pth(tmp_path / "model", tmp_path / "a.pth")
    with pytest.raises(UserError, match="the model has 100 tokens, fewer than the 320"):
        import_pth(tmp_path / "a.pth", tokenizer, tmp_path / "out")


def test_wrong_lora_files_get_one_sentence(tokenizer: Path, tmp_path: Path) -> None:
    base = make_directory(SHAPES["3"], tokenizer, tmp_path / "base")
    good = {
        f"model.layers.{i}.self_attn.{p}_proj.lora.{m}.weight": torch.zeros((4, 64) if m == "A" else (64, 4))
        for i in (0, 1)
        for p in "qo"
        for m in "AB"
    }
    first, last = next(iter(good)), list(good)[-1]

    def refused(content: Any, message: str) -> None:
        torch.save(content, tmp_path / "bad.pth")
        with pytest.raises(UserError, match=message):
            import_lora_pth(tmp_path / "bad.pth", base, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused({k: v for k, v in good.items() if k != last}, f"does not fit: {last} is missing$")
    refused({**good, first: torch.zeros(4, 32)}, rf"{first} is \[4, 32\], not \[4, 64\]$")
    refused(
        {**good, "model.layers.7.self_attn.q_proj.lora.A.weight": torch.zeros(4, 64)},
        "layers.7.* is not a projection of",
    )
    refused({**good, "model.norm.weight": torch.zeros(4)}, "not a MiniMind LoRA file: has model.layers.0")
    refused({}, "not a MiniMind LoRA file: has nothing")
    refused({first: torch.zeros(4)}, "does not fit")


def test_what_a_model_cannot_have_is_one_sentence(tokenizer: Path, tmp_path: Path) -> None:
    export_pth(make_directory(SHAPES["3"], tokenizer, tmp_path / "model"), tmp_path / "a.pth")

    def refused(message: str, **settings: Any) -> None:
        with pytest.raises(UserError, match=message):
            import_pth(tmp_path / "a.pth", tokenizer, tmp_path / "out", settings)

    refused("has no experts; leave num_experts_per_tok out$", num_experts_per_tok=3)
    refused("has no experts; leave norm_topk_prob out$", norm_topk_prob=False)
    refused("has 8 heads of 8; leave num_attention_heads out$", num_attention_heads=4)
    for epsilon in (0.0, -1.0, math.inf):
        refused("rms_norm_eps: Input should be .*$", rms_norm_eps=epsilon)
    refused("dropout: Input should be less than 1$", dropout=1.0)
    export_pth(make_directory(SHAPES["2-moe"], tokenizer, tmp_path / "2"), tmp_path / "a.pth")
    refused("norm_topk_prob is false, so the weights of a token's experts do not add up to 1", norm_topk_prob=False)
    refused("model.num_experts_per_tok 5 is more than model.num_experts 4$", num_experts_per_tok=5)


def test_one_expert_per_token_is_weighted_otherwise_in_minimind_2(tokenizer: Path, tmp_path: Path) -> None:
    directory = make_directory(SHAPES["2-moe"], tokenizer, tmp_path / "2")
    export_pth(directory, tmp_path / "a.pth")
    assert (
        import_pth(tmp_path / "a.pth", tokenizer, tmp_path / "3", {"num_experts_per_tok": 3}).num_experts_per_tok == 3
    )
    with pytest.raises(UserError, match="weights a token's only expert by its probability"):
        import_pth(tmp_path / "a.pth", tokenizer, tmp_path / "1", {"num_experts_per_tok": 1})
    directory = make_directory({**SHAPES["2-moe"], "num_experts_per_tok": 1}, tokenizer, tmp_path / "one")
    with pytest.raises(UserError, match="weights a token's only expert by its probability"):
        export_pth(directory, tmp_path / "b.pth")


# Against MiniMind itself


@pytest.fixture(scope="module")
def minimind() -> ModuleType:
    return load_minimind("model_minimind")


def load_minimind(name: str) -> ModuleType:
    repository = os.environ.get("MINIMIND_REPO")
    if not repository:
        pytest.skip("needs MiniMind's own code: set MINIMIND_REPO to a checkout")
    spec = importlib.util.spec_from_file_location(f"minimind_{name}", Path(repository) / "model" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MINIMIND_2_COMMIT = "c090b69"
"""MiniMind's last commit whose model is MiniMind-2."""


@pytest.fixture(scope="module")
def minimind_2(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    repository = os.environ.get("MINIMIND_REPO", ".")
    file = f"{MINIMIND_2_COMMIT}:model/model_minimind.py"
    code = subprocess.run(["git", "-C", repository, "show", file], capture_output=True, text=True, check=False)
    if code.returncode:
        pytest.skip(f"needs MiniMind-2's own code: set MINIMIND_REPO to a clone that has commit {MINIMIND_2_COMMIT}")
    folder = tmp_path_factory.mktemp("minimind_2")
    (folder / "model").mkdir()
    (folder / "model" / "model_minimind.py").write_text(code.stdout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIMIND_REPO", str(folder))
        return load_minimind("model_minimind")


def minimind_2_model(minimind_2: ModuleType, name: str) -> Any:
    renamed = {"num_experts": "n_routed_experts", "router_aux_loss_coef": "aux_loss_alpha"}
    fields = {"n_shared_experts": 0, **SHAPES[name]}
    tied = fields.pop("tie_word_embeddings", True)
    torch.manual_seed(1)
    model = minimind_2.MiniMindForCausalLM(
        minimind_2.MiniMindConfig(
            vocab_size=400, use_moe="moe" in name, **{renamed.get(k, k): v for k, v in fields.items() if k != "qk_norm"}
        )
    )
    if not tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1).copy_(p.half())
    return model.eval()


@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith("2")])
def test_minimind_2_both_ways(name: str, minimind_2: ModuleType, tokenizer: Path, tmp_path: Path) -> None:
    theirs = minimind_2_model(minimind_2, name)
    torch.save({k: v.half() for k, v in theirs.state_dict().items()}, tmp_path / "a.pth")
    shape = import_pth(tmp_path / "a.pth", tokenizer, tmp_path / "model")
    ours = load_model(tmp_path / "model")
    torch.testing.assert_close(logits(ours.eval()), minimind_logits(theirs), rtol=1e-4, atol=1e-4)
    export_pth(tmp_path / "model", tmp_path / "b.pth")
    again = torch.load(tmp_path / "b.pth", weights_only=True)
    assert again.keys() == theirs.state_dict().keys()
    assert all(torch.equal(again[k], v.half()) for k, v in theirs.state_dict().items())

    # In training: documents of one length, as MiniMind's batches have them, and the loss that balances experts.
    tokens = torch.randint(400, (3, 11))
    loss = theirs.train()(tokens, labels=tokens)
    aux = torch.as_tensor(loss.aux_loss)
    (loss.loss + aux).backward()
    hidden_NC = ours.train()(tokens.flatten(), torch.tensor([0, 11, 22, 33], dtype=torch.int32))
    counted_NC = hidden_NC.unflatten(0, (3, 11))[:, :-1].flatten(0, 1)
    own = nn.functional.cross_entropy(ours.project(counted_NC), tokens[:, 1:].flatten())
    torch.testing.assert_close(own, loss.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.aux_loss(), aux, rtol=1e-5, atol=1e-8)
    assert bool(aux > 0) == (shape.num_experts > 0)
    (own + ours.aux_loss()).backward()
    their_grads = {n: p.grad for n, p in theirs.named_parameters()}
    for n, p in ours.named_parameters():
        torch.testing.assert_close(
            p.grad, their_grads[n if n in their_grads else "lm_head.weight"], rtol=1e-3, atol=1e-5
        )


def minimind_model(minimind: ModuleType, fields: dict[str, Any]) -> Any:
    config = {k: v for k, v in fields.items() if k != "qk_norm"}
    torch.manual_seed(1)
    model = minimind.MiniMindForCausalLM(
        minimind.MiniMindConfig(vocab_size=400, use_moe="num_experts" in fields, **config)
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    if not fields.get("qk_norm", True):  # MiniMind-2 is MiniMind-3 without these
        for layer in model.model.layers:
            layer.self_attn.q_norm = layer.self_attn.k_norm = nn.Identity()
    return model.eval()


def minimind_logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS[None]).logits[0]


@pytest.mark.parametrize("name", [name for name in SHAPES if not name.startswith("2-moe")])
def test_minimind_loads_ours(name: str, minimind: ModuleType, tokenizer: Path, tmp_path: Path) -> None:
    directory = make_directory(SHAPES[name], tokenizer, tmp_path / "model")
    export_pth(directory, tmp_path / "a.pth", "float32")
    theirs = minimind_model(minimind, SHAPES[name])
    theirs.load_state_dict(torch.load(tmp_path / "a.pth", weights_only=True), strict=True)
    torch.testing.assert_close(minimind_logits(theirs), logits(load_model(directory).eval()), rtol=1e-4, atol=1e-4)


SETTINGS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "nothing": ({**MINIMIND_3, "intermediate_size": 256}, set()),
    "untied": ({**SHAPES["3-untied"], "rope_theta": 1e4}, {"intermediate_size", "tie_word_embeddings", "rope_theta"}),
    "experts": (
        {**SHAPES["3-moe"], "num_experts_per_tok": 2, "norm_topk_prob": False, "rms_norm_eps": 1e-3},
        {"num_experts", "moe_intermediate_size", "num_experts_per_tok", "norm_topk_prob", "rms_norm_eps"},
    ),
    "yarn": ({**MINIMIND_3, "intermediate_size": 256, "rope_scaling": RopeScaling()}, {"inference_rope_scaling"}),
    "2": ({**SHAPES["2"], "num_attention_heads": 4}, {"num_attention_heads"}),
    "2-moe": ({**SHAPES["2-moe-none-shared"], "num_experts_per_tok": 3}, {
        "intermediate_size", "n_shared_experts", "num_experts_per_tok",
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_minimind_is_the_same_model_once_its_config_is_told(
    name: str, request: pytest.FixtureRequest, tokenizer: Path, tmp_path: Path
) -> None:
    fields, expected = SETTINGS[name]
    directory = make_directory(fields, tokenizer, tmp_path / "model")
    settings = export_pth(directory, tmp_path / "a.pth", "float32")
    assert settings.keys() == expected | {"vocab_size"}
    code = request.getfixturevalue("minimind_2" if name.startswith("2") else "minimind")
    options = {"hidden_size": 64, "num_hidden_layers": 2, "use_moe": "num_experts" in fields}
    theirs = code.MiniMindForCausalLM(code.MiniMindConfig(**options, **settings)).eval()
    theirs.load_state_dict(torch.load(tmp_path / "a.pth", weights_only=True), strict=True)
    torch.testing.assert_close(minimind_logits(theirs), logits(load_model(directory).eval()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in SHAPES if not name.startswith("2-moe")])
def test_we_load_minimind(name: str, minimind: ModuleType, tokenizer: Path, tmp_path: Path) -> None:
    theirs = minimind_model(minimind, SHAPES[name])
    torch.save({k: v.half().cpu() for k, v in theirs.state_dict().items()}, tmp_path / "a.pth")  # as its trainers do
    shape = import_pth(tmp_path / "a.pth", tokenizer, tmp_path / "model")
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(p.half())
    torch.testing.assert_close(
        logits(load_model(tmp_path / "model").eval()), minimind_logits(theirs), rtol=1e-4, atol=1e-4
    )
    export_pth(tmp_path / "model", tmp_path / "b.pth")
    again = torch.load(tmp_path / "b.pth", weights_only=True)
    assert set(again) == set(theirs.state_dict())
    assert all(torch.equal(again[k], v.half()) for k, v in theirs.state_dict().items())
    assert shape.num_attention_heads == 8


def test_adapters_go_both_ways(minimind: ModuleType, tokenizer: Path, tmp_path: Path) -> None:
    minimind_lora = load_minimind("model_lora")
    base = make_directory(SHAPES["3"], tokenizer, tmp_path / "base")
    export_pth(base, tmp_path / "base.pth", "float32")
    theirs = minimind_model(minimind, SHAPES["3"])
    theirs.load_state_dict(torch.load(tmp_path / "base.pth", weights_only=True), strict=True)
    minimind_lora.apply_lora(theirs, rank=6)
    for name, p in theirs.named_parameters():
        if ".lora." in name:
            p.data.normal_(std=0.2).copy_(p.data.half())
    minimind_lora.save_lora(theirs, tmp_path / "lora.pth")

    import_lora_pth(tmp_path / "lora.pth", base, tmp_path / "adapter")
    ours = load_model(base).eval()
    plain = logits(ours)
    load_adapter(ours, tmp_path / "adapter", model_fingerprint(base))
    assert (logits(ours) - plain).abs().max() > 0.1
    torch.testing.assert_close(logits(ours), minimind_logits(theirs), rtol=1e-4, atol=1e-4)

    for name, p in theirs.named_parameters():
        if ".lora." in name:
            p.data.zero_()
    export_lora_pth(tmp_path / "adapter", base, tmp_path / "back.pth")
    minimind_lora.load_lora(theirs, tmp_path / "back.pth")
    torch.testing.assert_close(minimind_logits(theirs), logits(ours), rtol=1e-4, atol=1e-4)
