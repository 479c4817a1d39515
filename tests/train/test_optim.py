"""Gradient norms and clipping against float64."""

from __future__ import annotations

import pytest
import torch

from minimind_ray.train.optim import NORM_PIECE, FlatGradients, l2_norm

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
