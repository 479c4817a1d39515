from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import LoraConfig, ModelConfig
from minimind_ray.model.checkpoint import load_model, model_fingerprint, save_model
from minimind_ray.model.lora import (
    adapter_base,
    adapters,
    add_lora,
    load_adapter,
    merge_lora,
    save_adapter,
    target_names,
)
from minimind_ray.model.minimind_pth import export_lora_pth
from minimind_ray.model.transformer import Transformer

pytestmark = pytest.mark.unit

V = 61
TOKENS_N = torch.randint(V, (11,), generator=torch.Generator().manual_seed(0))
BOUNDS_D1 = torch.tensor([0, 11], dtype=torch.int32)
DENSE = {"preset": "tiny"}
QWEN2 = {**DENSE, "qk_norm": False, "qkv_bias": True}
EXPERTS = {"preset": "tiny", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

GRANITE = {**EXPERTS, "intermediate_size": 48, "qk_norm": False, "n_shared_experts": 1}


def make_model(fields: dict[str, Any] = DENSE) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**fields).shape(V))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(3)  # so that what adapters change shows in the logits
            if name.endswith(".bias"):
                p.normal_()
    return model.eval()


def logits(model: Transformer) -> Tensor:
    return model.project(model(TOKENS_N, BOUNDS_D1))


