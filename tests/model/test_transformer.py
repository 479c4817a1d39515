"""Our logits and gradients against transformers, on the saved directory and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from minimind_ray.config.schema import ModelConfig, ModelShape, RopeScaling
from minimind_ray.model.checkpoint import load_model, load_shape, model_fingerprint, save_model
from minimind_ray.model.families import family_of
from minimind_ray.model.transformer import Transformer
from minimind_ray.train.throughput import parameter_counts

pytestmark = pytest.mark.unit

BASE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 80, "max_position_embeddings": 512,
}  # fmt: skip
YARN = RopeScaling(factor=4.0, original_max_position_embeddings=128, attention_factor=1.2, beta_fast=24.0)
GRANITE: dict[str, Any] = {"qk_norm": False, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 80}
SHAPES = {
    "qwen3": ModelShape(**BASE),
    "qwen3-untied": ModelShape(**BASE, tie_word_embeddings=False, rope_theta=1e4),
    "qwen3-yarn": ModelShape(**BASE, rope_scaling=YARN),
    "llama": ModelShape(**BASE, qk_norm=False, rms_norm_eps=1e-5),
    "llama-untied-yarn": ModelShape(**BASE, qk_norm=False, tie_word_embeddings=False, rope_scaling=YARN),
    "qwen2": ModelShape(**BASE, qk_norm=False, qkv_bias=True),
    "qwen2-untied-yarn": ModelShape(**BASE, qk_norm=False, qkv_bias=True, tie_word_embeddings=False, rope_scaling=YARN),
    "moe": ModelShape(**BASE, num_experts=4, moe_intermediate_size=40),
    "moe-top2": ModelShape(**BASE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40,
                           norm_topk_prob=False, tie_word_embeddings=False),
    "granite": ModelShape(**BASE, **GRANITE, n_shared_experts=1, rope_scaling=YARN),
    "granite-2-shared": ModelShape(**BASE, **GRANITE, n_shared_experts=2, tie_word_embeddings=False),
    "granite-none-shared": ModelShape(**BASE, **GRANITE),
}  # fmt: skip
LENGTHS = (1, 37, 5, 130, 2)


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(BASE["vocab_size"], (n,), generator=generator) for n in LENGTHS]


def bounds(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def make(shape: ModelShape) -> Transformer:
    """With norms and routers that are not at their start, so that leaving one out shows."""
    torch.manual_seed(0)
    model = Transformer(shape)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return model.eval()


def reference(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def reference_logits(model: Any) -> Tensor:
    return torch.cat([model(tokens.unsqueeze(0)).logits[0] for tokens in documents()])


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_logits_and_gradients_equal_transformers(name: str, tmp_path: Path) -> None:
    model = make(SHAPES[name])
    save_model(model, None, tmp_path)
    theirs = reference(tmp_path)

    logits = model.project(model(torch.cat(documents()), bounds()))
    expected = reference_logits(theirs)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)

    targets = torch.cat(documents()).roll(-1)
    F.cross_entropy(logits, targets).backward()
    F.cross_entropy(expected, targets).backward()
    largest = max(float(grad.abs().max()) for grad in gradients(theirs))
    for ours, their in zip(hugging_face_gradients(model), gradients(theirs), strict=True):
        torch.testing.assert_close(ours, their, rtol=1e-5, atol=1e-5 * largest)


def gradients(model: torch.nn.Module) -> list[Tensor]:
    found = {name: p.grad for name, p in model.named_parameters()}
    return [grad for name, grad in sorted(found.items()) if grad is not None]


def hugging_face_gradients(model: Transformer) -> list[Tensor]:
    """Ours with each layer's experts stacked, which is how transformers holds them in memory."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    family = family_of(model.shape)
    if family.model_type == "granitemoeshared":
        stored = family.to_stored(found, model.shape)
        return [grad for _, grad in sorted((in_memory(k), v) for k, v in stored.items())]
    for layer in range(model.shape.num_hidden_layers if model.shape.num_experts else 0):
        at = f"model.layers.{layer}.mlp.experts"
        each = [
            {kind: found.pop(f"{at}.{e}.{kind}_proj.weight") for kind in ("gate", "up", "down")}
            for e in range(model.shape.num_experts)
        ]
        found[f"{at}.down_proj"] = torch.stack([e["down"] for e in each])
        found[f"{at}.gate_up_proj"] = torch.stack([torch.cat([e["gate"], e["up"]]) for e in each])
    return [grad for _, grad in sorted(found.items())]


def in_memory(name: str) -> str:
    """What transformers 5 names a tensor of GraniteMoeShared's files."""
    for stored, name_in_memory in (("input_linear.weight", "gate_up_proj"), ("output_linear.weight", "down_proj")):
        name = name.replace(f"block_sparse_moe.{stored}", f"block_sparse_moe.experts.{name_in_memory}")
    return name.replace("router.layer.weight", "router.weight")


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_loads_what_transformers_saves(name: str, tmp_path: Path) -> None:
    model = make(SHAPES[name])
    save_model(model, None, tmp_path / "ours")
    reference(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert load_shape(tmp_path / "theirs") == model.shape == load_shape(tmp_path / "ours")
    loaded = load_model(tmp_path / "theirs").state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[k], v) for k, v in model.state_dict().items())
    assert model_fingerprint(tmp_path / "theirs") == model_fingerprint(tmp_path / "ours")


@pytest.mark.slow
def test_mistral_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    fields = {key: value for key, value in BASE.items() if key != "max_position_embeddings"}
    config = MistralConfig(**fields, sliding_window=512, max_position_embeddings=512, rms_norm_eps=1e-5)
    theirs = MistralForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "mistral")
    ours = load_model(tmp_path / "mistral").eval()
    logits = ours.project(ours(torch.cat(documents()), bounds()))
    torch.testing.assert_close(logits, reference_logits(theirs), rtol=1e-5, atol=1e-4)
    save_model(ours, None, tmp_path / "llama")
    torch.testing.assert_close(reference_logits(reference(tmp_path / "llama")), logits, rtol=1e-5, atol=1e-4)


def test_biases_start_at_zero_and_are_trained_in_the_sum_of_products() -> None:
    torch.manual_seed(0)
    model = Transformer(SHAPES["qwen2"])
    biases = [p for name, p in model.named_parameters() if name.endswith(".bias")]
    assert len(biases) == 3 * BASE["num_hidden_layers"] and not any(p.any() for p in biases)
    assert sum(p.numel() for p in model.parameters()) == parameter_counts(model.shape)[0]
    model(torch.cat(documents()), bounds()).sum().backward()
    assert all(p.grad is not None for p in biases)


def test_documents_do_not_see_each_other() -> None:
    model = make(SHAPES["qwen3"])
    together = model(torch.cat(documents()), bounds())
    apart = torch.cat([model(tokens, bounds((len(tokens),))) for tokens in documents()])
    torch.testing.assert_close(together, apart)


@pytest.mark.parametrize(
    ("preset", "total", "active"),
    [
        ("minimind-2-small", 25_829_888, 25_829_888),
        ("minimind-2", 104_030_976, 104_030_976),
        ("minimind-2-moe", 145_029_760, 91_945_600),
        ("minimind-3", 63_912_192, 63_912_192),
        ("minimind-3-moe", 198_416_640, 63_936_768),
    ],
)
def test_presets_are_of_the_sizes_that_minimind_publishes(preset: Any, total: int, active: int) -> None:
    shape = ModelConfig(preset=preset).shape(6400)
    with torch.device("meta"):
        model = Transformer(shape)
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    assert parameter_counts(shape) == (total, active)
