"""Gradient norms and clipping against float64; AdamW against torch's class."""

from __future__ import annotations

import pytest
import torch

from minimind_ray.config.schema import OptimConfig
from minimind_ray.train.optim import NORM_PIECE, FlatGradients, build_adamw, l2_norm

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("size", [1, NORM_PIECE - 1, NORM_PIECE, 3 * NORM_PIECE + 7, 30_000_000])
def test_norm_of_many_values_is_exact(size: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 1e-3
    exact = torch.linalg.vector_norm(values.double()).item()
    assert l2_norm(values).item() == pytest.approx(exact, rel=1e-7)


def test_norms_of_several_runs() -> None:
    values = torch.randn(3, 2 * NORM_PIECE + 5, generator=torch.Generator().manual_seed(0))
    values[1, 9] = torch.nan
    expected = torch.linalg.vector_norm(values.double(), dim=1)
    torch.testing.assert_close(l2_norm(values), expected, rtol=1e-7, atol=0, equal_nan=True)


def test_clipping_scales_to_the_norm_asked_for() -> None:
    model = torch.nn.Linear(300, 200)
    gradients = FlatGradients(model)
    gradients.buffer.copy_(torch.randn(len(gradients.buffer), generator=torch.Generator().manual_seed(0)))
    before = gradients.buffer.double()
    norm = gradients.clip(0.5)
    assert norm.item() == pytest.approx(torch.linalg.vector_norm(before).item(), rel=1e-7)
    torch.testing.assert_close(gradients.buffer.double(), before * (0.5 / norm), rtol=1e-5, atol=0)
    unchanged = gradients.buffer.clone()
    gradients.clip(0.0)
    gradients.clip(10.0)
    assert torch.equal(gradients.buffer, unchanged)


def test_adamw_gives_the_same_bits_as_the_class_of_torch() -> None:
    config = OptimConfig(weight_decay=0.1)
    models = [torch.nn.Linear(30, 20) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    weight, bias = models[1].weight, models[1].bias
    theirs = torch.optim.AdamW(
        [{"params": [weight]}, {"params": [bias], "weight_decay": 0.0}],
        lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=0.1, fused=True,
    )  # fmt: skip
    ours, generator = build_adamw(models[0], config), torch.Generator().manual_seed(0)
    for number in range(5):
        for pair in zip(*(model.parameters() for model in models), strict=True):
            gradient = torch.randn(pair[0].shape, generator=generator)
            for parameter in pair:
                parameter.grad = gradient.clone()
        ours.lr = config.lr / (number + 1)
        for group in theirs.param_groups:
            group["lr"] = config.lr / (number + 1)
        ours.step()
        theirs.step()
    for own, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(own, other)
        assert ours.state[own].keys() == theirs.state[other].keys()
        for key, value in theirs.state[other].items():
            assert torch.equal(ours.state[own][key], value) and ours.state[own][key].dtype == value.dtype