def train_a_little(model: nn.Module, seed: int = 1) -> None:
    """Values an adapter could have after training; B is no longer 0 and magnitudes are no longer the norms."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapters(model).values():
        layer.lora_A.data.normal_(std=0.2, generator=generator)
        layer.lora_B.data.normal_(std=0.2, generator=generator)
        if layer.magnitude is not None:
            layer.magnitude.data.mul_(torch.rand(layer.magnitude.shape, generator=generator) + 0.5)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_model(make_model(), None, tmp_path / "base")
    return tmp_path / "base"


EVERYTHING = LoraConfig(targets="all-linear", dora=True, rslora=True, dropout=0.3)


@pytest.mark.parametrize("config", [LoraConfig(), EVERYTHING])
@pytest.mark.parametrize("training", [True, False])
def test_before_the_first_step_nothing_has_changed_to_the_bit(config: LoraConfig, training: bool) -> None:
    for fields in (DENSE, {**EXPERTS, "num_key_value_heads": 4}) if config is not EVERYTHING else (DENSE,):
        model = make_model(fields).train(training)
        plain = logits(model)
        add_lora(model, config, seed=0)
        assert adapters(model)
        assert torch.equal(logits(model.train(training)), plain)
        with torch.autocast("cpu", torch.bfloat16):
            adapted = logits(model)
            assert torch.equal(adapted, logits(merge_lora(model)))


def test_only_adapters_train_and_a_step_changes_the_output() -> None:
    model = make_model()
    names = {name for name, _ in model.named_parameters()}
    add_lora(model, LoraConfig(targets="all-linear", dora=True), seed=0)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {name for name, p in model.named_parameters() if not p.requires_grad}
    assert trainable == {f"{name}.{p}" for name in adapters(model) for p in ("lora_A", "lora_B", "magnitude")}
    before = logits(model)
    before.logsumexp(-1).sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (name in trainable), name
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
    assert not torch.equal(logits(model), before)


def test_the_backward_pass_makes_no_weight_gradients_of_the_base() -> None:
    def products(model: Transformer) -> set[frozenset[int]]:
        """Sizes of all matrix products of the backward pass, in either order."""
        value = logits(model).sum()
        with torch.profiler.profile(record_shapes=True) as profile:
            value.backward()
        shapes = [event.input_shapes for event in profile.events() if event.name == "aten::mm"]
        return {frozenset((a[0], b[1])) for a, b, *_ in shapes}

    model = make_model()
    weights = {frozenset(layer.weight.shape) for name, layer in model.named_modules() if name.endswith("_proj")}
    assert weights <= products(model)
    add_lora(model, LoraConfig(rank=3, targets="all-linear"), seed=0)
    assert not weights & products(model)


def test_init_is_normal_0_02_and_0_and_follows_the_seed() -> None:
    def weights(seed: int) -> tuple[Tensor, Tensor]:
        model = make_model()
        torch.manual_seed(99)  # the global generator plays no part
        add_lora(model, LoraConfig(rank=32, targets="all-linear"), seed)
        layers = adapters(model).values()
        return torch.cat([x.lora_A.flatten() for x in layers]), torch.cat([x.lora_B.flatten() for x in layers])

    a, b = weights(0)
    assert a.std().item() == pytest.approx(0.02, rel=0.02) and abs(a.mean().item()) < 1e-3
    assert not b.any()
    assert torch.equal(weights(0)[0], a) and not torch.equal(weights(1)[0], a)


def test_the_formulas() -> None:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    for rslora, scale in ((False, 6 / 4), (True, 6 / 2)):
        for dora in (False, True):
            model = nn.Sequential(nn.Linear(8, 6, bias=False))
            base = model[0].weight.detach().clone()
            add_lora(model, LoraConfig(rank=4, alpha=6, targets="0", rslora=rslora, dora=dora), seed=0)
            train_a_little(model)
            (layer,) = adapters(model).values()
            weight = base + scale * layer.lora_B @ layer.lora_A
            if layer.magnitude is not None:
                weight = weight * (layer.magnitude / weight.norm(dim=1))[:, None]
            torch.testing.assert_close(model(x), x @ weight.T, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(merge_lora(model)(x), x @ weight.T, rtol=1e-5, atol=1e-6)
            assert isinstance(model[0], nn.Linear) and model[0].weight.requires_grad


def test_dropout_is_on_the_adapter_alone() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    x = torch.ones(500, 64)
    plain = model(x)
    add_lora(model, LoraConfig(rank=4, dropout=0.5), seed=0)
    train_a_little(model)
    torch.manual_seed(0)
    noisy = model.train()(x)
    assert not torch.equal(noisy[0], noisy[1])
    whole = model.eval()(x)
    torch.testing.assert_close((noisy - plain).mean(0), (whole - plain)[0], rtol=0.5, atol=0.5)  # unbiased
    assert not torch.equal(whole, plain)


def test_targets() -> None:
    def leaves(targets: str | list[str], fields: dict[str, Any] = DENSE) -> set[str]:
        names = target_names(make_model(fields), targets)
        assert len(names) == len(set(names))
        return {name.rpartition(".")[2] for name in names}

    attention, feed_forward = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
    assert leaves("square") == {"q_proj", "o_proj"}
    assert leaves("square", {**DENSE, "num_key_value_heads": 4}) == attention
    assert leaves("all-linear") == leaves("all-linear", {**DENSE, "tie_word_embeddings": False})
    assert leaves("all-linear") == leaves("all-linear", EXPERTS) == attention | feed_forward
    assert leaves("all-linear", GRANITE) == attention  # PEFT knows its feed-forwards by other names
    assert leaves(["v_proj", "down_proj"]) == {"v_proj", "down_proj"}
    assert leaves("v_proj") == {"v_proj"}
    assert len(target_names(make_model(EXPERTS), "up_proj")) == 2 * 4
    valid = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    for unknown in ("lm_head", "query", ["q_proj", "query"]):
        with pytest.raises(UserError, match=f"is unknown; use square, all-linear, {valid}"):
            target_names(make_model(), unknown)
    with pytest.raises(UserError, match=r"lora.targets is square, but this model has no square projection"):
        target_names(make_model({**DENSE, "head_dim": 8}), "square")
    rank = make_model().model.embed_tokens.weight.shape[1]
    add_lora(make_model(), LoraConfig(rank=rank), seed=0)
    with pytest.raises(UserError, match=f"no matrix of lora.targets has more than rank {rank}"):
        add_lora(make_model(), LoraConfig(rank=rank + 1), seed=0)


def peft_logits(base: Path, adapter: Path, merge: bool = False) -> Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    if merge:
        model = model.merge_and_unload()
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS_N[None]).logits[0]


VARIANTS = {
    "square": (DENSE, LoraConfig()),
    "all-linear": (DENSE, LoraConfig(targets="all-linear", rank=4, alpha=10, dropout=0.1)),
    "names": (DENSE, LoraConfig(targets=["v_proj", "down_proj"], rank=3, alpha=2)),
    "rslora": (DENSE, LoraConfig(targets="all-linear", rank=4, alpha=10, rslora=True)),
    "dora": (DENSE, LoraConfig(targets="all-linear", rank=4, dora=True)),
    "rslora-dora": (DENSE, LoraConfig(rank=4, alpha=5, rslora=True, dora=True)),
    "llama": ({**DENSE, "qk_norm": False}, LoraConfig(targets="all-linear")),
    "qwen2": (QWEN2, LoraConfig(targets="all-linear", rank=4)),
    "qwen2-dora": (QWEN2, LoraConfig(targets="all-linear", rank=4, dora=True)),
    "experts": (EXPERTS, LoraConfig(targets="all-linear", rank=3, alpha=4, dropout=0.1)),
    "experts-rslora": (EXPERTS, LoraConfig(targets="all-linear", rank=3, alpha=4, rslora=True)),
    "experts-attention-only": (EXPERTS, LoraConfig(rank=3, rslora=True, dora=True)),
    "experts-down": (EXPERTS, LoraConfig(rank=3, targets=["down_proj"])),
    "granite": (GRANITE, LoraConfig(rank=3)),
    "granite-all-linear": (GRANITE, LoraConfig(targets="all-linear", rank=3, dora=True)),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_loads_ours_to_the_same_logits_and_merges_the_same(variant: str, tmp_path: Path) -> None:
    fields, config = VARIANTS[variant]
    model = make_model(fields)
    save_model(model, None, tmp_path / "base")
    plain = logits(model).detach()
    add_lora(model, config, seed=0)
    train_a_little(model)
    model.eval()
    ours = logits(model).detach()
    assert (ours - plain).abs().max() > 0.1
    fingerprint = model_fingerprint(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter", tmp_path / "base", fingerprint)

    torch.testing.assert_close(peft_logits(tmp_path / "base", tmp_path / "adapter"), ours, rtol=1e-4, atol=1e-4)
    again = load_model(tmp_path / "base").eval()
    load_adapter(again, tmp_path / "adapter", fingerprint)
    assert torch.equal(logits(again), ours)

    merged = merge_lora(model)
    assert not adapters(merged) and all(p.requires_grad for p in merged.parameters())
    torch.testing.assert_close(logits(merged), ours, rtol=1e-4, atol=1e-4)
    save_model(merged, None, tmp_path / "merged")
    theirs = peft_logits(tmp_path / "base", tmp_path / "adapter", merge=True)
    torch.testing.assert_close(logits(load_model(tmp_path / "merged")), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_merged_weights_equal_peft(base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for dora in (False, True):
        model = load_model(base)
        add_lora(model, LoraConfig(targets="all-linear", alpha=12, dora=dora), seed=0)
        train_a_little(model)
        save_adapter(model, tmp_path / "a", base, "")
        peft_model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "a")
        theirs = peft_model.merge_and_unload().state_dict()
        for name, weight in merge_lora(model).state_dict().items():
            torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "o_proj"], "r": 4, "lora_alpha": 6},
        {"target_modules": "all-linear", "use_rslora": True, "use_dora": True},
        {"target_modules": ["v_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.v_proj"], "bias": "all"},
        {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
        {"target_modules": r".*layers\.0.*(q|up)_proj"},
    ],
)
def test_we_load_what_peft_made(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    theirs: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), PeftConfig(task_type="CAUSAL_LM", **options)
    )
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data.add_(torch.randn_like(p), alpha=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs.eval()(input_ids=TOKENS_N[None]).logits[0]

    model = load_model(base).eval()
    plain = logits(model)
    load_adapter(model, tmp_path / "theirs", model_fingerprint(base))
    assert (expected - plain).abs().max() > 0.05
    torch.testing.assert_close(logits(model.eval()), expected, rtol=1e-4, atol=1e-4)
    # And back: peft reads what we save of it, also where not every layer is adapted.
    save_adapter(model, tmp_path / "ours", base, model_fingerprint(base))
    torch.testing.assert_close(peft_logits(base, tmp_path / "ours"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens", "lm_head"], ["norm"], ["k_proj", "layers.1.mlp"]])
def test_modules_that_peft_trained_whole_replace_the_bases(modules: list[str], tmp_path: Path) -> None:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    save_model(make_model({**DENSE, "tie_word_embeddings": False}), None, base)
    torch.manual_seed(0)
    options = PeftConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"], modules_to_save=modules)
    theirs: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), options)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)
        expected = theirs.eval()(input_ids=TOKENS_N[None]).logits[0]
    theirs.save_pretrained(tmp_path / "adapter")

    model = load_model(base).eval()
    plain = logits(model)
    load_adapter(model, tmp_path / "adapter", model_fingerprint(base))
    model.eval()
    assert (expected - plain).abs().max() > 0.05
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(merge_lora(model)), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="MiniMind's LoRA files have no place for modules_to_save"):
        export_lora_pth(tmp_path / "adapter", base, tmp_path / "a.pth")


def test_modules_to_save_that_cannot_be_read_are_named(base: Path, tmp_path: Path) -> None:
    adapter = saved(base, tmp_path / "adapter")
    config = adapter / "adapter_config.json"
    written = json.loads(config.read_text())

    def refused(modules: Any, message: str) -> None:
        config.write_text(json.dumps({**written, "modules_to_save": modules}))
        model = load_model(base)
        with pytest.raises(UserError, match=f"{config}: .*{message}|^{adapter}: {message}"):
            load_adapter(model, adapter, model_fingerprint(base))
        assert not adapters(model)

    for module in ("lm_head", "embed_tokens", "model.embed_tokens"):
        refused([module], f"modules_to_save has '{module}', but the base's embedding and lm_head are one tensor")
    refused(["score"], "modules_to_save has 'score', which the base does not have")
    refused("norm", "modules_to_save is 'norm', not a list of module names")
    refused([1], r"modules_to_save is \[1\], not a list of module names")
    refused(["model.norm"], "does not fit the model: base_model.model.model.norm.weight is missing")


def saved(base: Path, directory: Path, config: LoraConfig | None = None) -> Path:
    model = load_model(base)
    add_lora(model, config or LoraConfig(), seed=0)
    train_a_little(model)
    save_adapter(model, directory, base, model_fingerprint(base))
    return directory


def test_an_adapter_belongs_to_its_base(base: Path, tmp_path: Path) -> None:
    adapter = saved(base, tmp_path / "adapter")
    assert adapter_base(adapter) == (str(base), model_fingerprint(base))
    model = load_model(base)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    save_model(model, None, tmp_path / "other")
    with pytest.raises(UserError, match="trained on .*base with config and weights of hash .* not on this model"):
        load_adapter(model, adapter, model_fingerprint(tmp_path / "other"))
    assert not adapters(model)


@pytest.mark.parametrize("begun", [True, False, "gaussian", "eva", "orthogonal", None])
def test_how_an_adapter_began_matters_only_to_its_base(begun: Any, base: Path, tmp_path: Path) -> None:
    adapter = saved(base, tmp_path / "adapter")
    before, after = load_model(base), load_model(base)
    load_adapter(before, adapter, model_fingerprint(base))
    content = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**content, "init_lora_weights": begun}))
    load_adapter(after, adapter, model_fingerprint(base))
    assert torch.equal(logits(after), logits(before)) and not torch.equal(logits(after), logits(load_model(base)))


def test_values_go_into_the_adapters_a_model_has(base: Path, tmp_path: Path) -> None:
    adapter, fingerprint = saved(base, tmp_path / "adapter"), model_fingerprint(base)
    model = load_model(base)
    add_lora(model, LoraConfig(), seed=5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    load_adapter(model, adapter, fingerprint)
    assert all(a is b for a, b in zip(parameters, [p for p in model.parameters() if p.requires_grad], strict=True))
    fresh = load_model(base)
    load_adapter(fresh, adapter, fingerprint)
    assert torch.equal(logits(model), logits(fresh))
    for config in (LoraConfig(rank=4), LoraConfig(alpha=3), LoraConfig(targets="q_proj"), LoraConfig(dora=True)):
        other = saved(base, tmp_path / "other", config)
        with pytest.raises(UserError, match="already has an adapter of another shape"):
            load_adapter(model, other, fingerprint)
    assert torch.equal(logits(model), logits(fresh))


def test_a_scale_that_is_written_as_an_alpha_is_the_same_scale(tmp_path: Path) -> None:
    config = LoraConfig(targets="all-linear", rank=20, alpha=16, rslora=True)
    model, base = make_model(EXPERTS), tmp_path / "base"
    save_model(model, None, base)
    add_lora(model, config, seed=0)
    train_a_little(model)
    save_adapter(model, tmp_path / "adapter", base, model_fingerprint(base))
    fresh = load_model(base)
    for other in (model, fresh):  # one that has the adapter, and one that gets it
        load_adapter(other, tmp_path / "adapter", model_fingerprint(base))
    assert torch.equal(logits(fresh), logits(model))


def test_what_does_not_fit_is_named(base: Path, tmp_path: Path) -> None:
    adapter, fingerprint = saved(base, tmp_path / "adapter"), model_fingerprint(base)
    config, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    written, tensors = config.read_text(), load_file(weights)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

    def refused(message: str) -> None:
        model = load_model(base)
        with pytest.raises(UserError, match=message):
            load_adapter(model, adapter, fingerprint)
        assert not adapters(model) and all(p.requires_grad for p in model.parameters())

    def with_config(**changes: Any) -> None:
        config.write_text(json.dumps({**json.loads(written), **changes}))

    with_config(peft_type="LOHA")
    refused("peft_type is 'LOHA'; only LORA")
    with_config(task_type="SEQ_CLS")
    refused("task_type is 'SEQ_CLS'; only CAUSAL_LM")
    for field, value in {
        "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 4}, "fan_in_fan_out": True, "lora_bias": True,
        "trainable_token_indices": [1], "target_parameters": ["q_proj.weight"], "layer_replication": [[0, 1]],
        "megatron_config": {"a": 1}, "a_field_of_later_versions": 1,
    }.items():  # fmt: skip
        with_config(**{field: value})
        refused(f"{field} is set to .*, which is not supported; merge the adapter in peft")
    for begun in ("pissa", "pissa_niter_16", "OLoRA", "corda", "loftq", "lora_ga", "mica"):
        with_config(init_lora_weights=begun)
        refused(f"init_lora_weights is '{begun}', which can change the base's weights too")
    with_config(r="8")
    refused("adapter_config.json: r: Input should be a valid integer")
    with_config(r=7)
    refused(r"lora_A.weight is \[8, 64\], not \[7, 64\]")
    with_config(use_dora=True)
    refused(r"q_proj.lora_magnitude_vector is missing")
    config.write_text("[1]")
    refused("adapter_config.json: not a JSON object")
    config.write_text("{")
    refused("adapter_config.json: not valid JSON")
    config.unlink()
    refused("adapter_config.json: cannot be read: No such file")
    config.write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    refused("lora_alpha is missing")
    config.write_text(written)

    save_file({k: v for k, v in tensors.items() if k != key}, weights)
    refused(f"{key.replace('lora_A', 'lora_B')} is unknown")
    save_file({**tensors, "base_model.model.lm_head.weight": torch.zeros(2, 2)}, weights)
    refused("base_model.model.lm_head.weight is unknown")
    save_file({}, weights)
    refused("it holds no tensors")
    weights.write_bytes(b"not tensors")
    refused("adapter_model.safetensors: not a readable safetensors file")
    weights.unlink()
    refused("adapter_model.safetensors: not a readable safetensors file")


def test_what_peft_has_no_form_for_is_refused() -> None:
    with pytest.raises(UserError, match=r"lora.dora is on, but PEFT has no DoRA for experts"):
        add_lora(make_model(EXPERTS), LoraConfig(targets="all-linear", dora=True), seed=0)
    with pytest.raises(UserError, match="gate_proj and up_proj as one"):
        add_lora(make_model(EXPERTS), LoraConfig(targets=["up_proj"]), seed=0)


def test_the_file_says_which_weights_it_belongs_to(base: Path, tmp_path: Path) -> None:
    adapter = saved(base, tmp_path / "adapter")
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as f:
        assert f.metadata() == {"base_fingerprint": model_fingerprint(base)}
    content = json.loads((adapter / "adapter_config.json").read_text())
    assert content["target_modules"] == ["o_proj", "q_proj"]
    assert (content["r"], content["lora_alpha"]) == (8, 8)


def test_the_same_adapter_is_the_same_file(base: Path, tmp_path: Path) -> None:
    model = make_model()
    add_lora(model, LoraConfig(), seed=0)
    written: set[bytes] = set()
    for _ in range(10):
        save_adapter(model, tmp_path / "a", base, "f" * 40)
        written.add((tmp_path / "a" / "adapter_model.safetensors").read_bytes())
    assert len(written) == 1
