"""Operations with hand-written gradients, against their plain formulas in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind_ray.config.errors import UserError
from minimind_ray.model import ops

pytestmark = pytest.mark.unit

EPS = 1e-3


def draw(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, requires_grad=True)


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As Hugging Face writes it."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = (torch.cat((c, c), -1).unsqueeze(1) for c in (cos, sin))
    return x * cos + torch.cat((-b, a), -1) * sin


class Two(nn.Module):
    """Two projections of one input."""

    def __init__(self, first: nn.Linear, second: nn.Linear) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return ops.linears(x, self.first, self.second)


def cases() -> Iterator[tuple[str, Callable[..., Any], Callable[..., Any], list[Tensor]]]:
    torch.manual_seed(0)
    yield (
        "add_norm",
        lambda x, delta, w: ops.add_norm(x, delta, w, EPS),
        lambda x, delta, w: (x + delta, F.rms_norm(x + delta, w.shape, w, EPS)),
        [draw(5, 8), draw(5, 8), draw(8)],
    )
    angles = draw(5, 4).detach()
    rotary = (angles.cos(), angles.sin())
    yield (
        "rotate",
        lambda x: ops.rotate(x, rotary, 0.3),
        lambda x: plain_rotate(x, *rotary) * 0.3,
        [draw(5, 3, 8)],
    )
    yield (
        "norm_rotate",
        lambda x, w: ops.norm_rotate(x, w, EPS, rotary, 0.3),
        lambda x, w: plain_rotate(F.rms_norm(x, w.shape, w, EPS), *rotary) * 0.3,
        [draw(5, 3, 8), draw(8)],
    )
    first, second = nn.Linear(8, 5, bias=False).double(), nn.Linear(8, 3, bias=False).double()
    yield (
        "linears",
        lambda x, *weights: torch.func.functional_call(
            Two(first, second), {"first.weight": weights[0], "second.weight": weights[1]}, x
        ),
        lambda x, *weights: tuple(x @ w.t() for w in weights),
        [draw(4, 8), draw(5, 8), draw(3, 8)],
    )
    yield "swiglu", ops.swiglu, lambda gate, up: F.silu(gate) * up, [draw(5, 8), draw(5, 8)]
    targets = torch.tensor([3, 0, 6, 3])
    yield (
        "log_probs",
        lambda logits: ops.log_probs(logits, targets),
        lambda logits: -F.cross_entropy(logits, targets, reduction="none"),
        [draw(4, 7)],
    )


CASES = {name: case for name, *case in cases()}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name: str) -> None:
    ours, plain, inputs = CASES[name]
    torch.testing.assert_close(ours(*inputs), plain(*inputs), rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(ours, inputs)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_stays_close(name: str) -> None:
    """From 16-bit inputs the float32 result, rounded at the end (SwiGLU: silu too)."""
    ours, plain, inputs = CASES[name]
    rounded = [x.detach().to(torch.bfloat16) for x in inputs]
    expected = plain(*(x.float() for x in rounded))
    results = ours(*rounded)
    for got, value in zip(*([r] if isinstance(r, Tensor) else r for r in (results, expected)), strict=True):
        torch.testing.assert_close(got.float(), value.to(got.dtype).float(), rtol=2**-6, atol=1e-3)


def test_log_probs_of_bfloat16_are_exact_to_float32() -> None:
    torch.manual_seed(0)
    logits, targets = (torch.randn(200, 6400) * 4).bfloat16(), torch.randint(6400, (200,))
    exact = logits.double().log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(ops.log_probs(logits, targets).double(), exact, rtol=1e-6, atol=1e-5)


@pytest.mark.slow
def test_compiled_is_the_same() -> None:
    """One operation, forward and backward; all are compiled by the same line."""
    torch.manual_seed(0)
    inputs = [torch.randn(300, 128), torch.randn(300, 128), torch.randn(128)]

    def run() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        y, out = ops.add_norm(*leaves, EPS)
        return [y, out, *torch.autograd.grad((y * out).sum(), leaves)]

    eager = run()
    assert inputs[0].numel() >= ops.SMALL
    ops.compile_kernels(torch.device("cpu"))
    try:
        compiled = run()
    finally:
        ops.run_eagerly()
    torch.testing.assert_close(compiled, eager)


def test_no_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no working C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(UserError, match=r"train\.compile .*no working C\+\+ compiler\).* g\+\+"):
        ops.compile_kernels(torch.device("cpu"))
    assert all(kernel.compiled is kernel.eager for kernel in ops.KERNELS)
