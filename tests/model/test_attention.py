"""Every backend against a plain masked softmax over padded documents, with gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minimind_ray.model import attention, ops
from minimind_ray.model.attention import Layout

H, G, K = 6, 2, 16
LENGTHS = [(1,), (3, 1, 40, 33, 2, 90, 64), (300, 299, 17), (1, 1, 600, 5)]


def padded_reference(q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """One [D, H, L, L] masked softmax: every document padded to the longest."""
    batch, longest = len(lengths), max(lengths)
    real_DL = torch.arange(longest, device=q_NHK.device) < torch.tensor(lengths, device=q_NHK.device).unsqueeze(1)

    def pad(x: Tensor) -> Tensor:
        padded = x.new_zeros(batch, longest, *x.shape[1:])
        padded[real_DL] = x
        return padded.repeat_interleave(H // x.shape[1], dim=2).transpose(1, 2)

    hidden = torch.ones(longest, longest, dtype=torch.bool, device=q_NHK.device).triu(1)
    scores = (pad(q_NHK) @ pad(k_NGK).transpose(2, 3)).masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ pad(v_NGK)).transpose(1, 2)[real_DL]


def inputs(lengths: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    sizes = [(sum(lengths), heads, K) for heads in (H, G, G, H)]
    q, k, v, grad = (torch.randn(size, generator=generator) for size in sizes)
    qkv, grad = [x.to(dtype).to(device) for x in (q * K**-0.5, k, v)], grad.to(dtype).to(device)
    return [x.requires_grad_() for x in qkv], grad


def check(lengths: tuple[int, ...], dtype: torch.dtype, device: str, tolerance: float) -> None:
    bounds_D1 = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    qkv, grad = inputs(lengths, dtype, device)
    layout = Layout(bounds_D1, torch.device(device))
    assert layout.positions_N.tolist() == [i for length in lengths for i in range(length)]
    out = layout.attend(*qkv)
    ours = [out, *torch.autograd.grad(out, qkv, grad)]
    out = padded_reference(*(x.float() for x in qkv), lengths)
    for got, expected in zip(ours, [out, *torch.autograd.grad(out, qkv, grad.float())], strict=True):
        torch.testing.assert_close(got.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.unit
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_cpu_equals_padded_reference(lengths: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    check(lengths, dtype, "cpu", tolerance)


@pytest.mark.slow
@pytest.mark.unit
def test_gradient_in_float64() -> None:
    """Lengths over QUERY_BLOCK and many heads are too slow for gradcheck; blocks of 4 rows take the same path."""
    lengths, block = (9, 1, 5), attention.QUERY_BLOCK
    layout = Layout(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), torch.device("cpu"))
    (q_NHK, k_NGK, v_NGK), _ = inputs(lengths, torch.float64, "cpu")
    qkv = [x[..., :3].detach().requires_grad_() for x in (q_NHK[:, :4], k_NGK, v_NGK)]
    attention.QUERY_BLOCK = 4
    try:
        assert torch.autograd.gradcheck(layout.attend, qkv)
    finally:
        attention.QUERY_BLOCK = block


@pytest.mark.unit
def test_a_document_without_tokens_changes_nothing() -> None:
    qkv, _ = inputs((5, 3), torch.float32, "cpu")
    outs = [
        Layout(torch.tensor(bounds, dtype=torch.int32), torch.device("cpu")).attend(*qkv)
        for bounds in ([0, 5, 8], [0, 0, 5, 5, 8, 8])
    ]
    torch.testing.assert_close(*outs)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_equals_padded_reference(
    lengths: tuple[int, ...], dtype: torch.dtype, tolerance: float, compiled: bool
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if compiled:
        ops.compile_kernels(torch.device("cuda"))
    try:
        check(lengths, dtype, "cuda", tolerance)
    finally:
        ops.run_eagerly()
