"""Triton's kernels against the others, by Triton's interpreter where there is no GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from minimind_ray.model import ops
from minimind_ray.model.attention import Layout

triton = pytest.importorskip("triton", reason="needs Triton, which comes with the development tools on Linux")
from minimind_ray.model import gpu_kernels  # noqa: E402

pytestmark = pytest.mark.slow
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def differences(ours: list[Tensor], others: list[Tensor]) -> list[float]:
    return [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(ours, others, strict=True)]


@pytest.mark.parametrize("lengths", [(1, 70, 64, 0, 65, 3), (200,)], ids=str)
@pytest.mark.parametrize(("size", "half"), [(8, False), (24, False), (16, True)])
def test_attention_is_that_of_the_buckets(lengths: tuple[int, ...], size: int, half: bool) -> None:
    torch.manual_seed(0)
    bounds_D1 = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    # Float32 is for the interpreter alone, which has no bfloat16: a GPU's products of it are shorter than that.
    dtype = torch.float16 if half else torch.bfloat16 if DEVICE == "cuda" else torch.float32
    q, k, v, grad = (torch.randn(sum(lengths), heads, size) for heads in (4, 2, 2, 4))
    qkv = [x.to(DEVICE, dtype).requires_grad_() for x in (q * size**-0.5, k, v)]
    out = gpu_kernels.attend(*qkv, gpu_kernels.tiles_of(bounds_D1).to(DEVICE))
    ours = [out, *torch.autograd.grad(out, qkv, grad.to(out))]
    wide = [x.detach().cpu().float().requires_grad_() for x in qkv]
    out = Layout(bounds_D1, torch.device("cpu")).attend(*wide)
    others = [out, *torch.autograd.grad(out, wide, grad)]
    assert max(differences([x.cpu() for x in ours], others)) < (1e-5 if dtype is torch.float32 else 1e-2)


def test_a_cpu_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from minimind_ray.model import transformer, ops; "
        "ops.compile_kernels(torch.device('cpu')); print(ops.compiled())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("heads", [1, 3])
def test_norm_and_rotation_are_those_of_ops(heads: int) -> None:
    torch.manual_seed(0)
    count, size, eps, scale = 70, 24, 1e-3, 0.3
    x, grad, weight = torch.randn(count, heads, size), torch.randn(count, heads, size), torch.randn(size)
    angles = torch.randn(count, size // 2)
    rotary = (angles.cos(), angles.sin())
    on = [y.to(DEVICE) for y in (x, grad, weight, *rotary)]
    out, scales = gpu_kernels.norm_rotate(on[0], on[2], *on[3:], eps, scale)
    ours = [out, scales, *gpu_kernels.norm_rotate_backward(on[1], on[0], on[2], scales, *on[3:], scale)]
    out, scales = ops._norm_rotate.eager(x, weight, *rotary, eps, scale)  # pyright: ignore[reportPrivateUsage]
    backward = ops._norm_rotate_backward.eager  # pyright: ignore[reportPrivateUsage]
    others = [out, scales, *backward(grad, x, weight, scales, *rotary, scale)]
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(ours, others, strict=True))
    assert max(differences([y.cpu() for y in ours], others)) < 1e-5
