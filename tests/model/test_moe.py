"""Routing and the load-balancing loss, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minimind_ray.config.schema import ModelShape
from minimind_ray.model.moe import MixtureOfExperts
from minimind_ray.model.transformer import Transformer

pytestmark = pytest.mark.unit


def make(**fields: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(
        ModelShape(
            vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=8, intermediate_size=24, num_experts=4, **fields,
        )
    )  # fmt: skip


@pytest.mark.parametrize("per_token", [1, 2])
def test_aux_loss_by_hand(per_token: int) -> None:
    """coef · E · Σ_e load_e · probability_e over the layers, from what the routers saw."""
    model = make(num_experts_per_tok=per_token, router_aux_loss_coef=0.01)
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, logits: seen.append(logits.detach()))
    model(torch.arange(31), torch.tensor([0, 11, 31], dtype=torch.int32))
    expected = 0.0
    for logits_NE in seen:
        probabilities_NE = logits_NE.softmax(-1)
        chosen = probabilities_NE.topk(per_token).indices.flatten().tolist()
        loads = [chosen.count(expert) / 31 for expert in range(4)]
        expected += 0.01 * 4 * sum(load * p for load, p in zip(loads, probabilities_NE.mean(0).tolist()))
    assert len(seen) == 2
    assert model.aux_loss().item() == pytest.approx(expected, rel=1e-5)


def test_aux_loss_of_minimind_2_by_hand() -> None:
    """Of each document: coef · E / X · Σ_e load_e · probability_e; then their mean by length."""
    model = make(num_experts_per_tok=2, router_aux_loss_coef=0.01, qk_norm=False, n_shared_experts=1)
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, logits: seen.append(logits.detach()))
    model(torch.arange(31), torch.tensor([0, 11, 11, 31], dtype=torch.int32))
    expected = 0.0
    for logits_NE in seen:
        for part in (logits_NE[:11], logits_NE[11:]):
            probabilities = part.softmax(-1)
            chosen = probabilities.topk(2).indices.flatten().tolist()
            loads = [chosen.count(expert) / len(part) for expert in range(4)]
            balance = sum(load * p for load, p in zip(loads, probabilities.mean(0).tolist()))
            expected += 0.01 * 4 / 2 * balance * len(part) / 31
    assert len(seen) == 2
    assert model.aux_loss().item() == pytest.approx(expected, rel=1e-5)


def test_balanced_routers_have_the_least_loss() -> None:
    model = make(router_aux_loss_coef=1.0)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.mlp.gate.weight)
    model(torch.arange(31), torch.tensor([0, 31], dtype=torch.int32))
    # Equal probabilities of 1/4: E · Σ load/4 = 1 per layer, whatever the loads.
    assert model.aux_loss().item() == pytest.approx(2.0)


def test_every_parameter_has_a_gradient_even_of_an_idle_expert() -> None:
    """The gradient buffer is summed over workers: no worker may lack a part of it."""
    model = make()
    model(torch.tensor([3]), torch.tensor([0, 1], dtype=torch.int32)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if ".mlp." in name}
    assert all(grad is not None for grad in grads.values())
    assert any(float(grad.abs().sum()) == 0 for grad in grads.values() if grad is not None)


def test_a_dense_model_has_none() -> None:
    shape = make().shape.model_copy(update={"num_experts": 0})
    assert Transformer(shape).aux_loss().item() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("per_token", [1, 2])
def test_grouped_products_equal_the_experts_one_by_one(per_token: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper, with an expert that gets no tokens."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    model = make(num_experts_per_tok=per_token).cuda()
    tokens_N, bounds_D1 = torch.arange(31, device="cuda"), torch.tensor([0, 11, 31], dtype=torch.int32)
    topk = torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda x, *args, **kwargs: topk(x[:, :3], *args, **kwargs))
    found = []
    for grouped in (True, False):
        if not grouped:
            monkeypatch.setattr(MixtureOfExperts, "_grouped", lambda self, x: False)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            hidden_NC = model(tokens_N, bounds_D1)
        found.append([hidden_NC, *torch.autograd.grad(hidden_NC.float().square().sum(), list(model.parameters()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=3e-2, atol=3e-2)
